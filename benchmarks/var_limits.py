"""Low-rank attention of a polynomial beside softmax attention: its error, its cost, how time grows, and the transition.

    python benchmarks/var_limits.py [--width 8] [--heads 8] [--degree 4] [--repeats 3] [--clock cpu|wall]
    python benchmarks/var_limits.py --train 300     # also: two small generators, one with small logits, one without

Three tables. *Curve*: for logits up to s and even degrees g, the largest relative error of a weight, the paper's bound,
the error of attention over the 680 rows of VAR's schedule at 256 pixels (random unit queries and keys, one head), the
features, and the multiplications over those of exact attention at three schedules. *Time*: both kinds over schedules of
growing length, step by step, turn by turn in one process; the exponent is the slope of log time over log rows. *Train*:
on tokens of the emoji, generators with heads of width 8 whose logits are held at or below s; what the same
degree does to their attention and to greedily drawn tokens.
"""
from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import nextscale
from nextscale.acceleration.var_limits import LowRankAttention, crossover, error_bound, rank, relative_error, streamed
from nextscale.context import Attend, Context, Hook
from nextscale.data import open_dataset
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers.attention import attention
from nextscale.plan import Plan
from nextscale.run import Rows
from nextscale.systems.var import PLANS, VAR, VARConfig

LENGTHS = {**PLANS, 724: (1, 2, 3, 4, 5, 7, 10, 14, 18, 24, 32, 45)}


def draws(plan: Plan, s: float, width: int, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, plan.length, width, generator=generator) for _ in range(3))
    return s * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v


