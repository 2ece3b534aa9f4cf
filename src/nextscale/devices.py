"""Which device to compute on, and what has been brought there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nextscale import parallel
from nextscale.errors import DeviceError

_RESIDENT: dict[tuple[int, torch.device], tuple[weakref.ref[Tensor], Tensor]] = {}
"""Copies of tables by what they were made from, as long as that lives."""


def resident(table: Tensor, device: torch.device) -> Tensor:
    """A table that nobody writes to, on a device: copied there once, since at every copy the host waits until a GPU has
    done all that was asked of it before."""
    if table.device == device or torch.compiler.is_compiling():
        return table.to(device)
    key = id(table), device
    found = _RESIDENT.get(key)
    if found is None or found[0]() is not table:
        with torch.inference_mode(False):  # a first use under inference mode would spoil the copy for training
            found = weakref.ref(table, lambda _: _RESIDENT.pop(key, None)), table.to(device)
        _RESIDENT[key] = found
    return found[1]


def made_once(device: torch.device, make: Callable[..., Tensor], *given: Hashable) -> Tensor:
    """``make(*given)`` on a device, where that hangs on what is given alone: made, and copied there, once. Within a
    compiled graph it is a constant that is copied in every call."""
    if torch.compiler.is_compiling():
        return make(*given).to(device)
    return resident(_made(make, given), device)


def listed(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers that come again as a tensor on a device, (n,), copied there once."""
    return made_once(device, _listed, tuple(numbers), dtype)


def _listed(numbers: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


@lru_cache(maxsize=1024)
def _made(make: Callable[..., Tensor], given: tuple[Hashable, ...]) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        return make(*given)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has left for this process: a GPU's with what torch holds in reserve, a machine's by what its
    kernel says, within the limit of a container; None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return free_on_machine(Path("/"))


def free_on_machine(root: Path) -> int | None:
    """Bytes that a Linux machine says are free, by the files below ``root``; None where there are none."""
    found, groups = [], root / "sys/fs/cgroup"
    with suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for group, limit, used in ((groups, "memory.max", "memory.current"),
                               (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(OSError, ValueError):  # the word "max" where a container has no limit
            lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
            # Files that the kernel keeps at hand count as used, but are given up for whoever asks.
            kept = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
            found.append(int((group / limit).read_text()) - int((group / used).read_text()) + kept)
    return max(0, min(found)) if found else None


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda, mps or cpu, the first that is there; ``cuda`` in a job of several processes is this one's GPU.

    Raises:
        DeviceError: a device that is not there, or no device at all.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}; use auto, cpu, cuda or mps") from None
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise DeviceError(f"device {name!r} is not there; use --device cpu, or install a torch that has it")
    if device == torch.device("cuda") and parallel.world() > 1:
        return torch.device("cuda", parallel.local_rank())
    return device
