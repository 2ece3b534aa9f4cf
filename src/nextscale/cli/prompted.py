"""What commands ask of a model that text steers: prompts in the place of labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextscale.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from nextscale.evaluation.prompt_exports import BenchmarkPrompt, Layout
    from nextscale.sampling.generation import Generation


class Benchmark(str, Enum):
    """Where the evaluator of a published benchmark looks for its pictures."""

    geneval = "geneval"
    dpg = "dpg"
    hpsv2 = "hpsv2"
    imagereward = "imagereward"


@dataclass(frozen=True)
class Asked:
    """Pictures of one schedule: what they are of, a seed each, the schedule (None is the model's own), and of each the
    negative prompt, "" for none."""

    labels: Any
    seeds: list[int]
    schedule: Any = None
    negatives: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.seeds)


def takes_prompts(system: Any) -> bool:
    """Whether text says what pictures are of."""
    return hasattr(system, "prompts")


def check(system: Any, model: str, labels: list[str] | None, prompts: bool) -> bool:
    """Whether text says what pictures are of.

    Raises InputError where labels were given to a model of prompts, or prompts to a model of classes.
    """
    if takes_prompts(system):
        if labels:
            raise InputError("--label: text steers this model, give prompts instead")
    elif prompts:
        raise InputError(f"{model} takes no prompts; say what to draw by --label, `nextscale models {model}` lists its "
                         "classes")
    return takes_prompts(system)


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
        raise InputError('what to draw is missing; give a prompt, as in "a red apple", or a file of them by --prompts')
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


def schedule_of(system: Any, ratio: str | None) -> Any:
    """The schedule that ``--ratio`` means, None (the model's own) where it isn't given. Raises DataError for what is no
    ratio, InputError where the model has one shape only."""
    from nextscale.data.prompts import read_ratio

    return None if ratio is None else list(system.schedule_of_ratio(1 / read_ratio(ratio, "--ratio")))


def _asked(system: Any, members: list[tuple[Any, int]], ratio: float | None, negative: str | None) -> Asked:
    away = [one.negative or negative or "" for one, _ in members]
    labels = system.prompts([one.text for one, _ in members], away if any(away) else None)
    schedule = None if ratio is None else list(system.schedule_of_ratio(1 / ratio))
    return Asked(labels, [drawn_by for _, drawn_by in members], schedule, away)


def read_one_shape(
    system: Any, prompts: list[str], file: Path | None, count: int | None, seed: int, command: str
) -> Asked:
    """``read`` for a command that draws by the model's own schedule alone. Raises InputError where prompts in the file
    have a ratio."""
    found = read(system, prompts, file, None, None, count, seed, None)
    if len(found) > 1 or found[0].schedule is not None:
        raise InputError(f"{file}: {command} draws by the model's own schedule; take the ratios out of the prompts")
    return found[0]


# Published benchmarks

def read_benchmark(
    kind: Benchmark, source: Path | None, out: Path, model: str, count: int | None
) -> tuple[Layout, list[BenchmarkPrompt]]:
    """Where pictures go, and the prompts of a benchmark's own file or folder.

    Raises:
        InputError: no file was named, or a count that the benchmark doesn't have.
        DataError: it can't be read.
    """
    from nextscale.evaluation.prompt_exports import LAYOUTS

    if source is None:
        raise InputError(f"--benchmark {kind.value}: its prompts are missing; name the benchmark's own file or folder "
                         "by --prompts")
    layout_type = LAYOUTS[kind.value]
    # The evaluator's folders are named so; a published size has dots in its name.
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(model).resolve().name if Path(model).is_dir() else model).strip("-_")
    layout = layout_type(out, **({} if count is None else {"count": count}), model=name or "nextscale")
    return layout, layout_type.read(source)


def draw_benchmark(
    layout: Layout,
    prompts: list[BenchmarkPrompt],
    system: Any,
    negative: str | None,
    ratio: str | None,
    seed: int,
    draw: Callable[..., Generation],
) -> int:
    """Draws what is not there yet, and returns of how many prompts. Picture i of prompt n has the seed of its number,
    whatever was there.

    Raises:
        InputError: names or pictures that the layout can't hold, a ratio that can't be drawn.
        DataError: files that belong to other prompts, or can't be written.
    """
    from nextscale.evaluation.prompt_exports import export
    from nextscale.sampling.generation import Progress

    schedule = schedule_of(system, ratio)
    number = {layout.files(one)[0]: i for i, one in enumerate(prompts)}

    def pictures(one: BenchmarkPrompt) -> np.ndarray:
        first = seed + layout.count * number[layout.files(one)[0]]
        labels = system.prompts(one.text, negative, layout.count)
        drawn = draw(Asked(labels, [first + i for i in range(layout.count)], schedule), progress=False)
        found: np.ndarray = drawn.images
        return found

    with Progress(len(prompts), "drawing prompts", None) as bar:
        return export(layout, prompts, pictures, lambda done, total: bar.advance())
