"""Scale distillation: a network learns to draw in one scale what its teacher draws in several (SRDD, arXiv 2509.22636).

The student has some of its teacher's scales, t_1 < ... < t_J. Both are Markov: what a scale is drawn from is the
canvas. So the teacher can begin at any canvas S_(j-1) that the student has, though it never saw such a one while it was
trained, and draws its own scales up to the student's next one; what it added is coded anew on that one's grid,

    r_k ~ p_teacher(. | S_(j-1) + sum_(i<k) up(r_i)),  k = t_(j-1) + 1 .. t_j
    q_j = quantise(area-resize(sum_k up(r_k))),         loss_j = -log p_student(q_j | S_(j-1))

which is the encoding of the teacher's canvas behind t_j by one scale. Where no scale is dropped, codes mean the same to
both, and the cross-entropy's mean over draws is taken at once: loss_j = KL(teacher || student), the same gradient
without the draws' noise. A merged scale has no such form: what two residual codes add up to is another code, which also
hangs on the cells around. S_(j-1) are the data's own canvases on the student's schedule.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.noise import inverse_cdf
from nextscale.objectives.distillation import divergence
from nextscale.objectives.teacher_forcing import steps_forced, teacher_forced
from nextscale.parallel import rand_pictures


def merged(kept: Sequence[int]) -> list[bool]:
    """Of every scale of the student whether it stands for several of the teacher's, whose numbers ``kept`` has."""
    return [k - before > 1 for before, k in zip((-1, *kept), kept, strict=False)]


@torch.no_grad()
def lessons(teacher: Any, codec: Any, kept: Sequence[int], states: Sequence[Canvas], cond_BD: Tensor) -> list[Tensor]:
    """What the student is to learn of every scale: logits (B, L_j, V), or tokens (B, L_j) where scales are merged.

    teacher: with a ``plan`` under which rows see their own step alone, ``generator``, ``head`` and ``tokenizer``;
    codec: the student's quantiser; states: the canvas before every scale of the student's. Every scale of the teacher's
    is evaluated once, those that the same number of draws come before together. Tokens are drawn by torch's generator.
    """
    plan, first = teacher.plan, [before + 1 for before in (-1, *kept[:-1])]
    canvases = [replace(state, plan=plan, codec=teacher.tokenizer.quantiser) for state in states]
    found = [torch.empty(0)] * len(kept)
    for turn in range(max(last - k for k, last in zip(first, kept, strict=True)) + 1):
        steps = {j: first[j] + turn for j in range(len(kept)) if first[j] + turn <= kept[j]}
        reads = [canvases[j].read(k) if k else None for j, k in steps.items()]
        logits = teacher.head(steps_forced(teacher.generator, plan, list(steps.values()), reads, cond_BD))
        parts = logits.split([plan.steps[k].rows for k in steps.values()], 1)
        for (j, k), logits_BLV in zip(steps.items(), parts, strict=True):
            if first[j] == kept[j]:
                found[j] = logits_BLV
                continue
            uniform_BL = rand_pictures(len(logits_BLV), logits_BLV.shape[1], device=logits_BLV.device)
            canvases[j] = canvases[j].write(k, inverse_cdf(logits_BLV, uniform_BL))
            if k == kept[j]:
                added = codec.leftover(canvases[j].value, states[j].value)
                found[j] = codec.quantise(codec.resize(added, plan.steps[k].grid, "area"))
    return found


def scale_distillation_loss(student: Any, teacher: Any, kept: Sequence[int], tokens: Sequence[Tensor],
                            labels_Bn: Tensor, label_dropout: float, part_dropout: float,
                            step_weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """sum_j w_j sum_(rows of j) loss_j / sum_j w_j L_j; the teacher gets no gradient.

    tokens: of the data, on the student's schedule. Returns the loss, its mean of every scale (J,), and the share of
    rows of every scale where the student's likeliest token is what it learns: the teacher's likeliest, or of merged
    scales what was drawn (J,).
    """
    plan, codec = student.plan, student.tokenizer.quantiser
    with torch.no_grad():
        states = [Canvas.empty(plan, codec, len(labels_Bn), labels_Bn.device)]
        for k, given in enumerate(tokens[:-1]):
            states.append(states[-1].write(k, given))
        reads = [state.read(k) if k else None for k, state in enumerate(states)]
        rows_Bn = student.labels.drop(labels_Bn, label_dropout, part_dropout)
        wanted = lessons(teacher, codec, kept, states, teacher.labels(rows_Bn))
    hidden = teacher_forced(student.generator, plan, reads, student.labels(rows_Bn))
    apart_BL = torch.zeros(hidden.shape[:2], device=hidden.device)
    right_BL = torch.zeros_like(apart_BL)
    steps_L, several_J = plan.step_of_row, torch.tensor(merged(kept))
    for several in (False, True):
        here = (several_J[steps_L] == several).nonzero()[:, 0].to(hidden.device)
        lesson = [wanted[j] for j in range(len(plan)) if bool(several_J[j]) == several]
        if not lesson:
            continue
        if several:
            apart_BL[:, here], right_BL[:, here] = student.head.loss(hidden[:, here], torch.cat(lesson, 1))
            continue
        logits_BLV, taught_BLV = student.head(hidden[:, here]), torch.cat(lesson, 1)
        apart_BL[:, here] = divergence(logits_BLV, taught_BLV, "teacher-student")
        right_BL[:, here] = (logits_BLV.argmax(-1) == taught_BLV.argmax(-1)).float()
    weight_L = torch.tensor(step_weights, device=hidden.device)[steps_L.to(hidden.device)]
    loss = (apart_BL * weight_L).sum() / (len(apart_BL) * weight_L.sum()).clamp_min(1e-12)
    by_step, right = (torch.stack([value[:, s.lo:s.hi].mean() for s in plan.spans(0, len(plan))])
                      for value in (apart_BL.detach(), right_BL))
    return loss, by_step, right
