"""Teacher forcing: every step's input from the true tokens, all steps in one masked call (flow 2 of the design)."""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.devices import listed
from nextscale.plan import Plan, Span, places
from nextscale.run import Call, Rows


def teacher_forcing_call(generator: Any, plan: Plan, reads: Sequence[Tensor | None], cond_RD: Any) -> Call:
    """All rows of a plan in one call, under the plan's visibility; every row predicts.

    reads: (B, L_k, latent_width) a step, None for the first; cond_RD: conditions, branch-major, as ``Run.conditions``
    has them.
    """
    cell_1L3, step_1L = places(plan, cond_RD.device)
    cond = cond_RD.to(generator.word.weight.dtype)
    rows = Rows(cell_1L3, step_1L, plan.spans(0, len(plan)), plan.length, plan.visible, masked=len(plan) > 1, cond=cond)
    return Call(generator.embed(plan, reads, cond, 0, len(plan)), rows, slice(0, plan.length), reads)


def steps_forced(generator: Any, plan: Plan, steps: Sequence[int], reads: Sequence[Tensor | None],
                 cond_RD: Tensor) -> Tensor:
    """Hidden states (R, L, C) of some steps of a plan in one call, for networks whose rows see their own step alone.

    reads: the inputs of these steps, as ``teacher_forcing_call`` has them.
    """
    cell_1L3, step_1L = places(plan, cond_RD.device)
    cond, rows = cond_RD.to(generator.word.weight.dtype), [plan.span(k, k + 1) for k in steps]
    x = torch.cat([generator.embed(plan, [*[None] * k, read], cond, k, k + 1)
                   for k, read in zip(steps, reads, strict=True)], 1)
    own = Plan(tuple(plan.steps[k] for k in steps))
    spans = tuple(Span(k, lo, hi) for k, (_, lo, hi) in zip(steps, own.spans(0, len(own)), strict=True))
    tags = Rows(torch.cat([cell_1L3[:, span] for span in rows], 1), torch.cat([step_1L[:, span] for span in rows], 1),
                spans, own.length, plan.visible, masked=len(own) > 1, cond=cond)
    hidden: Tensor = generator(Call(x, tags, slice(0, own.length), reads), masked_context(plan, x))
    return hidden


@lru_cache(maxsize=64)
def _mask(plan: Plan, device: torch.device) -> dict[Any, Any]:
    """What a context holds once the plan's mask was made: so it is made once, and outside of a compiled network."""
    cell_1L3, step_1L = places(plan, device)
    ctx = Context()
    with torch.inference_mode(False):
        ctx.expect(Rows(cell_1L3, step_1L, None, None, plan.visible, masked=len(plan) > 1))
    return ctx.scratch


def teacher_forced(generator: Any, plan: Plan, reads: Sequence[Tensor | None], cond_RD: Any,
                   hooks: Sequence[Hook] = ()) -> Tensor:
    """Hidden states (R, L, C) of the one call, its mask made once for all calls of a plan."""
    call = teacher_forcing_call(generator, plan, reads, cond_RD)
    hidden: Tensor = generator(call, masked_context(plan, call.x, hooks))
    return hidden


def masked_context(plan: Plan, like: Tensor, hooks: Sequence[Hook] = ()) -> Context:
    """A context without memory for one call of all rows of a plan, on a tensor's device, with the mask made."""
    ctx = Context(None, hooks, plan=plan)
    if plan.visible.previous != 0:  # rows that see their own step alone need no mask
        ctx.scratch.update(_mask(plan, like.device))
    return ctx


def teacher_forcing_loss(generator: Any, head: Any, plan: Plan, tokens: Sequence[Tensor],
                         reads: Sequence[Tensor | None], cond_BD: Any, step_weights: Sequence[float] | None = None,
                         label_smoothing: float = 0.0, hooks: Sequence[Hook] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of all tokens given the true tokens of all earlier steps.

    loss = sum_k w_k sum_(rows of k) ce / sum_k w_k L_k, with w_k = 1 by default (VAR weighs rows alike). A plan of the
    first steps only trains these. hooks: what acts inside the network, as in sampling.

    Returns the loss, the mean cross-entropy of every step (K,) in nats, and the share of rows of every step whose true
    token no other is likelier than (K,).
    """
    hidden = teacher_forced(generator, plan, reads, cond_BD, hooks)
    target_BL = torch.cat(list(tokens), 1)
    entropy_BL, right_BL = head.loss(hidden, target_BL, label_smoothing)
    spans = plan.spans(0, len(plan))
    by_step_K = torch.stack([entropy_BL[:, s.lo:s.hi].mean() for s in spans])
    right_K = torch.stack([right_BL[:, s.lo:s.hi].mean() for s in spans])
    weights_K = listed([step.rows for step in plan], by_step_K.device, torch.float32)
    if step_weights is not None:
        weights_K = weights_K * listed(step_weights, weights_K.device, torch.float32)
    return (by_step_K * weights_K).sum() / weights_K.sum(), by_step_K.detach(), right_K
