"""LiteVAR (Xie et al., arXiv 2411.17178): window attention, attention shared by guidance branches, rounded weights.

Three parts, each by itself and all together; nothing is trained.

Multi-diagonal window attention. A row at cell (y, x) of step k, on a grid (h_k, w_k), sees of step j <= k the cells

    |y' - ŷ| <= max(r h_j, 1/2)  and  |x' - x̂| <= max(r w_j, 1/2),     ŷ = (y + 1/2) h_j / h_k - 1/2,  x̂ alike

with reach r in 0..1; steps of few cells stay visible as a whole. In raster order this is one band of diagonals a step.

Attention sharing: softmax(q k^T) v is computed for the first guidance branch and copied to the others, before the
output projection; adaLN, MLP and residual streams stay each branch's own. Layers share at all steps, so that the other
branches' queries, keys and values are neither computed nor kept, and the projection of equal rows is computed once.

Rounding (``quantise``): weights of 8 bits, an output channel its own scale. The second layer of the MLP stays, since
its inputs, behind the GELU, have a long tail; so do modulations, embeddings and the head.

The paper came without code: the window's rule and the choice of layers follow its group's DiTFastAttn (2406.08552).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.acceleration.blocks import block_of, depth_of
from nextscale.acceleration.budgets import read_json
from nextscale.acceleration.calibration import Observed, Statistic, grid_of, measure
from nextscale.acceleration.memory_policy import MemoryPolicy
from nextscale.context import Attend, Context, Hook, overrides
from nextscale.errors import InputError
from nextscale.layers import quantised
from nextscale.layers.attention import Marks, Rule, attention, pairs
from nextscale.layers.memory import Tags
from nextscale.plan import Plan
from nextscale.run import At, Rows

KEPT = ("mlp.contract",)
"""Layers whose weights are not rounded, by the ends of their names."""


@dataclass(frozen=True)
class Window(Rule):
    """The rule of the window: who sees whom among the cells of a plan with these grids (h, w).

    reach: of the rows of every step, as a share of the map, 1 for all of it; dense: grids of at most that many cells a
    side are seen as a whole. A window covers both maps of a joint plan.
    """

    grids: tuple[tuple[int, int], ...]
    reach: tuple[float, ...]
    dense: int = 4

    def marks(self, tags: Tags) -> Marks:
        """The line that a row lies on, on either axis, among those of all steps."""
        starts = _tables(self, tags.step.device)[2:]
        return tuple(start_K[tags.step.long()] + tags.cell[..., 1 + axis] for axis, start_K in enumerate(starts))

    def shown(self, device: torch.device) -> Callable[[Marks, Marks], Tensor]:
        """Whether the key's line is in the query's window, on both axes."""
        high_NN, wide_NN, _, _ = _tables(self, device)
        return lambda query, key: high_NN[query[0], key[0]] & wide_NN[query[1], key[1]]

    @cached_property
    def covers(self) -> tuple[bool, ...]:
        """Of every step, whether its rows see all cells of it and of the steps before."""
        return tuple(all(bool((counts[k, :k + 1] == side[k] * side[:k + 1]).all())
                         for counts, side in zip(self.counts, self.sides, strict=True)) for k in range(len(self.grids)))

    @cached_property
    def sides(self) -> Tensor:
        """Heights, then widths, (2, K)."""
        return torch.tensor(self.grids).T

    def lines(self, axis: int) -> Tensor:
        """Which lines (rows of cells for axis 0, columns for 1) see which, all steps' one after the other, (N, N)."""
        side_K = self.sides[axis]
        step_N = torch.repeat_interleave(torch.arange(len(side_K)), side_K)
        place_N = torch.arange(len(step_N)) - (side_K.cumsum(0) - side_K)[step_N]
        side_N, centre_N = side_K[step_N].double(), 2.0 * place_N + 1
        apart = (centre_N[None] * side_N[:, None] - centre_N[:, None] * side_N[None]).abs()  # in 1 / (2 h_k h_j)
        reach_N1 = torch.tensor(self.reach, dtype=torch.float64)[step_N][:, None]
        inside = apart <= torch.maximum(2 * reach_N1 * side_N[:, None] * side_N[None], side_N[:, None]) + 1e-6
        return inside | (self.sides.amax(0) <= self.dense)[step_N][None]

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Pairs of lines that see each other, by step of query and key, (K, K), for either axis."""
        found = []
        for axis in (0, 1):
            of_NK = nn.functional.one_hot(torch.repeat_interleave(torch.arange(len(self.grids)), self.sides[axis]))
            found.append((of_NK.T.double() @ self.lines(axis).double() @ of_NK.double()).round().long())
        return found[0], found[1]

    def pairs(self, plan: Plan) -> tuple[int, ...]:
        """(query, key) pairs of every step of a plan that the window and the visibility show."""
        before, found = plan.visible.previous, []
        for k, step in enumerate(plan):
            first = 0 if before is None else max(0, k - before)
            shown = self.counts[0][k, first:k + 1] * self.counts[1][k, first:k + 1]
            found.append(int(shown.sum()) * step.maps**2)
        return tuple(found)


@lru_cache(maxsize=256)
def _tables(window: Window, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lines that see each other on either axis, and the first line of every step, (K,), on either."""
    with torch.inference_mode(False):
        high_K, wide_K = window.sides.cumsum(1) - window.sides
        return window.lines(0).to(device), window.lines(1).to(device), high_K.to(device), wide_K.to(device)


