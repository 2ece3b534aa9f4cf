"""Systems side by side on one data set: the same pictures, sizes and minutes, one tokenizer a family.

    python experiments/side_by_side.py --data cifar10/train.parquet --test cifar10/test.parquet \\
        --judge resnet20.safetensors --out runs/side-by-side [--only var-0 hmar ...] [--minutes 10] [--prepare]
    python experiments/side_by_side.py --costs

Pictures of 32 pixels, grids up to 8x8, generators of about three million parameters. Every family of tokenizers
(residual codes, drafts, frequency bands, continuous latents) is trained once for ``--tokenizer-minutes`` and its
tokens are cached once; every generator then trains on its family's cache. VAR is trained with three seeds: their
spread is the noise, and no ranking is made inside it. What is done is skipped, what was stopped goes on. Writes
``table.md``. ``--costs`` trains nothing: it draws with random weights and counts what a picture costs, by every
system's first arm or those of ``--only``.

All generators get the same time of one core: training steps of all that are asked for are timed turn by turn in one
process (``steps.json``), and each trains as many as fit into ``--minutes``. So nothing else that the machine does while
they train gives one of them more steps than another; only the timing wants a core of its own. ``--prepare`` stops
after it. ``--steps`` gives all the same number of steps instead, whatever they cost.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nextscale
from nextscale import hub
from nextscale.cli import main as command
from nextscale.configuration import build
from nextscale.data import open_dataset
from nextscale.data.token_dataset import TokenDataset
from nextscale.errors import InputError, NextscaleError, did_you_mean
from nextscale.evaluation.blocks import Shard
from nextscale.evaluation.cost import cost_of
from nextscale.evaluation.evaluate import Evaluation, Wanted
from nextscale.evaluation.features import fingerprint, open_extractor
from nextscale.evaluation.sets import Subject
from nextscale.systems import folders
from nextscale.systems.class_conditional import ClassConditionalSystem
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training import read_metrics
from nextscale.training.generator import GeneratorTask
from nextscale.training.generator_recipe import GeneratorTraining, system_config, train_generator
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer import TokenizerRecipe
from nextscale.training.tokenizer_recipe import train_tokenizer

SIZE = 32
AUTOENCODER = {"width": 32, "multipliers": [1, 2, 4], "encoder_blocks": 1, "decoder_blocks": 2, "latent_width": 16,
               "attention": "middle"}
SCALES = [[side, side] for side in (1, 2, 3, 4, 6, 8)]
RESIDUAL = {"autoencoder": AUTOENCODER, "grids": SCALES, "vocabulary": 1024, "codebook_update": "ema",
            "codebook_decay": 0.97}
REVIVED = {"revive_every": 20, "revive_below": 0.1}

FAMILIES: dict[str, dict[str, Any]] = {
    "residual": {"model": RESIDUAL, **REVIVED},
    "bands": {"model": {**RESIDUAL, "bands": "nyquist"}, **REVIVED},
    "drafts": {"model": {"autoencoder": {**AUTOENCODER, "latent_width": 8, "latent_kernel": 1}, "grids": SCALES,
                         "vocabulary": 1024, "kind": "l2-vq"}, **REVIVED},
    "vectors": {"model": {"autoencoder": {**AUTOENCODER, "attention": "encoder", "latent_kernel": 1}, "kind": "kl",
                          "grids": [[side, side] for side in (1, 2, 4, 8)]}},
}
"""The tokenizers, as a recipe's ``tokenizer`` has them."""


@dataclass(frozen=True)
class Arm:
    """One line of the table: a system, its tokenizer's family, its network and how it samples."""

    system: str
    family: str
    generator: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


