"""What share of the machine's matrix products a training uses."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MatrixProduct(NamedTuple):
    """``times`` products of (batch, n, k) and (batch, k, m) in a forward pass; ``useful``: share of their arithmetic
    that is needed (a mask may hide the rest)."""

    n: int
    k: int
    m: int
    times: int
    batch: int = 1
    useful: float = 1.0

    @property
    def flops(self) -> float:
        """Of the forward pass: 2 n k m a product."""
        return 2.0 * self.batch * self.n * self.k * self.m * self.times * self.useful


def training_flops(products: Sequence[MatrixProduct]) -> float:
    """Of a forward and a backward pass: each product has a gradient for both of its operands, so three times as many.

    Recomputing for activation checkpoints is not counted: it is no progress.
    """
    return 3 * sum(product.flops for product in products)


def products_seconds(products: Sequence[MatrixProduct], device: torch.device, dtype: torch.dtype,
                     least: float = 0.01, clock: Callable[[], float] | None = None) -> float:
    """Seconds that the useful arithmetic of a forward and backward pass takes at the rate measured here and now.

    For each shape the three products (y = x w, dx = dy w^T, dw = x^T dy) are timed on plain contiguous operands of
    their own, repeated for at least ``least`` seconds each after one warm-up; the median of three rounds counts.
    """
    now = clock or time.perf_counter
    total = 0.0
    with torch.no_grad():
        for n, k, m, times, batch, useful in products:
            for a, b, c in ((n, k, m), (n, m, k), (k, n, m)):
                left, right = (torch.randn(batch, *shape, device=device).to(dtype) for shape in ((a, b), (b, c)))
                if batch == 1:
                    left, right = left[0], right[0]
                total += useful * times * statistics.median(_seconds(left, right, least / 3, now) for _ in range(3))
    return total


def _seconds(left: Tensor, right: Tensor, least: float, now: Callable[[], float]) -> float:
    left @ right
    _wait(left.device)
    began, done = now(), 0
    while True:
        left @ right
        done += 1
        if done % 4 == 0 or left.device.type == "cpu":
            _wait(left.device)
            spent = now() - began
            if spent >= least:
                return spent / done


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Utilisation:
    """Share of the measured rate of matrix products that the steps of a training reach: the time that their products
    would take alone over the time that the steps took, data loading and optimiser included.

    The rate is measured once for every number of pictures and plan, on the first step that has it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._alone: dict[Hashable, float] = {}
        self._needed = 0.0
        self._since: float | None = None

    def add(self, key: Hashable, products: Callable[[], Sequence[MatrixProduct]]) -> None:
        """Counts one forward and backward pass; ``key``: its pictures and plan, which ``products`` follow from."""
        if key not in self._alone:
            self._alone[key] = products_seconds(products(), self.device, self.dtype)
            self._since = None  # a step in which the machine was measured is not one to measure
        self._needed += self._alone[key]

    def pause(self) -> None:
        """What comes before the next call of ``step`` was no step (samples were drawn)."""
        self._since = None

    def step(self) -> float | None:
        """The share reached since the last call; None for the first step and for one in which rates were measured."""
        now, began, needed = time.perf_counter(), self._since, self._needed
        self._since, self._needed = now, 0.0
        return None if began is None else needed / (now - began)
