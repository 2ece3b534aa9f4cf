"""CoDe on CIFAR-10: a wide and a narrow VAR alone, and either drafting for the other at every number of scales.

    python experiments/code_decoding.py --data cifar10/train.parquet --test cifar10/test.parquet \\
        --judge resnet20.safetensors --out runs/code [--minutes 30] [--tune-minutes 8] [--count 1000] [--threads 2]

Both networks train the same minutes on the codes of one tokenizer, the recipe cifar-10-tokenizer's (32 pixels, grids 1
to 8), unless ``--wide`` names a VAR that was trained longer. Then every pair is measured, without training: nats a
token of test pictures, Fréchet distance to them and class agreement of samples by the judge, and the arithmetic and
memory as shares of the wide network's. "Turned" pairs have the narrow network draft and the wide one refine: the paper
says that this helps little. At last one pair is tuned by the two losses, the refiner first, since its teacher is the
drafter. What is done is skipped, what was stopped goes on. Writes ``table.md``. Minutes are of the processor's time
(``clock: processor``).
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import nextscale
from nextscale import hub
from nextscale.acceleration.code_decoding import relative_cost
from nextscale.cli import main as command
from nextscale.data import open_dataset
from nextscale.errors import InputError, NextscaleError
from nextscale.evaluation.blocks import Shard
from nextscale.evaluation.evaluate import Evaluation, Wanted
from nextscale.evaluation.features import fingerprint, open_extractor
from nextscale.evaluation.sets import Subject
from nextscale.systems.code_decoding import pair
from nextscale.training.generator_recipe import train_generator

SIZES = {"wide": {"depth": 6, "width": 256, "heads": 4, "shared_modulation": True},
         "narrow": {"depth": 3, "width": 96, "heads": 3, "shared_modulation": True}}
SETTINGS = {"guidance_scale": 2.0, "temperature": 0.6}
SIZE = 32


def tokens(given: argparse.Namespace) -> Path:
    """The folder of cached tokens, those of mirrored pictures too."""
    out: Path = given.out / "tokens"
    words = ["tokenize", "--tokenizer", given.tokenizer, "--data", given.data, "--split", "train", "--flips"]
    if not (out / "train" / "manifest.json").is_file() and command.run([*words, "--out", str(out)]):
        raise InputError("the tokens could not be made; see above")
    return out


def train(name: str, given: argparse.Namespace, minutes: float, learning_rate: float, **recipe: Any) -> Path:
    """Train into a folder, or take what is there; the model's folder."""
    out: Path = given.out / name
    if not (out / "done.json").is_file():
        print(f"training {name}", flush=True)
        settings = {"steps": 10**6, "minutes": minutes, "batch_size": 32, "learning_rate": learning_rate,
                    "warmup_steps": 50, "final_learning_rate_ratio": 0.02, "weight_decay": 0.05, "ema_decay": 0.998,
                    "sample_every": 0, "checkpoint_every": 200, "keep_checkpoints": 1, "clock": "processor"}
        data = {"spec": given.data, "size": SIZE, "flip": True, "held_out": 0}
        done = train_generator({"data": data, "tokens": str(tokens(given)),
                                "gate": 0.3, "settings": SETTINGS, "threads": given.threads, "train": settings,
                                **recipe}, out, True)
        if done.stopped == "signal":
            raise InputError(f"stopped in {name!r} after step {done.step}; run the same command to go on")
        hub.save_json({"steps": done.step, "seconds": done.seconds}, out / "done.json")
    return out / "model"


