"""Tokens that are bits, as token caches hold them: eight in a byte, which no integer beats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_width(bits: int) -> int:
    """Bytes of a token of so many bits."""
    return -(-bits // 8)


def pack_bits(tokens: Tensor) -> Tensor:
    """Bits (..., d) as uint8 (..., ceil(d / 8)), the first the highest of its byte; what is over is zero."""
    whole = F.pad(tokens.to(torch.uint8), (0, -tokens.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (whole << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Bits (..., d) as booleans, of what :func:`pack_bits` made of them."""
    return (((packed[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1) != 0).flatten(-2)[..., :bits]
