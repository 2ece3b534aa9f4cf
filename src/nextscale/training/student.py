"""Training a system to do as a teacher does, which stays as it is: what every kind of distillation shares."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.training.finetune import PartTask
from nextscale.training.task import Batch, Metrics, TrainingStep


class StudentTask(PartTask):
    """``PartTask`` on a student whose teacher has no gradients; a kind of distillation gives ``apart``.

    Both networks are in evaluation mode: nothing of the student is dropped but its conditions. base: fingerprint of the
    teacher. Settings: as ``GeneratorTask`` has them. measure: what the loss on held-out pictures is called.
    """

    measure = "divergence"

    def __init__(self, system: Any, teacher: Any, base: str, average: bool = True, **settings: Any):
        super().__init__(system, base, average, **settings)
        self.teacher = teacher.eval()
        system.eval()

    def apart(self, batch: Batch, label_dropout: float, training: bool) -> tuple[Tensor, Metrics]:
        """The loss of a batch, and its figures. training: whether it is, or held-out pictures are measured."""
        raise NotImplementedError

    def _begin(self) -> None:
        super()._begin()
        if self.compile == "on" or (self.compile == "auto" and self.system.device.type == "cuda"):
            self.teacher.generator.compile(backend=self.backend, dynamic=False)

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if self._utilisation is None:
            self._begin()
        return self.apart(batch, self.label_dropout, True)

    def samples(self, out: Path, at: TrainingStep, averaged: Mapping[str, nn.Module]) -> Metrics | None:
        found = super().samples(out, at, dict(averaged))
        self.system.eval()
        return found

    @torch.no_grad()
    def _validate(self) -> Metrics | None:
        """What the ordinary loss on held-out pictures is, and how far the student is from the teacher there."""
        found = super()._validate()
        if found is None or self.validation is None:
            return found
        total, pictures = dict[str, float](), len(self.validation["tokens"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for start in range(0, pictures, 64):
                batch = {name: rows[start:start + 64] for name, rows in self.validation.items()}
                batch |= {name: rows.to(self.system.device) for name, rows in batch.items() if isinstance(rows, Tensor)}
                loss, figures = self.apart(batch, 0.0, False)
                for name, value in {self.measure: loss, **figures}.items():
                    total[name] = total.get(name, 0.0) + float(value) * len(batch["tokens"]) / pictures
        return {**found, **{f"held_out/{name}": value for name, value in total.items()}}
