"""Resizing of feature maps, by the named rules that are part of a checkpoint.

A multi-scale tokenizer reads a map down (``area``) and writes it up (``bicubic``); which rule a system uses decides
what its weights mean, so rules are named here once and referred to by name.
"""
from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

ResizeRule = Literal["area", "bicubic", "bilinear", "nearest"]


def resize(map_BCHW: Tensor, grid: tuple[int, int], rule: ResizeRule) -> Tensor:
    """Resize a map (B, C, H, W) to ``grid`` = (h, w) in float32; a map that already has that size is returned as it is.

    ``area`` is adaptive average pooling (windows overlap where h does not divide H), ``bicubic`` has a = -0.75,
    corners not aligned and no antialiasing, as in VAR (arXiv 2404.02905, published code).
    """
    if tuple(map_BCHW.shape[-2:]) == tuple(grid):
        return map_BCHW
    x = map_BCHW.float()
    if rule == "area":
        return F.adaptive_avg_pool2d(x, grid)
    if rule == "nearest":
        return F.interpolate(x, size=grid, mode="nearest")
    return F.interpolate(x, size=grid, mode=rule, align_corners=False)
