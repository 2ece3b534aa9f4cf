"""Training settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.errors import InputError
from nextscale.training.schedules import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and how precisely to train; what is trained is the task's.

    Attributes:
        steps: optimiser steps.
        batch_size: pictures an optimiser step, over all its micro-batches and all processes.
        accumulate: micro-batches a step in each process; times their number it divides ``batch_size``.
        learning_rate: peak of the schedule.
        schedule: fall of the learning rate after the warm-up.
        warmup_steps: steps of linear rise.
        final_learning_rate_ratio: learning rate at the end over its peak, in [0, 1].
        weight_decay: of AdamW and Muon, for the groups that the task wants decayed.
        betas: of AdamW.
        optimiser: ``adamw``, or ``adafactor`` (arXiv 1804.04235), which keeps a row and a column of second moments a
            matrix instead of two numbers a weight; its learning rate is relative to the size of the weights. ``muon``:
            orthogonalised momentum for matrices inside of blocks, AdamW for the rest (``MuonAndAdamW``).
        gradient_clip: largest norm of the gradient; 0 for none.
        ema_decay: of the averaged weights, in [0, 1).
        precision: ``bf16`` (autocast; weights and optimiser stay fp32) or ``fp32``.
        seed: of the data order and of every training draw.
        log_every, sample_every, checkpoint_every: in steps; ``sample_every`` 0 for none but the last.
        keep_checkpoints: how many of the latest to keep, at least 1.
        device: ``auto`` (cuda, mps, cpu) or a torch device.
        parallel: what several processes do (``torchrun``): ``ddp`` keeps all weights in each and averages gradients,
            ``fsdp`` spreads weights, gradients, optimiser states and averages over them; one process does neither.
        minutes: stop cleanly after this time, of which the schedule then follows the share spent where that is ahead
            of the share of steps; such a run resumes, but is bound to the machine's speed.
        clock: what ``minutes`` are of: ``wall``, or ``processor``, the time that all threads of this process were at
            work, which compares systems fairly on a machine that does other things too.
    """

    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: int = 100
    final_learning_rate_ratio: float = 0.05
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    optimiser: Literal["adamw", "adafactor", "muon"] = "adamw"
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    log_every: int = 20
    sample_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    minutes: float | None = None
    clock: Literal["wall", "processor"] = "wall"

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("warmup_steps", "sample_every", "weight_decay", "gradient_clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}, it must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay is {self.ema_decay}, it must be at least 0 and below 1")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise InputError(f"final_learning_rate_ratio is {self.final_learning_rate_ratio}, it must be in [0, 1]")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}, each must be at least 0 and below 1")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes is {self.minutes}, it must be above 0")
