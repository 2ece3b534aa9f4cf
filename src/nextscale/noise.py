"""Addressed randomness: every draw is a pure function of (seed, picture, what, step, round, cell).

A picture's numbers therefore don't depend on the batch it is in, on the order of draws, or on the device. The
generator is Philox-4x32-10 (Salmon et al., SC 2011) in plain int64 tensor operations, so it runs vectorised on any
device and inside a captured graph.
"""
from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nextscale.errors import InputError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_FORK = zlib.crc32(b"fork")


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox-4x32: four counter words and two key words (int64 tensors holding 32-bit values) to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product of two 32-bit words wraps in int64, but its bit pattern is the unsigned one.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def _purpose(what: str) -> int:
    """The counter word of a purpose's name; a constant to the compiler, which can't look into zlib."""
    return zlib.crc32(what.encode())


# What torch.compiler.assume_constant_result does; the decorator would import the compiler, which takes seconds.
_purpose._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Noise(Protocol):
    """Where a run's random numbers come from."""

    def uniform(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        """Numbers in (0, 1): (B, L, width) for rows of ``step`` (B|1, L) at ``cells`` (B|1, L, 3)."""
        ...

    def normal(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        """Standard normal numbers, (B, L, width)."""
        ...

    def gather(self, items: Tensor) -> Noise:
        """The noise of the pictures ``items``; a picture that is taken twice gets a new key for every copy."""
        ...


@dataclass(frozen=True)
class Keyed:
    """Noise from one 64-bit key a picture. ``key_B2`` holds 32-bit words; ``forks_B`` counts a picture's copies."""

    key_B2: Tensor
    forks_B: Tensor

    @classmethod
    def from_seeds(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> Keyed:
        """One seed a picture, any integers of up to 64 bits."""
        words = [[seed & _MASK, seed >> 32 & _MASK] for seed in seeds]
        key_B2 = torch.tensor(words, dtype=torch.int64, device=device).reshape(-1, 2)
        return cls(key_B2, torch.zeros(len(words), dtype=torch.int64, device=device))

    def _words(self, what: str, step: Tensor, round: int, cells: Tensor, blocks: int) -> Tensor:
        """(B, L, blocks, 4) random 32-bit words."""
        pictures = len(self.key_B2)
        cells = cells.expand(pictures, -1, -1)
        step = step.expand(pictures, -1)
        block = torch.arange(blocks, device=cells.device)
        shape = (pictures, cells.shape[1], blocks)
        counter = (torch.full(shape, _purpose(what), dtype=torch.int64, device=cells.device),
                   (step + (round << 16))[..., None].expand(shape),
                   (cells[..., 1] << 16 | cells[..., 2])[..., None].expand(shape),
                   ((cells[..., 0] << 16)[..., None] + block).expand(shape))
        key = (self.key_B2[:, 0, None, None].expand(shape), self.key_B2[:, 1, None, None].expand(shape))
        return torch.stack(philox(counter, key), -1)

    def uniform(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        words = self._words(what, step, round, cells, -(-width // 4)).flatten(2)[..., :width]
        return ((words >> 8).float() + 0.5) * 2.0**-24

    def normal(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        pairs = -(-width // 2)
        u = self.uniform(what, step, round, cells, 2 * pairs)  # Box-Muller
        radius, angle = torch.sqrt(-2 * torch.log(u[..., :pairs])), 2 * math.pi * u[..., pairs:]
        return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], -1)[..., :width]

    def gather(self, items: Tensor) -> Keyed:
        """First copies keep their key; each further copy of picture i gets key = philox(key_i, i's fork counter).

        The counter goes on with the copy that kept the key, so that copies of copies never share one: folding by
        occurrence alone would repeat a key when a picture is copied a second time.
        """
        key_B2, forks_B = self.key_B2[items].clone(), self.forks_B[items].clone()
        first: dict[int, int] = {}
        used: dict[int, int] = {}
        for place, item in enumerate(items.tolist()):
            if item not in first:
                first[item], used[item] = place, int(self.forks_B[item])
                continue
            count = torch.tensor(used[item], dtype=torch.int64, device=key_B2.device)
            zero = torch.zeros_like(count)
            words = philox((count, zero, zero, zero + _FORK), (self.key_B2[item, 0], self.key_B2[item, 1]))
            key_B2[place] = torch.stack(words[:2])
            forks_B[place] = 0
            used[item] += 1
        for item, place in first.items():
            forks_B[place] = used[item]
        return Keyed(key_B2, forks_B)


@dataclass(frozen=True)
class Recorded:
    """Noise that was recorded: ``{(what, step, round): values (B, L, width)}``; replays published runs."""

    draws: Mapping[tuple[str, int, int], Tensor]
    items: Tensor | None = None

    def _find(self, what: str, step: Tensor, round: int) -> Tensor:
        key = (what, int(step.flatten()[0]), round)
        if key not in self.draws:
            raise InputError(f"recorded noise: no draw {key}; recorded are {sorted(self.draws)[:6]} ...")
        draw = self.draws[key]
        draw = draw[..., None] if draw.ndim == 2 else draw
        return draw if self.items is None else draw[self.items]

    def uniform(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        return self._find(what, step, round)

    def normal(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        return self._find(what, step, round)

    def gather(self, items: Tensor) -> Recorded:
        return Recorded(self.draws, items if self.items is None else self.items[items])


def inverse_cdf(logits: Tensor, uniform: Tensor, exact: bool = False) -> Tensor:
    """Draw one category a position: how many entries of the cumulative distribution are <= the uniform number.

    logits (..., V), -inf where ruled out; uniform (...). ``exact`` accumulates in float64, the rule by which recorded
    published draws are replayed; sampling takes float32. The result never has probability zero.
    """
    p = torch.softmax(logits.double() if exact else logits.float(), -1)
    total = p.cumsum(-1)
    # Rounding may lift the threshold to the whole sum, behind which there is nothing.
    below = torch.nextafter(total[..., -1:], torch.zeros_like(total[..., -1:]))
    threshold = torch.minimum(uniform[..., None].to(total.dtype) * total[..., -1:], below)
    return torch.searchsorted(total, threshold.contiguous(), right=True)[..., 0]
