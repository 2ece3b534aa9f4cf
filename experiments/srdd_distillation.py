"""An SRDD in fewer scales: what leaving them out costs, and what distillation or training on the data gives back.

    python experiments/srdd_distillation.py --teacher runs/side-by-side/srdd/model \\
        --data runs/side-by-side/first-25000.parquet --test cifar10/test.parquet --judge resnet20.safetensors \\
        --out runs/srdd-distillation [--grids 1,3,4,8 1,4,8] [--minutes 10] [--tokens runs/side-by-side/tokens/residual]

Every schedule has three arms: the teacher with the other scales left out, that model trained on the data for so many
minutes of the processor, and distilled for as many. A schedule whose grids the one before has is distilled from that
one's student, round after round. With ``--tokens``, of the teacher's tokenizer, the teacher trains on as well: what
training alone gives to it must not be taken for distillation's. Fréchet distances of samples of two seeds; their
difference is the noise. What is done is skipped, what was stopped goes on. Writes ``table.md``.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nextscale
from nextscale import hub
from nextscale.data import open_dataset
from nextscale.errors import InputError, NextscaleError
from nextscale.evaluation.cost import cost_of
from nextscale.evaluation.distances import Statistics, frechet_distance
from nextscale.evaluation.features import open_extractor
from nextscale.plan import parse_grids
from nextscale.systems import folders
from nextscale.training.distill_recipe import train_distill
from nextscale.training.generator_recipe import train_generator
from nextscale.training.scale_distillation import shortened
from nextscale.training.trainer import TrainResult

Train = Callable[[dict[str, Any], Path, bool], TrainResult]


class Judged:
    """Models beside the test pictures, in a judge's features."""

    def __init__(self, given: argparse.Namespace):
        self.judge, self.given = open_extractor(f"resnet20:{given.judge}"), given
        test = open_dataset(given.test, 32, "all")
        self.pictures = torch.cat([torch.from_numpy(test.read(range(at, min(at + 500, len(test))))[0])
                                   for at in range(0, min(len(test), given.references), 500)])
        self.real = self.statistics(self.pictures.float() / 127.5 - 1)

    def statistics(self, pictures: torch.Tensor) -> Statistics:
        return Statistics.of(torch.cat([self.judge(part).features_BD for part in pictures.split(500)]), self.judge.name)

    def measure(self, folder: Path, name: str, train_steps: int = 0) -> dict[str, Any]:
        """What a model costs and how near it is, or what was found before."""
        path = folder / "result.json"
        about = [name, train_steps, self.given.count, self.given.references, self.given.minutes]
        if path.is_file() and (known := hub.read_json(path))["about"] == about:
            return known
        system = nextscale.load(str(folder / "model"))
        labels = [i % system.config.classes[0] for i in range(self.given.count)]
        cost = cost_of(system, labels[:8])
        distances = [frechet_distance(self.statistics(system.generate(
            labels, seed=seed, batch_size=100, output="torch", progress=False).images), self.real)
            for seed in (0, 10**6)]
        with torch.no_grad():
            again = torch.cat([system.tokenizer.decode(system.tokenizer.encode(part.float() / 127.5 - 1).canvas)
                               for part in self.pictures[:self.given.count].split(100)])
        found = {"about": about, "name": name, "grids": [h for h, _ in system.plan.grids], "train_steps": train_steps,
                 "evaluations": cost.evaluations, "rows": cost.rows // cost.pictures, "distances": distances,
                 "reconstructions": frechet_distance(self.statistics(again), self.real)}
        hub.save_json(found, path)
        return found


def trained(run: Train, recipe: dict[str, Any], out: Path, given: argparse.Namespace) -> int:
    """Train into a folder for the minutes given, where it isn't done; the number of steps."""
    done = out / "done.json"
    if not done.is_file():
        train = {"steps": 10**6, "minutes": given.minutes, "clock": "processor", "batch_size": given.batch_size,
                 "learning_rate": given.learning_rate, "warmup_steps": 20, "final_learning_rate_ratio": 0.02,
                 "weight_decay": 0.0, "ema_decay": 0.998, "sample_every": 0, "checkpoint_every": 50,
                 "keep_checkpoints": 1}
        data = {"spec": given.data, "size": 32, "balanced": False, "flip": True, "held_out": 500}
        result = run({**recipe, "data": data, "train": train, "threads": 1}, out, True)
        if result.stopped == "signal":
            raise InputError(f"stopped in {out.name} after step {result.step}; run the same command to go on")
        hub.save_json({"steps": result.step, "minutes": given.minutes}, done)
    found = hub.read_json(done)
    if found["minutes"] != given.minutes:
        raise InputError(f"{done} is of {found['minutes']} minutes; choose another --out, or remove {out}")
    return int(found["steps"])


def work(given: argparse.Namespace) -> list[dict[str, Any]]:
    judged = Judged(given)
    teacher, found, out = nextscale.load(given.teacher), [], given.out
    folders.save(teacher, out / "teacher" / "model", tokenizer_dtype=torch.float32)
    found.append(judged.measure(out / "teacher", "teacher"))

    def on_data(start: Path, tokens: str, place: Path) -> int:
        settings = vars(nextscale.load(str(start)).config.settings["pictures"])
        return trained(train_generator, {"system": teacher.config.slug, "start": str(start), "tokens": tokens,
                                         "settings": settings}, place, given)

    if given.tokens:
        steps = on_data(out / "teacher" / "model", given.tokens, out / "teacher-on-data")
        found.append(judged.measure(out / "teacher-on-data", "trained on", steps))
    before, before_grids = out / "teacher" / "model", teacher.plan.grids
    for text in given.grids:
        grids, place = parse_grids(text), out / text.replace(",", "-")
        if not set(grids) <= set(before_grids):
            before = out / "teacher" / "model"
        folders.save(shortened(teacher, grids)[0], place / "left-out" / "model", tokenizer_dtype=torch.float32)
        found.append(judged.measure(place / "left-out", "left out"))
        steps = trained(train_distill, {"teacher": str(before), "grids": text}, place / "distilled", given)
        found.append(judged.measure(place / "distilled", "distilled", steps))
        steps = on_data(place / "left-out" / "model", str(place / "distilled" / "tokens"), place / "on-data")
        found.append(judged.measure(place / "on-data", "trained on the data", steps))
        before, before_grids = place / "distilled" / "model", grids
        (out / "table.md").write_text(table(found), encoding="utf-8")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| grids | model | training steps | evaluations | rows | Fréchet distance, two seeds | reconstructions' |",
             "| --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for r in found:
        lines.append(f"| {','.join(map(str, r['grids']))} | {r['name']} | {r['train_steps'] or ''} | {r['evaluations']}"
                     f" | {r['rows']} | {' '.join(f'{d:.1f}' for d in r['distances'])} | {r['reconstructions']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of an SRDD of 32 pixels")
    parser.add_argument("--data", required=True, help="pictures to train on")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--out", type=Path, default=Path("runs/srdd-distillation"))
    parser.add_argument("--grids", nargs="+", default=["1,3,4,8", "1,4,8"], help="of the students, one after the other")
    parser.add_argument("--tokens", default="", help="of the teacher's tokenizer, to train the teacher on as well")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the processor, for every training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--count", type=int, default=1000, help="samples of each seed")
    parser.add_argument("--references", type=int, default=10_000, help="test pictures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        print(table(work(given)))
    except NextscaleError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
