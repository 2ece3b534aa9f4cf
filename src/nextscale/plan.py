"""The plan of a generation: which steps there are, what each predicts, and what each may see.

A plan is static and hashable. Row spans, cells, masks, FLOPs and cache sizes are derived from it and never stored
beside it.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nextscale.errors import InputError


class Span(NamedTuple):
    """Rows ``lo:hi`` of a call that belong to ``step``."""

    step: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Visibility:
    """Which steps a row sees: its own (all of it, both directions) and ``previous`` earlier ones (None: all)."""

    previous: int | None = None

    def __post_init__(self) -> None:
        if self.previous is not None and self.previous < 0:
            raise InputError(f"visibility: previous={self.previous} is negative; use None for all earlier steps")

    def sees(self, query_step: Tensor, key_step: Tensor) -> Tensor:
        """Boolean tensor (broadcast of the two): may a row of ``query_step`` see a row of ``key_step``?"""
        visible = key_step <= query_step
        if self.previous is not None:
            visible = visible & (key_step >= query_step - self.previous)
        return visible


ALL_PREVIOUS = Visibility(None)
PREVIOUS_ONLY = Visibility(1)
OWN_STEP = Visibility(0)


@dataclass(frozen=True)
class Step:
    """One step: a grid (h, w), how many maps of that grid it holds, and how many positions it predicts.

    ``maps`` is 1 but for joint models, which draw a control map and a picture map in one step. ``count`` is None where
    every cell of every map is predicted. ``places``: which cells a part is, as their numbers in row-major order map
    after map; None where a run's order says so.

    Raises InputError where the places are none of the grid's, repeat, or are not ``count``.
    """

    grid: tuple[int, int]
    maps: int = 1
    count: int | None = None
    places: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.places is not None:
            cells = self.maps * self.grid[0] * self.grid[1]
            if len(set(self.places)) < len(self.places) or not all(0 <= place < cells for place in self.places):
                raise InputError(f"plan: a step's places must differ and lie in 0..{cells - 1} on a {self.grid} grid")
            if self.count not in (None, len(self.places)):
                raise InputError(f"plan: a step predicts {self.count} positions but has {len(self.places)} places")
            object.__setattr__(self, "count", len(self.places))

    @property
    def rows(self) -> int:
        """Rows of the network that the step takes."""
        return self.maps * self.grid[0] * self.grid[1] if self.count is None else self.count


@dataclass(frozen=True)
class Plan:
    """Ordered steps and their visibility. ``Plan.scales([1, 2, (3, 4)])`` makes a next-scale plan."""

    steps: tuple[Step, ...]
    visible: Visibility = ALL_PREVIOUS

    def __post_init__(self) -> None:
        if not self.steps:
            raise InputError("plan: it has no steps; give at least one grid, such as 1,2,3,4")
        for k, step in enumerate(self.steps):
            if min(step.grid) < 1 or step.maps < 1:
                raise InputError(f"plan: step {k} has grid {step.grid} and {step.maps} maps; all must be at least 1")

    @classmethod
    def scales(cls, grids: Iterable[int | tuple[int, int]], visible: Visibility = ALL_PREVIOUS,
               maps: int = 1) -> Plan:
        """A next-scale plan from sides or (h, w) pairs, coarse to fine."""
        pairs = [(g, g) if isinstance(g, int) else (int(g[0]), int(g[1])) for g in grids]
        return cls(tuple(Step(pair, maps) for pair in pairs), visible)

    def stretched(self, grid: tuple[int, int]) -> Plan:
        """The same steps for another last grid: every side keeps its share of the last grid's, and is at least 1.

        Raises:
            InputError: a step predicts a part of its cells only, whose number cannot follow.
        """
        if grid == self.grid:
            return self
        if any(step.count is not None for step in self.steps):
            raise InputError("plan: steps that predict a part of their cells cannot follow another size")
        (height, width), (high, wide) = self.grid, grid
        sides = [(max(1, round(h * high / height)), max(1, round(w * wide / width)))
                 for h, w in (step.grid for step in self.steps)]
        return replace(self, steps=tuple(replace(step, grid=one) for step, one in zip(self.steps, sides, strict=True)))

    def scales_to(self, grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The grids of ``stretched``, but the first one as it is, and none twice: a schedule for a network whose first
        step has a fixed number of rows."""
        first = self.grids[0]
        return first, *(one for one in dict.fromkeys(self.stretched(grid).grids[1:]) if one != first)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every step, and the number of all rows at the end: K + 1 integers."""
        starts = [0]
        for step in self.steps:
            starts.append(starts[-1] + step.rows)
        return tuple(starts)

    @property
    def length(self) -> int:
        """Rows of the whole plan, L."""
        return self.starts[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """The grid of the last step: the latent's size."""
        return self.steps[-1].grid

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The grid of every step, (h, w)."""
        return tuple(step.grid for step in self.steps)

    def span(self, first: int, last: int) -> slice:
        """Rows of the steps ``first`` up to but not including ``last``."""
        return slice(self.starts[first], self.starts[last])

    def spans(self, first: int, last: int) -> tuple[Span, ...]:
        """The same rows step by step, counted from the first of them."""
        base = self.starts[first]
        return tuple(Span(k, self.starts[k] - base, self.starts[k + 1] - base) for k in range(first, last))

    @cached_property
    def step_of_row(self) -> Tensor:
        """Step of every row, (L,) int64."""
        sizes = torch.tensor([step.rows for step in self.steps])
        return torch.repeat_interleave(torch.arange(len(self.steps)), sizes)

    @cached_property
    def cells(self) -> Tensor:
        """Cell of every row as (map, row, column), (L, 3) int64; row-major inside a map, map after map.

        A step that predicts fewer positions than it has cells has those of its places, and where it has none, gets them
        from the run's order instead.
        """
        return torch.cat([grid_cells(step)[:step.rows] if step.places is None
                          else grid_cells(step)[list(step.places)] for step in self.steps])

    def mask(self, first: int = 0, last: int | None = None) -> Tensor:
        """Who sees whom among the rows of some steps: (L, L) bool, query first."""
        step = self.step_of_row[self.span(first, len(self) if last is None else last)]
        return self.visible.sees(step[:, None], step[None, :])

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of the whole plan: what attention must compute."""
        total = 0
        for k, step in enumerate(self.steps):
            first = 0 if self.visible.previous is None else max(0, k - self.visible.previous)
            total += step.rows * (self.starts[k + 1] - self.starts[first])
        return total


