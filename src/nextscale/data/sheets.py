"""Sheets of pictures, for looking at many at once."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def sheet(pictures: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """One picture of many: (N, 3, S, S') in [-1, 1], row by row, ``gap`` white pixels between, each pixel enlarged."""
    levels = (pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return board(levels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), columns, gap, scale)


def board(pixels_NHWC: np.ndarray, columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """The same of uint8 pictures (N, H, W, 3)."""
    n, h, w, _ = pixels_NHWC.shape
    rows = -(-n // columns)
    pixels = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels_NHWC):
        y, x = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        pixels[y:y + h, x:x + w] = picture
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def enlarged(pixels_NHWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 pictures (N, H, W, 3) at another height and width, pixels as blocks; those of the size stay as they are."""
    if pixels_NHWC.shape[1:3] == tuple(size):
        return pixels_NHWC
    height, width = size
    images = [Image.fromarray(one).resize((width, height), Image.Resampling.NEAREST) for one in pixels_NHWC]
    return np.stack([np.asarray(image) for image in images])


def save_image(image: Image.Image, path: Path, **options: Any) -> Path:
    """Write a picture under a temporary name beside ``path``, then rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        image.save(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
