"""Sheets of pictures, for looking at many at once."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def sheet(pictures: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """One picture of many: (N, 3, S, S') in [-1, 1], row by row, ``gap`` white pixels between, each pixel enlarged."""
    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    board = torch.ones(3, rows * (h + gap) + gap, columns * (w + gap) + gap)
    for i, picture in enumerate(pictures.detach().float().cpu().clamp(-1, 1)):
        y, x = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        board[:, y:y + h, x:x + w] = picture
    pixels = ((board + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def save_image(image: Image.Image, path: Path, **options: object) -> Path:
    """Write a picture under a temporary name beside ``path``, then rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        image.save(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
