"""Tokens that are bits, as token caches hold them: an integer a token where it fits one, else packed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_BITS = 62
"""Bits that one integer holds, as tokenizers have it; of more, eight lie in a byte."""


def packed_width(bits: int) -> int:
    """Bytes of a token of so many bits that is too wide for one integer, 0 for one that isn't."""
    return 0 if bits <= INDEX_BITS else -(-bits // 8)


def pack(tokens: Tensor) -> Tensor:
    """Bits (..., d) as int64 (...), the highest first, or as uint8 (..., ceil(d / 8)) where d is above 62."""
    width = tokens.shape[-1]
    if not packed_width(width):
        return (tokens.long() << torch.arange(width - 1, -1, -1)).sum(-1)
    whole = torch.nn.functional.pad(tokens.to(torch.uint8), (0, -width % 8)).unflatten(-1, (-1, 8))
    return (whole << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(stored: Tensor, bits: int) -> Tensor:
    """Bits (..., d) as booleans, of what :func:`pack` made of them, in any type of integers."""
    if not packed_width(bits):
        return (stored.long()[..., None] >> torch.arange(bits - 1, -1, -1)) & 1 != 0
    return ((stored[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1).flatten(-2)[..., :bits] != 0
