"""FastVAR (Guo et al., arXiv 2503.23367): at the last scales a sub-layer computes its pivotal rows alone.

With x (L, C) the residual stream that a sub-layer f is given at a pruned step, before its norm, and r the step's ratio:

    s_i = sum_c (x_ic - mean_j x_jc)^2;  I = the L - int(L r) rows with the largest s        (pivotal token selection)
    y = f(x_I);  Y = resize(what f added at the cached step, area);  Y_I = y;  x <- x + Y    (cached token restoration)

f is a residual branch with its norm and its gate; the cached step is the last one that runs in full. Every branch of
every picture selects by itself, and every sub-layer anew. Keys and values of the selected rows alone enter memory. A
ratio of 1 leaves a step out: the picture is decoded from what was written before. No training.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.acceleration.blocks import block_of, depth_of
from nextscale.context import Context, Function, Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.layers.memory import Memory
from nextscale.layers.resize import resize
from nextscale.plan import Plan, Span, Step
from nextscale.run import Call, Rows, Run

Score = Literal["pivotal", "random"]
Restore = Literal["cached", "zero"]


@dataclass(frozen=True)
class Preset:
    """The ratios of the last steps, blocks that run in full at both ends (None: a tenth each), and the schedule."""

    ratio: tuple[float, ...]
    full_blocks: tuple[int, int] | None
    sides: tuple[int, ...]


PRESETS = {
    "infinity-1m": Preset((0.4, 0.5, 1.0, 1.0), (3, 4), (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)),
    "hart-1024": Preset((0.5, 0.75), (0, 0), (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)),
    # Not published: Infinity's first two ratios at the last two of VAR's steps.
    "var-256": Preset((0.4, 0.5), None, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "var-512": Preset((0.4, 0.5), None, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)),
}


def kept_rows(rows: int, ratio: float) -> int:
    """How many of a step's rows are computed when a share of them is pruned: L - int(L r)."""
    return rows - int(rows * ratio)


def pivotal_score(x_RLC: Tensor) -> Tensor:
    """Squared distance of every row from the mean of its step, (R, L), in float32: large where there is detail."""
    x = x_RLC.float()
    return (x - x.mean(1, keepdim=True)).square().sum(-1)


def largest(score_RL: Tensor, keep: int) -> Tensor:
    """The rows with the largest scores, (R, keep), the largest first."""
    return score_RL.topk(keep, 1).indices


def to_map(rows_RLC: Tensor, maps: int, grid: tuple[int, int]) -> Tensor:
    """The rows of a step as (R, maps * C, h, w)."""
    return rows_RLC.unflatten(1, (maps, *grid)).permute(0, 1, 4, 2, 3).flatten(1, 2)


def upsampled(map_RCHW: Tensor, maps: int, grid: tuple[int, int]) -> Tensor:
    """A map as the rows (R, L, C) of another grid. ``area`` means that a cell is the mean of those that it overlaps."""
    found = resize(map_RCHW, grid, "area").unflatten(1, (maps, -1)).permute(0, 1, 3, 4, 2)
    return found.flatten(1, 3).to(map_RCHW.dtype)


