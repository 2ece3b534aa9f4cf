"""Distillation: a network learns the distributions of another one on the same true tokens."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.plan import Plan

Direction = Literal["student-teacher", "teacher-student"]


def divergence(student_BLV: Tensor, teacher_BLV: Tensor, direction: Direction = "student-teacher") -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of every row (B, L) in nats, from logits; p is the distribution that
    ``direction`` names first."""
    student, teacher = student_BLV.float().log_softmax(-1), teacher_BLV.float().log_softmax(-1)
    p, q = (student, teacher) if direction == "student-teacher" else (teacher, student)
    return (p.exp() * (p - q)).sum(-1)


def distillation_loss(student: Any, teacher: Any, plan: Plan, tokens: Sequence[Tensor], reads: Sequence[Tensor | None],
                      conditions: tuple[Tensor, Tensor], step_weights: Sequence[float],
                      direction: Direction = "student-teacher") -> tuple[Tensor, Tensor, Tensor]:
    """sum_k w_k sum_(rows of k) KL / sum_k w_k L_k under teacher forcing; the teacher gets no gradient.

    student, teacher: each with a ``generator`` and a ``head``; conditions: theirs, (B, D). Returns the loss, the
    student's mean cross-entropy of every step (K,) in nats, and the share of rows of every step whose true token no
    other is likelier than (K,).
    """
    with torch.no_grad():
        wanted_BLV = teacher.head(teacher_forced(teacher.generator, plan, reads, conditions[1]))
    found_BLV = student.head(teacher_forced(student.generator, plan, reads, conditions[0]))
    apart_BL = divergence(found_BLV, wanted_BLV, direction)
    weight_L = torch.tensor(step_weights, device=apart_BL.device)[plan.step_of_row.to(apart_BL.device)]
    loss = (apart_BL * weight_L).sum() / (len(apart_BL) * weight_L.sum()).clamp_min(1e-12)
    with torch.no_grad():
        chosen_BL = found_BLV.gather(-1, torch.cat(list(tokens), 1)[..., None])[..., 0]
        entropy_BL, right_BL = found_BLV.logsumexp(-1) - chosen_BL, (chosen_BL >= found_BLV.amax(-1)).float()
        by_step, right = (torch.stack([value[:, s.lo:s.hi].mean() for s in plan.spans(0, len(plan))])
                          for value in (entropy_BL, right_BL))
    return loss, by_step, right
