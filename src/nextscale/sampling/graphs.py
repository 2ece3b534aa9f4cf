"""Steps captured as CUDA graphs: a plan's shapes never change, so each step's kernels are recorded once and replayed.

At one picture a GPU spends most of a step waiting for Python to launch the next kernel; a replayed graph launches all
of them at once. Not run on a GPU yet: what is tested is everything around the capture, with a recorder of operations in
the place of the GPU's.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextscale.context import Context, Hook, overrides
from nextscale.errors import InputError
from nextscale.heads.categorical import Evaluate
from nextscale.layers.memory import Group, Memory
from nextscale.plan import Plan
from nextscale.run import Call, Rows, Run


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """The same operations again on the same memory."""
        ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Records work, which may be run several times: what replays it, and the tensor that its result is written to."""

INSIDE = ("enter", "leave", "block", "residual", "leading", "attend", "read")
"""What a hook does inside the network, where a replay runs no Python."""


@dataclass
class Step:
    """One evaluation, captured: the tensors that it reads its call from and writes its result to, and what it left in
    memory. Tensors of ``reads`` are those of the run that the graph reads besides."""

    graph: Graph
    generator: nn.Module
    inputs: list[Tensor]
    rows: Rows
    hidden: Tensor
    reads: list[Tensor]
    groups: dict[str, list[Group]]
    advanced: dict[str, Tensor]
    constants: dict[str, Any]


@dataclass
class CapturedSteps(Hook):
    """A hook that captures every evaluation of the network at its first use and replays it in later runs of the same
    plan, branches and number of pictures; on devices without CUDA graphs it does nothing.

    What a replay can't stand for is evaluated as ever: calls that need a mask or whose rows are provisional, networks
    whose calls or conditions hold more than tensors (xAR, MAR), runs that were gathered or handed over. One run at a
    time lives in the captured memory: to go on with a run after another has begun, gather it before. A network whose
    weights were moved needs a new hook. Raises InputError beside hooks that act inside the network.
    """

    capture: Capture | None = None
    _steps: dict[Any, Step] = field(default_factory=dict, init=False, repr=False)
    _owner: weakref.ref[Memory] | None = field(default=None, init=False, repr=False)
    _before: dict[int, weakref.ref[Memory]] = field(default_factory=dict, init=False, repr=False)
    _pool: Any = field(default=None, init=False, repr=False)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            if hook is not self and any(overrides(hook, name) for name in INSIDE):
                raise InputError(f"captured steps: {type(hook).__name__} acts inside the network, where a replay runs "
                                 "no Python; leave one of the two out")

    def evaluation(self, generator: nn.Module, run: Run, evaluate: Evaluate) -> Evaluate:
        capture = self.capture
        if capture is None:
            if run.device.type != "cuda":
                return evaluate
            capture = self._cuda_capture

        def captured(call: Call) -> Tensor:
            if not capturable(call) or torch.is_grad_enabled() or not self._owns(run.memory):
                return evaluate(call)
            run.memory.begin()
            key = (id(generator), run.plan, run.branches, run.cursor, _key(call), len(run.memory.log or ()))
            if key not in self._steps:
                self._steps[key] = _captured(capture, generator, run, call)
            step = self._steps[key]
            if not _same(step.reads, _tensors(run.memory)):
                return evaluate(call)
            for held, given in zip(step.inputs, _inputs(call), strict=True):
                held.copy_(given)
            step.graph.replay()
            memory = run.memory
            memory.groups = {address: [replace(group) for group in groups] for address, groups in step.groups.items()}
            memory.advanced = dict(step.advanced)
            memory.constants = {**memory.constants, **step.constants}
            run.settle(step.rows)
            return step.hidden.clone()

        return captured

    def _owns(self, memory: Memory) -> bool:
        """Whether a run's memory is the one that lives in the captured tensors; one that is empty becomes it."""
        if self._owner is not None and self._owner() is memory:
            return True
        known = self._before.get(id(memory))
        if known is not None and known() is memory:
            raise InputError("captured steps: another run was begun in the memory of this one; gather a run before "
                             "another begins, or draw one after the other")
        if memory.log is not None or memory.groups or memory.state:
            return False
        self._owner = weakref.ref(memory)
        self._before = {key: ref for key, ref in self._before.items() if ref() is not None}
        self._before[id(memory)] = self._owner
        return True

    def _cuda_capture(self, work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """One run to warm up, as the capture wants it on a stream of its own, then the capture; one pool for all."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = work()
        return graph, hidden


def capturable(call: Call) -> bool:
    """Whether a call is made of tensors whose shapes a plan fixes: no mask to make, no rows to commit later."""
    rows, cond = call.rows, call.rows.cond
    return type(call) is Call and not rows.masked and rows.keep is not None and isinstance(cond, Tensor)


def _inputs(call: Call) -> list[Tensor]:
    return [call.x, call.rows.cell, call.rows.step, call.rows.cond]


def _key(call: Call) -> tuple[Any, ...]:
    shapes = tuple((tuple(t.shape), t.dtype, t.device) for t in _inputs(call))
    return shapes, call.rows.keep, call.rows.spans, call.rows.visible, call.round


def _tensors(memory: Memory) -> list[Tensor]:
    """What of a memory an evaluation may read."""
    held = [t for groups in memory.groups.values() for group in groups for t in (group.k, group.v)]
    return [*held, *memory.state.values()]


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _captured(capture: Capture, generator: nn.Module, run: Run, call: Call) -> Step:
    memory = run.memory
    inputs = [t.clone() for t in _inputs(call)]
    x, cell, step, cond = inputs
    rows = replace(call.rows, cell=cell, step=step, cond=cond)
    held = replace(call, x=x, rows=rows)
    before = {address: [replace(group) for group in groups] for address, groups in memory.groups.items()}
    constants, reads = dict(memory.constants), _tensors(memory)

    def work() -> Tensor:
        memory.groups = {address: [replace(group) for group in groups] for address, groups in before.items()}
        memory.constants, memory.advanced = dict(constants), {}
        hidden: Tensor = generator(held, Context(memory, branches=run.branches))
        return hidden

    graph, hidden = capture(work)
    if any(group.tags is not None for groups in memory.groups.values() for group in groups):
        raise InputError("captured steps: an address of this run's memory holds rows of its own; leave the hook out")
    made = {name: value for name, value in memory.constants.items() if name not in constants}
    found = Step(graph, generator, inputs, rows, hidden, reads, memory.groups, memory.advanced, made)
    # As they were: the replay behind this puts them in place, as every later one does.
    memory.groups, memory.constants, memory.advanced = before, constants, {}
    return found
