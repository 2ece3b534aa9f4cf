"""Learning-rate schedules as plain functions of how far the training is."""

from __future__ import annotations

import math
from typing import Literal

from nextscale.errors import InputError

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_scale(
    schedule: Schedule,
    step: int,
    progress: float,
    warmup_steps: int = 0,
    final_ratio: float = 0.0,
) -> float:
    """What the peak learning rate is multiplied by.

    ``min(1, (step + 1) / warmup_steps) * (final_ratio + (1 - final_ratio) * fall(progress))`` with
    ``fall = (1 + cos(pi p)) / 2`` (cosine), ``1 - p`` (linear) or 1 (constant).

    Warm-up counts steps and the fall follows ``progress``, because a run that is bounded by wall time does not know
    its number of steps.

    Args:
        schedule: which fall.
        step: steps done before this one, from 0.
        progress: share of the training done before this step, in [0, 1].
        warmup_steps: steps of linear rise; 0 for none.
        final_ratio: learning rate at the end over its peak, in [0, 1].

    Raises:
        InputError: unknown schedule.
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule == "linear":
        fall = 1.0 - progress
    elif schedule == "constant":
        return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    else:
        raise InputError(f"unknown schedule {schedule!r}; use cosine, linear or constant")
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warm * (final_ratio + (1.0 - final_ratio) * fall)
