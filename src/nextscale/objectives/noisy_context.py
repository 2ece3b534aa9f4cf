"""Noisy context learning (xAR, arXiv 2502.20388, section 3.3): every step's input is the step itself, made noisy.

Each entity has a time of its own, so the context of a prediction is noisy to a random degree, as it is wrong to some
degree when pictures are drawn; there is no clean copy. What the paper compares with, clean context, is here too: of
every picture one entity is drawn and learned, with those before it at time 0, as the sampler has them.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextscale.devices import listed
from nextscale.objectives.teacher_forcing import masked_context
from nextscale.parallel import rand_pictures, randn_pictures
from nextscale.plan import Plan, places
from nextscale.run import Call, Rows


def noisy_context_call(generator: Any, plan: Plan, vectors_RLC: Tensor, time_RK: Tensor, cond_RD: Tensor) -> Call:
    """All rows of a plan in one call, under the plan's visibility: step k's vectors stand at time t_k; all predict."""
    cell_1L3, step_1L = places(plan, cond_RD.device)
    cond = generator.condition(cond_RD.to(generator.word.weight.dtype), time_RK, 0)
    rows = Rows(cell_1L3, step_1L, plan.spans(0, len(plan)), plan.length, plan.visible, masked=len(plan) > 1, cond=cond)
    return Call(generator.embed(vectors_RLC, rows), rows, slice(0, plan.length))


def noisy_context_loss(generator: Any, head: Any, plan: Plan, tokens: Sequence[Tensor], cond_BD: Tensor,
                       step_weights: Sequence[float] | None = None,
                       draws: tuple[Tensor, Tensor] | None = None, clean: bool = False) -> tuple[Tensor, Tensor]:
    """Squared error of the velocity of all entities at once, the mean over positions; its mean over each entity (K,).

    clean: of one entity a picture under clean context, drawn as often as its positions weigh, so that the mean is over
    the same; of entities that nobody drew the mean is NaN.

    tokens: vectors of every step, (B, L_k, C); x = (1 - t_k) s + t_k e, target e - s, with t_k the logistic function of
    a normal number, one a picture and entity. step_weights: of every step's positions (None: 1). draws: times (B, K)
    and noise (B, L, C) instead of ones from torch's generator.
    """
    target_BLC = torch.cat(list(tokens), 1)
    b, device = len(target_BLC), target_BLC.device
    if draws is None:
        draws = randn_pictures(b, len(plan), device=device).sigmoid(), randn_pictures(*target_BLC.shape, device=device)
    time_BK, noise_BLC = draws
    weights_K = listed([step.rows for step in plan], device, torch.float32)
    if step_weights is not None:
        weights_K = weights_K * listed(step_weights, device, torch.float32)
    step_L = places(plan, device)[1][0]
    if clean:
        shares_K = (weights_K / weights_K.sum()).cumsum(0)
        drawn_B = torch.searchsorted(shares_K, rand_pictures(b, device=device)).clamp_max(len(plan) - 1)
        time_BK = time_BK.masked_fill(torch.arange(len(plan), device=device) < drawn_B[:, None], 0.0)
    t = time_BK[:, step_L, None]
    call = noisy_context_call(generator, plan, (1 - t) * target_BLC + t * noise_BLC, time_BK, cond_BD)
    error_BL = head.loss(generator(call, masked_context(plan, cond_BD)), noise_BLC - target_BLC)
    if clean:
        own_BL = step_L == drawn_B[:, None]
        error_BL = error_BL * own_BL
        by_step_K = torch.stack([error_BL[:, s.lo:s.hi].sum() / own_BL[:, s.lo:s.hi].sum()
                                 for s in plan.spans(0, len(plan))])
        return (error_BL.sum(1) / own_BL.sum(1)).mean(), by_step_K.detach()
    by_step_K = torch.stack([error_BL[:, s.lo:s.hi].mean() for s in plan.spans(0, len(plan))])
    return (by_step_K * weights_K).sum() / weights_K.sum(), by_step_K.detach()
