"""Teacher forcing: every step's input from the true tokens, all steps in one masked call (flow 2 of the design)."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.plan import Plan
from nextscale.run import Call, Rows


def teacher_forcing_call(generator: Any, plan: Plan, reads: Sequence[Tensor | None], cond_RD: Tensor) -> Call:
    """All rows of a plan in one call, under the plan's visibility; every row predicts.

    reads: (B, L_k, latent_width) a step, None for the first; cond_RD: conditions, branch-major.
    """
    step_1L = plan.step_of_row.to(cond_RD.device)[None]
    cond = cond_RD.to(generator.word.weight.dtype)
    rows = Rows(plan.cells[None].to(cond_RD.device), step_1L, plan.spans(0, len(plan)), plan.length, plan.visible,
                masked=len(plan) > 1, cond=cond)
    return Call(generator.embed(reads, cond, 0, len(plan)), rows, slice(0, plan.length))


def teacher_forcing_loss(generator: Any, head: Any, plan: Plan, tokens: Sequence[Tensor],
                         reads: Sequence[Tensor | None], cond_BD: Tensor, step_weights: Sequence[float] | None = None,
                         label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of all tokens given the true tokens of all earlier steps.

    loss = sum_k w_k sum_(rows of k) ce / sum_k w_k L_k, with w_k = 1 by default (VAR weighs rows alike).

    Returns the loss, the mean cross-entropy of every step (K,) in nats, and the share of right guesses a step (K,).
    """
    hidden = generator(teacher_forcing_call(generator, plan, reads, cond_BD), Context())
    target_BL = torch.cat(list(tokens), 1)
    logits = head(hidden)
    entropy_BL = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target_BL.flatten(), reduction="none",
                                                   label_smoothing=label_smoothing).view(target_BL.shape)
    right_BL = (logits.detach().argmax(-1) == target_BL).float()
    spans = plan.spans(0, len(plan))
    by_step_K = torch.stack([entropy_BL[:, s.lo:s.hi].mean() for s in spans])
    right_K = torch.stack([right_BL[:, s.lo:s.hi].mean() for s in spans])
    weights_K = torch.tensor([step.rows for step in plan], dtype=torch.float32, device=by_step_K.device)
    if step_weights is not None:
        weights_K = weights_K * torch.tensor(step_weights, device=weights_K.device)
    return (by_step_K * weights_K).sum() / weights_K.sum(), by_step_K.detach(), right_K
