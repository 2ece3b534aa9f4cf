"""Opening pictures safely, and the way between pictures and tensors.

Every picture that comes from outside passes through :func:`open_image`: it looks at the size in the header before
any pixel is decoded, knows a short list of formats, turns the picture upright, lays transparency on white, and
answers anything broken with one :class:`~nextscale.errors.InputError` line.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 50_000_000

Crop = Literal["center", "pad"]


def _open_header(source: str | Path | bytes, max_pixels: int, name: str) -> Image.Image:
    """The picture with only its header read, its size checked against ``max_pixels``."""
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder, not a picture; name one picture file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name} is larger than {max_pixels:,} pixels; make it smaller first") from None
    except Exception as error:
        reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else _reason(error)
        raise InputError(f"{name} cannot be opened ({reason}); give a {', '.join(FORMATS)} file") from None
    width, height = image.size
    if width * height > max_pixels or width < 1 or height < 1:
        image.close()
        raise InputError(f"{name} is {width}x{height} pixels, the bound is {max_pixels:,}; make it smaller first")
    return image


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        # Pillow clips 16-bit greys to white when converting; keep the high byte instead.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def open_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Opens one picture as upright RGB, transparency laid on white.

    Args:
        source: a path, or the bytes of an encoded picture.
        max_pixels: width x height above which the picture is refused, before anything is decoded.
        name: what errors call the picture; by default its path.

    Returns:
        A decoded RGB picture. Of an animation the first frame; of 16-bit greys the high byte.

    Raises:
        InputError: missing, not a picture, of an unknown format, too large, truncated or corrupt.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    image = _open_header(source, max_pixels, name)
    try:
        with image:
            image.load()
            upright = _upright(image)
            if upright.mode == "F":
                raise ValueError("floating-point pictures have no agreed range of values")
            return _to_rgb(upright)
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:
        raise InputError(f"{name} is broken ({_reason(error)}); save it again or leave it out") from None


def check_header(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> None:
    """Raises :class:`InputError` where :func:`open_image` would refuse from the header alone; decodes nothing."""
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    _open_header(source, max_pixels, name).close()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A damaged EXIF block says nothing about the pixels: keep the picture as it is stored.
        return image


def resize_crop(image: Image.Image, size: int | tuple[int, int], crop: Crop = "center") -> Image.Image:
    """Fits a picture to ``size`` without changing its proportions.

    Args:
        image: any picture.
        size: side in pixels, or (height, width).
        crop: ``center`` scales until the picture covers the size and cuts the middle out;
            ``pad`` scales until it fits inside and fills up with white (nothing is cut off).

    Raises:
        InputError: a size below 1 or an unknown ``crop``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"picture size {height}x{width} must be at least 1x1")
    if image.size == (width, height):
        return image
    if crop == "center":
        return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    if crop == "pad":
        white = 255 if image.mode == "L" else (255, 255, 255)
        return ImageOps.pad(image, (width, height), method=Image.Resampling.LANCZOS, color=white)
    raise InputError(f"unknown crop {crop!r}; use 'center' or 'pad'")


def to_uint8(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W); one-channel picture -> uint8 (1, H, W)."""
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(array, dtype=np.uint8, order="C"))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 (3, H, W) in [-1, 1]."""
    return to_uint8(image if image.mode == "RGB" else _to_rgb(image)).float().div_(127.5).sub_(1.0)


def to_pil(picture: Tensor) -> Image.Image:
    """Float (3, H, W) in [-1, 1] -> RGB picture; values outside are clamped, the rest rounded to the nearest byte.

    Raises:
        InputError: another shape.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InputError(f"a picture is a tensor (3, H, W), this one is {tuple(picture.shape)}")
    byte = picture.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(byte.permute(1, 2, 0).cpu().numpy())
