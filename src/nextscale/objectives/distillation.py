"""Distillation: a network learns the distributions of another one on the same true tokens."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.devices import listed
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.plan import Plan, places

Direction = Literal["student-teacher", "teacher-student"]


def divergence(student_BLV: Tensor, teacher_BLV: Tensor, direction: Direction = "student-teacher") -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of every row (B, L) in nats, from logits; p is the distribution that
    ``direction`` names first."""
    student, teacher = student_BLV.float().log_softmax(-1), teacher_BLV.float().log_softmax(-1)
    p, q = (student, teacher) if direction == "student-teacher" else (teacher, student)
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(student: Any, teacher: Any, plan: Plan, tokens: Sequence[Tensor], reads: Sequence[Tensor | None],
                      conditions: tuple[Any, Any], step_weights: Sequence[float],
                      direction: Direction = "student-teacher",
                      further: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, ...]:
    """sum_k w_k sum_(rows of k) KL / sum_k w_k L_k under teacher forcing; the teacher gets no gradient. The KL of a
    row whose token is bits is the mean over them.

    student, teacher: each with a ``generator`` and a ``head``; conditions: theirs, (B, D), or what else their networks
    take; further: a loss of both hidden states that is added. Returns the loss, the student's mean cross-entropy of
    every step (K,) in nats, the share of rows of every step whose true token no other is likelier than (K,), and the
    mean divergence of every step (K,).
    """
    with torch.no_grad():
        taught = teacher_forced(teacher.generator, plan, reads, conditions[1])
        wanted_BLV = teacher.head(taught)
    hidden = teacher_forced(student.generator, plan, reads, conditions[0])
    apart_BL = divergence(student.head(hidden), wanted_BLV, direction)
    apart_BL = apart_BL.mean(-1) if apart_BL.ndim > 2 else apart_BL
    weight_L = listed(step_weights, apart_BL.device, torch.float32)[places(plan, apart_BL.device)[1][0]]
    loss = (apart_BL * weight_L).sum() / (len(apart_BL) * weight_L.sum()).clamp_min(1e-12)
    if further is not None:
        loss = loss + further(hidden, taught)
    with torch.no_grad():
        entropy_BL, right_BL = student.head.loss(hidden, torch.cat(list(tokens), 1))
        by_step, right, apart = (torch.stack([value[:, s.lo:s.hi].mean() for s in plan.spans(0, len(plan))])
                                 for value in (entropy_BL, right_BL, apart_BL))
    return loss, by_step, right, apart
