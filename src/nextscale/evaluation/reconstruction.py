"""How well a system's tokens describe pictures: PSNR, scale by scale, inside the drawing; how much of the codebook."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.objectives.reconstruction import psnr

__all__ = [
    "CodeUsage",
    "Codec",
    "Reconstruction",
    "after_each_scale",
    "code_usage",
    "psnr",
    "reconstruct",
    "summary",
    "thumbnails",
]


class Codec(Protocol):
    """What a system offers here: pictures to tokens of every scale and back."""

    def encode(self, pictures: Tensor) -> list[Tensor]: ...

    def decode(self, tokens: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Reconstruction:
    """Pictures through the codes and back: (N, 3, S, S') in [-1, 1], and the tokens of every scale (N, L_k)."""

    pictures: Tensor
    tokens: list[Tensor]


@torch.no_grad()
def reconstruct(system: Codec, pictures: Tensor, batch: int = 64,
                each: Callable[[int], None] | None = None) -> Reconstruction:
    """Encode and decode pictures (N, 3, S, S') in [-1, 1]; ``each`` is called with how many are done."""
    found, codes = [], []
    for start in range(0, len(pictures), batch):
        tokens = system.encode(pictures[start:start + batch])
        found.append(system.decode(tokens).cpu())
        codes.append([step.cpu() for step in tokens])
        if each is not None:
            each(min(start + batch, len(pictures)))
    return Reconstruction(torch.cat(found), [torch.cat(step) for step in zip(*codes, strict=True)])


@torch.no_grad()
def after_each_scale(system: Codec, pictures: Tensor, tokens: Sequence[Tensor], batch: int = 64,
                     each: Callable[[int], None] | None = None) -> Tensor:
    """Mean squared error (N, K) of the preview after every scale, for pictures in [-1, 1]."""
    steps = len(tokens)
    errors_NK = torch.zeros(len(pictures), steps)
    for start in range(0, len(pictures), batch):
        part = slice(start, start + batch)
        for k in range(steps):
            preview = system.decode([step[part] for step in tokens[:k + 1]]).cpu()
            errors_NK[part, k] = (preview - pictures[part]).square().flatten(1).mean(1)
        if each is not None:
            each(min(start + batch, len(pictures)))
    return errors_NK


@dataclass(frozen=True)
class CodeUsage:
    """One scale: distinct codes used, share of the vocabulary, and perplexity (the even vocabulary as varied)."""

    codes: int
    share: float
    perplexity: float


def code_usage(tokens: Sequence[Tensor], vocabulary: int) -> list[CodeUsage]:
    """Usage of the codebook by tokens (N, L_k) of every scale, and over all scales as the last entry."""
    found = []
    for of_scale in [*tokens, torch.cat([step.flatten() for step in tokens])]:
        counts_V = torch.bincount(of_scale.flatten(), minlength=vocabulary).double()
        shares = counts_V[counts_V > 0] / counts_V.sum()
        used = len(shares)
        found.append(CodeUsage(used, used / vocabulary, math.exp(-float((shares * shares.log()).sum()))))
    return found


def thumbnails(pictures: Tensor, side: int) -> Tensor:
    """Pictures through a thumbnail of side x side pixels and back, both ways bicubic: what few numbers can say."""
    small = F.interpolate(pictures, size=(side, side), mode="bicubic", antialias=True)
    # A thumbnail is stored in bytes.
    small = ((small.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return F.interpolate(small, size=pictures.shape[-2:], mode="bicubic").clamp(-1, 1)


def summary(values_N: Tensor) -> dict[str, float]:
    """Mean, median, and the 5th and 95th percentile."""
    low, middle, high = torch.quantile(values_N.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"mean": float(values_N.double().mean()), "median": middle, "p5": low, "p95": high}
