"""What memory policies do to the pictures of emoji-64, at the same budget.

    python experiments/cache_policies.py scalekv [--pictures 48] [--shares 0.1 0.2]
    python experiments/cache_policies.py hack [--pictures 48] [--compression 0.5]

Drawn are pictures of the same labels and seeds with and without a policy. Reported: PSNR and token agreement with the
pictures of the full memory; the divergence KL(full || policy) of the next token's guided distribution, in nats a token,
when both follow the full memory's tokens, which unlike PSNR does not hang on single draws; the negative log-likelihood
of held-out pictures' tokens, in nats a token; rows that a layer holds before the last step. Calibrated on other seeds.
"""
from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nextscale
from nextscale.acceleration import hack, scalekv
from nextscale.acceleration.budgets import by_identity, uniform_rows
from nextscale.context import Hook
from nextscale.data import open_dataset
from nextscale.noise import Keyed
from nextscale.run import At
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.guidance import Guidance, make_guidance

WINDOW = 4
CALIBRATION_SEED = 1000


class Listener(Hook):
    """Keeps the guided logits of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def logits(self, logits: Tensor, at: At) -> Tensor:
        self.found.append(F.log_softmax(logits.float(), -1))
        return logits


@torch.no_grad()
def follow(system: Any, labels: list[Any], tokens: Sequence[Tensor], guidance: Guidance, hooks: Sequence[Hook]
           ) -> tuple[Tensor, int]:
    """Log-probabilities (B, L, V) along given tokens, and the bytes in memory before the last step."""
    listener = Listener()
    forced = ForcedTokens(tokens, [torch.ones_like(t, dtype=torch.bool) for t in tokens])
    begun = system.start(system.label_rows(labels), guidance, Keyed.from_seeds(range(len(labels))))
    held = 0
    for run in system.sampled(begun, guidance, system.settings_for("pictures", {}), [*hooks, listener, forced]):
        held = run.memory.bytes() if run.cursor == len(system.plan) - 1 else held
    return torch.cat(listener.found, 1), held


def psnr(one: Tensor, other: Tensor) -> Tensor:
    return -10 * torch.log10(((one - other) / 2).square().mean((1, 2, 3)).clamp_min(1e-6))


class Bench:
    """The full memory's pictures, tokens and distributions, and what a policy makes of them."""

    def __init__(self, pictures: int):
        self.system = nextscale.load("runs/emoji-64")
        draw = random.Random(5)
        self.labels = [(draw.randrange(51), draw.randrange(5)) for _ in range(pictures)]
        self.guidance = self.system.guidance(self.system.settings_for("pictures", {}))
        self.full = self.draw([])
        self.along, self.bytes = follow(self.system, self.labels, self.full.tokens, self.guidance, [])
        data = open_dataset("emoji", 64, "concept-test")
        places = torch.linspace(0, len(data) - 1, pictures).long()
        pixels, _ = data.read(places.numpy())
        self.real = self.system.encode(torch.from_numpy(pixels[:, :3].copy()).float() / 127.5 - 1)
        self.real_labels = [tuple(row) for row in data.labels[places].tolist()]

    def draw(self, hooks: Sequence[Hook], seed: int = 0) -> Any:
        return self.system.generate(self.labels, seed=seed, output="torch", progress=False, batch_size=64, hooks=hooks)

    def row(self, name: str, hooks: Sequence[Hook]) -> None:
        drawn = self.draw(hooks)
        self.report(name, drawn, hooks)

    def report(self, name: str, drawn: Any, hooks: Sequence[Hook]) -> None:
        quality = psnr(drawn.images, self.full.images)
        same = torch.cat([(a == b).float() for a, b in zip(drawn.tokens, self.full.tokens, strict=True)], 1).mean()
        along, held = follow(self.system, self.labels, self.full.tokens, self.guidance, hooks)
        divergence = (self.along.exp() * (self.along - along)).sum(-1)
        real, _ = follow(self.system, self.real_labels, self.real, make_guidance(1.0), hooks)
        nll = -real.gather(-1, torch.cat(list(self.real), 1)[..., None]).mean()
        error = divergence.mean(1).std() / math.sqrt(len(divergence))
        print(f"| {name} | {quality.mean():.2f} | {same:.3f} | {divergence.mean():.4f} ± {error:.4f} | {nll:.4f} | "
              f"{held / self.bytes:.3f} |", flush=True)


