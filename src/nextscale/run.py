"""A generation as a value: rows, calls, and the run that they advance.

Letters: B pictures, R = branches x pictures (branch-major), L rows of a call, C width.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.layers.attention import Rule
from nextscale.layers.memory import Memory, Tags
from nextscale.noise import Keyed, Noise, Recorded
from nextscale.plan import Plan, Span, Visibility, places

AHEAD = 2**20
"""Random words that a run draws at once at most: 25 MB while it does, 4 MB kept."""


@dataclass(frozen=True)
class Rows:
    """What travels with the rows of a call into every sub-layer.

    cell (1|R, L, 3) as (map, row, column); step (1|R, L); spans: the rows step by step, None where pictures stand at
    different steps or rows were selected; keep: leading rows that stay in memory, None for provisional ones; visible:
    the plan's visibility; masked: False promises that every row may see all of memory and all of the call; cond:
    what the rows are conditioned on, (R, D) or whatever the generator takes; narrowed: what hooks hide from the rows
    beside the visibility.
    """

    cell: Tensor
    step: Tensor
    spans: tuple[Span, ...] | None
    keep: int | None
    visible: Visibility
    masked: bool
    cond: Any = None
    narrowed: tuple[Rule, ...] = ()

    def __len__(self) -> int:
        return self.step.shape[1]

    def narrow(self, rule: Rule) -> Rows:
        """The same rows, which see only what this rule shows, too."""
        return replace(self, narrowed=(*self.narrowed, rule))

    @property
    def tags(self) -> Tags:
        return Tags(self.step, self.cell)

    def select(self, index_RM: Tensor) -> Rows:
        """Other rows for every row of the batch, (R, M). Those that stay in memory are those that would have stayed.

        Rows of one step remain a span of that step. Raises InputError where the rows that stay don't lead, or are
        provisional.
        """
        if self.keep is None:
            raise InputError("rows: provisional rows can't be selected from, their commit counts all of them; "
                             "let calls with keep=None pass whole")
        keep, chosen = index_RM.shape[1] if self.keep == len(self) else 0, self.tags.selected(index_RM)
        if 0 < self.keep < len(self):
            stays = index_RM < self.keep
            keep = int(stays[0].sum())
            if not bool((stays == (torch.arange(stays.shape[1], device=stays.device) < keep)).all()):
                raise InputError("rows: those that stay in memory must lead the selection, as many in every picture; "
                                 "select among the rows of one step (Rows.by_step)")
        spans = None
        if self.spans is not None and len(self.spans) == 1:
            spans = (Span(self.spans[0].step, 0, index_RM.shape[1]),)
        return replace(self, cell=chosen.cell, step=chosen.step, spans=spans, keep=keep)

    def part(self, first: int, last: int, keep: int | None) -> Rows:
        """A run of consecutive rows ``first:last``."""
        spans = None if self.spans is None else tuple(
            Span(s.step, max(s.lo, first) - first, min(s.hi, last) - first)
            for s in self.spans if s.lo < last and s.hi > first)
        return replace(self, cell=self.cell[:, first:last], step=self.step[:, first:last], spans=spans, keep=keep)

    def by_step(self) -> list[tuple[slice, Rows]]:
        """The rows step by step, each part with its share of what stays in memory.

        What acts on a step's rows (prunes them, shrinks memory behind them) goes through a call in these parts, so
        that a prefill of several steps does what the loop did. Raises InputError where pictures stand at different
        steps.
        """
        if self.spans is None:
            raise InputError("rows: pictures stand at different steps, so the call can't be taken step by step; "
                             "leave out what acts on whole steps")
        if len(self.spans) == 1:
            return [(slice(0, len(self)), self)]
        return [(slice(s.lo, s.hi), self.part(s.lo, s.hi, None if self.keep is None
                                              else min(max(self.keep - s.lo, 0), s.hi - s.lo))) for s in self.spans]


@dataclass(frozen=True)
class Call:
    """One evaluation of the network: embedded rows x (R, L, C), their tags, which of them predict.

    raw: un-embedded inputs of the call's steps, (B, L_k, latent width) each, None for the first; again: where a step is
    predicted in several rounds, what makes the call of a later one (its arguments are the generator's); round: which
    round this is, 0 for the first; known: where hooks may know some of the step, what puts that into a
    sample, with infinite confidence, for heads that go on with what they drew.
    """

    x: Tensor
    rows: Rows
    predicts: slice
    raw: Sequence[Tensor | None] = ()
    again: Callable[..., Call] | None = None
    round: int = 0
    known: Callable[[Sample], Sample] | None = None


@dataclass(frozen=True)
class At:
    """Where a generation stands, for guidance, filters and schedules.

    step of steps; done of total: rows predicted before this step, of all; count: rows that it predicts; time and
    round: inside heads that integrate a flow or predict in rounds.
    """

    step: int
    steps: int
    done: int
    total: int
    time: float = 0.0
    round: int = 0
    grid: tuple[int, int] = (1, 1)
    count: int = 0

    @classmethod
    def of(cls, plan: Plan, step: int) -> At:
        at = plan.steps[step]
        return cls(step, len(plan), plan.starts[step], plan.length, grid=at.grid, count=at.rows)

    @property
    def progress(self) -> float:
        """Share of the steps done, 0 at the first and 1 at the last."""
        return self.step / (self.steps - 1) if self.steps > 1 else 1.0


@dataclass(frozen=True)
class Sample:
    """What a head predicts for a step.

    tokens (B, L) indices or (B, L, C) vectors; log_prob (B, L) under the distribution that was sampled, None where a
    head knows none; confidence (B, L); codes (B, L, C) where what is written on the canvas is not the tokens' own.
    """

    tokens: Tensor
    log_prob: Tensor | None = None
    confidence: Tensor | None = None
    codes: Tensor | None = None

    @property
    def written(self) -> Tensor:
        """What goes on the canvas."""
        return self.tokens if self.codes is None else self.codes


class Condition(Protocol):
    """What the pictures are of, bound to the pictures of a run; builds every branch that a guidance names."""

    def branch(self, name: str) -> Any:
        """The condition of one branch, (B, D), or what else the generator takes: a named tuple of tensors with a
        leading B, whose type can ``join`` several."""
        ...

    def gather(self, items: Tensor) -> Condition:
        """The conditions of the pictures ``items``."""
        ...


class Ahead(NamedTuple):
    """Random numbers (B, L, width) of the rows of steps ``first`` up to ``last``, and what they were drawn from."""

    numbers: Tensor
    first: int
    last: int
    noise: Noise
    order: Tensor


def conditions(condition: Condition, branches: Sequence[str]) -> Any:
    """The conditions of all rows of a batch, branch-major."""
    found = [condition.branch(name) for name in branches]
    return torch.cat(found) if isinstance(found[0], Tensor) else type(found[0]).join(found)


def empty_memory(plan: Plan) -> Memory:
    """A memory for the rows of a plan, with tags as narrow as its numbers allow. It takes nothing until it is written
    to, and loops tell it how much of the plan they walk (``sampling.steps.make_room``)."""
    largest = max(len(plan), plan.visible.previous or 0, *(max(*step.grid, step.maps) for step in plan))
    return Memory(plan.length, tag_type=torch.int8 if largest <= 127 else torch.int16)


@dataclass
class Run:
    """A generation in progress.

    ``cursor`` is the step that is predicted next, ``filled`` the steps in memory: a call covers ``filled..cursor``,
    so that a prefix, a prefill and a hand-over are just calls with more rows. ``reads`` holds the un-embedded input of
    every step up to the cursor (None for the first): it can't be had back from a canvas that was edited since.
    ``order`` is the cell of every row, (B|1, L, 3). ``carried``: what hooks hold a picture, (B, ...): forced tokens,
    control maps, scores; unlike memory, which belongs to one network, it follows a hand-over. ``ahead``: random numbers
    that were drawn already, see ``uniform``; ``step_1L``: the step of every row.
    """

    plan: Plan
    order: Tensor
    canvas: Canvas
    memory: Memory
    noise: Noise
    condition: Condition
    branches: tuple[str, ...]
    cursor: int = 0
    filled: int = 0
    tokens: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    reads: list[Tensor | None] = field(default_factory=lambda: [None])
    carried: dict[str, Tensor] = field(default_factory=dict)
    ahead: dict[tuple[str, int, int], Ahead] = field(default_factory=dict, repr=False, compare=False)
    step_1L: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up before anything is compiled, since the compiler traces through what is cached.
        self.step_1L = places(self.plan, self.device)[1]

    @classmethod
    def start(cls, plan: Plan, codec: Any, condition: Condition, branches: Sequence[str], noise: Noise,
              pictures: int, device: torch.device | str = "cpu", order: Tensor | None = None) -> Run:
        """A run at step 0 with an empty canvas and memory. order: other cells of the rows than the plan's own."""
        device = torch.device(device)
        cells = places(plan, device)[0] if order is None else order.to(device)
        return cls(plan, cells, Canvas.empty(plan, codec, pictures, device), empty_memory(plan), noise,
                   condition, tuple(branches))

    @property
    def pictures(self) -> int:
        return self.canvas.value.shape[0]

    @property
    def device(self) -> torch.device:
        return self.canvas.value.device

    @property
    def done(self) -> bool:
        return self.cursor >= len(self.plan)

    @property
    def at(self) -> At:
        return At.of(self.plan, self.cursor)

    def conditions(self) -> Any:
        """The conditions of all rows of the batch, branch-major."""
        return conditions(self.condition, self.branches)

    def uniform(self, what: str, round: int = 0, width: int = 1) -> Tensor:
        """Numbers in (0, 1) for the rows of the step under way, (B, L_k, width).

        Where the noise is addressed, those of as many of the steps behind it as ``AHEAD`` allows are drawn with them
        and kept: step by step, most of what a device is asked for outside the network would be this.
        """
        known = self.ahead.get((what, round, width))
        if known is None or not known.first <= self.cursor < known.last or known.noise is not self.noise \
                or known.order is not self.order:
            known = self._drawn(what, round, width)
        start, span = self.plan.starts[known.first], self.plan.span(self.cursor, self.cursor + 1)
        return known.numbers[:, span.start - start:span.stop - start]

    def _drawn(self, what: str, round: int, width: int) -> Ahead:
        starts, first, last = self.plan.starts, self.cursor, self.cursor + 1
        words = self.pictures * -(-width // 4) * 4
        while isinstance(self.noise, Keyed) and last < len(self.plan) \
                and (starts[last + 1] - starts[first]) * words <= AHEAD:
            last += 1
        span = self.plan.span(first, last)
        found = Ahead(self.noise.uniform(what, self.step_1L[:, span], round, self.order[:, span], width), first, last,
                      self.noise, self.order)
        if (starts[last] - starts[first]) * words <= AHEAD:
            self.ahead[what, round, width] = found
        return found

    @property
    def exact(self) -> bool:
        """Whether draws are those of a recorded run, to the last of float64's digits."""
        return isinstance(self.noise, Recorded)

    def rows(self, first: int, last: int, keep: int | None = -1, cond: Any = None) -> Rows:
        """Rows of the steps ``first`` up to ``last``; by default all of them stay in memory.

        A mask is needed where a call holds several steps, or memory holds steps that the visibility hides.
        """
        span = self.plan.span(first, last)
        step_1L = self.step_1L[:, span]
        previous = self.plan.visible.previous
        hidden = previous is not None and self.filled > 0 and first - previous > 0
        length = span.stop - span.start
        return Rows(self.order[:, span], step_1L, self.plan.spans(first, last), length if keep == -1 else keep,
                    self.plan.visible, masked=last - first > 1 or hidden, cond=cond)

    def write(self, sample: Sample) -> None:
        """Put a step's tokens on the canvas and move to the next step."""
        self.tokens.append(sample.tokens)
        if sample.log_prob is not None:
            self.log_probs.append(sample.log_prob)
        step = self.plan.steps[self.cursor]
        cells = None if step.count is None else self.order[:, self.plan.span(self.cursor, self.cursor + 1)]
        self.canvas = self.canvas.write(self.cursor, sample.written, cells)
        self.cursor += 1
        if not self.done:
            self.reads.append(self.canvas.read(self.cursor))

    def force(self, tokens: Tensor) -> None:
        """Give a step's tokens instead of predicting them; memory is filled when the next step is evaluated."""
        certain = None if tokens.is_floating_point() else torch.zeros(tokens.shape[:2], device=self.device)
        self.write(Sample(tokens, certain))

    def settle(self, rows: Rows) -> None:
        """After a call: its kept rows are in memory now, and steps all of whose rows are kept count as filled."""
        self.memory.settle(rows.keep, rows.tags)
        for span in rows.spans or ():
            if rows.keep is not None and span.hi <= rows.keep:
                self.filled = max(self.filled, span.step + 1)

    def carry(self, name: str, values: Tensor) -> Tensor:
        """The values (B, ...) that a hook holds a picture: taken over when first asked for, then gathered with the
        run. A hook that kept them itself would give a gathered run another picture's."""
        if name not in self.carried:
            if len(values) != self.pictures:
                raise InputError(f"{name}: given for {len(values)} pictures, but the run has {self.pictures}")
            self.carried[name] = values
        return self.carried[name]

    def commit(self, count_B: Tensor) -> None:
        """Keep the first ``count`` provisional rows of every picture, in all branches."""
        self.memory.commit(count_B.repeat(len(self.branches)))

    def _batch_rows(self, items: Tensor) -> Tensor:
        branch = torch.arange(len(self.branches), device=items.device) * self.pictures
        return (branch[:, None] + items[None]).flatten()

    def gather(self, items: Tensor | Sequence[int]) -> Run:
        """An independent run of the pictures ``items`` (repeats allowed, each with noise of its own)."""
        items = torch.as_tensor(items, dtype=torch.int64, device=self.device)
        if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < self.pictures:
            raise InputError(f"gather: items {items.tolist()} are not all in 0..{self.pictures - 1}")
        order = self.order if len(self.order) == 1 else self.order[items]
        return replace(self, order=order, canvas=self.canvas.gather(items),
                       memory=self.memory.gather(self._batch_rows(items)), noise=self.noise.gather(items),
                       condition=self.condition.gather(items),
                       tokens=[t[items] for t in self.tokens], log_probs=[p[items] for p in self.log_probs],
                       reads=[None if r is None else r[items] for r in self.reads],
                       carried={name: value[items] for name, value in self.carried.items()}, ahead={})

    def fork(self, copies: int) -> Run:
        """Every picture ``copies`` times, copies of one picture side by side."""
        return self.gather(torch.arange(self.pictures, device=self.device).repeat_interleave(copies))

    def hand_over(self, condition: Condition, branches: Sequence[str] | None = None) -> Run:
        """The same generation for another network: same canvas, tokens and noise, an empty memory.

        The next call prefills every step so far under the training mask (CoDe, arXiv 2411.17787).
        """
        everyone = torch.arange(self.pictures, device=self.device)
        child = replace(self, memory=empty_memory(self.plan)).gather(everyone)  # a memory that goes isn't copied
        child.change_network(condition, branches)
        return child

    def change_network(self, condition: Condition, branches: Sequence[str] | None = None) -> None:
        """Hand the run itself over: its memory is given up at once, whoever else holds the run."""
        self.memory, self.filled, self.condition = empty_memory(self.plan), 0, condition
        self.branches = self.branches if branches is None else tuple(branches)
