"""What the training loop asks of the thing that it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
"""What a step trains on, by name: tensors with a row a picture, and lists (of texts, of schedules) with an entry a
picture."""
Metrics = Mapping[str, "float | Tensor"]


@dataclass(frozen=True)
class TrainingStep:
    """Where a training stands.

    Attributes:
        step: steps done before this one, from 0.
        steps: steps of the whole training.
        progress: share done, in [0, 1]; by wall time where that is ahead.
        epoch: of the first picture here.
        seed: the training's.
        rested: whether samples were drawn between the step before and this one, in whichever process.
    """

    step: int
    steps: int
    progress: float
    epoch: int
    seed: int
    rested: bool = False


class Task(Protocol):
    """What is trained.

    Attributes:
        modules: everything a checkpoint keeps, by name; the loop puts them on the device and into training mode.
            What is used but not trained stays the task's own.
        phases: what a step does to each micro-batch, in order; each phase has an optimiser of its own, and all are
            updated after the last micro-batch, so a phase may use what the one before it computed.

    A task whose loss always depends on all parameters of its phase may say so by an attribute ``uses_all_parameters``
    that is true, which saves several processes a search for those without a gradient.
    """

    modules: dict[str, nn.Module]
    phases: tuple[str, ...]

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW groups of a phase: ``params``, ``weight_decay``, optionally ``learning_rate_scale``."""
        ...

    def averaged(self) -> dict[str, nn.Module]:
        """Which of the modules get an average of their weights."""
        ...

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        """Mean loss over a (micro-)batch, and metrics to log; None for the loss skips the phase in this step.

        Random numbers that belong to pictures come from :func:`nextscale.parallel.rand_pictures`, so that they are the
        same however many processes and micro-batches share the batch; those that belong to the step from torch's
        default generator, which is seeded for the step anew before every micro-batch. Whoever draws asks no picture
        whether to draw: all processes must make the same draws.
        """
        ...

    def after_step(self, at: TrainingStep) -> Metrics:
        """Called in every process after all phases (code revival, ...); may return more metrics."""
        ...

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        """Writes sample pictures into ``out``; may return what it measured on held-out pictures. Only rank 0 does.

        Args:
            out: folder, the same every time; ``at.step`` (here: steps done) keeps files apart.
            at: where the training stands.
            averaged: every module, its average in its place where there is one.
        """
        ...

    def extra_state(self) -> dict[str, Tensor | float | str]:
        """What else a checkpoint must keep."""
        ...

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`extra_state` gave."""
        ...


class BatchSource(Protocol):
    """Where batches come from; :class:`nextscale.data.Loader` is one.

    ``batch_size`` is that of all processes together. A source gives each process its own rows
    (``nextscale.parallel.share(batch_size)``) or, where that costs little, every process the whole batch.
    """

    batch_size: int

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` on; ``epoch`` and ``id`` are in each."""
        ...


def decay_groups(modules: list[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of some modules: matrices and kernels decay; biases, norms, gains and embeddings don't."""
    decayed: dict[Tensor, None] = {}
    plain: dict[Tensor, None] = {}
    for root in modules:
        embeddings = {id(part.weight) for part in root.modules() if isinstance(part, nn.Embedding)}
        for parameter in root.parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
                (decayed if matrix else plain)[parameter] = None
    groups = [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(plain), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
