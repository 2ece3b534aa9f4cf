"""What the tests of memory policies share: a run whose every attention is held against the full one with a mask."""
from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_var
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.layers.attention import attention
from nextscale.layers.memory import Tags
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Rows, Run
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps

GUIDANCE = ClassifierFree(2.0)


def plan_rows(tags: Tags, plan: Plan, rows: int, heads: int) -> Tensor:
    """Which rows of the plan tags mean, (R, H, N)."""
    step = tags.step.long() if tags.step.ndim == 3 else tags.step[:, None]
    cell = tags.cell.long() if tags.cell.ndim == 4 else tags.cell[:, None]
    starts, grids = torch.tensor(plan.starts[:-1]), torch.tensor([s.grid for s in plan])
    return (starts[step] + cell[..., 1] * grids[step, 1] + cell[..., 2]).expand(rows, heads, -1)


class Reads(Hook):
    """Innermost: which rows of the plan an attention is about to read, head by head."""

    def attend(self, ctx: Context, address: str, q: Tensor, k: Any, v: Any, rows: Rows, inner: Any) -> Tensor:
        end = ctx.plan.starts[rows.spans[0].step + 1]
        mask = torch.zeros(*q.shape[:2], end, dtype=torch.bool)
        if k is not None:
            mask[..., end - len(rows):] = True
        for group in ctx.memory.groups.get(address, ()):
            if len(tags := ctx.memory.tags_of(group) or ()):
                heads = slice(None) if group.heads is None else group.heads
                part = mask[:, heads]
                index = plan_rows(tags, ctx.plan, len(q), part.shape[1])
                assert bool((index.diff(dim=-1) > 0).all()), "kept rows must be in their order, each once"
                mask[:, heads] = part.scatter(2, index, True)
        ctx.scratch["reads", address] = mask
        return inner(q, k, v, rows)


class AgainstMasked(Hook):
    """Outermost: keeps all keys and values of a layer, and compares each attention with one over all of them in which
    the rows that ``Reads`` didn't see are masked."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.lengths: dict[str, list[list[int]]] = {}
        self.compared, self.worst = 0, 0.0

    def attend(self, ctx: Context, address: str, q: Tensor, k: Any, v: Any, rows: Rows, inner: Any) -> Tensor:
        old = self.kept.get(address)
        k_all, v_all = (k, v) if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
        self.kept[address] = k_all, v_all
        found = inner(q, k, v, rows)
        mask = ctx.scratch["reads", address]
        expected = attention(q, k_all, v_all, mask[:, :, None], ctx.scale(address))
        self.worst = max(self.worst, float((found - expected).abs().max()))
        self.compared += not bool(mask.all())
        self.lengths.setdefault(address, []).append(mask[0].sum(-1).tolist())
        return found


def against_masked(*hooks: Hook, **options: Any) -> tuple[AgainstMasked, Any, Run]:
    """A run under some policies, and what the comparison found."""
    masked = AgainstMasked()
    return masked, *drawn([Reads(), *hooks, masked], **options)


def drawn(hooks: list[Hook], grids: Any = ((1, 1), (2, 2), (3, 3), (4, 5), (6, 6)), pictures: int = 2,
          until: int | None = None, **options: Any) -> tuple[Any, Run]:
    """A tiny VAR's run under some hooks, with the promises checked on the way."""
    from nextscale.conditions.class_label import ClassCondition

    system = tiny_var(grids, phi_count=1, **options)
    labels = (torch.arange(pictures) % 5)[:, None]
    run = Run.start(system.plan, system.tokenizer.quantiser, ClassCondition(system.labels, labels), GUIDANCE.branches,
                    Keyed.from_seeds(range(pictures)), pictures)
    with torch.no_grad():
        for _ in sample_steps(system, run, GUIDANCE, (), hooks, until=until, check=True):
            pass
    return system, run
