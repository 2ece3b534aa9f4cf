"""HACK: head-aware memory compression (arXiv 2504.09261), and the split budgets of HACK++ (arXiv 2606.08302).

Two kinds of heads: "contextual" ones, whose queries all look at the same few rows, stand being shrunk far; "structural"
ones, whose queries look at their own place in earlier scales, do not. What a layer remembers and the step's own rows
are shrunk together, class by class, before the queries read them: attention costs as much as its budget.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.acceleration.budgets import read_json
from nextscale.acceleration.calibration import Observed, grid_of, measure
from nextscale.acceleration.memory_policy import MemoryPolicy, step_of, whole_plan
from nextscale.acceleration.observation import best, hidden_keys, pooled, probabilities, strided
from nextscale.context import Context
from nextscale.devices import listed
from nextscale.errors import InputError, did_you_mean
from nextscale.layers.memory import Group
from nextscale.plan import Plan
from nextscale.run import Rows

Classes = tuple[tuple[bool, ...], ...]
"""Which heads are contextual, layer by layer."""

PRESETS: dict[str, Classes] = {
    "emoji-text-64": tuple(tuple(mark == "c" for mark in layer)
                           for layer in ("sccc", "scsc", "ssss", "sscc", "ccsc")),
}
"""Contextual (c) and structural (s) heads, layer by layer: the shipped model's, as ``nextscale calibrate hack`` tells
them apart."""


@dataclass(frozen=True)
class HACK(MemoryPolicy):
    """HACK: contextual and structural heads remember budgets of their own, chosen before attention (arXiv 2504.09261).

    heads: a file of ``nextscale calibrate hack``, a mapping of the same form, or a preset (emoji-text-64). compression:
    1 - B / T, B rows that a head keeps on average, of the T rows of all steps, the step's own counted; contextual: B_C
    over B, what a contextual head keeps; structural heads get what is left. queries: rows of a step that judge;
    initial: first steps that structural heads always keep; merge: in the last step, contextual heads average what they
    drop into the kept rows most like it. stored: (HACK++) 1 - B / T of what stays behind attention, None for the same;
    kernel: (HACK++) how many neighbours a contextual head's scores are max-pooled over, 1 for none.
    """

    name: ClassVar[str] = "hack"

    heads: str | dict[str, Any] = ""
    compression: float = 0.7
    contextual: float = 1 / 3
    queries: int = 32
    initial: int = 2
    merge: bool = True
    stored: float | None = None
    kernel: int = 1

    def __post_init__(self) -> None:
        for name, value in (("compression", self.compression), ("stored", self.stored)):
            if value is not None and not 0 <= value < 1:
                raise InputError(f"hack: {name} is {value}; it must be at least 0 and below 1 (0 keeps everything)")
        if self.stored is not None and self.stored < self.compression:
            raise InputError(f"hack: stored {self.stored} is below compression {self.compression}; what stays is a "
                             "part of what attention reads")
        if not 0 < self.contextual <= 1:
            raise InputError(f"hack: contextual is {self.contextual}; it must lie above 0 and be at most 1")
        if self.queries < 1 or self.initial < 0 or self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError("hack: queries must be at least 1, initial at least 0, and kernel odd")
        _ = self.classes  # a file that can't be read is told before any work

    @cached_property
    def classes(self) -> Classes:
        """Which heads are contextual, layer by layer."""
        if isinstance(self.heads, Mapping):
            return read_classes(self.heads, "hack heads")
        if not self.heads:
            raise InputError("hack: heads are missing; `nextscale calibrate hack` tells a model's contextual heads "
                             "apart")
        if self.heads in PRESETS:
            return PRESETS[self.heads]
        if "." not in self.heads and "/" not in self.heads:
            raise InputError(f"hack: unknown heads {self.heads!r}"
                             f"{did_you_mean(self.heads, PRESETS, '; give a preset or a .json file')}")
        return read_classes(read_json(self.heads), self.heads)

    def budgets(self, plan: Plan, compression: float) -> tuple[int, int]:
        """Rows that a contextual and a structural head keep: alpha B_C + (1 - alpha) B_S = B, alpha being the share of
        contextual heads."""
        flat = [one for row in self.classes for one in row]
        alpha, length = sum(flat) / len(flat), plan.length
        mean = (1 - compression) * length
        if alpha in (0, 1):
            return max(1, round(mean)), max(1, round(mean))
        few = max(1, round(self.contextual * mean))
        many = min(length, max(1, round((mean - alpha * few) / (1 - alpha))))
        # Where structural heads keep everything, contextual ones get what is left.
        return (few if many < length else min(length, round((mean - (1 - alpha) * length) / alpha))), many

    def check(self, plan: Plan, layers: int) -> None:
        if len(self.classes) != layers:
            raise InputError(f"hack: the heads are those of {len(self.classes)} layers, this model has {layers}; "
                             "calibrate it (nextscale calibrate hack)")
        first = plan.starts[min(self.initial, len(plan))]
        least = min(self.budgets(plan, one)[1] for one in (self.compression, self.stored) if one is not None)
        if least < first:
            raise InputError(f"hack: a structural head would keep {least} rows, fewer than the {first} of the first "
                             f"{self.initial} steps; compress less, or set a smaller initial")

    def rows(self, plan: Plan) -> int:
        return self.budgets(plan, self.compression)[1]

    def shrinks(self, plan: Plan, layers: int, layer: int, step: int, rows: int) -> bool:
        """By its heads that keep least: with them the others get memory of their own."""
        stored = self.stored if self.stored is not None and step < len(plan) - 1 else self.compression
        few, many = self.budgets(plan, stored)
        return rows > min(few if contextual else many for contextual in self.classes[layer])

    def before(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        plan = whole_plan(ctx)
        self._shrink(ctx, address, layer, q, rows, self.budgets(plan, self.compression),
                     self.merge and step_of(rows) == len(plan) - 1)

    def after(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        plan = whole_plan(ctx)
        if self.stored is not None and step_of(rows) < len(plan) - 1:
            self._shrink(ctx, address, layer, q, rows, self.budgets(plan, self.stored), False)

    def _shrink(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows, budgets: tuple[int, int],
                merge: bool) -> None:
        memory = ctx.memory
        assert memory is not None
        contextual = self.classes[layer]
        if len(contextual) != q.shape[1]:
            raise InputError(f"hack: the heads of layer {layer} are {len(contextual)} in the table, {q.shape[1]} here; "
                             "calibrate this model (nextscale calibrate hack)")
        kinds = sorted(set(contextual), reverse=True)  # contextual heads first
        if len(kinds) == 2 and len(memory.groups[address]) == 1:
            if memory.groups[address][0].rows <= min(budgets):
                return
            memory.split_heads(address, [[h for h, one in enumerate(contextual) if one is kind] for kind in kinds])
        for number, (kind, group) in enumerate(zip(kinds, memory.groups[address], strict=True)):
            budget = budgets[0 if kind else 1]
            if group.rows <= budget:
                continue
            scores = self.scores(ctx, address, group, q if group.heads is None else q[:, group.heads], rows, kind)
            index = best(scores, budget)
            merged = merge_evicted(group.k[:, :, :group.rows], group.v[:, :, :group.rows], index) \
                if kind and merge else None
            memory.keep_rows(address, index, number, merged)

    def scores(self, ctx: Context, address: str, group: Group, q: Tensor, rows: Rows, contextual: bool) -> Tensor:
        """Scores (R, H, N) of what a class of heads holds: the mean probability that the step's judging queries give a
        row; structural heads keep the first steps before all else, then the step's own rows, then the rest."""
        assert ctx.memory is not None
        tags = ctx.memory.tags_of(group)
        assert tags is not None
        judges = q[:, :, listed(strided(len(rows), self.queries), q.device)]
        scores = probabilities(judges, group.k[:, :, :group.rows], ctx.scale(address),
                               hidden_keys(rows, tags.step)).mean(2)
        if contextual:
            return pooled(scores, self.kernel, "max")
        step = tags.step if tags.step.ndim == 3 else tags.step[:, None]
        own = torch.where(step == step_of(rows), 2.0, 0.0)
        return torch.where(step < self.initial, torch.inf, scores + own)


