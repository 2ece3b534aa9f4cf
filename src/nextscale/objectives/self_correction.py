"""Bitwise self-correction (Infinity, arXiv 2412.04431, section 3.3): the network sees flipped bits and learns to code
what then is missing."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.parallel import rand_pictures
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.quantiser import Quantiser


@dataclass(frozen=True)
class SelfCorrection:
    """How often bits are flipped: at every one of the first ``scales`` scales every bit with a probability that is
    drawn for the batch, uniformly from 0, 0.01, ..., ``strength``. Strength 0 is teacher forcing.

    Raises InputError for a strength outside of 0..1.
    """

    strength: float = 0.3
    scales: int = 13

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or self.scales < 0:
            raise InputError(f"self-correction: strength {self.strength} must lie in 0..1 and scales {self.scales} be "
                             "at least 0")

    def __call__(self, step: int, bits: Tensor) -> Tensor:
        """The bits (B, L, d) of a step, some of them flipped, with torch's generator."""
        if step >= self.scales or not self.strength:
            return bits
        p = int(torch.randint(round(100 * self.strength) + 1, ())) / 100
        return bits ^ (rand_pictures(len(bits), *bits.shape[1:], device=bits.device) < p)


@torch.no_grad()
def corrupted(quantiser: Quantiser, latent_BCHW: Tensor, canvas: Canvas,
              corrupt: Callable[[int, Tensor], Tensor]) -> pyramid.Pyramid:
    """Labels and inputs of a training pass whose canvas is corrupted: at every step the tokens are those of
    latent - canvas, and what ``corrupt(step, tokens)`` makes of them is written.

    So later labels say what repairs the earlier corruption. Labels are the pyramid's ``tokens``, inputs its ``reads``.
    """
    return pyramid.encode(latent_BCHW, canvas, lambda k, z: quantiser.quantise(z), corrupt)
