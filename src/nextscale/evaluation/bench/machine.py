"""What the machine can do: rates of large products and of memory, measured in the run that they are compared with."""
from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nextscale.evaluation.bench.clock import Now, wait_for

SIDES = {"cuda": 8192}
"""Side of the product that tells a device's rate, 2048 by default; 16 times its values tell the bandwidth."""


def median_time(f: Callable[[], Any], now: Now, repeats: int, device: torch.device | str = "cpu") -> float:
    """Seconds of a function: the median, after one call to warm up."""
    device = torch.device(device)
    f()
    times = []
    for _ in range(repeats):
        wait_for(device)
        began = now()
        f()
        wait_for(device)
        times.append(now() - began)
    return statistics.median(times)


def matmul_rate(dtype: torch.dtype, now: Now, device: torch.device) -> float:
    """Operations a second of a large square product: the best that this machine and torch do."""
    side = SIDES.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / median_time(lambda: a @ b, now, 5, device)


def bandwidth(now: Now, device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    values = 16 * SIDES.get(device.type, 2048) ** 2
    a, b = torch.ones(values, device=device), torch.empty(values, device=device)
    return 2.0 * a.nbytes / median_time(lambda: b.copy_(a), now, 5, device)


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """What figures were measured on."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(device), "threads": threads,
                             "cpu": cpu_name(), "load": round(os.getloadavg()[0], 2)}
    if device.type == "cuda":
        return found | {"gpu": torch.cuda.get_device_name(device)}
    return found | {"capability": torch.backends.cpu.get_cpu_capability(),
                    "amx": torch.cpu._is_amx_tile_supported()}


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
