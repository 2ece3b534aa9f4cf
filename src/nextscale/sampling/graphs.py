"""Steps captured as CUDA graphs: a plan's shapes never change, so each step's kernels are recorded once and replayed.

At one picture a GPU spends most of a step waiting for Python to launch the next kernel; a replayed graph launches all
of them at once. Not run on a GPU yet: what is tested is everything around the capture, with a recorder of operations in
the place of the GPU's.
"""
from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nextscale.context import Context, Hook, overrides
from nextscale.errors import InputError
from nextscale.heads.categorical import Evaluate
from nextscale.layers.memory import Group, Memory
from nextscale.noise import Keyed
from nextscale.plan import Plan, places
from nextscale.run import Ahead, Call, Rows, Run
from nextscale.sampling.steps import Choice, evaluator


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """The same operations again on the same memory."""
        ...


Capture = Callable[[Callable[[], Any]], tuple[Graph, Any]]
"""Records work, which may be run several times: what replays it, and what it gave, tensors that replays write to."""

INSIDE = ("enter", "leave", "block", "residual", "leading", "attend", "read")
"""What a hook does inside the network, where a replay runs no Python."""

BETWEEN = ("evaluation", "advance", "inputs", "output", "logits", "tokens")
"""What a hook does between the network and the canvas: with it, the network alone is captured."""


@dataclass
class Evaluation:
    """One evaluation of the network, captured.

    inputs, hidden: the tensors that it reads its call from and writes its result to; reads: what of the run's memory it
    reads besides; left: that memory behind it.
    """

    graph: Graph
    inputs: list[Tensor]
    rows: Rows
    hidden: Tensor
    reads: list[Tensor]
    left: Memory


@dataclass
class Whole:
    """A whole step, captured: call, network, guidance, filters, draw and canvas.

    canvas, read, numbers: the tensors that it reads the run's canvas, last read and random numbers from, these by what
    they are asked for; reads: as in ``Evaluation``; ended: the run that it writes to.
    """

    graph: Graph
    canvas: Tensor
    read: Tensor | None
    numbers: dict[tuple[str, int, int], Ahead]
    reads: list[Tensor]
    ended: Run


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run in one tensor, branch-major."""

    held: Tensor
    branches: tuple[str, ...]

    def branch(self, name: str) -> Tensor:
        return self.held.chunk(len(self.branches))[self.branches.index(name)]

    def gather(self, items: Tensor) -> Conditions:
        raise InputError("captured steps: the conditions of a captured run are one run's")


@dataclass
class Given:
    """What all whole steps of a run read: its conditions, keys and order; ``of``: whose they are now."""

    condition: Conditions
    noise: Keyed
    order: Tensor
    of: tuple[Any, ...] = ()


@dataclass
class Family:
    """The graphs of runs of one kind, and the pool of memory that they share; None for what can't be captured."""

    pool: Any = None
    steps: dict[Hashable, Evaluation | Whole | None] = field(default_factory=dict)
    given: Given | None = None