def exact_steps(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    return torch.cat([attention(q[:, :, s.lo:s.hi], k[:, :, :s.hi], v[:, :, :s.hi], None, 1.0)
                      for s in plan.spans(0, len(plan))], 2)


def low_rank_steps(q: Tensor, k: Tensor, v: Tensor, plan: Plan, degree: int) -> Tensor:
    state, parts = None, []
    for s in plan.spans(0, len(plan)):
        out, state = streamed(q[:, :, s.lo:s.hi], k[:, :, s.lo:s.hi], v[:, :, s.lo:s.hi], degree, state)
        parts.append(out)
    return torch.cat(parts, 2)


def curve(width: int) -> None:
    plans = {size: Plan.scales(PLANS[size]) for size in (256, 512, 1024)}
    print(f"heads of width {width}; exact attention sees "
          + ", ".join(f"{crossover(plan):.0f} keys a row at {size}" for size, plan in plans.items()) + "\n")
    print("| s | degree | error of a weight | bound | error of attention | features | cost at 256 | 512 | 1024 |\n"
          "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for s in (0.25, 0.5, 1.0, 2.0, 4.0):
        q, k, v = draws(plans[256], s, width)
        exact = exact_steps(q, k, v, plans[256])
        for degree in (2, 4, 6):
            found = low_rank_steps(q, k, v, plans[256], degree)
            # A row takes r (E + 1) to add and as much to read; exact attention 2 E a visible key.
            costs = [rank(width, degree) * 2 * (width + 1) / (2 * width * crossover(plan)) for plan in plans.values()]
            print(f"| {s:g} | {degree} | {relative_error(s, degree):.1e} | {error_bound(s, degree):.1e} | "
                  f"{float((found - exact).norm() / exact.norm()):.1e} | {rank(width, degree):,} | "
                  + " | ".join(f"{cost:.2f}" for cost in costs) + " |")


def timed(width: int, heads: int, degree: int, repeats: int, clock: str) -> None:
    now = time.process_time if clock == "cpu" else time.perf_counter
    print(f"\n{heads} heads, degree {degree}, {rank(width, degree):,} features, fp32, one thread, {clock} time\n")
    print("| rows | exact, ms | low rank, ms | exact / low rank |\n| ---: | ---: | ---: | ---: |")
    points = []
    for plan in sorted((Plan.scales(sides) for sides in LENGTHS.values()), key=lambda plan: plan.length):
        q, k, v = draws(plan, 0.5, width, heads)
        kinds = (lambda: exact_steps(q, k, v, plan), lambda: low_rank_steps(q, k, v, plan, degree))  # noqa: B023
        best = [math.inf, math.inf]
        for kind in kinds:
            kind()
        for _ in range(repeats):
            for i, kind in enumerate(kinds):
                began = now()
                kind()
                best[i] = min(best[i], now() - began)
        points.append((math.log(plan.length), *map(math.log, best)))
        print(f"| {plan.length} | {1e3 * best[0]:.1f} | {1e3 * best[1]:.1f} | {best[0] / best[1]:.2f} |", flush=True)
    x, *lines = torch.tensor(points, dtype=torch.float64).T
    slopes = [float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) for y in lines]
    print(f"\ntime grows with rows to the power of {slopes[0]:.2f} (exact) and {slopes[1]:.2f} (low rank)")


@dataclass
class Compare(Hook):
    """How far low-rank attention is from the exact one, layer by layer; the exact one goes on."""

    hook: LowRankAttention
    errors: dict[str, float] = field(default_factory=dict)

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        exact, low = inner(q, k, v, rows), self.hook.attend(ctx, address, q, k, v, rows, inner)
        self.errors[address] = float((low - exact).norm() / exact.norm())
        return exact


def trained(drawer: VAR, s: float, steps: int, tokens: list[Tensor], labels: Tensor) -> tuple[VAR, float]:
    """A small generator on emoji-64's tokens whose logits never exceed s, and its last losses' mean."""
    torch.manual_seed(0)
    config = replace(drawer.config, generator=VARGeneratorConfig(depth=3, width=64, heads=8))
    system = VAR(VARConfig(config.tokenizer, config.generator, config.classes, config.class_names, config.settings))
    system.tokenizer.load_state_dict(drawer.tokenizer.state_dict())
    system.initialise(gate=0.1)
    scales = [block.attention.scale_1H11 for block in system.generator.blocks]  # type: ignore[union-attr]
    with torch.no_grad():
        for scale in scales:
            scale.fill_(math.log(s))  # type: ignore[operator]
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    optimiser, losses = torch.optim.AdamW(parts, 2e-3, (0.9, 0.95)), []
    for step in range(steps):
        at = torch.arange(step * 16, step * 16 + 16) % len(labels)
        loss, _, _ = system.loss([t[at] for t in tokens], labels[at])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for scale in scales:
                scale.clamp_(max=math.log(s))  # type: ignore[operator]
        losses.append(float(loss.detach()))
    return system.eval(), sum(losses[-20:]) / len(losses[-20:])


def transition(steps: int) -> None:
    drawer = nextscale.load("runs/emoji-64")
    data = open_dataset("emoji", 64, "train")
    places = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:512]
    pictures = torch.from_numpy(data.read(places.numpy())[0][:, :3].copy()).float() / 127.5 - 1
    labels = data.labels[places]
    tokens = [torch.cat(step) for step in zip(*(drawer.encode(part) for part in pictures.split(32)), strict=True)]
    print(f"\n{steps} steps of 16 pictures\n\n| logits at most | loss | degree | worst layer's error | equal greedy "
          "tokens |\n| ---: | ---: | ---: | ---: | ---: |")
    for s, degrees in ((0.5, (4,)), (1.0, (4, 6)), (4.0, (4, 6))):
        system, loss = trained(drawer, s, steps, tokens, labels)
        asked = [tuple(row) for row in labels[:16].tolist()]
        drawn = {degree: torch.cat(system.generate(asked, hooks=[LowRankAttention(degree)] if degree else [], top_k=1,
                                                   output="torch", progress=False).tokens, 1)
                 for degree in (0, *degrees)}
        for degree in degrees:
            compare = Compare(LowRankAttention(degree))
            system.log_prob([t[:16] for t in tokens], asked, hooks=[compare])
            same = float((drawn[degree] == drawn[0]).float().mean())
            print(f"| {s:g} | {loss:.3f} | {degree} | {max(compare.errors.values()):.1e} | {same:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="channels a head")
    parser.add_argument("--heads", type=int, default=8, help="of the timed attention")
    parser.add_argument("--degree", type=int, default=4, help="of the timed construction")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--train", type=int, default=0, help="steps of each small training; 0 for none")
    given = parser.parse_args()
    torch.set_num_threads(1)
    curve(given.width)
    timed(given.width, given.heads, given.degree, given.repeats, given.clock)
    if given.train:
        transition(given.train)


if __name__ == "__main__":
    main()
