"""Training a next-scale generator: the task that the trainer runs (flow 2 of the design)."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.data.sheets import save_image, sheet
from nextscale.systems.var import VAR
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups

# The published training leaves these out of weight decay, beside biases, embeddings and other vectors.
NO_DECAY = ("start", "position", "modulation_offset", "scale_1H11")


class GeneratorTask:
    """Trains a VAR's transformer on cached tokens by teacher forcing.

    tokens_NL: tokens of the pictures whose ids are ``ids``; label_dropout: share of pictures trained without labels,
    part_dropout: share trained without each further kind; validation: tokens and labels to measure on at every
    sample sheet; sheet_labels: what the sample sheets draw.
    """

    phases: tuple[str, ...] = ("main",)

    def __init__(self, system: VAR, ids: Tensor, tokens_NL: Tensor, label_dropout: float = 0.1,
                 part_dropout: float = 0.1, label_smoothing: float = 0.0,
                 step_weights: tuple[float, ...] | None = None,
                 validation: tuple[Tensor, Tensor] | None = None, sheet_labels: Any = None):
        self.system, self.tokens_NL = system, tokens_NL
        self.place = torch.full((int(ids.max()) + 1,), -1)
        self.place[ids] = torch.arange(len(ids))
        self.label_dropout, self.part_dropout = label_dropout, part_dropout
        self.label_smoothing, self.step_weights = label_smoothing, step_weights
        self.validation, self.sheet_labels = validation, sheet_labels
        system.tokenizer.requires_grad_(False).eval()
        self.modules: dict[str, nn.Module] = {"generator": system.generator, "head": system.head,
                                              "labels": system.labels}

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        groups = decay_groups(list(self.modules.values()), weight_decay)
        spared = {p for m in self.modules.values() for n, p in m.named_parameters() if n.split(".")[-1] in NO_DECAY}
        decayed = [p for p in groups[0]["params"] if p not in spared]
        plain = groups[1]["params"] + [p for p in groups[0]["params"] if p in spared]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

    def averaged(self) -> dict[str, nn.Module]:
        return dict(self.modules)

    def _split(self, tokens_BL: Tensor) -> list[Tensor]:
        return list(tokens_BL.long().split([step.rows for step in self.system.plan], 1))

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        tokens = self._split(self.tokens_NL[self.place[batch["id"].cpu()]].to(self.system.device))
        loss, by_step_K, right_K = self.system.loss(tokens, batch["labels"], self.label_dropout, self.part_dropout,
                                                    self.step_weights, self.label_smoothing)
        metrics: dict[str, Tensor | float] = {f"nats_{k}": v for k, v in enumerate(by_step_K)}
        metrics["accuracy"] = (right_K * self._rows_K(right_K)).sum() / self.system.plan.length
        metrics["bits_per_dimension"] = self._bits_per_dimension(by_step_K)
        return loss, metrics

    def _bits_per_dimension(self, by_step_K: Tensor) -> Tensor:
        """Bits a colour value that coding the picture's tokens with this model would take."""
        h, w = self.system.tokenizer.picture_size
        return (by_step_K * self._rows_K(by_step_K)).sum() / (math.log(2) * 3 * h * w)

    def _rows_K(self, like: Tensor) -> Tensor:
        return torch.tensor([step.rows for step in self.system.plan], device=like.device)

    def after_step(self, at: TrainingStep) -> Metrics:
        return {}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        """A sheet of samples from the averaged weights, and the loss on held-out pictures."""
        with self._using(averaged):
            self.system.eval()
            if self.sheet_labels is not None:
                drawn = self.system.generate(self.sheet_labels, seed=1, output="torch", progress=False, batch_size=32)
                save_image(sheet(drawn.images, columns=8), out / f"samples-{at.step:08d}.png")
            return self._validate()

    @contextmanager
    def _using(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The system with other modules in place of those under training."""
        for name, module in modules.items():
            setattr(self.system, name, module)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                setattr(self.system, name, module)

    def _validate(self) -> Metrics | None:
        if self.validation is None:
            return None
        tokens_NL, labels = self.validation
        sums, count = torch.zeros(len(self.system.plan)), 0
        for start in range(0, len(tokens_NL), 64):
            part = self._split(tokens_NL[start:start + 64].to(self.system.device))
            _, by_step_K, _ = self.system.loss(part, labels[start:start + 64].to(self.system.device), 0.0, 0.0)
            sums += by_step_K.cpu() * len(part[0])
            count += len(part[0])
        means_K = sums / count
        nats = (means_K * self._rows_K(means_K)).sum() / self.system.plan.length
        return {"held_out/nats_per_token": float(nats),
                "held_out/bits_per_dimension": float(self._bits_per_dimension(means_K))}

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None
