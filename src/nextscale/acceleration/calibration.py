"""Calibration: draw a few pictures with a model and measure what its attention does, step by step and layer by layer.

Statistics are functions of what one attention of one step did, so one run serves any number of them: ScaleKV's
selectivity, HACK's column variance, LiteVAR's similarities. A method turns the means into its settings.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nextscale.acceleration.observation import hidden_keys, probabilities, strided
from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.layers.memory import Tags
from nextscale.plan import Plan
from nextscale.run import Rows


@dataclass(frozen=True)
class Observed:
    """What the attention of one layer did in one step.

    q (R, H, L, E), as attention took it; k, v (R, H, N, E), all rows that it saw, those of the step last; output
    (R, H, L, E); rows, keys: the tags of queries and of keys; R is branch-major over ``branches``.
    """

    layer: int
    step: int
    plan: Plan
    branches: tuple[str, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    scale: float
    rows: Rows
    keys: Tags
    queries: int | None = None

    @property
    def own(self) -> int:
        """How many of the keys, the last ones, are those of the step itself."""
        return self.q.shape[2]

    @cached_property
    def chosen(self) -> list[int]:
        """The queries that are looked at: all, or ``queries`` evenly strided ones."""
        return strided(self.own, self.queries or self.own)

    @cached_property
    def probabilities(self) -> Tensor:
        """Attention probabilities of the chosen queries, (R, H, Q, N) float32."""
        return probabilities(self.q[:, :, self.chosen], self.k, self.scale, hidden_keys(self.rows, self.keys.step))

    def of_branch(self, rows: Tensor, name: str) -> Tensor:
        """One branch's part (B, ...) of something with a leading R."""
        pictures = len(rows) // len(self.branches)
        first = self.branches.index(name) * pictures
        return rows[first:first + pictures]


Statistic = Callable[[Observed], "Tensor | None"]
"""What is measured: a tensor whose first axis is averaged over (rows of the batch, pictures), or None to leave a step
out."""

Means = dict[tuple[int, int], Tensor]
"""Means by (layer, step)."""


@dataclass
class Measurement(Hook):
    """The hook that measures: it changes nothing and gathers the sums of some statistics.

    layers, steps: where to look (None: everywhere); queries: how many of a step's rows the probabilities are computed
    for (None: all). Unlike other hooks it keeps what it finds, over all batches that it is given to.
    """

    statistics: Mapping[str, Statistic]
    layers: Collection[int] | None = None
    steps_of_interest: Collection[int] | None = None
    queries: int | None = None
    sums: dict[str, dict[tuple[int, int], tuple[Tensor, int]]] = field(default_factory=dict)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        if not getattr(model.generator, "remembered", ()):
            raise InputError(f"calibration: {type(model.generator).__name__} remembers no keys and values, and "
                             "attention over them is what is measured; use a model that does")

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Any) -> Tensor:
        out: Tensor = inner(q, k, v, rows)
        names = ctx.network.remembered
        if address not in names or rows.spans is None or len(rows.spans) != 1:
            return out
        layer, step = names.index(address), rows.spans[0].step
        if layer not in (self.layers or (layer,)) or step not in (self.steps_of_interest or (step,)):
            return out
        memory = ctx.remembered("calibration")
        (group,) = memory.groups[address]
        tags, n = memory.tags_of(group), group.rows
        assert tags is not None and ctx.plan is not None
        seen = Observed(layer, step, ctx.plan, ctx.branches, q, group.k[:, :, :n], group.v[:, :, :n], out,
                        ctx.scale(address), rows, tags, self.queries)
        for name, statistic in self.statistics.items():
            found = statistic(seen)
            if found is not None:
                total, count = self.sums.setdefault(name, {}).get((layer, step), (torch.zeros(()), 0))
                self.sums[name][layer, step] = total + found.double().sum(0).cpu(), count + len(found)
        return out

    def means(self, name: str) -> Means:
        """The means of a statistic by (layer, step), float64."""
        return {at: total / count for at, (total, count) in self.sums.get(name, {}).items()}


def measure(system: Any, statistics: Mapping[str, Statistic], labels: Any = None, count: int | None = None, *,
            layers: Collection[int] | None = None, steps: Collection[int] | None = None, queries: int | None = None,
            **options: Any) -> dict[str, Means]:
    """Draw pictures with ``system.generate(labels, count, **options)`` and average statistics over them.

    Returns for every statistic its means by (layer, step). layers, steps, queries: as ``Measurement``'s. Raises
    InputError for a model that remembers no keys and values.
    """
    hook = Measurement(statistics, layers, steps, queries)
    system.generate(labels, count, output="torch", **{"progress": False, **options,
                                                      "hooks": [hook, *options.get("hooks", ())]})
    return {name: hook.means(name) for name in statistics}


def grid_of(means: Means, layers: int, steps: int) -> Tensor:
    """Means as a tensor (layers, steps, ...), NaN where nothing was measured."""
    some = next(iter(means.values()))
    grid = torch.full((layers, steps, *some.shape), torch.nan, dtype=torch.float64)
    for (layer, step), value in means.items():
        grid[layer, step] = value
    return grid
