"""Distillation into fewer scales: a student that draws in one scale what its teacher draws in several (SRDD)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextscale.errors import InputError
from nextscale.hub import WithoutInitialisation
from nextscale.objectives.scale_distillation import merged, scale_distillation_loss
from nextscale.systems import folders
from nextscale.systems.class_conditional import ClassConditionalSystem
from nextscale.tokenizers.shorter import on_steps
from nextscale.training.student import StudentTask
from nextscale.training.task import Batch, Metrics

Grids = Sequence[tuple[int, int]]


def kept_steps(grids: Grids, chosen: Grids) -> tuple[int, ...]:
    """Which of a schedule's scales a shorter one keeps, by number; of equal grids the last.

    Raises InputError where the shorter one has other grids, another order, or another end.
    """
    found: list[int] = []
    for grid in reversed(chosen):
        before = [k for k in range(found[0] if found else len(grids)) if tuple(grids[k]) == tuple(grid)]
        if not before:
            break
        found.insert(0, before[-1])
    if not chosen or len(found) < len(chosen) or found[-1] != len(grids) - 1:
        raise InputError(f"grids: {_written(chosen) or 'none are given'}; give some of the teacher's, in their order, "
                         f"with the last: {_written(grids)}")
    return tuple(found)


def shortened(teacher: Any, grids: Grids) -> tuple[Any, tuple[int, ...]]:
    """A copy of a Markov system on some of its scales, to be distilled, and which these are.

    What is learned a position or a level is that of the same grid, the tokenizer ``on_steps``; of settings that have a
    number a scale those of its scales are left. A first scale that was another has the mean of the teacher's learned
    start everywhere. HMAR's mask module isn't distilled, so the student draws without its rounds.

    Raises InputError for systems that aren't Markov, and as ``kept_steps``.
    """
    if not (isinstance(teacher, ClassConditionalSystem) and teacher.markov):
        raise InputError(f"teacher: in this {teacher.config.slug} scales hang on more than the canvas, on what others "
                         "computed that a student would skip; distil an srdd with window 0, or an hmar")
    old, kept = teacher.plan, kept_steps(teacher.plan.grids, grids)
    tokenizer = on_steps(teacher.tokenizer, kept)
    settings = {purpose: _on_steps(used, kept, len(old)) for purpose, used in teacher.config.settings.items()}
    with WithoutInitialisation():
        student = folders.build_system(replace(teacher.config, tokenizer=tokenizer.config, settings=settings))
    student.tokenizer = tokenizer
    tensors = {name: value for name, value in teacher.state_dict().items() if not name.startswith("tokenizer.")}
    rows = [row for k in kept for row in range(old.starts[k], old.starts[k + 1])]
    tensors["generator.position"] = tensors["generator.position"][:, rows]
    tensors["generator.level.weight"] = tensors["generator.level.weight"][list(kept)]
    if kept[0]:
        mean = tensors["generator.start"].mean(1, keepdim=True)
        tensors["generator.start"] = mean.expand(-1, old.steps[kept[0]].rows, -1)
    student.load_state_dict({**tensors, **{f"tokenizer.{name}": t for name, t in tokenizer.state_dict().items()}})
    if student.parts:
        student.train_part(student.parts[0])
    student.tokenizer.requires_grad_(False)
    teacher.requires_grad_(False)
    return student.to(teacher.device).eval(), kept


class ScaleDistillationTask(StudentTask):
    """Trains a shortened system by ``scale_distillation_loss`` on tokens of its own tokenizer. kept: the teacher's
    scales that it has; others: as ``StudentTask`` has them.

    Figures of scale k: ``divergence_k`` in nats, of a merged one ``teacher_nats_k``, the cross-entropy of what the
    teacher's chain gave; ``agreement_k``, and ``agreement`` over all rows; ``held_out/imitation``, the loss.
    """

    measure = "imitation"

    def __init__(self, system: Any, teacher: Any, kept: Sequence[int], base: str, average: bool = True,
                 **settings: Any):
        super().__init__(system, teacher, base, average, **settings)
        self.kept = tuple(kept)

    def apart(self, batch: Batch, label_dropout: float, training: bool) -> tuple[Tensor, Metrics]:
        system: Any = self.system
        loss, apart_K, right_K = scale_distillation_loss(
            system, self.teacher, self.kept, system.training_tokens(batch["tokens"]), batch["labels"], label_dropout,
            self.part_dropout if training else 0.0, self._weights(system.plan))
        figures = {f"{'teacher_nats' if several else 'divergence'}_{k}": apart_K[k]
                   for k, several in enumerate(merged(self.kept))}
        figures |= {f"agreement_{k}": right for k, right in enumerate(right_K)}
        rows = [step.rows for step in system.plan]
        agreement = sum(n * right for n, right in zip(rows, right_K, strict=True)) / sum(rows)
        return loss, {"agreement": agreement, **figures}


def _on_steps(used: Any, kept: Sequence[int], steps: int) -> Any:
    """Sampling settings for some of the scales, HMAR's without rounds."""
    changes: dict[str, Any] = {name: tuple(value[k] for k in kept) for name, value in vars(used).items()
                               if isinstance(value, tuple) and len(value) == steps}
    return replace(used, **changes | ({"rounds": ()} if hasattr(used, "rounds") else {}))


def _written(grids: Grids) -> str:
    return ",".join(f"{h}" if h == w else f"{h}x{w}" for h, w in grids)
