"""How a picture is cut and resized to the size that a model takes.

Every crop but ADM's is one window of the picture, resampled once (Lanczos). Random windows come from uniform numbers
that the caller draws, so the same numbers give the same window on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageOps

from nextscale.errors import InputError

Crop = Literal["center", "pad", "adm", "random", "random-resized"]
CROPS: tuple[Crop, ...] = ("center", "pad", "adm", "random", "random-resized")
RANDOM_CROPS: tuple[Crop, ...] = ("random", "random-resized")
CROP_AREA = 0.64
DRAWS = 22
"""Uniform numbers that a random crop takes."""

_MARGIN = 1.125
_ATTEMPTS = 10
_RATIO = 4 / 3
_REDUCING_GAP = 2.0
MIDDLE = (0.5,) * DRAWS

Box = tuple[float, float, float, float]


def window(
    width: int,
    height: int,
    size: tuple[int, int],
    crop: Crop = "center",
    draws: Sequence[float] = MIDDLE,
    crop_area: float = CROP_AREA,
) -> Box:
    """The part of a picture that a crop keeps, as (left, top, right, bottom) in pixels of the picture.

    ``center``: the largest window of the proportions asked for, in the middle.
    ``random``: VAR's (arXiv 2404.02905, published code): the picture is scaled to cover 1.125 times the size and a
    window of the size is placed uniformly.
    ``random-resized``: Inception's (arXiv 1409.4842): a share of the area uniform in [``crop_area``, 1], proportions
    log-uniform within 4/3 of those asked for, placed uniformly; after ten windows that don't fit, ``center``.

    Args:
        width, height: of the picture in pixels.
        size: (height, width) asked for.
        crop: one of the three.
        draws: ``DRAWS`` numbers in [0, 1).
        crop_area: in (0, 1]; classifiers are trained with 0.08, the default keeps four fifths of each side.
    """
    wanted = size[1] / size[0]
    cut_width, cut_height = float(width), float(height)
    if width / height >= wanted:
        cut_width = wanted * height
    else:
        cut_height = width / wanted
    if crop == "random":
        return _place(width, height, cut_width / _MARGIN, cut_height / _MARGIN, draws[0], draws[1])
    if crop == "random-resized":
        for attempt in range(_ATTEMPTS):
            area = width * height * (crop_area + (1 - crop_area) * draws[2 + 2 * attempt])
            ratio = wanted * _RATIO ** (2 * draws[3 + 2 * attempt] - 1)
            across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if across <= width and down <= height:
                return _place(width, height, across, down, draws[0], draws[1])
    return _place(width, height, cut_width, cut_height, 0.5, 0.5)


def _place(width: int, height: int, cut_width: float, cut_height: float, across: float, down: float) -> Box:
    left, top = (width - cut_width) * across, (height - cut_height) * down
    return left, top, left + cut_width, top + cut_height


def least_size(
    width: int,
    height: int,
    size: tuple[int, int],
    crop: Crop = "center",
    draws: Sequence[float] = MIDDLE,
    crop_area: float = CROP_AREA,
) -> tuple[int, int]:
    """(width, height) below which a picture of ``width`` x ``height`` must not be decoded before it is cropped.

    Twice the resolution that the crop ends at, Pillow's own bound for reducing before a good filter. ADM's crop is a
    protocol whose every pixel counts: it gets the whole picture.
    """
    if crop == "adm":
        return width, height
    if crop == "pad":
        scale = min(size[1] / width, size[0] / height)
        across = down = scale * _REDUCING_GAP
    else:
        left, top, right, bottom = window(width, height, size, crop, draws, crop_area)
        across = size[1] / (right - left) * _REDUCING_GAP
        down = size[0] / (bottom - top) * _REDUCING_GAP
    return min(width, math.ceil(width * across)), min(height, math.ceil(height * down))


def resize_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: Crop = "center",
    draws: Sequence[float] = MIDDLE,
    crop_area: float = CROP_AREA,
    full: tuple[int, int] | None = None,
) -> Image.Image:
    """Fits a picture to ``size``.

    Args:
        image: any picture.
        size: side in pixels, or (height, width).
        crop: a window of :func:`window`; ``pad``, which scales until the picture fits inside and fills up with white
            (nothing is cut off); or ``adm``, the centre crop of ADM (arXiv 2105.05233, ``center_crop_arr`` of the
            published code): halve by box filter while both sides are at least twice the size, resize bicubically
            until the picture covers the size, cut the middle out. FID protocols use it.
        draws, crop_area: see :func:`window`.
        full: (width, height) of the picture where ``image`` is a reduced copy of it.

    Raises:
        InputError: a size below 1, an unknown ``crop``, ``crop_area`` out of range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"picture size {height}x{width} must be at least 1x1")
    check_crop(crop, crop_area)
    if image.size == (width, height) and crop not in RANDOM_CROPS:
        return image
    if crop == "pad":
        white = 255 if image.mode == "L" else (255, 255, 255)
        return ImageOps.pad(image, (width, height), method=Image.Resampling.LANCZOS, color=white)
    if crop == "adm":
        return _adm_crop(image, height, width)
    full_width, full_height = full or image.size
    left, top, right, bottom = window(full_width, full_height, (height, width), crop, draws, crop_area)
    across, down = image.width / full_width, image.height / full_height
    # Rounding must not put the window's far edge outside, which Pillow refuses.
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def check_crop(crop: str, crop_area: float = CROP_AREA) -> None:
    """Raises InputError for an unknown crop, or a share of the area outside (0, 1]."""
    if crop not in CROPS:
        raise InputError(f"unknown crop {crop!r}; use {', '.join(map(repr, CROPS[:-1]))} or {CROPS[-1]!r}")
    if not 0 < crop_area <= 1:
        raise InputError(f"crop_area is {crop_area}, it must be above 0 and at most 1")


def _adm_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    # max: rounding of a very long picture's short side must not fall below the size.
    across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((across, down), Image.Resampling.BICUBIC)
    left, top = (across - width) // 2, (down - height) // 2
    return image.crop((left, top, left + width, top + height))
