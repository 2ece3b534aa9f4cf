"""Which device to compute on."""

from __future__ import annotations

import torch

from nextscale import parallel
from nextscale.errors import DeviceError


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