BODY = {"depth": 4, "width": 224, "heads": 4, "shared_modulation": True}
GUIDED = {"guidance_scale": 4.0, "temperature": 0.8}
MASKED = {"width": 160, "heads": 5, "buffer": 8, "head_width": 192, "head_depth": 2, "dropout": 0.0}
FLOWING = {"guidance_scale": 2.0}
DIFFUSING = {**FLOWING, "clip": 4.0}
ARMS: dict[str, Arm] = {
    **{f"var-{seed}": Arm("var", "residual", BODY, GUIDED, seed=seed) for seed in range(3)},
    "hmar": Arm("hmar", "residual", {**BODY, "depth": 4, "mask_blocks": 1}, GUIDED),
    "srdd": Arm("srdd", "residual", BODY, GUIDED),
    "srdd-equal": Arm("srdd", "residual", BODY, GUIDED, {"step_weights": "equal"}),
    "srdd-window-1": Arm("srdd", "residual", {**BODY, "window": 1}, GUIDED),
    "m-var": Arm("m_var", "residual", {**BODY, "depth": 3, "width": 192, "heads": 3}, GUIDED),
    "var-deeper": Arm("var", "residual", {**BODY, "depth": 5}, GUIDED),
    "nfig": Arm("nfig", "bands", BODY, GUIDED),
    "flexvar": Arm("flexvar", "drafts", BODY, GUIDED),
    "flowar": Arm("flowar", "vectors", {"depth": [2, 2], "width": 144, "heads": 4, "flow": {
        "depth": 2, "width": 192, "heads": 3}}, FLOWING),
    "flowar-pooled": Arm("flowar", "vectors", {"depth": [2, 2], "width": 144, "heads": 4, "flow": {
        "depth": 2, "width": 192, "heads": 3, "pooled": True}}, FLOWING),
    "xar": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "cell", "size": 4}, FLOWING),
    "xar-clean": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "cell", "size": 4,
                                        "context": "clean"}, FLOWING),
    "xar-image": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "image"}, FLOWING),
    "xar-cells-of-2": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "cell", "size": 2},
                          FLOWING),
    "xar-clean-cells-of-2": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "cell",
                                                   "size": 2, "context": "clean"}, FLOWING),
    "xar-tokens": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "token"}, FLOWING),
    "xar-clean-tokens": Arm("xar", "vectors", {"depth": [3, 3], "width": 160, "heads": 5, "entity": "token",
                                               "context": "clean"}, FLOWING),
    "mar": Arm("mar", "vectors", {**MASKED, "encoder_depth": 3, "decoder_depth": 3},
               {**DIFFUSING, "iterations": 16, "solver_steps": 50}),
    "mar-l2": Arm("mar", "vectors", {**MASKED, "encoder_depth": 3, "decoder_depth": 3, "head": "l2"},
                  {**DIFFUSING, "iterations": 16}),
    "himar": Arm("himar", "vectors", {**MASKED, "width": 128, "heads": 4, "encoder_depth": 3, "decoder_depth": 3,
                                      "joint_width": 96, "joint_depth": 2, "joint_heads": 4},
                 {**DIFFUSING, "coarse_guidance_scale": 2.0, "coarse_iterations": 8, "iterations": 4,
                  "coarse_solver_steps": 50, "solver_steps": 50}),
}

CONTROLLED = {
    "car": Arm("car", "residual", BODY, GUIDED, {"control": {"kinds": ["canny"], "widths": [16, 32, 64]}}),
    "scalar": Arm("scalar", "residual", BODY, GUIDED, {"control": {
        "kinds": ["canny"], "encoder": "emoji-features", "feature_width": 272}})}
"""What steers a VAR by a map, for ``--costs``; experiments/control_agreement.py trains them."""


def pictures_of(given: argparse.Namespace) -> str:
    """The parquet file with the first pictures of the data, written where it isn't there."""
    out: Path = given.out / f"first-{given.pictures}.parquet"
    if not out.is_file():
        from pyarrow import parquet

        out.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(parquet.read_table(given.data).slice(0, given.pictures), out.with_suffix(".part"))
        out.with_suffix(".part").replace(out)
    return str(out)


def data_recipe(given: argparse.Namespace) -> dict[str, Any]:
    return {"spec": pictures_of(given), "size": SIZE, "balanced": False, "flip": True, "held_out": 500}


