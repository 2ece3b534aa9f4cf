"""Opening pictures safely, and the way between pictures and tensors.

Every picture that comes from outside passes through :func:`open_image`: it looks at the size in the header before
any pixel is decoded, knows a short list of formats, turns the picture upright, lays transparency on white, and
answers anything broken with one :class:`~nextscale.errors.InputError` line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nextscale.data.crops import CROP_AREA, MIDDLE, Crop, least_size, resize_crop
from nextscale.errors import InputError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "SUFFIXES",
    "Crop",
    "check_header",
    "open_fitted",
    "open_image",
    "picture_size",
    "resize_crop",
    "to_pil",
    "to_tensor",
    "to_uint8",
]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 50_000_000
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


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
    return _decode(source, max_pixels, _name(source, name))[0]


def open_fitted(
    source: str | Path | bytes,
    size: int | tuple[int, int],
    crop: Crop = "center",
    draws: Sequence[float] = MIDDLE,
    crop_area: float = CROP_AREA,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """``resize_crop(open_image(source), size, ...)``, with large JPEGs decoded at a half, quarter or eighth.

    JPEG can be decoded at these sizes for a fraction of the time. What is decoded is never smaller than twice what
    the crop ends at, so the result differs from that of the whole picture by less than the JPEG itself lost.

    Args:
        source, max_pixels, name: see :func:`open_image`.
        size, crop, draws, crop_area: see :func:`resize_crop`; ``adm`` is never reduced.

    Raises:
        InputError: as :func:`open_image` and :func:`resize_crop`.
    """
    target = (size, size) if isinstance(size, int) else size

    def least(width: int, height: int) -> tuple[int, int]:
        return least_size(width, height, target, crop, draws, crop_area)

    image, full = _decode(source, max_pixels, _name(source, name), least)
    return resize_crop(image, target, crop, draws, crop_area, full)


def _name(source: str | Path | bytes, name: str | None) -> str:
    return name or ("the picture" if isinstance(source, bytes) else str(source))


def _decode(
    source: str | Path | bytes,
    max_pixels: int,
    name: str,
    least: Callable[[int, int], tuple[int, int]] | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """Upright RGB, and the full (width, height) of the upright picture."""
    image = _open_header(source, max_pixels, name)
    try:
        with image:
            full = _upright_size(image)
            if least is not None and image.format in ("JPEG", "MPO"):
                need = least(*full)
                image.draft(image.mode, need if full == image.size else need[::-1])
            image.load()
            upright = _upright(image)
            if upright.mode == "F":
                raise ValueError("floating-point pictures have no agreed range of values")
            return _to_rgb(upright), full
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:
        raise InputError(f"{name} is broken ({_reason(error)}); save it again or leave it out") from None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the camera's rotation, from the header."""
    width, height = image.size
    # Pillow decodes a whole PNG to look for EXIF behind the pixels; before them it is in info.
    if image.format == "PNG" and "exif" not in image.info:
        return width, height
    try:
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    except Exception:
        sideways = False
    return (height, width) if sideways else (width, height)


def picture_size(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header; raises InputError as :func:`check_header` does."""
    with _open_header(source, max_pixels, _name(source, name)) as image:
        return _upright_size(image)


def check_header(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> None:
    """Raises :class:`InputError` where :func:`open_image` would refuse from the header alone; decodes nothing."""
    _open_header(source, max_pixels, _name(source, name)).close()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A damaged EXIF block says nothing about the pixels: keep the picture as it is stored.
        return image


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