def measure(name: str, system: Any, share: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Likelihood and samples of a system, measured or read from before."""
    result: Path = given.out / "results" / f"{name}.json"
    if result.is_file():
        return hub.read_json(result)
    print(f"measuring {name}", flush=True)
    config = system.config
    subject = Subject(name, fingerprint(system), system, system.tokenizer.picture_size, config.tokenizer.vocabulary,
                      config.tokenizer.bits, system, tuple(config.classes), config.class_names)
    wanted = Wanted(given.count, 0, "even", given.held_out, 0, 0, batch_size=50)
    held_out, judge = open_dataset(given.test, SIZE, "all"), open_extractor(f"resnet20:{given.judge}")
    evaluation = Evaluation(subject, given.out / "evaluation" / name, [judge], wanted, held_out)
    evaluation.work(Shard(0, 1))
    figures = evaluation.report()
    judged = next(iter(figures["features"].values()))["samples"]
    found = {"name": name, "flops": share.flops, "memory": share.memory,
             "nats": figures["likelihood"]["reference"]["nats_a_token"],
             "frechet": judged["frechet_distance"]["value"], "agreement": judged["agreement"]["class"]}
    hub.save_json(found, result)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| model | arithmetic | memory | nats a token | Fréchet distance | class agreement |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {r['name']} | {r['flops']:.2f} | {r['memory']:.2f} | {r['nats']:.3f} | {r['frechet']:.1f} | "
              f"{r['agreement']:.1%} |" for r in results]
    return "\n".join(lines) + "\n"


def run(given: argparse.Namespace) -> str:
    given_folders = {"wide": given.wide} if given.wide else {}
    folders = {name: given_folders.get(name) or train(name, given, given.minutes, 1e-3, tokenizer=given.tokenizer,
                                                      generator=sizes) for name, sizes in SIZES.items()}
    networks = {name: nextscale.load(str(folder), device="cpu") for name, folder in folders.items()}
    plan, sizes = networks["wide"].plan, {name: (size["depth"], size["width"]) for name, size in SIZES.items()}

    def share(drafter: str, refiner: str, steps: int) -> Any:
        found, alone = (relative_cost(plan, sizes[drafter], sizes[refiner], steps),
                        relative_cost(plan, sizes[drafter], sizes["wide"], 0))
        return type(found)(*(one / whole for one, whole in zip(found, alone, strict=True)))

    results = [measure(name, one, share(name, name, len(plan)), given) for name, one in networks.items()]
    for steps in range(1, len(plan)):
        for drafter, refiner, name in (("wide", "narrow", f"CoDe, N={steps}"),
                                       ("narrow", "wide", f"turned, N={steps}")):
            both = pair(networks[drafter], networks[refiner], steps)
            results.append(measure(name, both, share(drafter, refiner, steps), given))
    steps, about = given.draft_steps, {"system": "code_decoding", "draft_steps": given.draft_steps}
    refined = train(f"refined-{steps}", given, given.tune_minutes, 1e-4, **about, part="refiner",
                    start=str(folders["narrow"]), drafter=str(folders["wide"]))
    tuned = train(f"tuned-{steps}", given, given.tune_minutes, 3e-5, **about, part="drafter", start=str(refined))
    for name, folder in ((f"CoDe, N={steps}, refiner tuned", refined), (f"CoDe, N={steps}, both tuned", tuned)):
        results.append(measure(name, nextscale.load(str(folder), device="cpu"), share("wide", "narrow", steps), given))
    return table(results)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/code"))
    parser.add_argument("--data", required=True, help="pictures to train on")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--tokenizer", default="runs/cifar-10-tokenizer/tokenizer")
    parser.add_argument("--minutes", type=float, default=30.0, help="of either network's training")
    parser.add_argument("--tune-minutes", type=float, default=8.0, help="of either part's tuning")
    parser.add_argument("--wide", type=Path, help="a VAR of the wide network's size, longer trained, in its place")
    parser.add_argument("--draft-steps", type=int, default=3, help="of the pair that is tuned")
    parser.add_argument("--count", type=int, default=1000, help="samples to measure")
    parser.add_argument("--held-out", type=int, default=400, help="pictures to score")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        torch.set_num_threads(given.threads)
        found = run(given)
    except NextscaleError as error:
        print(error, file=sys.stderr)
        return 2
    (given.out / "table.md").write_text(found, encoding="utf-8")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
