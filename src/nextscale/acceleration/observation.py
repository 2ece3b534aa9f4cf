"""How a memory policy judges remembered rows: a few queries of the step look at all of them.

Shared by the policies (ScaleKV, HACK, SnapKV, PyramidKV) and by the calibration that their settings come from.
"""
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.plan import Step
from nextscale.run import Rows

Pooling = Literal["max", "average"]


def strided(length: int, count: int) -> list[int]:
    """At most ``count`` positions of ``length``, spread evenly from the first to the last."""
    count = min(count, length)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def patch_centres(grid: tuple[int, int], count: int) -> list[int]:
    """The centres of n x n patches of a map (h, w), count = n^2, as positions in row-major order.

    Patches are (h // n) x (w // n); the centre of one of p rows is its row (p - 1) // 2 (ScaleKV, arXiv 2505.19602).
    """
    n = round(count**0.5)
    (p, q), width = (grid[0] // n, grid[1] // n), grid[1]
    return [(i * p + (p - 1) // 2) * width + j * q + (q - 1) // 2 for i in range(n) for j in range(n)]


def window(step: Step, rows: int, count: int) -> list[int]:
    """Positions of an observation window of ``count`` among the ``rows`` of a step that attention has.

    Patch centres where count is a square and all cells of one map large enough are there, else evenly strided: joint
    maps, and rows that something selected.
    """
    n, (h, w) = round(count**0.5), step.grid
    whole = step.maps == 1 and step.count is None and rows == h * w
    return patch_centres(step.grid, count) if whole and n * n == count and min(h, w) >= n else strided(rows, count)


def hidden_keys(rows: Rows, key_step: Tensor) -> Tensor | None:
    """Which keys a step's rows don't see, bool, broadcastable to (R, H, N); None where all are seen. key_step: (1|R, N)
    or (R, H, N)."""
    if rows.visible.previous is None:
        return None
    step = key_step if key_step.ndim == 3 else key_step[:, None]
    return ~rows.visible.sees(rows.step[:, None, :1], step)


def probabilities(q_RHQE: Tensor, k_RHNE: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) in float32, (R, H, Q, N); hidden keys get none."""
    scores = scale * (q_RHQE.float() @ k_RHNE.float().transpose(2, 3))
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, :, None], -torch.inf)
    return scores.softmax(-1)


def pooled(scores_RHN: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Scores pooled along the keys over ``kernel`` neighbours, stride 1; averages count only what is there."""
    if kernel == 1:
        return scores_RHN
    if pooling == "max":
        return F.max_pool1d(scores_RHN, kernel, 1, kernel // 2)
    return F.avg_pool1d(scores_RHN, kernel, 1, kernel // 2, count_include_pad=False)


def best(scores_RHN: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores, ascending, (R, H, count)."""
    return scores_RHN.topk(count, -1, sorted=False).indices.sort(-1).values