@dataclass
class CapturedSteps(Hook):
    """A hook that captures every step at its first use and replays it in later runs of the same plan, branches, number
    of pictures and sampling settings; on devices without CUDA graphs it does nothing.

    A whole step is one graph: call, network, guidance, filters, draw and canvas. Where something looks between these
    (another hook, VAR's smooth mode, a head of rounds that are not known beforehand) the network alone is, and what a
    replay can't stand for is evaluated as ever: calls that need a mask or whose rows are provisional, networks whose
    calls or conditions hold more than tensors (xAR, MAR, text), runs that were gathered or handed over, and what the
    device refuses to capture. One run at a time lives in the captured memory: to go on with a run after another has
    begun, gather it before. A network whose weights were moved needs a new hook.

    keep: of how many kinds of runs the graphs and their memory are kept, the last used; of whole steps and of networks
    each plan, number of pictures and so on is one. capture: what records in the place of CUDA. Raises InputError beside
    hooks that act inside the network.
    """

    same_pictures = True

    capture: Capture | None = None
    keep: int = 4
    _families: OrderedDict[Hashable, Family] = field(default_factory=OrderedDict, init=False, repr=False)
    _owner: weakref.ref[Memory] | None = field(default=None, init=False, repr=False)
    _before: dict[int, weakref.ref[Memory]] = field(default_factory=dict, init=False, repr=False)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            if hook is not self and any(overrides(hook, name) for name in INSIDE):
                raise InputError(f"captured steps: {type(hook).__name__} acts inside the network, where a replay runs "
                                 "no Python; leave one of the two out")

    def advance(self, choice: Choice, run: Run, hooks: Sequence[Hook], step: Callable[[], None]) -> Callable[[], None]:
        others = [hook for hook in hooks if hook is not self]
        if not self._captures(run) or not replayable(choice, run) \
                or any(overrides(hook, name) for hook in others for name in BETWEEN):
            return step

        def captured() -> None:
            if not self._replayed(choice, run):
                step()

        return captured

    def evaluation(self, generator: nn.Module, run: Run, evaluate: Evaluate) -> Evaluate:
        if not self._captures(run):
            return evaluate

        def captured(call: Call) -> Tensor:
            memory = run.memory
            if not capturable(call) or torch.is_grad_enabled() or not self._owns(run):
                return evaluate(call)
            memory.begin()
            family = self._family((generator, *_kind(run)))
            key = (run.cursor, len(memory.log or ()), *_key(call))
            if key not in family.steps:
                family.steps[key] = self._record_evaluation(family, generator, run, call)
            step = family.steps[key]
            if not isinstance(step, Evaluation) or not _same(step.reads, _read(memory)):
                return evaluate(call)
            for held, given in zip(step.inputs, _inputs(call), strict=True):
                held.copy_(given)
            step.graph.replay()
            memory.groups, memory.advanced = _groups(step.left), dict(step.left.advanced)
            memory.constants = {**step.left.constants, **memory.constants}
            run.settle(step.rows)
            return step.hidden.clone()

        return captured

    def _captures(self, run: Run) -> bool:
        return self.capture is not None or run.device.type == "cuda"

    def _family(self, kind: Hashable) -> Family:
        """The graphs of a kind of runs; those of the kind that was used longest ago are given up for a new one."""
        found = self._families.setdefault(kind, Family())
        self._families.move_to_end(kind)
        while len(self._families) > self.keep:
            self._families.popitem(last=False)
        return found

    def _owns(self, run: Run) -> bool:
        """Whether a run's memory is the one that lives in the captured tensors; that of one that begins becomes it."""
        memory = run.memory
        if self._owner is not None and self._owner() is memory:
            return True
        known = self._before.get(id(memory))
        if known is not None and known() is memory:
            raise InputError("captured steps: another run was begun in the memory of this one; gather a run before "
                             "another begins, or draw one after the other")
        if run.cursor or memory.log is not None or memory.groups or memory.state:
            return False
        self._owner = weakref.ref(memory)
        self._before = {key: ref for key, ref in self._before.items() if ref() is not None}
        self._before[id(memory)] = self._owner
        return True

    # Whole steps

    def _replayed(self, choice: Choice, run: Run) -> bool:
        """Do a step by its graph, which is captured where there is none; False where that can't be."""
        memory = run.memory
        if torch.is_grad_enabled() or not isinstance(run.noise, Keyed) or not self._owns(run):
            return False
        memory.begin()
        family = self._family((choice.generator, choice.head.replays, choice.guidance, choice.filters, *_kind(run)))
        given, read = _given(family, run), run.reads[run.cursor]
        key = (run.cursor, run.filled, run.canvas.value.shape, None if read is None else (read.shape, read.dtype))
        if key not in family.steps:
            family.steps[key] = self._record_step(family, given, choice, run)
        step = family.steps[key]
        if not isinstance(step, Whole) or not _same(step.reads, _all(memory)):
            return False
        step.canvas.copy_(run.canvas.value)
        if step.read is not None and read is not None:
            step.read.copy_(read)
        for asked, held in step.numbers.items():
            held.numbers.copy_(run.uniform(*asked))
        step.graph.replay()
        ended = step.ended
        run.cursor, run.filled = ended.cursor, ended.filled
        run.tokens.append(ended.tokens[-1].clone())
        run.log_probs += [log_prob.clone() for log_prob in ended.log_probs]
        run.canvas = replace(run.canvas, value=ended.canvas.value.clone())
        if not run.done:
            last = ended.reads[-1]
            run.reads.append(None if last is None else last.clone())
        left = ended.memory
        memory.groups, memory.log, memory.state = _groups(left), left.log, dict(left.state)
        memory.constants = dict(left.constants)
        return True

    def _record_step(self, family: Family, given: Given, choice: Choice, run: Run) -> Whole | None:
        with _plainly():
            canvas, last = run.canvas.value.clone(), run.reads[run.cursor]
            read, numbers = None if last is None else last.clone(), dict[tuple[str, int, int], Ahead]()
            held = replace(run, order=given.order, noise=given.noise, condition=given.condition, carried={})

            def begin(earlier: Sequence[Tensor | None]) -> Call:
                held.memory, held.cursor, held.filled = _copy(run.memory), run.cursor, run.filled
                held.canvas, held.reads = replace(run.canvas, value=canvas), [*earlier, read]
                held.tokens, held.log_probs, held.ahead = [], [], dict(numbers)
                call: Call = choice.generator.call(held)
                return call

            def work() -> None:
                call = begin([None] * run.cursor)
                held.write(choice.sample(evaluator(choice.generator, held), call, held))

            call = begin(run.reads[:run.cursor])
            if not capturable(call) or len(call.raw) != 1:
                return None
            work()  # tells which random numbers are asked for
            here = run.plan.span(run.cursor, run.cursor + 1)
            for asked, found in held.ahead.items():
                start = run.plan.starts[found.first]
                numbers[asked] = Ahead(found.numbers[:, here.start - start:here.stop - start].clone(), run.cursor,
                                       run.cursor + 1, given.noise, given.order)
            graph = self._record(family, run.device, work)
            if graph is None or _departed(held.memory):
                return None
            return Whole(graph[0], canvas, read, numbers, _all(run.memory), held)

    # The network alone

    def _record_evaluation(self, family: Family, generator: nn.Module, run: Run, call: Call) -> Evaluation | None:
        with _plainly():
            inputs = [t.clone() for t in _inputs(call)]
            x, cell, step, cond = inputs
            rows = replace(call.rows, cell=cell, step=step, cond=cond)
            held, before = replace(call, x=x, rows=rows), run.memory
            memories: list[Memory] = []

            def work() -> Tensor:
                memories.append(_copy(before))
                hidden: Tensor = generator(held, Context(memories[-1], branches=run.branches))
                return hidden

            found = self._record(family, run.device, work)
            if found is None:
                return None
            if _departed(memories[-1]):
                raise InputError("captured steps: an address of this run's memory holds rows of its own; leave the "
                                 "hook out")
            return Evaluation(found[0], inputs, rows, found[1], _read(before), memories[-1])

    def _record(self, family: Family, device: torch.device, work: Callable[[], Any]) -> tuple[Graph, Any] | None:
        """What replays some work, and what it gave; None, and a line of the log, where it can't be captured."""
        try:
            return self._cuda_capture(family, device, work) if self.capture is None else self.capture(work)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            logging.getLogger("nextscale").warning(f"captured steps: a step is drawn as ever, its capture failed "
                                                   f"({reason})")
            return None

    @staticmethod
    def _cuda_capture(family: Family, device: torch.device, work: Callable[[], Any]) -> tuple[Graph, Any]:
        """One run to warm up, as the capture wants it on a stream of its own, then the capture. All on the run's own
        device, whichever is the current one."""
        with torch.cuda.device(device):
            family.pool = family.pool or torch.cuda.graph_pool_handle()
            stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(before)
            with torch.cuda.stream(stream):
                work()
            before.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # The stream is named, for torch's own is of the device that was the current one when it was made; what
            # other threads do (saving pictures) is no part of the capture.
            with torch.cuda.graph(graph, pool=family.pool, stream=stream, capture_error_mode="thread_local"):
                found = work()
        return OnDevice(graph, device), found