def merge_evicted(k_RHNE: Tensor, v_RHNE: Tensor, index_RHM: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (R, H, M, E) of the kept rows, each the mean of its own and of those that were dropped and whose
    keys are most like its key, by their cosine (as in LOOK-M)."""
    wide = index_RHM[..., None].expand(-1, -1, -1, k_RHNE.shape[3])
    unit = F.normalize(k_RHNE.float(), dim=-1)
    owner_RHN = (unit @ unit.gather(2, wide).transpose(2, 3)).argmax(-1)
    owner_RHN.scatter_(2, index_RHM, torch.arange(index_RHM.shape[2], device=index_RHM.device).expand_as(index_RHM))
    count = torch.zeros_like(index_RHM).scatter_add_(2, owner_RHN, torch.ones_like(owner_RHN))[..., None]

    def mean(x: Tensor) -> Tensor:
        total = x.new_zeros(*index_RHM.shape, x.shape[3], dtype=torch.float32)
        total.scatter_add_(2, owner_RHN[..., None].expand_as(x), x.float())
        return (total / count).to(x.dtype)

    return mean(k_RHNE), mean(v_RHNE)


def read_classes(found: Mapping[str, Any], where: str) -> Classes:
    """The heads of ``nextscale calibrate hack``'s JSON. Raises InputError where it holds none."""
    table = found.get("contextual")
    if not isinstance(table, list) or not table or not all(isinstance(row, list) and row for row in table) \
            or not all(one is True or one is False for row in table for one in row):
        raise InputError(f"{where}: it needs `contextual`, for every layer a list of true or false, one a head")
    return tuple(tuple(row) for row in table)


@torch.no_grad()
def group_heads(generator: nn.Module, classes: Classes) -> Classes:
    """Reorder the heads of VAR's transformer in place so that contextual ones come first in every layer, and return
    their table. The function stays what it was; classes of neighbouring heads are then read without a copy.

    Rows of the weights of queries, keys and values, biases and the scale of each head move, and columns of the output
    projection. Raises InputError where the table is not the network's, or its attention is of another form.
    """
    layers: list[Any] = [getattr(block, "attention", None) for block in getattr(generator, "blocks", ())]
    if [len(row) for row in classes] != [getattr(one, "heads", None) for one in layers]:
        raise InputError("hack: the table of heads is not that of this network")
    if not all(hasattr(one, "q_bias") for one in layers):
        raise InputError("hack: only the heads of VAR's transformer can be reordered")
    for attention, row in zip(layers, classes, strict=True):
        order = torch.tensor(sorted(range(len(row)), key=lambda head: not row[head]))
        for parameter, axis, outer in ((attention.qkv.weight, 0, 3), (attention.q_bias, 0, 1), (attention.v_bias, 0, 1),
                                       (attention.projection.weight, 1, 1), (attention.scale_1H11, 1, 1)):
            if parameter is not None:
                split = parameter.unflatten(axis, (outer, len(row), -1))
                parameter.copy_(split.index_select(axis + 1, order.to(parameter.device)).reshape(parameter.shape))
    return tuple(tuple(sorted(row, reverse=True)) for row in classes)


# Calibration

def column_variance(seen: Observed) -> Tensor:
    """How much the queries differ in what they look at, (R, H): the variance over the queries of every key's
    probability, summed over the keys. Low where all look at the same rows (arXiv 2504.09261)."""
    return seen.probabilities.var(2, unbiased=False).sum(-1)


@dataclass(frozen=True)
class Calibration:
    """Tells contextual from structural heads: those of lowest variance, all layers ranked together.

    share: of contextual heads (alpha; set it by the knee of the sorted variances); queries: rows of the last step that
    are looked at.
    """

    share: float = 0.5
    queries: int = 1024

    def run(self, system: Any, labels: Any = None, count: int | None = None, **options: Any) -> dict[str, Any]:
        """The heads as JSON, with their variances."""
        if not 0 <= self.share <= 1:
            raise InputError(f"hack: share is {self.share}; it must lie in 0..1")
        plan, last = system.plan, len(system.plan) - 1
        found = measure(system, {"variance": column_variance}, labels, count, steps=(last,), queries=self.queries,
                        **options)
        variance_LH = grid_of(found["variance"], len(system.generator.remembered), len(plan))[:, last]
        return {"contextual": classify(variance_LH, self.share), "share": self.share,
                "variance": [[float(f"{value:.4g}") for value in row] for row in variance_LH.tolist()]}


def classify(variance_LH: Tensor, share: float) -> list[list[bool]]:
    """The ``share`` of heads with the lowest variance, by layer."""
    order = variance_LH.flatten().argsort(stable=True)
    contextual = torch.zeros(variance_LH.numel(), dtype=torch.bool)
    contextual[order[:round(share * len(order))]] = True
    return contextual.view(variance_LH.shape).tolist()
