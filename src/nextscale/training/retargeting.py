"""Retargeting: a trained text-to-picture system made to read another text encoder's features.

The transformer stays as it is. What reads the features (its text front: Infinity's projections and pooling, STAR's
projection of the prompt and every block's keys and values) is new where the width differs, and is then distilled: on
the same true tokens the student, with its encoder, learns the distributions that the teacher has with its own,

    sum_k w_k mean_(rows of k) KL(teacher || student) / sum_k w_k

Tokens of two encoders don't correspond, so nothing is matched token by token; what the network does with them is.
"""
from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.conditions.text_encoders import open_text_encoder
from nextscale.conditions.text_words import WordConfig, WordEncoder
from nextscale.errors import InputError
from nextscale.objectives.distillation import Direction
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.training.student import StudentTask
from nextscale.training.task import Batch, Metrics


def retargeted(teacher: TextConditionalSystem, encoder: str = "words",
               words: WordConfig | None = None) -> TextConditionalSystem:
    """A system of the same tokenizer and transformer that reads another text encoder's features, to be distilled.

    encoder: as ``open_text_encoder`` takes it; ``words`` and ``bytes`` are trained with the front, of the sizes in
    ``words``. What is not its text front is the teacher's own, not copied, and trains in neither from here on. Of the
    front, what fits begins as the teacher's; the rest is drawn by torch's generator as large as the teacher's.

    Raises as ``open_text_encoder``.
    """
    longest = teacher.config.generator.longest_text
    if encoder in ("words", "bytes"):
        words = replace(words or WordConfig(), kind=encoder)  # type: ignore[arg-type]
        width, pooled_width, longest = words.width, words.width, words.max_tokens + 1
    else:
        opened = open_text_encoder(encoder)
        words, width, pooled_width = None, opened.width, opened.pooled_width
        longest = getattr(opened, "max_tokens", longest)
    config = replace(teacher.config, encoder=encoder, words=words,
                     generator=teacher.config.generator.for_text(width, pooled_width, longest))
    with torch.device("meta"):
        student = type(teacher)(config)
    student.tokenizer = teacher.tokenizer
    if words is not None:
        student.encoder = WordEncoder(words)
    own = dict(teacher.named_parameters())
    for name, parameter in list(student.named_parameters()):
        if name.startswith(("tokenizer.", "encoder.")):
            continue
        place, _, last = name.rpartition(".")
        kept = own[name]
        if in_front(student, name):
            same = kept.shape == parameter.shape
            kept = nn.Parameter(kept.detach().clone() if same else as_large(parameter.shape, kept.detach()))
        setattr(student.get_submodule(place), last, kept)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(in_front(student, name))
    return student.to(teacher.device).eval()


def in_front(system: TextConditionalSystem, name: str) -> bool:
    """Whether a parameter belongs to what reads the text encoder's features, or to an encoder that is trained along."""
    return any(fnmatchcase(name, pattern) for pattern in (*system.text_front, "encoder.*"))


def as_large(shape: torch.Size, like: Tensor) -> Tensor:
    """New weights: of a product every output's as long as the given one's, so that features of unit size give outputs
    of the same size; elsewhere of the same root mean square, and of a gain the same everywhere."""
    size = like.square().mean().sqrt()
    if like.ndim < 2:
        return size.expand(shape).clone()
    drawn = torch.randn(shape, device=like.device)
    if shape[0] != like.shape[0]:
        return drawn * size
    return drawn * (like.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)).view(-1, *[1] * (drawn.ndim - 1))


class RetargetTask(StudentTask):
    """Trains the text front of a retargeted system to draw as its teacher does.

    The input of bitwise systems is corrupted as in their training. Both lose the prompts of the same pictures, so that
    guidance goes away from the same thing. direction: of the divergence. Others: as ``StudentTask`` has them.

    Raises InputError where no prompts are dropped.
    """

    def __init__(self, system: TextConditionalSystem, teacher: TextConditionalSystem, base: str, average: bool = True,
                 direction: Direction = "teacher-student", **settings: Any):
        super().__init__(system, teacher, base, average, **settings)
        if not 0 < self.label_dropout < 1:
            raise InputError(f"label_dropout is {self.label_dropout}; the student learns from dropped prompts what no "
                             "prompt is, so it must be above 0 and below 1")
        self.direction = direction

    def apart(self, batch: Batch, label_dropout: float, training: bool) -> tuple[Tensor, Metrics]:
        system: Any = self.system
        plan = system.training_plan(batch)
        loss, _, _, apart_K = system.distillation_loss(
            self.teacher, system.training_tokens(batch["tokens"], plan), (batch["caption"], batch["caption"]),
            label_dropout, self._weights(plan), self.direction, training, **system.training_options(batch))
        return loss, {f"divergence_{k}": value for k, value in enumerate(apart_K)}
