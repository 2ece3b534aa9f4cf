"""How a memory policy judges remembered rows: a few queries of the step look at all of them.

Shared by the policies (ScaleKV, HACK, SnapKV, PyramidKV) and by the calibration that their settings come from.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.devices import listed
from nextscale.errors import InputError
from nextscale.plan import Step
from nextscale.run import Rows

Pooling = Literal["max", "average"]
Scoring = Literal["published", "paper"]


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


def pooled(scores_RHN: Tensor, kernel: int, pooling: Pooling, padded: bool = False) -> Tensor:
    """Scores pooled along the keys over ``kernel`` neighbours, stride 1; padded: averages count a zero for every
    neighbour beyond an end, else only what is there."""
    if kernel == 1:
        return scores_RHN
    if pooling == "max":
        return F.max_pool1d(scores_RHN, kernel, 1, kernel // 2)
    return F.avg_pool1d(scores_RHN, kernel, 1, kernel // 2, count_include_pad=padded)


def best(scores_RHN: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores, ascending, (R, H, count)."""
    return scores_RHN.topk(count, -1, sorted=False).indices.sort(-1).values


def check_share(share: float, kernel: int, who: str) -> None:
    """Raises InputError where a share or a pooling kernel is none."""
    if not 0 < share <= 1:
        raise InputError(f"{who}: share is {share}; it must lie above 0 and be at most 1 (1 keeps everything)")
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"{who}: kernel is {kernel}; it must be odd")


def window_scores(q_RHQE: Tensor, k_RHNE: Tensor, positions: Sequence[int], own: int, kernel: int, pooling: Pooling,
                  scoring: Scoring, scale: float, hidden: Tensor | None = None) -> Tensor:
    """Scores (R, H, N) of remembered rows by the window's queries; the window's own rows score infinity, so they stay.

    positions: of the window among the last ``own`` keys, those of the step. published: sum over the queries of
    scale q k^T, pooled as the code pools it: an average next to the window, whose rows score minus infinity, is minus
    infinity, too. paper: sum of softmax(scale q k^T), over all keys, whose averages count the window's rows.
    """
    at = k_RHNE.shape[2] - own + listed(positions, k_RHNE.device)
    if scoring == "paper":
        scores = probabilities(q_RHQE, k_RHNE, scale, hidden).sum(2)
    else:
        scores = scale * (q_RHQE.float().sum(2, keepdim=True) @ k_RHNE.float().transpose(2, 3))[:, :, 0]
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    if pooling == "max" or scoring == "published":  # the window must not lend its neighbours its own scores
        scores = scores.index_fill(2, at, -torch.inf)
    return pooled(scores, kernel, pooling, padded=scoring == "published").index_fill(2, at, torch.inf)