@lru_cache(maxsize=256)
def window_of(grids: tuple[tuple[int, int], ...], reach: tuple[float, ...], dense: int) -> Window:
    """The window, made once."""
    return Window(grids, reach, dense)


@dataclass(frozen=True)
class Cost:
    """Attention over a whole plan, per picture and head, summed over layers and branches.

    pairs: (query, key) pairs that are computed; all_pairs: those of the model as it is; rows, all_rows: keys and values
    that are kept.
    """

    pairs: int
    all_pairs: int
    rows: int
    all_rows: int


@dataclass(frozen=True)
class LiteVAR(Hook):
    """LiteVAR: window attention, and attention shared by guidance branches (arXiv 2411.17178).

    window: reach of all layers and steps, a share of the map from 0 to 1 (1: all); dense: grids of at most that many
    cells a side are seen as a whole; share: numbers of the blocks whose attention all guidance branches share;
    calibration: what ``calibrate`` found, or a JSON file with it, in the place of window and share.

    Raises InputError for values out of range, and DataError for a calibration that can't be read.
    """

    window: float = 1.0
    dense: int = 4
    share: tuple[int, ...] = ()
    calibration: str | dict[str, Any] = ""

    def __post_init__(self) -> None:
        reaches, dense, shared = self.parts
        if self.calibration and (self.window != 1 or self.share):
            raise InputError("litevar: a calibration says what windows and shared blocks there are; leave out window "
                             "and share")
        if not all(0 <= reach <= 1 for reach in (self.window, *(r for layer in reaches for r in layer))):
            raise InputError(f"litevar: window is {self.window}; a reach is a share of the map, from 0 to 1")
        if dense < 0 or any(block < 0 for block in shared):
            raise InputError(f"litevar: dense is {dense} and share {sorted(shared)}; neither can be negative")

    @cached_property
    def parts(self) -> tuple[tuple[tuple[float, ...], ...], int, frozenset[int]]:
        """A reach for every block and step (none: ``window`` is that of all), dense, and the blocks that share."""
        return _read(self.calibration) if self.calibration else ((), self.dense, frozenset(self.share))

    @property
    def shared(self) -> frozenset[int]:
        """The blocks that share."""
        return self.parts[2]

    def window_at(self, plan: Plan, block: int | None) -> Window | None:
        """The window of a block, or of what is none of the network's (a control tower's): the calibrated one is not
        its."""
        reaches, dense, _ = self.parts
        if reaches:
            return None if block is None else window_of(plan.grids, reaches[block], dense)
        return None if self.window == 1 else window_of(plan.grids, (self.window,) * len(plan), dense)

    def cost(self, plan: Plan, depth: int, branches: int = 2) -> Cost:
        """What attention computes and keeps in a network of ``depth`` blocks."""
        pairs = rows = 0
        for block in range(depth):
            window = self.window_at(plan, block)
            computed = 1 if block in self.shared else branches
            pairs += computed * (plan.pairs if window is None else sum(window.pairs(plan)))
            rows += computed * plan.length
        return Cost(pairs, branches * depth * plan.pairs, rows, branches * depth * plan.length)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        if sum(isinstance(hook, LiteVAR) for hook in hooks) > 1:
            raise InputError("litevar: the run carries it twice; give all settings to one of them")
        if any(step.count is not None for step in plan):
            raise InputError("litevar: a step of this plan predicts a part of its grid, and windows are over whole "
                             "maps; leave it out")
        depth = depth_of(model.generator) or 0
        reaches = self.parts[0]
        if reaches and (len(reaches) != depth or any(len(layer) != len(plan) for layer in reaches)):
            raise InputError(f"litevar: the calibration is for {len(reaches)} blocks and {len(reaches[0])} steps, the "
                             f"run has {depth} and {len(plan)}; calibrate for this model")
        if any(block >= depth for block in self.shared):
            raise InputError(f"litevar: share names block {max(self.shared)}, but the network has {depth}")
        for hook in hooks:
            self._check_beside(hook)

    def _check_beside(self, hook: Hook) -> None:
        name, narrows = type(hook).__name__, bool(self.parts[0]) or self.window < 1
        if self.shared and overrides(hook, "residual"):
            raise InputError(f"litevar: {name} picks rows in every branch by itself, so attention can't be copied from "
                             "one to another; leave out share")
        if self.shared and overrides(hook, "attend") and hook is not self:
            raise InputError(f"litevar: {name} acts on the attention of every branch, and share computes that of the "
                             "first alone; leave out share")
        if narrows and isinstance(hook, MemoryPolicy) and type(hook).before is not MemoryPolicy.before:
            raise InputError(f"litevar: {name} drops keys before attention reads them, perhaps all that a window "
                             "shows; leave out window")

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        plan = ctx.plan
        if plan is None or ctx.network is None:
            raise InputError("litevar: this pass doesn't say which plan and network it is of; leave it out")
        block = block_of(ctx.network, address)
        window = self.window_at(plan, block)
        steps = range(len(plan)) if rows.spans is None else [span.step for span in rows.spans]
        if window is not None and not all(window.covers[k] for k in steps):
            rows = rows.narrow(window)
        first = self._computed(ctx, address, len(q), rows)
        if first == len(q) or ("litevar", address) in ctx.scratch:
            return inner(q, k, v, rows)
        if self._kept_alone(ctx, address, first):
            k, v = (None if given is None else given[:first] for given in (k, v))
        return inner(q[:first], k, v, rows).repeat(len(ctx.branches), 1, 1, 1)

    def leading(self, ctx: Context, address: str, count: int, rows: Rows) -> int:
        first = self._computed(ctx, address, count, rows)
        if first == count or not self._kept_alone(ctx, address, first):
            return count
        ctx.scratch["litevar", address] = first  # what comes to ``attend`` is of the first branch already
        return first

    def _computed(self, ctx: Context, address: str, count: int, rows: Rows) -> int:
        """How many of the batch's rows an attention is computed for."""
        if len(ctx.branches) == 1 or ctx.network is None or block_of(ctx.network, address) not in self.shared:
            return count
        if len(rows.step) > 1 or len(rows.cell) > 1:
            raise InputError("litevar: the rows of a call differ from picture to picture, so attention can't be copied "
                             "from one branch to another; leave out share")
        return count // len(ctx.branches)

    @staticmethod
    def _kept_alone(ctx: Context, address: str, first: int) -> bool:
        """Whether memory need not hold the other branches' keys: it does in a run that began without sharing."""
        held = None if ctx.memory is None else ctx.memory.groups.get(address)
        return held is None or len(held[0].k) == first


