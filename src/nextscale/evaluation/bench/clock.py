"""Seconds and peak memory by phase, on a CPU or a GPU."""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from nextscale.evaluation.bench.recorder import Recorder

Now = Callable[[], float]


def now_of(kind: str, threads: int) -> Now:
    """Seconds of the clock on the wall, or with ``cpu`` the time that this process was given, divided by its threads:
    for a machine that others use too."""
    return time.perf_counter if kind == "wall" else lambda: time.process_time() / threads


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def waited(now: Now, device: torch.device) -> Now:
    """The same clock, read when the device has done all that it was given."""
    def read() -> float:
        wait_for(device)
        return now()

    return read


class Clock(Recorder):
    """Seconds by phase, from when it is made until ``stop``; an inner phase is not counted in the outer one.

    On CUDA these are the device's own, between events in its queue, so that nothing waits while it is measured.
    """

    def __init__(self, now: Now, device: torch.device) -> None:
        super().__init__()
        self._now, self._device = now, device
        self._marks: list[tuple[Any, str]] = [(self._stamp(), "")]

    def _stamp(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def switch(self) -> None:
        self._marks.append((self._stamp(), self.stack[-1]))

    def stop(self) -> dict[str, float]:
        """The seconds of every phase that there was."""
        self.switch()
        wait_for(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for (before, _), (after, name) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += before.elapsed_time(after) / 1e3 if self._device.type == "cuda" else after - before
        return dict(seconds)


class CudaPeaks(Recorder):
    """Most bytes that a CUDA device held in each phase, weights included."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.peaks: dict[str, int] = defaultdict(int)
        torch.cuda.reset_peak_memory_stats(device)

    def switch(self) -> None:
        name = self.stack[-1]
        self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