def tokenizer_of(family: str, given: argparse.Namespace) -> Path:
    """The folder of a family's tokenizer, trained where it isn't there."""
    out: Path = given.out / "tokenizers" / family
    if not (out / "done.json").is_file():
        print(f"tokenizer {family}", flush=True)
        train = {"steps": 10**6, "minutes": given.tokenizer_minutes, "batch_size": 16, "learning_rate": 1e-3,
                 "warmup_steps": 50, "final_learning_rate_ratio": 0.02, "weight_decay": 0.01, "ema_decay": 0.998,
                 "sample_every": 0, "clock": "processor", "checkpoint_every": 200, "keep_checkpoints": 1}
        done = train_tokenizer({"data": data_recipe(given), "tokenizer": FAMILIES[family], "train": train,
                                "threads": given.threads}, out, resume=True)
        if done.stopped == "signal":
            raise InputError(f"stopped in tokenizer {family!r} after step {done.step}; run the same command to go on")
        hub.save_json({"steps": done.step, "seconds": done.seconds}, out / "done.json")
    return out / "tokenizer"


def tokens_of(arm: Arm, given: argparse.Namespace) -> Path:
    """The folder of cached tokens for an arm, its family's own or, for Hi-MAR, of two sizes; mirrored versions too."""
    family, special = arm.family, arm.system == "himar"
    out: Path = given.out / "tokens" / (f"{family}-{arm.system}" if special else family)
    words = ["tokenize", "--tokenizer", str(tokenizer_of(family, given)), "--data", pictures_of(given),
             "--out", str(out), *(["--system", arm.system] if special else [])]
    for more in (["--split", "train", "--flips"], ["--split", "validation"]):
        if not (out / more[1] / "manifest.json").is_file() and command.run([*words, *more]):
            raise InputError(f"tokens of {out.name} could not be made; see above")
    return out


def step_seconds(arms: dict[str, Arm], given: argparse.Namespace, rounds: int = 7) -> dict[str, float]:
    """Seconds of the processor that a training step of every arm takes, the median of turns."""
    steps = {}
    for name, arm in arms.items():
        dataset = TokenDataset(tokens_of(arm, given) / "train")
        batch = {"tokens": dataset.read(range(given.batch_size)), "labels": dataset.labels[:given.batch_size]}
        task = GeneratorTask(untrained(arm), **{key: arm.recipe[key] for key in ("step_weights",) if key in arm.recipe})
        steps[name] = partial(train_step, task, torch.optim.AdamW(task.parameter_groups("main", 0.05)), batch)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            torch.manual_seed(turn)
            began = time.process_time()
            for _ in range(3):
                step()
            if turn:  # the first warms up
                found[name].append((time.process_time() - began) / 3)
    return {name: statistics.median(values) for name, values in found.items()}