def grid_cells(step: Step) -> Tensor:
    """All cells of a step as (map, row, column), (maps * h * w, 3) int64."""
    h, w = step.grid
    return torch.cartesian_prod(torch.arange(step.maps), torch.arange(h), torch.arange(w)).reshape(-1, 3)


@lru_cache(maxsize=64)
def places(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cell (1, L, 3) and step (1, L) of a plan's rows on a device, copied there once: a copy from the host makes the
    host wait. The same tensors every time: masks are known by their identity, and a compiled network would be compiled
    again for others."""
    with torch.inference_mode(False):  # else a first call under inference mode would spoil them for training
        return plan.cells[None].to(device, copy=True), plan.step_of_row.to(device, copy=True)[None]


def raster(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The numbers of cells (..., 3) in the order of ``grid_cells``: (map h + row) w + column."""
    return (cells[..., 0] * grid[0] + cells[..., 1]) * grid[1] + cells[..., 2]


EntityKind = Literal["token", "cell", "subsample", "scale", "image"]


def entities(kind: EntityKind, grids: Sequence[tuple[int, int]], size: int = 1, visible: Visibility = ALL_PREVIOUS
             ) -> Plan:
    """The plan that predicts a map entity after entity (next-X prediction, xAR, arXiv 2502.20388, section 3.2).

    ``token``: one position after another, in raster order; ``cell``: blocks of ``size`` x ``size`` positions, in raster
    order; ``subsample``: for every offset (a, b) below ``size``, in raster order, the positions (a + size i,
    b + size j); ``image``: all at once; ``scale``: whole maps of all ``grids``, coarse to fine. All but ``scale`` cut
    the last grid into parts; positions inside of an entity are in raster order.

    Raises InputError where ``size`` doesn't divide the grid.
    """
    if kind == "scale":
        return Plan.scales(grids, visible)
    if kind not in ("token", "cell", "subsample", "image"):
        raise InputError(f"entities {kind!r} are unknown; use token, cell, subsample, scale or image")
    height, width = grids[-1]
    side = size if kind in ("cell", "subsample") else 1
    if side < 1 or height % side or width % side:
        raise InputError(f"entities: {kind} of size {size} doesn't divide a grid of {height}x{width}")
    members: dict[tuple[int, int], list[int]] = {}
    for row in range(height):
        for column in range(width):
            of = {"image": (0, 0), "subsample": (row % side, column % side)}.get(kind, (row // side, column // side))
            members.setdefault(of, []).append(row * width + column)
    return Plan(tuple(Step((height, width), places=tuple(members[of])) for of in sorted(members)), visible)


def parse_grids(text: str) -> tuple[tuple[int, int], ...]:
    """Read a schedule such as ``"1,2,3x4,6"`` into grids; raises InputError naming the part that is wrong."""
    grids = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) > 2 or not all(n.isdecimal() and len(n) < 6 and int(n) > 0 for n in numbers):
            raise InputError(f"schedule: cannot read {part.strip()!r} in {text!r}; write sides or hxw, as in 1,2,3x4,6")
        grids.append((int(numbers[0]), int(numbers[-1])))
    return tuple(grids)