@dataclass(frozen=True)
class OnDevice:
    """A CUDA graph that is replayed on its own device."""

    graph: Any
    device: torch.device

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


def capturable(call: Call) -> bool:
    """Whether a call is made of tensors whose shapes a plan fixes: no mask to make, no rows to commit later."""
    rows, cond = call.rows, call.rows.cond
    return type(call) is Call and not rows.masked and rows.keep is not None and isinstance(cond, Tensor)


def replayable(choice: Choice, run: Run) -> bool:
    """Whether all that a step does is known beforehand: its head says so, guidance and filters are settings, and the
    conditions are tensors."""
    settings = (choice.guidance, *choice.filters)
    return getattr(choice.head, "replays", None) is not None and choice.soft is None \
        and all(is_dataclass(one) and type(one).__dataclass_params__.frozen for one in settings) \
        and isinstance(run.condition.branch(run.branches[0]), Tensor)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Without gradients and without inference mode, whose tensors nothing could be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _kind(run: Run) -> tuple[Hashable, ...]:
    """What graphs of runs hang on, whatever the step."""
    kind = run.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return run.plan, run.branches, run.pictures, run.device, run.order.shape, _own_order(run), cast


def _own_order(run: Run) -> bool:
    return run.order is places(run.plan, run.device)[0]