def scalekv_rows(bench: Bench, shares: Sequence[float]) -> None:
    plan, layers = bench.system.plan, len(bench.system.generator.remembered)
    for share in shares:
        found = scalekv.Calibration(share=share, window=WINDOW).run(
            bench.system, bench.labels[:10], seed=CALIBRATION_SEED, progress=False)
        uniform = uniform_rows(plan, share)
        index = torch.tensor([[math.nan if v is None else v for v in row] for row in found["selectivity"]])
        worst = scalekv.find_drafters(-index, plan, uniform, 0.06)
        swapped = {**by_identity(plan, layers, uniform, worst, least=WINDOW + 1).to_json(), "window": WINDOW}
        print(f"drafters at {share:.0%} [step, layer]: {found['drafters']}; budgets {found['budgets']}")
        for name, hook in (
                ("ScaleKV, calibrated drafters", nextscale.hook("scalekv", budgets=found)),
                ("the same, paper's scores", nextscale.hook("scalekv", budgets=found, scoring="paper",
                                                            pooling="average")),
                ("ScaleKV, most selective layers draft", nextscale.hook("scalekv", budgets=swapped)),
                ("ScaleKV, same budget everywhere", nextscale.hook("scalekv", share=share, window=WINDOW)),
                ("the same, paper's scores", nextscale.hook("scalekv", share=share, window=WINDOW, scoring="paper",
                                                            pooling="average")),
                ("PyramidKV", nextscale.hook("pyramidkv", share=share, window=WINDOW)),
                ("SnapKV", nextscale.hook("snapkv", share=share, window=WINDOW)),
                ("sliding window", nextscale.hook("sliding-window", share=share, sinks=4)),
                ("sliding window, no sinks", nextscale.hook("sliding-window", share=share, sinks=0))):
            bench.row(f"{share:.0%} {name}", [hook])


def hack_rows(bench: Bench, compressions: Sequence[float]) -> None:
    found = hack.Calibration().run(bench.system, bench.labels[:10], seed=CALIBRATION_SEED, progress=False)
    variance = torch.tensor(found["variance"])
    one = hack.Calibration().run(bench.system, bench.labels[-1:], seed=CALIBRATION_SEED + 500, progress=False)
    print(f"variances {found['variance']}\nrank correlation of 1 picture with 10: "
          f"{spearman(torch.tensor(one['variance']), variance):.3f}")
    shuffle = random.Random(0)
    tables: dict[str, list[list[bool]]] = {
        "HACK, classes by variance": found["contextual"],
        "classes swapped": [[not head for head in row] for row in found["contextual"]]}
    for n in range(3):
        flat = [head for row in found["contextual"] for head in row]
        shuffle.shuffle(flat)
        width = len(found["contextual"][0])
        tables[f"random classes {n}"] = [flat[i:i + width] for i in range(0, len(flat), width)]
    for compression in compressions:
        for name, table in tables.items():
            bench.row(f"{compression:.0%} {name}", [nextscale.hook("hack", heads={"contextual": table},
                                                                  compression=compression)])
        bench.row(f"{compression:.0%} HACK, no merging", [nextscale.hook(
            "hack", heads={"contextual": found["contextual"]}, compression=compression, merge=False)])
        bench.row(f"{compression:.0%} all heads structural", [nextscale.hook(
            "hack", heads={"contextual": [[False] * len(row) for row in found["contextual"]]},
            compression=compression)])


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = [x.flatten().argsort().argsort().double() for x in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("scalekv", "hack"))
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--compression", type=float, nargs="+", default=[0.5])
    given = parser.parse_args()
    bench = Bench(given.pictures)
    print("| policy | PSNR, dB | tokens equal | KL, nats a token | NLL, nats a token | bytes before the last step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    bench.report("none, other seeds", bench.draw([], seed=500), [])
    if given.method == "scalekv":
        scalekv_rows(bench, given.shares)
    else:
        hack_rows(bench, given.compression)


if __name__ == "__main__":
    main()
