"""Orders and unmasking schedules: how many cells each step draws, and which."""
from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from nextscale.devices import made_once
from nextscale.errors import InputError
from nextscale.noise import Noise
from nextscale.plan import Step, grid_cells

Order = Literal["random", "raster"]
Unmasking = Literal["cosine", "linear"]


def masked_after(cells: int, iterations: int, unmasking: Unmasking = "cosine") -> list[int]:
    """How many cells are still masked after every iteration: few are drawn at first and many at last by the cosine
    schedule (MaskGIT, arXiv 2202.04200), as many every time by the linear one.

    m_k = max(1, min(m_(k-1) - 1, floor(n s_k))), s_k = cos(pi / 2 (k + 1) / K) or 1 - (k + 1) / K, and 0 after the
    last. Raises InputError where there are more iterations than cells.
    """
    if not 1 <= iterations <= cells:
        raise InputError(f"iterations is {iterations}; it must be at least 1 and at most {cells}, the number of tokens")
    left, masked = [], cells
    for done in range(1, iterations):
        kept = (cells * math.cos(math.pi / 2 * done / iterations) if unmasking == "cosine"
                else cells * (iterations - done) / iterations)
        masked = max(1, min(masked - 1, math.floor(kept)))
        left.append(masked)
    return [*left, 0]


def unmasked_counts(cells: int, iterations: int, unmasking: Unmasking = "cosine") -> list[int]:
    """How many cells every iteration draws; they add up to all of them."""
    return [before - after for before, after in pairwise([cells, *masked_after(cells, iterations, unmasking)])]


def random_order(noise: Noise, step: Step, round: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A step's cells in an even random order, (B, L, 3), the same for a picture in any batch."""
    cells_L3 = made_once(torch.device(device), grid_cells, step)
    keys_BL = noise.uniform("order", torch.zeros(1, 1, dtype=torch.int64, device=device), round, cells_L3[None])[..., 0]
    return cells_L3[keys_BL.argsort(dim=-1, stable=True)]


def drawing_order(order: Order, noise: Noise, step: Step, round: int = 0,
                  device: torch.device | str = "cpu") -> Tensor:
    """A step's cells in a random order, (B, L, 3), or in raster order, (1, L, 3)."""
    if order == "raster":
        return made_once(torch.device(device), grid_cells, step)[None]
    return random_order(noise, step, round, device)