@dataclass(frozen=True)
class Cost:
    """What the blocks compute for one row of the batch over a whole plan.

    rows: of every step in a pruned block; lengths: rows whose keys and values every block holds at the end;
    token_layers: rows, summed over blocks; flops: of the blocks' products and their attention, two a multiplication.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    token_layers: int
    flops: float


@dataclass(frozen=True)
class FastVAR(Hook):
    """Token pruning at the last steps of a scale-wise run.

    ratio: share of the rows that is pruned at each of the plan's last steps, coarse to fine, as in (0.4, 0.5, 1, 1); 1
    leaves a step out; one number for the last step alone. The step before these is the cached one. By default 0.5.
    full_blocks: how many blocks at each end compute all rows; by default a tenth of them, rounded.
    preset: published ratios by name, see ``PRESETS``; what is given beside it goes first.
    score: ``pivotal``, or ``random`` rows; restore: ``cached``, or ``zero``, which adds nothing at pruned rows. Both
    are there to be compared with.

    Raises InputError for ratios outside 0..1, for a 1 in front of another, and for an unknown preset.
    """

    ratio: float | tuple[float, ...] | None = None
    full_blocks: tuple[int, int] | None = None
    preset: str = ""
    score: Score = "pivotal"
    restore: Restore = "cached"

    def __post_init__(self) -> None:
        if self.preset and self.preset not in PRESETS:
            raise InputError(f"fastvar: unknown preset {self.preset!r}{did_you_mean(self.preset, PRESETS)}")
        for name, known in (("score", ("pivotal", "random")), ("restore", ("cached", "zero"))):
            if getattr(self, name) not in known:
                raise InputError(f"fastvar: {name} {getattr(self, name)!r} is unknown; use {' or '.join(known)}")
        ratios = self.ratios
        if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
            raise InputError(f"fastvar: ratio is {self.ratio}; give shares from 0 to 1, one for each of the last steps")
        if list(ratios) != [*(r for r in ratios if r < 1), *(r for r in ratios if r == 1)]:
            raise InputError(f"fastvar: ratio {ratios} leaves out a step in front of one that it keeps; a ratio of 1 "
                             "must come last")
        if self.full_blocks is not None and min(self.full_blocks) < 0:
            raise InputError(f"fastvar: full_blocks is {self.full_blocks}; give two numbers of at least 0")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios of the last steps."""
        if self.ratio is None:
            return PRESETS[self.preset].ratio if self.preset else (0.5,)
        return tuple(self.ratio) if isinstance(self.ratio, Sequence) else (self.ratio,)

    def ratio_at(self, plan: Plan, step: int) -> float:
        """The share of a step's rows that is pruned."""
        index = step - (len(plan) - len(self.ratios))
        return self.ratios[index] if index >= 0 else 0.0

    def cached_step(self, plan: Plan) -> int:
        """The step whose sub-layer outputs stand in for those of pruned rows."""
        return len(plan) - len(self.ratios) - 1

    def steps(self, plan: Plan) -> int:
        """How many steps are walked."""
        return len(plan) - sum(ratio == 1 for ratio in self.ratios)

    def rows(self, plan: Plan) -> tuple[int, ...]:
        """The rows of every step that a pruned block computes."""
        return tuple(kept_rows(step.rows, self.ratio_at(plan, k)) for k, step in enumerate(plan))

    def pruned_blocks(self, depth: int) -> range:
        """The blocks that prune, of ``depth``."""
        full = self.full_blocks
        if full is None:
            full = PRESETS[self.preset].full_blocks if self.preset else None
        first, last = (round(depth / 10),) * 2 if full is None else full
        return range(first, depth - last)

    def cost(self, plan: Plan, depth: int, width: int = 0, mlp_ratio: float = 4.0) -> Cost:
        """Rows, lengths of memory and arithmetic of blocks such as VAR's; without a width, flops is 0."""
        live, pruned = self.steps(plan), self.pruned_blocks(depth)
        whole = tuple(step.rows if k < live else 0 for k, step in enumerate(plan))
        blocks = [self.rows(plan) if block in pruned else whole for block in range(depth)]
        flops = 0.0
        for rows in blocks:
            for k, n in enumerate(rows):
                first = 0 if plan.visible.previous is None else max(0, k - plan.visible.previous)
                flops += 2 * n * width * (width * (4 + 2 * mlp_ratio) + 2 * sum(rows[first:k + 1]))
        lengths = tuple(sum(rows) for rows in blocks)
        return Cost(self.rows(plan), lengths, sum(lengths), flops)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        if sum(isinstance(hook, FastVAR) for hook in hooks) > 1:
            raise InputError("fastvar: the run carries it twice; give all ratios to one of them")
        if any(step.count is not None for step in plan):
            raise InputError("fastvar: a step of this plan predicts a part of its grid, and only whole maps can be "
                             "pruned and restored; leave it out")
        if self.preset and self.ratio is None and len(plan) != len(PRESETS[self.preset].sides):
            raise InputError(f"fastvar: preset {self.preset} is for {len(PRESETS[self.preset].sides)} steps, this plan "
                             f"has {len(plan)}; give ratios of your own")
        if self.cached_step(plan) < 0:
            raise InputError(f"fastvar: {len(self.ratios)} ratios for a plan of {len(plan)} steps leave none to run in "
                             "full; give fewer")
        depth = depth_of(model.generator)
        if depth is None:
            raise InputError(f"fastvar: {type(model.generator).__name__} has no blocks with residual branches; leave "
                             "it out")
        if not self.pruned_blocks(depth):
            raise InputError(f"fastvar: none of {depth} blocks is left to prune; lower full_blocks")

    def room(self, network: Any, plan: Plan, address: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        """The rows that are computed: those alone enter memory."""
        if block_of(network, address) not in self.pruned_blocks(depth_of(network) or 0):
            return rows
        return tuple(min(both) for both in zip(rows, self.rows(plan), strict=True))

    def inputs(self, run: Run, call: Call) -> Call:
        if self.score == "random":
            for span in call.rows.spans or ():
                if self.ratio_at(run.plan, span.step):
                    at = run.plan.span(span.step, span.step + 1)
                    step = torch.full((1, span.hi - span.lo), span.step, device=run.device)
                    draw = run.noise.uniform("fastvar", step, 0, run.order[:, at], len(run.branches))
                    run.memory.state[f"fastvar.random.{span.step}"] = draw.permute(2, 0, 1).flatten(0, 1)
        return call

    def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        memory, plan = ctx.remembered("fastvar"), ctx.plan
        if plan is None or ctx.network is None:
            raise InputError("fastvar: this pass doesn't say which plan and network it is of; leave it out")
        block = block_of(ctx.network, address)
        # A recurrence goes through all rows in their order.
        if block is None or kind == "scan" or block not in self.pruned_blocks(depth_of(ctx.network) or 0):
            return inner(x, rows)
        whole = rows.spans is not None and not any(self._prunes(plan, span.step) for span in rows.spans)
        if whole:
            return self._full(memory, plan, address, kind, x, rows, inner)
        parts = []
        for at, part in rows.by_step():
            assert part.spans is not None
            if self._prunes(plan, part.spans[0].step):
                parts.append(self._pruned(memory, plan, address, block, kind, x[:, at], part, inner))
            else:
                parts.append(self._full(memory, plan, address, kind, x[:, at], part, inner))
        return torch.cat(parts, 1)

    @property
    def _restores(self) -> bool:
        """Whether anything is to be put in the place of pruned rows."""
        return self.restore == "cached" and any(0 < ratio < 1 for ratio in self.ratios)

    def _prunes(self, plan: Plan, step: int) -> bool:
        rows = plan.steps[step].rows
        return kept_rows(rows, self.ratio_at(plan, step)) < rows

    def _full(self, memory: Memory, plan: Plan, address: str, kind: str, x: Tensor, rows: Rows, inner: Function
              ) -> Tensor:
        """A sub-layer on all rows; at the cached step what it adds is remembered."""
        out, cached = inner(x, rows), self.cached_step(plan)
        for span in rows.spans or ():
            if span.step == cached and self._restores:
                delta, at = (out - x)[:, span.lo:span.hi], _whole_step(plan, span)
                memory.state[f"fastvar.{address}.{kind}"] = to_map(delta, at.maps, at.grid)
        return out

    def _pruned(self, memory: Memory, plan: Plan, address: str, block: int, kind: str, x: Tensor, rows: Rows,
                inner: Function) -> Tensor:
        assert rows.spans is not None
        at, step, name = _whole_step(plan, rows.spans[0]), rows.spans[0].step, f"fastvar.{address}.{kind}"
        keep = kept_rows(at.rows, self.ratio_at(plan, step))
        if keep == 0:
            raise InputError(f"fastvar: step {step} has ratio 1 and is left out; end the run in front of it")
        if self._restores and name not in memory.state:
            raise InputError(f"fastvar: nothing is remembered of step {self.cached_step(plan)}; the hook must be there "
                             "from that step on")
        if self.score == "pivotal":
            index = largest(pivotal_score(x), keep)
        else:  # one draw, and another order out of it for every sub-layer
            index = largest(memory.state[f"fastvar.random.{step}"] * (4 * block + 2 * (kind != "attention") + 1) % 1,
                            keep)
        wide = index[..., None].expand(-1, -1, x.shape[-1])
        restored = x + upsampled(memory.state[name], at.maps, at.grid) if self._restores else x
        return restored.scatter(1, wide, inner(x.gather(1, wide), rows.select(index)))


def _whole_step(plan: Plan, span: Span) -> Step:
    """The step whose rows are given. Raises InputError where they aren't all of them."""
    step = plan.steps[span.step]
    if span.hi - span.lo != step.rows:
        raise InputError("fastvar: the step's rows were selected already; use one pruning hook a run")
    return step