def train_step(task: GeneratorTask, optimiser: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    """One optimiser step, as the trainer does it but for its averages and notes."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss("main", batch, TrainingStep(0, 1, 0.5, 0, 0))
    assert loss is not None
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def steps_of(arms: dict[str, Arm], given: argparse.Namespace) -> dict[str, int]:
    """How many steps each arm trains: what fits into the minutes, timed where it isn't written down yet."""
    if given.steps:
        return dict.fromkeys(arms, given.steps)
    path: Path = given.out / "steps.json"
    found = hub.read_json(path) if path.is_file() else {}
    if found.setdefault("minutes", given.minutes) != given.minutes:
        raise InputError(f"{path} was made for {found['minutes']} minutes; choose another --out, or remove it")
    seconds = found.setdefault("seconds", {})
    # Seeds of an arm take the same steps: the first of them is timed.
    timed = {name: next(other for other in ARMS if ARMS[other] == replace(arm, seed=0)) for name, arm in arms.items()}
    missing = {name: ARMS[name] for name in timed.values() if name not in seconds}
    if missing:
        print(f"timing a training step of {len(missing)} arms", flush=True)
        seconds |= step_seconds(missing, given)
        hub.save_json(found, path)
    return {name: max(1, round(60 * given.minutes / seconds[timed[name]])) for name in arms}


def run(name: str, arm: Arm, steps: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train and measure an arm, or read what it gave before."""
    out: Path = given.out / name
    result = out / "result.json"
    about = json.loads(json.dumps({"arm": asdict(arm), "family": FAMILIES[arm.family], "steps": steps,
                                   "pictures": given.pictures, "count": given.count, "batch_size": given.batch_size}))
    if result.is_file():
        found = hub.read_json(result)
        if found["about"] != about:
            raise InputError(f"{result} was made with other settings; choose another --out, or remove {out}")
        print(f"{name}: done before")
        return found
    recipe = {"system": arm.system, "tokenizer": str(tokenizer_of(arm.family, given)),
              "tokens": str(tokens_of(arm, given)), "data": data_recipe(given), "generator": arm.generator,
              "settings": arm.settings, "gate": 0.3, "threads": given.threads, **arm.recipe,
              "train": {"steps": steps, "batch_size": given.batch_size, "learning_rate": 1e-3, "warmup_steps": 50,
                        "final_learning_rate_ratio": 0.02, "ema_decay": 0.998, "sample_every": 0,
                        "checkpoint_every": 200, "keep_checkpoints": 1, "seed": arm.seed}}
    done = train_generator(recipe, out, resume=True)
    if done.stopped == "signal":
        raise InputError(f"stopped in arm {name!r} after step {done.step}; run the same command to go on")
    found = {"name": name, "about": about, "steps": done.step, **measure(out, given)}
    hub.save_json(found, result)
    return found


def measure(out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Likelihood or loss on held-out pictures, distance and agreement of samples, and what a picture costs."""
    system = nextscale.load(str(out / "model"))
    judge = open_extractor(f"resnet20:{given.judge}")
    test = open_dataset(given.test, SIZE, "all")
    wanted = Wanted(given.count, 0, "even", 400, 400, 0, "fid", batch_size=100)
    config = system.config
    subject = Subject(out.name, fingerprint(system), system, system.tokenizer.picture_size, config.tokenizer.vocabulary,
                      config.tokenizer.bits, system, tuple(config.classes), config.class_names)
    evaluation = Evaluation(subject, out / "evaluation", [judge], wanted, test)
    evaluation.work(Shard(0, 1))
    figures = evaluation.report()
    of_judge = next(iter(figures["features"].values()))
    held_out = [record for record in read_metrics(out) if any(key.startswith("held_out/") for key in record)]
    cost = cost_of(system, [i % 10 for i in range(8)])
    return {
        "frechet": of_judge["samples"]["frechet_distance"]["value"],
        "agreement": of_judge["samples"]["agreement"]["class"],
        "psnr": figures["tokenizer"]["psnr"]["mean"],
        "ceiling": of_judge["reconstruction"]["frechet_distance"]["value"],
        "nats": figures.get("likelihood", {}).get("reference", {}).get("nats_a_token"),
        "loss": held_out[-1].get("held_out/loss") if held_out else None, "cost": asdict(cost)}


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| arm | parameters | steps | nats a token | loss | Fréchet distance | reconstructions' | agreement | "
             "ms a picture | evaluations | rows a picture | kB of memory a picture |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in results:
        cost = r["cost"]
        of_cost = (1e3 * cost["seconds"] / cost["pictures"], cost["rows"] / cost["pictures"],
                   cost["memory_bytes"] / 1e3 / cost["pictures"])
        evaluations = f"{cost['evaluations']}" + (f" + {cost['head_evaluations']}" if cost["head_evaluations"] else "")
        lines.append(f"| {r['name']} | {cost['parameters'] / 1e6:.2f} M | {r['steps']} | {_or_none(r['nats'])} | "
                     f"{_or_none(r['loss'])} | {r['frechet']:.1f} | {r['ceiling']:.1f} | {r['agreement']:.1%} | "
                     f"{of_cost[0]:.0f} | {evaluations} | {of_cost[1]:.0f} | {of_cost[2]:.0f} |")
    return "\n".join(lines) + "\n"


def untrained(arm: Arm) -> ClassConditionalSystem:
    """The system of an arm with random weights."""
    values = {"system": arm.system, "generator": arm.generator, "settings": arm.settings, **arm.recipe}
    recipe = build(GeneratorTraining, values, arm.system)
    kind = folders.system_type(arm.system)
    tokenizer = kind.fitted(Tokenizer(build(TokenizerRecipe, FAMILIES[arm.family], arm.family).model))
    torch.manual_seed(0)
    return kind(system_config(recipe, tokenizer.config, (tuple("0123456789"),))).initialise().eval()


def costs(arms: dict[str, Arm], pictures: int = 8) -> str:
    """What each arm's generation costs, as Markdown."""
    lines = ["| arm | parameters | steps | evaluations | of the head | rows a picture | kB of memory a picture | "
             "most kB alive a picture |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, arm in arms.items():
        steered = {"control": torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8)} if name in CONTROLLED else {}
        found = cost_of(untrained(arm), [i % 10 for i in range(pictures)], peak=True, **steered)
        assert found.peak_bytes is not None
        lines.append(f"| {name} | {found.parameters / 1e6:.2f} M | {found.steps} | {found.evaluations} | "
                     f"{found.head_evaluations or ''} | {found.rows / pictures:.0f} | "
                     f"{found.memory_bytes / 1e3 / pictures:.0f} | {found.peak_bytes / 1e3 / pictures:.0f} |")
    return "\n".join(lines) + "\n"


def _or_none(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="pictures to train on")
    parser.add_argument("--test", help="pictures to measure against")
    parser.add_argument("--judge", help="safetensors of the ResNet-20")
    parser.add_argument("--costs", action="store_true", help="train nothing, count what a picture costs")
    parser.add_argument("--out", type=Path, default=Path("runs/side-by-side"))
    parser.add_argument("--prepare", action="store_true", help="tokenizers, tokens and timing, no arm")
    parser.add_argument("--only", nargs="+", help="these arms alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="of every generator's training")
    parser.add_argument("--steps", type=int, default=0, help="of every generator's training, in the place of --minutes")
    parser.add_argument("--tokenizer-minutes", type=float, default=8.0)
    parser.add_argument("--pictures", type=int, default=25_000, help="the first of the data, to train on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000, help="samples to measure")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, progress: Callable[[str], None] = print) -> int:
    given = parse(arguments)
    try:
        arms = {**ARMS, **CONTROLLED} if given.costs else ARMS
        unknown = [name for name in given.only or () if name not in arms]
        if unknown:
            raise InputError(f"no arm {unknown[0]!r}{did_you_mean(unknown[0], arms, '; known are ' + ', '.join(arms))}")
        torch.set_num_threads(given.threads)
        wanted = {name: arm for name, arm in arms.items() if given.only is None or name in given.only}
        if given.costs:
            # Of every system its first arm, unless others are named: a solver of 3,200 evaluations takes minutes.
            first = {arm.system: name for name, arm in reversed(arms.items())}
            print(costs({name: arm for name, arm in wanted.items() if given.only or name == first[arm.system]}))
            return 0
        if not (given.data and given.test and given.judge):
            raise InputError("--data, --test and --judge are needed, or --costs alone")
        for arm in wanted.values():
            tokens_of(arm, given)
        steps = steps_of(wanted, given)
        for i, (name, arm) in enumerate([] if given.prepare else wanted.items()):
            progress(f"arm {i + 1} of {len(wanted)}: {name} ({arm.system}), {steps[name]} steps")
            run(name, arm, steps[name], given)
            done = [hub.read_json(path) for other in ARMS if (path := given.out / other / "result.json").is_file()]
            (given.out / "table.md").write_text(table(done), encoding="utf-8")
    except NextscaleError as error:
        print(error, file=sys.stderr)
        return 2
    print("prepared" if given.prepare else (given.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
