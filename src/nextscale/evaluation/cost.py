"""What a generation costs, counted while it runs: evaluations of the network, rows, memory, bytes alive, seconds."""
from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale.run import Run

__all__ = ["Cost", "LiveBytes", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """Of one batch.

    parameters: of everything but the tokenizer, a control's too; steps: of the plan; evaluations, rows: of the network,
    of both where there are two; a row counted once a branch and picture, whichever of a network's parts it goes
    through; head_evaluations: of networks that the head has of its own (a flow, a diffusion), its modules called
    ``network``; memory_bytes: most that the run's memory held between steps (keys and values, states); peak_bytes: most
    that was alive at once beyond the weights, decoding left out, None where it wasn't asked for; seconds: of the whole
    batch, decoding included.
    """

    pictures: int
    parameters: int
    steps: int
    evaluations: int
    rows: int
    head_evaluations: int
    memory_bytes: int
    peak_bytes: int | None
    seconds: float


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, while they are alive: ``now`` and ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if _has_storage(leaf) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _has_storage(value: Any) -> bool:
    """Whether a value is a tensor that bytes can be counted of: weights that oneDNN packed are opaque."""
    return isinstance(value, Tensor) and not value.is_mkldnn


def cost_of(system: Any, labels: Any = None, count: int | None = None, peak: bool = False, **options: Any) -> Cost:
    """Draw one batch with ``system.generate(labels, count, **options)`` and count. peak: also count the bytes alive,
    which makes it slow."""
    seen = {"steps": 0, "evaluations": 0, "rows": 0, "head": 0, "memory": 0, "peak": 0}

    def enters(module: nn.Module, given: tuple[Any, ...]) -> None:
        call = given[0]
        seen["evaluations"] += 1
        seen["rows"] += len(call.x) * len(call.rows)

    def head_enters(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen["head"] += 1

    live = LiveBytes() if peak else None

    def after_step(step: int, run: Run) -> None:
        seen["steps"] = len(run.plan)
        seen["memory"] = max(seen["memory"], run.memory.bytes())
        seen["peak"] = 0 if live is None else live.peak  # before the batch is decoded

    generators = [system.generator, *(part.generator for name in system.further
                                      if hasattr(part := getattr(system, name), "generator"))]
    handles = [generator.register_forward_pre_hook(enters) for generator in generators]
    networks = {module for name, module in system.head.named_modules() if name.split(".")[-1] == "network"}
    whole = getattr(system.head, "network", None)  # of a head that is a network itself
    networks |= {whole} if isinstance(whole, nn.Module) else set()
    handles += [network.register_forward_pre_hook(head_enters) for network in networks]
    began = time.perf_counter()
    try:
        drawn = _inside(live, lambda: system.generate(labels, count, callback=after_step, output="torch",
                                                      progress=False, batch_size=1 << 30, **options))
    finally:
        for handle in handles:
            handle.remove()
    parts = [getattr(system, name) for name in (*system.transformer_parts, *system.further)]
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return Cost(len(drawn.seeds), parameters, seen["steps"], seen["evaluations"], seen["rows"], seen["head"],
                seen["memory"], seen["peak"] if peak else None, time.perf_counter() - began)


def _inside(mode: TorchDispatchMode | None, work: Callable[[], Any]) -> Any:
    if mode is None:
        return work()
    with mode:
        return work()
