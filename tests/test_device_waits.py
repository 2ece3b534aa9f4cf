"""The step loop never makes the host wait for the device: it neither asks for a value nor copies from the host.

Shown without a GPU: systems run on tensors that have a shape and no values, where asking for one raises, and every
operation is watched for tensors of the host.
"""
from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_flexvar import tiny as tiny_flexvar
from test_hmar import tiny as tiny_hmar
from test_m_var import tiny as tiny_m_var
from test_srdd import tiny as tiny_srdd
from tiny import tiny_var
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale.noise import Keyed
from nextscale.systems.class_conditional import ClassConditionalSystem

SYSTEMS: dict[str, Callable[[], ClassConditionalSystem]] = {
    "var smooth": tiny_var, "flexvar": tiny_flexvar, "hmar": tiny_hmar,
    "hmar in rounds": lambda: tiny_hmar(((1,), (2, 2), (5, 4), (8, 8))), "m_var": tiny_m_var,
    "srdd": lambda: tiny_srdd(1)}


class Copies(TorchDispatchMode):
    """Names of operations that bring a tensor from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cpu"]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device.type == "meta"]
        if made and any(t.ndim for t in given):
            self.found.append(str(func))
        return out


def without_values(system: nn.Module) -> Any:
    """The same system with weights that have shapes alone."""
    memo: dict[int, Any] = {}
    for tensor in (*system.parameters(), *system.buffers()):
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, False) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(system, memo)


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which knows no such device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.usefixtures("no_autocast")
def test_the_loop_neither_asks_the_device_nor_copies_to_it(name: str) -> None:
    system = without_values(SYSTEMS[name]())
    used = system.settings_for("pictures", {"top_k": 5, "top_p": 0.9, "smooth": "smooth" in name})
    guidance = system.guidance(used)
    labels = torch.zeros(2, 1, dtype=torch.int64, device="meta")

    def draw() -> list[str]:
        run = system.start(labels, guidance, Keyed.from_seeds([0, 1], "meta"), system.plan_for(used))
        with torch.no_grad(), Copies() as copies:
            list(system.sampled(run, guidance, used))
            system.tokenizer.decode(run.canvas)
        assert run.done
        return copies.found

    draw()  # what a plan needs is brought over once
    assert draw() == []
