"""Guidance: which branches a run needs, and how their outputs are combined.

``scale`` means one thing for all: the combined output is u + scale (c - u) at the schedule's strongest step.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from nextscale.errors import InputError
from nextscale.run import At

Schedule = str | tuple[float, ...]
"""How the strength goes over the steps: by name, or as a share of the scale for every step."""

SCHEDULES: dict[str, Callable[[At], float]] = {
    "ramp": lambda at: at.progress,  # VAR: nothing at the first step, full at the last
    "constant": lambda at: 1.0,
    "cosine": lambda at: (1 - math.cos(math.pi * at.progress)) / 2,  # slow at both ends
    "linear": lambda at: min(at.done + at.count, at.total - 1) / max(at.total, 1),  # MAR: share drawn behind the step
}


def power_cosine(at: At, power: float) -> float:
    """(1 - cos(pi (k / K)^power)) / 2 at step k of K: the larger the power, the later it rises; 0 is constant.

    The convention of RAR (arXiv 2411.00776) and AliTok, so the last of few steps has not quite the full scale.
    """
    return (1 - math.cos(math.pi * (at.step / at.steps) ** power)) / 2


def interval(at: At, low: float, high: float) -> float:
    """Guidance where ``low`` <= progress <= ``high`` alone, 0 at the first step and 1 at the last: the interval of
    noise levels of arXiv 2404.07724, over the steps of a plan."""
    return 1.0 if low <= at.progress <= high else 0.0


def _check_power(power: float) -> str | None:
    return None if 0 <= power < math.inf else "its power must be at least 0 and finite"


def _check_interval(low: float, high: float) -> str | None:
    return None if 0 <= low <= high <= 1 else "its bounds must rise and lie in 0..1"


WITH_NUMBERS: dict[str, tuple[str, Callable[..., float], Callable[..., str | None]]] = {
    "power-cosine": ("power-cosine:1.5", power_cosine, _check_power),
    "interval": ("interval:0.2:0.8", interval, _check_interval),
}
"""Schedules that take numbers: how they are written, the share at a step, what is wrong with the numbers."""


@lru_cache
def _named(schedule: str) -> Callable[[At], float]:
    """A schedule by its name, with its numbers behind colons. Raises InputError where it is none."""
    name, *given = schedule.split(":")
    if name in SCHEDULES and not given:
        return SCHEDULES[name]
    if name not in WITH_NUMBERS:
        known = ", ".join([*SCHEDULES, *(written for written, _, _ in WITH_NUMBERS.values())])
        raise InputError(f"guidance_schedule {schedule!r} is unknown; use one of {known}, or a number for every step")
    written, share, wrong_with = WITH_NUMBERS[name]
    try:
        numbers = [float(text) for text in given]
    except ValueError:
        numbers = []
    if len(numbers) != written.count(":"):
        raise InputError(f"guidance_schedule {schedule!r}: write it as {written}")
    if wrong := wrong_with(*numbers):
        raise InputError(f"guidance_schedule {schedule!r}: {wrong}")
    return lambda at: share(at, *numbers)


def check_schedule(schedule: Schedule) -> None:
    """Raises InputError for a name that isn't known, or shares that are none."""
    if isinstance(schedule, str):
        _named(schedule)
    elif not schedule or not all(math.isfinite(share) for share in schedule):
        raise InputError(f"guidance_schedule {tuple(schedule)}: it must be a finite number for every step")


def share_of(schedule: Schedule, at: At) -> float:
    """The share of the scale at a step. Raises InputError where there are more or fewer numbers than steps."""
    if isinstance(schedule, str):
        return _named(schedule)(at)
    if len(schedule) != at.steps:
        raise InputError(f"guidance_schedule: {len(schedule)} numbers are given for {at.steps} steps")
    return schedule[at.step]


class Guidance(Protocol):
    """Branches by name, and the rule that combines their outputs in the head's native output."""

    @property
    def branches(self) -> tuple[str, ...]: ...

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor: ...


@dataclass(frozen=True)
class Unguided:
    """The conditional branch as it is. Other branches are for what is guided inside of the network."""

    branches: tuple[str, ...] = ("conditional",)

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
        return outputs["conditional"]


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598): (1 + t) c - t u with t = (scale - 1) schedule(step).

    VAR publishes t at the last step: its "cfg 1.5" is scale 2.5 here.
    """

    scale: float
    schedule: Schedule = "ramp"
    branches: tuple[str, ...] = ("conditional", "unconditional")

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise InputError(f"guidance_scale is {self.scale}; it must be at least 0 and finite (1 is unguided)")
        check_schedule(self.schedule)

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
        t = (self.scale - 1) * self.share(at)
        return (1 + t) * outputs["conditional"] - t * outputs["unconditional"]

    def share(self, at: At) -> float:
        """The schedule: share of the scale at a step."""
        return share_of(self.schedule, at)


@dataclass(frozen=True)
class WithinTimes(ClassifierFree):
    """Guidance of a flow's velocity at flow times from ``low`` to ``high`` alone (arXiv 2404.07724); t = 1 is noise.

    Outside of them, and where the schedule's share is 0, the conditional branch is all that is needed.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high <= 1:
            raise InputError(f"guidance_times are {self.low} to {self.high}; they must rise and lie in 0..1")

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
        return super().__call__(outputs, at) if len(self.needed(at)) > 1 else outputs["conditional"]

    def share(self, at: At) -> float:
        return super().share(at) if self.low <= at.time <= self.high else 0.0

    def needed(self, at: At) -> tuple[str, ...]:
        """The branches that are asked for at a time."""
        return self.branches if self.share(at) and self.scale != 1 else self.branches[:1]


@dataclass(frozen=True)
class Stepwise:
    """Classifier-free guidance u + s_k (c - u) with a scale of its own for every step k of the plan."""

    scales: tuple[float, ...]
    branches: tuple[str, ...] = ("conditional", "unconditional")

    def __post_init__(self) -> None:
        if not all(0 <= scale < math.inf for scale in self.scales):
            raise InputError(f"guidance scales are {self.scales}; they must be at least 0 and finite (1 is unguided)")

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
        scale, unguided = self.scales[at.step], outputs["unconditional"]
        return unguided + scale * (outputs["conditional"] - unguided)


@dataclass(frozen=True)
class Nested:
    """Guidance with one branch per thing that is dropped (the telescope of ControlVAR, arXiv 2406.09750, eq. 6).

    branches b_0 .. b_n from most to least conditioned and weights w_1 .. w_n:
    b_n + sum_i (1 + w_i) (b_(i-1) - b_i), each w_i times the schedule.
    """

    branches: tuple[str, ...]
    weights: tuple[float, ...]
    schedule: Schedule = "ramp"

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.branches) - 1:
            raise InputError(f"nested guidance: {len(self.branches)} branches need {len(self.branches) - 1} weights, "
                             f"got {len(self.weights)}")
        if not all(map(math.isfinite, self.weights)):
            raise InputError(f"nested guidance: its weights are {self.weights}; they must be finite")
        check_schedule(self.schedule)

    def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
        share = share_of(self.schedule, at)
        values = [outputs[name] for name in self.branches]
        total = values[-1]
        for w, more, less in zip(self.weights, values[:-1], values[1:], strict=True):
            total = total + (1 + w * share) * (more - less)
        return total


def make_guidance(scale: float, schedule: Schedule = "ramp") -> Guidance:
    """Guidance from settings: scale 1 is none."""
    return Unguided() if scale == 1 else ClassifierFree(scale, schedule)