def _read(calibration: str | Mapping[str, Any]) -> tuple[tuple[tuple[float, ...], ...], int, frozenset[int]]:
    """Reaches, dense and shared blocks of a calibration. Raises InputError and DataError where they aren't there."""
    where = calibration if isinstance(calibration, str) else "calibration"
    found = read_json(calibration) if isinstance(calibration, str) else calibration
    try:
        reaches = tuple(tuple(float(reach) for reach in layer) for layer in found["windows"])
        return reaches, int(found["dense"]), frozenset(int(block) for block in found["share"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"litevar: {where} must have windows (a reach for every block and step), dense and share "
                         f"({type(error).__name__}: {error}); nextscale calibrate litevar writes one") from None


def quantise(generator: nn.Module, bits: int = 8, activation_bits: int | None = None, per_tensor: bool = False,
             keep: Sequence[str] = KEPT) -> list[str]:
    """Round a network's weights in place, see ``layers.quantised.quantise``; by default 8 bits, inputs as they are."""
    return quantised.quantise(generator, bits, activation_bits, per_tensor, keep)


# Calibration

def window_errors(reaches: Sequence[float], dense: int) -> Statistic:
    """What windows do to an attention: |o' - o|² / |o|² for every reach, (R, len(reaches))."""
    def errors(seen: Observed) -> Tensor:
        found = []
        for reach in reaches:
            window = window_of(seen.plan.grids, (reach,) * len(seen.plan), dense)
            mask = None if window.covers[seen.step] else window.sees(*pairs(seen.rows.tags, seen.keys))
            out = seen.output if mask is None else attention(seen.q, seen.k, seen.v, mask, seen.scale)
            found.append(_apart(out, seen.output))
        return torch.stack(found, 1)

    return errors


def sharing_error(seen: Observed) -> Tensor | None:
    """What copying the first branch's attention does to the others: |o_1 - o|² / |o|², the mean over them, (B,)."""
    if len(seen.branches) == 1:
        return None
    first, *others = (seen.of_branch(seen.output, name) for name in seen.branches)
    return torch.stack([_apart(first, other) for other in others]).mean(0)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|² / |other|² of every row of the batch."""
    one, other = one.float().flatten(1), other.float().flatten(1)
    return (one - other).square().sum(1) / other.square().sum(1).clamp_min(1e-12)


class _Logits(Hook):
    """Keeps the guided logits that a scoring pass comes by."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def logits(self, logits: Tensor, at: At) -> Tensor:
        self.found.append(logits)
        return logits


def output_error(system: Any, tokens: Sequence[Tensor], labels: Any, hooks: Sequence[Hook], guidance: Any,
                 schedule: Any = None) -> float:
    """How far hooks take the guided logits of given tokens from those without: |l' - l| / |l|, l centred."""
    found = []
    for used in ((), hooks):
        keeps = _Logits()
        system.log_prob(tokens, labels, guidance, schedule=schedule, hooks=[*used, keeps])
        logits = torch.cat(keeps.found, 1)
        found.append(logits - logits.mean(-1, keepdim=True))
    return float((found[1] - found[0]).norm() / found[0].norm())


@dataclass(frozen=True)
class Calibration:
    """Finds windows and shared blocks for a model, from a few pictures that it draws.

    budget: every block and step gets the smallest of the ``reaches`` that changes its attention's output by no more
    than this (root of the mean relative square), and the whole map where none does. share_budget: blocks are made to
    share, those whose branches are nearest to each other first, as long as the guided logits of the pictures stay
    within this of those without sharing. Raises InputError for budgets below 0.
    """

    budget: float = 0.1
    share_budget: float = 0.1
    reaches: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5)
    dense: int = 4

    def __post_init__(self) -> None:
        if min(self.budget, self.share_budget) < 0:
            raise InputError(f"litevar: budgets are {self.budget} and {self.share_budget}; neither can be negative")

    def run(self, system: Any, labels: Any = None, count: int | None = None, **options: Any) -> dict[str, Any]:
        """What ``LiteVAR(calibration=...)`` reads. Raises InputError for models that remember no keys."""
        statistics = {"window": window_errors(self.reaches, self.dense), "share": sharing_error}
        means = measure(system, statistics, labels, count, **options)
        blocks, grids = len(system.generator.remembered), system.plan_of(options.get("schedule")).grids
        error_LKN = grid_of(means["window"], blocks, len(grids)).sqrt()
        covered = window_of(grids, (0.0,) * len(grids), self.dense).covers
        windows = [[1.0 if covered[k] else self._smallest(errors) for k, errors in enumerate(layer)]
                   for layer in error_LKN.tolist()]
        share: list[int] = []
        if self.share_budget and means["share"]:
            apart_L = grid_of(means["share"], blocks, len(grids)).mean(1)
            share = self._share(system, apart_L.argsort().tolist(), labels, count, options)
        return {"windows": windows, "dense": self.dense, "share": share, "grids": [list(grid) for grid in grids]}

    def _smallest(self, errors: Sequence[float]) -> float:
        return next((reach for reach, error in sorted(zip(self.reaches, errors, strict=True))
                     if error <= self.budget), 1.0)

    def _share(self, system: Any, order: Sequence[int], labels: Any, count: int | None,
               options: Mapping[str, Any]) -> list[int]:
        drawn = system.generate(labels, count, **{**options, "output": "torch"})
        guidance = system.guidance(drawn.settings)
        share: tuple[int, ...] = ()
        for block in order:
            tried = LiteVAR(share=(*share, block))
            if output_error(system, drawn.tokens, drawn.labels, [tried], guidance,
                            options.get("schedule")) <= self.share_budget:
                share = tried.share
        return sorted(share)
