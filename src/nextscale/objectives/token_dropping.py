"""Token dropping: a training pass without some of the finest scales' rows (STAR, arXiv 2406.10797, published code)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import Plan


@dataclass(frozen=True)
class TokenDropping:
    """keep: rows of a picture that a training pass keeps, the same in all pictures of the batch, 0 for all; the others
    are drawn among those of the scales from index ``first`` on. Raises InputError where either is negative."""

    keep: int = 0
    first: int = 13

    def __post_init__(self) -> None:
        if self.keep < 0 or self.first < 0:
            raise InputError(f"dropping: keep is {self.keep} and first {self.first}; both must be at least 0")

    def kept(self, plan: Plan, device: torch.device | str = "cpu") -> Tensor | None:
        """The rows (M,) of a plan that stay, in their order, drawn with torch's generator; None: all.

        Raises InputError where the scales that rows may be dropped of have too few.
        """
        if not self.keep or plan.length <= self.keep or len(plan) <= self.first:
            return None
        start = plan.starts[self.first]
        if self.keep <= start:
            raise InputError(f"dropping: keep is {self.keep}, but the scales before index {self.first} have {start} "
                             "rows, which all stay; keep more")
        stay = torch.randperm(plan.length - start)[:self.keep - start].sort().values + start
        return torch.cat([torch.arange(start), stay]).to(device)


def token_dropping_loss(generator: Any, head: Any, plan: Plan, tokens: Sequence[Tensor],
                        reads: Sequence[Tensor | None], cond: Any, kept_M: Tensor,
                        step_weights: Sequence[float] | None = None,
                        label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """``teacher_forcing_loss`` over the rows ``kept_M`` alone: the others are not computed, and nothing sees them.

    A row keeps its level, its place and its label. A step all of whose rows were dropped has NaN for its values.
    """
    call = teacher_forcing_call(generator, plan, reads, cond)
    count = len(kept_M)
    few = replace(call, x=call.x[:, kept_M], rows=call.rows.select(kept_M[None]), predicts=slice(0, count))
    target_BM = torch.cat(list(tokens), 1)[:, kept_M]
    entropy_BM, right_BM = head.loss(generator(few, Context(None, plan=plan)), target_BM, label_smoothing)
    return by_step(plan, plan.step_of_row.to(kept_M.device)[kept_M], entropy_BM, right_BM, step_weights)


def by_step(plan: Plan, step_M: Tensor, entropy_BM: Tensor, right_BM: Tensor,
            step_weights: Sequence[float] | None = None,
            counts_BM: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A loss over rows of several steps: sum w_k ce / sum w_k, and the means of both values at every step (K,), NaN
    where no row counts. counts: which rows do, all by default."""
    weight_K = torch.tensor(step_weights or (1.0,) * len(plan), device=entropy_BM.device)[:len(plan)]
    rows_BM = torch.ones_like(entropy_BM) if counts_BM is None else counts_BM.to(entropy_BM.dtype)
    each = torch.nn.functional.one_hot(step_M, len(plan)).to(entropy_BM.dtype)
    total_K = rows_BM.sum(0) @ each
    entropy_K, right_K = ((rows_BM * values).sum(0) @ each / total_K for values in (entropy_BM, right_BM))
    weight_M = weight_K[step_M]
    loss = (entropy_BM * rows_BM * weight_M).sum() / (rows_BM * weight_M).sum().clamp_min(1e-12)
    return loss, entropy_K.detach(), right_K.detach()
