"""Prefix training: only the first scales for a share of a training (VAR's progressive training)."""
from __future__ import annotations

from dataclasses import dataclass

from nextscale.errors import InputError


@dataclass(frozen=True)
class Prefix:
    """How many scales are trained when.

    share: of the training's length during which not all scales are trained, in [0, 1); 0 trains all from the start.
    first: index of the last scale that is trained at the beginning. warmup: share of the training over which the loss
    of a scale that has just come in rises from 0.01 to its full weight.

    At progress p < share the last trained scale is first + round(p / share (K - 1 - first)), as VAR's published
    training has it (arXiv 2404.02905, code); there the loss is divided by all rows of the schedule, here by those that
    are trained, so that its size does not follow the number of scales.
    """

    share: float = 0.0
    first: int = 4
    warmup: float = 1 / 300

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InputError(f"prefix: share is {self.share}; it must be at least 0 and below 1")
        if self.first < 1:
            raise InputError(f"prefix: first is {self.first}; the first two scales are trained at least, so it must be "
                             "1 or more")
        if self.warmup < 0:
            raise InputError(f"prefix: warmup is {self.warmup}; it must not be negative")

    def at(self, progress: float, scales: int) -> tuple[int, float]:
        """How many scales are trained at ``progress`` in [0, 1], and the weight of the last of them in (0, 1].

        Raises InputError where the schedule has not more scales than ``first``.
        """
        if not self.share:
            return scales, 1.0
        if self.first >= scales - 1:
            raise InputError(f"prefix: first is {self.first}, but the last of the {scales} scales is {scales - 1}; "
                             "lower it, or set share to 0")
        more = scales - 1 - self.first
        added = min(more, round(progress / self.share * more)) if progress < self.share else more
        if not added:
            return self.first + 1, 1.0
        since = progress - min((added - 0.5) * self.share / more, self.share)
        weight = 1.0 if since >= self.warmup else 0.01 + 0.99 * max(0.0, since) / self.warmup
        return self.first + added + 1, weight
