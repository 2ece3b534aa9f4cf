"""Training: one loop for every task, crash-safe checkpoints, averages, schedules, settings."""

from nextscale.training.checkpoint import Checkpoint, checkpoints, latest, read_checkpoint
from nextscale.training.config import TrainConfig
from nextscale.training.ema import Average
from nextscale.training.journal import read_metrics
from nextscale.training.task import Task, TrainingStep, decay_groups
from nextscale.training.trainer import DivergedError, Trainer, TrainResult

__all__ = [
    "Average",
    "Checkpoint",
    "DivergedError",
    "Task",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingStep",
    "checkpoints",
    "decay_groups",
    "latest",
    "read_checkpoint",
    "read_metrics",
]
