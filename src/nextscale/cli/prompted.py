"""What ``nextscale generate`` draws of a model that text steers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.errors import InputError


@dataclass(frozen=True)
class Asked:
    """Pictures of one schedule: what they are of, a seed each, the schedule (None is the model's own)."""

    labels: Any
    seeds: list[int]
    schedule: Any = None

    def __len__(self) -> int:
        return len(self.seeds)


def takes_prompts(system: Any) -> bool:
    """Whether text says what pictures are of."""
    return hasattr(system, "prompts")


def read(
    system: Any,
    prompts: list[str],
    file: Path | None,
    negative: str | None,
    ratio: str | None,
    count: int | None,
    seed: int,
    seeds: list[int] | None,
) -> list[Asked]:
    """The pictures that are asked for, those of one aspect ratio together, in the order in which the ratios come.

    Raises:
        InputError: no prompts, or seeds that they don't divide.
        DataError: a file of prompts that can't be read.
    """
    from nextscale.data.prompts import Prompt, read_prompts, read_ratio

    wanted = [Prompt(text) for text in prompts] + ([] if file is None else read_prompts(file))
    if not wanted:
        raise InputError('what to draw is missing; give a prompt, as in nextscale generate "a red apple", or --prompts')
    if count is None and seeds is not None:
        if len(seeds) % len(wanted):
            raise InputError(f"--seeds: {len(seeds)} seeds do not go evenly into {len(wanted)} prompts")
        count = len(seeds) // len(wanted)
    wanted = [one for one in wanted for _ in range(count or 1)]
    if seeds is not None and len(seeds) != len(wanted):
        raise InputError(f"--seeds: {len(seeds)} seeds were given for {len(wanted)} pictures; give one each")
    own = None if ratio is None else read_ratio(ratio, "--ratio")
    groups: dict[float | None, list[tuple[Prompt, int]]] = {}
    for i, one in enumerate(wanted):
        drawn_by = seeds[i] if seeds is not None else seed + i if one.seed is None else one.seed
        groups.setdefault(one.ratio or own, []).append((one, drawn_by))
    return [_asked(system, members, shape, negative) for shape, members in groups.items()]


def _asked(system: Any, members: list[tuple[Any, int]], ratio: float | None, negative: str | None) -> Asked:
    away = [one.negative or negative or "" for one, _ in members]
    labels = system.prompts([one.text for one, _ in members], away if any(away) else None)
    schedule = None if ratio is None else list(system.schedule_of_ratio(1 / ratio))
    return Asked(labels, [drawn_by for _, drawn_by in members], schedule)
