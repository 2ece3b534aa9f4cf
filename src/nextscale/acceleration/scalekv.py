"""ScaleKV: memory budgets by layer and scale (Li et al., arXiv 2505.19602).

After a layer's attention of step s, which dropped nothing, what the layer remembers is shrunk to its budget of step
s + 1. Budgets are large for "drafters", whose attention is spread over the history, small for "refiners", which look
at few rows of it. Which rows stay, 16 rows of the step decide, head by head.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from nextscale.acceleration.budgets import Budgets, by_identity, of_drafters, read_budgets, read_json, uniform_rows
from nextscale.acceleration.calibration import Observed, grid_of, measure
from nextscale.acceleration.memory_policy import MemoryPolicy, only_group, step_of, whole_plan
from nextscale.acceleration.observation import (
    Pooling,
    Scoring,
    best,
    check_share,
    hidden_keys,
    window,
    window_scores,
)
from nextscale.context import Context
from nextscale.devices import listed
from nextscale.errors import InputError, did_you_mean
from nextscale.plan import Plan
from nextscale.run import Rows

PRESETS = {
    "infinity-2b": of_drafters(13, 32, {8: ((0, 23), 920, 632), 9: ((0, 23), 1490, 594), 10: ((0, 23), 2510, 526),
                                        11: ((0, 23), 4100, 420), 12: ((0,), 6385, 465)}),
    "infinity-8b": of_drafters(13, 40, {8: ((0, 1, 2), 909, 629), 9: ((0, 1, 2), 1464, 584),
                                        10: ((0, 1, 2), 2463, 503), 11: ((0, 1, 2), 4054, 374),
                                        12: ((0, 1, 2), 6200, 200)}),
    "emoji-text-64": Budgets((None, None, None, (13, 13, 13, 14, 12), (16, 11, 11, 16, 11), (13, 13, 13, 13, 13)),
                             13, 4),
}
"""The published budgets of 10% for Infinity's 13 scales up to 64x64; budgets of 20% for the shipped model
(``nextscale calibrate scalekv PHRASES --count 4 --set share=0.2 --set window=4``, eight phrases)."""


@dataclass(frozen=True)
class ScaleKV(MemoryPolicy):
    """ScaleKV: every layer remembers its own budget of rows, chosen after attention (arXiv 2505.19602).

    budgets: a file of ``nextscale calibrate scalekv`` or of the published code, a mapping of the same form, or a preset
    (infinity-2b, infinity-8b, emoji-text-64); empty: by the identity from ``share``, of the rows remembered before
    the last step, and ``drafters``, layers that draft at every step (none: all layers get the same). window: rows of a
    step that judge and stay, None for the budgets' own number or 16; kernel, pooling: how scores are pooled along keys.
    scoring: ``published``: the bare query's products with the keys, summed; ``paper``: attention's probabilities.
    """

    name: ClassVar[str] = "scalekv"

    budgets: str | dict[str, Any] = ""
    share: float = 0.1
    drafters: tuple[int, ...] = ()
    window: int | None = None
    kernel: int = 5
    pooling: Pooling = "max"
    scoring: Scoring = "published"

    def __post_init__(self) -> None:
        check_share(self.share, self.kernel, self.name)
        if self.window is not None and self.window < 1:
            raise InputError(f"scalekv: window is {self.window}; at least one row must judge the others")
        _ = self.given  # a file that can't be read is told before any work

    @cached_property
    def given(self) -> Budgets | None:
        """The budgets as they were given, None where they follow from the share."""
        if isinstance(self.budgets, str) and self.budgets in PRESETS:
            return PRESETS[self.budgets]
        if not self.budgets:
            return None
        if isinstance(self.budgets, Mapping):
            return read_budgets(self.budgets, "scalekv budgets")
        if "." not in self.budgets and "/" not in self.budgets:
            raise InputError(f"scalekv: unknown budgets {self.budgets!r}"
                             f"{did_you_mean(self.budgets, PRESETS, '; give a preset or a .json file')}")
        return read_budgets(read_json(self.budgets), self.budgets)

    def budgets_of(self, plan: Plan, layers: int) -> Budgets:
        """The budgets of a plan and a number of layers."""
        if self.given is not None:
            return self.given
        return by_identity(plan, layers, uniform_rows(plan, self.share), {k: self.drafters for k in range(len(plan))},
                           least=self.width() + 1 if self.drafters else 1)

    def width(self) -> int:
        """Rows of the observation window."""
        if self.window is not None:
            return self.window
        return 16 if self.given is None or self.given.window is None else self.given.window

    def check(self, plan: Plan, layers: int) -> None:
        if not all(0 <= layer < layers for layer in self.drafters):
            raise InputError(f"scalekv: drafters are {self.drafters}, but the layers are 0 to {layers - 1}")
        budgets = self.budgets_of(plan, layers)
        budgets.check(plan, layers, self.name)
        least = min((n for row in budgets.rows for n in row or ()), default=self.width() + 1)
        if least <= self.width():
            raise InputError(f"scalekv: a budget of {least} rows has no room beside the window of {self.width()}; "
                             "raise the share, or set a smaller window (4)")

    def rows(self, plan: Plan) -> int:
        return uniform_rows(plan, self.share) if self.given is None else self.given.base

    def shrinks(self, plan: Plan, layers: int, layer: int, step: int, rows: int) -> bool:
        budgets = self.budgets_of(plan, layers)
        allowed = budgets.rows[min(step + 1, len(plan) - 1)]
        return allowed is not None and rows > max(allowed[layer], budgets.base)

    def after(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        plan, group, step = whole_plan(ctx), only_group(ctx, address), step_of(rows)
        budgets = self.budgets_of(plan, len(ctx.network.remembered))
        allowed = budgets.rows[min(step + 1, len(plan) - 1)]
        if allowed is None or group.rows <= allowed[layer] or (group.tags is None and group.rows <= budgets.base):
            return
        assert ctx.memory is not None
        ctx.memory.keep_rows(address, self.chosen(ctx, address, self.scores(ctx, address, q, rows), allowed[layer]))

    def chosen(self, ctx: Context, address: str, scores: Tensor, count: int) -> Tensor:
        """Positions (R, H, count) of the remembered rows that stay."""
        return best(scores, count)

    def scores(self, ctx: Context, address: str, q: Tensor, rows: Rows) -> Tensor:
        """The scores (R, H, N) of what a layer remembers behind a step; those of the window are infinite."""
        plan, group, step = whole_plan(ctx), only_group(ctx, address), step_of(rows)
        positions = window(plan.steps[step], len(rows), self.width())
        assert ctx.memory is not None
        tags = ctx.memory.tags_of(group)
        assert tags is not None
        query = ctx.offered(address, "bare query", rows) if self.scoring == "published" else q
        judging = query[:, :, listed(positions, query.device)]
        scale = q.shape[-1]**-0.5 if self.scoring == "published" else ctx.scale(address)
        return window_scores(judging, group.k[:, :, :group.rows], positions, len(rows), self.kernel, self.pooling,
                             self.scoring, scale, hidden_keys(rows, tags.step))


# Calibration

def selectivity(seen: Observed, top: int) -> Tensor | None:
    """Attention selectivity index of every row of the batch, (R,): the queries' mean attention to their own map, times
    their mean attention to the ``top`` rows of the history that each looks at most (arXiv 2505.19602, section 3.3)."""
    if seen.step == 0:
        return None
    p, history = seen.probabilities, seen.k.shape[2] - seen.own
    own = p[..., history:].sum(-1).mean(-1)
    most = p[..., :history].topk(min(top, history), -1).values.sum(-1).mean(-1)
    return (own * most).mean(1)


@dataclass(frozen=True)
class Calibration:
    """Finds a model's drafters and writes budgets.

    share: as ScaleKV's; drafting: the share of (layer, step) pairs that draft, of those that need budgets, at least one
    a step on average; top: rows of the history that selectivity counts, None for the uniform budget; queries: rows of
    a step that are looked at; window: rows that judge, which every budget must exceed.
    """

    share: float = 0.1
    drafting: float = 0.06
    top: int | None = None
    queries: int = 256
    refiner: float = 0.92
    decay: float = 0.108
    window: int = 16

    def run(self, system: Any, labels: Any = None, count: int | None = None, **options: Any) -> dict[str, Any]:
        """The budgets as JSON, and the selectivities (layers, steps) and drafters, [step, layer] each, behind them."""
        check_share(self.share, 1, "scalekv")
        plan, layers = system.plan_of(options.get("schedule")), len(system.generator.remembered)
        uniform = uniform_rows(plan, self.share)
        if uniform <= self.window:
            raise InputError(f"scalekv: a share of {self.share} is {uniform} rows, which leaves none beside the window "
                             f"of {self.window}; raise the share, or set a smaller window (4)")
        top = uniform if self.top is None else self.top
        found = measure(system, {"selectivity": lambda seen: selectivity(seen, top)}, labels, count,
                        queries=self.queries, **options)
        index = grid_of(found["selectivity"], layers, len(plan))
        drafters = find_drafters(index, plan, uniform, self.drafting)
        budgets = by_identity(plan, layers, uniform, drafters, self.refiner, self.decay, self.window + 1)
        return {**budgets.to_json(), "window": self.window, "grids": [list(grid) for grid in plan.grids],
                "drafters": [[k, layer] for k, chosen in drafters.items() for layer in chosen],
                "selectivity": [[None if value != value else round(value, 6) for value in row]
                                for row in index.tolist()]}


def find_drafters(index_LK: Tensor, plan: Plan, uniform: int, share: float) -> dict[int, list[int]]:
    """The layers that draft, by step: the pairs of smallest z-score of selectivity within their step, among the steps
    whose history exceeds the uniform budget."""
    steps = [k for k in range(1, len(plan)) if plan.starts[k] > uniform]
    if not steps:
        return {}
    of_steps = index_LK[:, steps]
    z = (of_steps - of_steps.mean(0)) / (of_steps.std(0, unbiased=False) + 1e-8)
    count = max(len(steps), round(share * z.numel()))
    found: dict[int, list[int]] = {k: [] for k in steps}
    for pair in z.flatten().argsort(stable=True)[:count].tolist():
        found[steps[pair % len(steps)]].append(pair // len(steps))
    return {k: sorted(chosen) for k, chosen in found.items()}
