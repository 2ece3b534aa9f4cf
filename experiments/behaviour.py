"""What the fact sheets of the scale-wise family say of behaviour, on the models of experiments/side_by_side.py.

    python experiments/behaviour.py --side-by-side runs/side-by-side --test cifar10/test.parquet \\
        --judge resnet20.safetensors

- nats: a token of every scale on held-out pictures, as the trainings logged them (VAR's three seeds, NFIG, SRDD, ...).
- prefixes: test pictures decoded after every scale, by VAR's and FlexVAR's tokenizers; how often the judge still finds
  their class (chance: 10%).
- iterations: Fréchet distance to the test pictures of MAR and Hi-MAR drawn in fewer and more iterations, of Hi-MAR also
  with learned tokens in the place of pivots; few pictures, so the distances are larger than elsewhere.
- orders: the same of MAR in 16 iterations by either schedule and in either order.
- scales: Fréchet distance of FlowAR's samples as they are after every scale, enlarged.
- temperature: how far apart MAR's samples of one class are, by temperature, and those of its head of means.

``--only`` chooses some of them.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.canvas import Canvas
from nextscale.data import open_dataset
from nextscale.evaluation.distances import Statistics, frechet_distance
from nextscale.evaluation.features import open_extractor
from nextscale.training import read_metrics
from nextscale.training.tokenizer_recipe import load_tokenizer

PARTS = ("nats", "prefixes", "iterations", "orders", "scales", "temperature")
CODES = ("var-0", "var-1", "var-2", "nfig", "srdd", "hmar", "m-var")


class Judged:
    """Test pictures in [-1, 1] with labels, and the judge's view of any pictures."""

    def __init__(self, test: str, judge: str, count: int):
        data = open_dataset(test, 32, "all")
        pixels = torch.cat([torch.from_numpy(data.read(range(at, min(at + 500, len(data))))[0])
                            for at in range(0, len(data), 500)])
        self.pictures, self.labels = pixels[:count].float() / 127.5 - 1, data.labels[:count, 0]
        self.extractor = open_extractor(f"resnet20:{judge}")
        self.reference = self.statistics(pixels.float() / 127.5 - 1)

    def right(self, pictures: Tensor) -> float:
        logits = torch.cat([self.extractor(part).logits[0] for part in pictures.split(500)])
        return float((logits.argmax(1) == self.labels[:len(pictures)]).float().mean())

    def agreement(self, pictures: Tensor, labels: list[int]) -> float:
        """How often the judge finds the class that was asked for."""
        logits = torch.cat([self.extractor(part).logits[0] for part in pictures.split(500)])
        return float((logits.argmax(1) == torch.tensor(labels)).float().mean())

    def features(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.extractor(part).features_BD for part in pictures.split(500)])

    def statistics(self, pictures: Tensor) -> Statistics:
        return Statistics.of(self.features(pictures), self.extractor.name)

    def distance(self, pictures: Tensor, reference: Statistics | None = None) -> float:
        """Fréchet distance to all test pictures, or to others."""
        return frechet_distance(self.statistics(pictures), reference or self.reference)


def nats(runs: Path) -> dict[str, Any]:
    found = {}
    for name in CODES:
        last = [record for record in read_metrics(runs / name) if "held_out/nats_per_token" in record][-1]
        keys = sorted(key for key in last if key.startswith("held_out/nats_") and key[-1].isdigit())
        found[name] = {"steps": last["step"], "scales": [last[key] for key in keys]}
        print(f"| {name} | {last['step']} | {' | '.join(f'{last[key]:.2f}' for key in keys)} |", flush=True)
    return found


@torch.no_grad()
def prefixes(runs: Path, judged: Judged) -> dict[str, Any]:
    found: dict[str, Any] = {"pictures themselves": judged.right(judged.pictures)}
    for family in ("residual", "drafts"):
        tokenizer = load_tokenizer(runs / "tokenizers" / family / "tokenizer").eval()
        shown: list[list[Tensor]] = [[] for _ in tokenizer.plan]
        for part in judged.pictures.split(250):
            tokens = tokenizer.encode(part).tokens
            canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, len(part))
            for k, given in enumerate(tokens):
                canvas = canvas.write(k, given)
                picture = tokenizer.decode(canvas)
                shown[k].append(torch.nn.functional.interpolate(picture, (32, 32), mode="bilinear", antialias=True))
        found[family] = [judged.right(torch.cat(parts)) for parts in shown]
        print(f"{family}: class found after every scale: {' '.join(f'{x:.1%}' for x in found[family])}", flush=True)
    print(f"pictures themselves: {found['pictures themselves']:.1%}", flush=True)
    return found