def _given(family: Family, run: Run) -> Given:
    """What the whole steps of a family read, made those of a run."""
    assert isinstance(run.noise, Keyed)
    of = weakref.ref(run.memory), run.noise, run.condition, run.order
    if family.given is None:
        with _plainly():
            noise = Keyed(run.noise.key_B2.clone(), run.noise.forks_B.clone())
            order = run.order if _own_order(run) else run.order.clone()
            family.given = Given(Conditions(run.conditions().clone(), run.branches), noise, order, of)
    given = family.given
    if given.of[0]() is not run.memory or not all(a is b for a, b in zip(given.of[1:], of[1:], strict=True)):
        given.condition.held.copy_(run.conditions())
        given.noise.key_B2.copy_(run.noise.key_B2)
        given.noise.forks_B.copy_(run.noise.forks_B)
        if given.order is not run.order:
            given.order.copy_(run.order)
        given.of = of
    return given


def _inputs(call: Call) -> list[Tensor]:
    return [call.x, call.rows.cell, call.rows.step, call.rows.cond]


def _key(call: Call) -> tuple[Hashable, ...]:
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in _inputs(call))
    return shapes, call.rows.keep, call.rows.spans, call.rows.visible, call.round


def _groups(memory: Memory) -> dict[str, list[Group]]:
    return {address: [replace(group) for group in groups] for address, groups in memory.groups.items()}


def _copy(memory: Memory) -> Memory:
    """A memory of its own with the same tensors."""
    return replace(memory, groups=_groups(memory), state=dict(memory.state), advanced={},
                   constants=dict(memory.constants), _joined=None)


def _departed(memory: Memory) -> bool:
    """Whether an address holds other rows than the log."""
    return any(group.tags is not None for groups in memory.groups.values() for group in groups)


def _read(memory: Memory) -> list[Tensor]:
    """What of a memory an evaluation may read."""
    held = [t for groups in memory.groups.values() for group in groups for t in (group.k, group.v)]
    return [*held, *memory.state.values()]


def _all(memory: Memory) -> list[Tensor]:
    """The same with what is constant over the run, which of an evaluation alone comes with its call."""
    return [*_read(memory), *(t for t in tree_leaves(memory.constants) if isinstance(t, Tensor))]


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