def iterations(runs: Path, judged: Judged, count: int) -> dict[str, Any]:
    labels, found = [i % 10 for i in range(count)], {}
    mar, himar = (nextscale.load(str(runs / name / "model")) for name in ("mar", "himar"))
    lines: dict[str, Callable[[], Tensor]] = {}
    for steps in (4, 8, 16, 32):
        lines[f"mar, {steps}"] = lambda steps=steps: mar.generate(
            labels, iterations=steps, batch_size=100, output="torch").images
    for steps in (1, 2, 4, 8):
        lines[f"himar, 8 + {steps}"] = lambda steps=steps: himar.generate(
            labels, iterations=steps, batch_size=100, output="torch").images

    def without_pivots() -> Tensor:
        kept = himar.generator.keep_pivots
        himar.generator.keep_pivots = lambda run, hidden: None
        try:
            images: Tensor = himar.generate(labels, iterations=4, batch_size=100, output="torch").images
        finally:
            himar.generator.keep_pivots = kept
        return images

    lines["himar, 8 + 4 without pivots"] = without_pivots
    for name, draw in lines.items():
        found[name] = judged.distance(draw())
        print(f"| {name} | {found[name]:.1f} |", flush=True)
    return found


def orders(runs: Path, judged: Judged, count: int) -> dict[str, Any]:
    labels, found = [i % 10 for i in range(count)], {}
    mar = nextscale.load(str(runs / "mar" / "model"))
    for unmasking in ("cosine", "linear"):
        for order in ("random", "raster"):
            drawn = [mar.generate(labels, seed=seed, unmasking=unmasking, order=order, batch_size=100,
                                  output="torch").images for seed in (0, 10**6)]
            found[f"{unmasking}, {order}"] = both = [judged.distance(pictures) for pictures in drawn]
            print(f"| {unmasking} | {order} | {both[0]:.1f} {both[1]:.1f} |", flush=True)
    return found


def scales(runs: Path, judged: Judged, count: int) -> dict[str, Any]:
    system = nextscale.load(str(runs / "flowar" / "model"))
    shown: dict[str, list[Tensor]] = {}
    for at in range(0, count, 100):
        labels = [i % 10 for i in range(at, min(at + 100, count))]
        for preview in system.stream(labels, seed=at, output="torch"):
            shown.setdefault("x".join(map(str, system.plan.steps[preview.step].grid)), []).append(preview.images)
    found = {grid: judged.distance(torch.cat(parts)) for grid, parts in shown.items()}
    print(" ".join(f"{grid}: {distance:.1f}" for grid, distance in found.items()), flush=True)
    return found


def temperature(runs: Path, count: int) -> dict[str, Any]:
    found = {}
    for name, values in {"mar": (0.8, 0.9, 1.0), "mar-l2": (1.0,)}.items():
        system = nextscale.load(str(runs / name / "model"))
        for value in values:
            pictures = system.generate([3] * count, temperature=value, batch_size=count, output="torch").images
            found[f"{name} {value}"] = apart = float(pictures.std(0).mean()) * 127.5
            print(f"{name}, temperature {value}: standard deviation of a pixel {apart:.1f} of 255", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side-by-side", type=Path, default=Path("runs/side-by-side"))
    parser.add_argument("--out", type=Path, default=Path("runs/behaviour"))
    parser.add_argument("--test", required=True, help="test pictures")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--count", type=int, default=300, help="samples a line")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    judged, runs = Judged(given.test, given.judge, 1000), given.side_by_side
    for name, measure in {"nats": lambda: nats(runs), "prefixes": lambda: prefixes(runs, judged),
                          "iterations": lambda: iterations(runs, judged, given.count),
                          "orders": lambda: orders(runs, judged, given.count),
                          "scales": lambda: scales(runs, judged, given.count),
                          "temperature": lambda: temperature(runs, min(given.count, 64))}.items():
        if given.only is None or name in given.only:
            print(f"-- {name}", flush=True)
            hub.save_json(measure(), given.out / f"{name}.json")


if __name__ == "__main__":
    main()
