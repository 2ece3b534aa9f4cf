"""Control maps: what is taken from a picture to steer where things are in another one.

A map is uint8, of the picture's size. ``canny`` and ``edges`` need the picture alone; ``mask`` and ``distance`` need a
set whose pictures have alpha masks; ``depth:PLACE`` needs a network. Maps are made, by OpenCV and transformers, from
the very crop that they go with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from nextscale.errors import InputError, MissingExtraError, WeightsError, did_you_mean

__all__ = ["CONTROLS", "Control", "check_kinds", "control_of", "make_controls", "plane_count", "planes_of"]

Pixels = np.ndarray
"""uint8 (B, 3 or 4, H, W), the alpha mask as the fourth plane."""


@dataclass(frozen=True)
class Control:
    """A kind of map: ``make`` gives uint8 (B, planes, H, W) of pixels; alpha: it needs their masks."""

    make: Callable[[Pixels], np.ndarray]
    planes: int = 1
    alpha: bool = False


def extractors() -> Any:
    """OpenCV, which has the usual extractors. Raises MissingExtraError where it isn't installed."""
    try:
        import cv2
    except ModuleNotFoundError:
        raise MissingExtraError("opencv-python-headless", "control", "make control maps of pictures") from None
    return cv2


def each(pixels: Pixels, make: Callable[[Any, np.ndarray], np.ndarray]) -> np.ndarray:
    """``make(cv2, picture (H, W, 3)) -> (H, W)`` of every picture, rounded to uint8 (B, 1, H, W)."""
    cv2 = extractors()
    found = [make(cv2, np.ascontiguousarray(one[:3].transpose(1, 2, 0))) for one in pixels]
    return np.clip(np.rint(np.stack(found)), 0, 255).astype(np.uint8)[:, None]


def edges(pixels: Pixels) -> np.ndarray:
    """Strength of Sobel's gradient of the channel where it is strongest, sqrt(x^2 + y^2) / 4."""
    def make(cv2: Any, picture: np.ndarray) -> np.ndarray:
        x, y = (cv2.Sobel(picture, cv2.CV_32F, *order, borderType=cv2.BORDER_REPLICATE) for order in ((1, 0), (0, 1)))
        strongest: np.ndarray = np.hypot(x, y).max(-1) / 4
        return strongest

    return each(pixels, make)


def canny(pixels: Pixels, low: int = 100, high: int = 200) -> np.ndarray:
    """Canny's edges (1986) of a colour picture, 0 or 255, with the thresholds that are usual for control."""
    return each(pixels, lambda cv2, picture: cv2.Canny(picture, low, high))


def lines(pixels: Pixels) -> np.ndarray:
    """A line drawing: how much darker a pixel is than what surrounds it, a difference of two Gaussians."""
    side = min(pixels.shape[-2:]) / 64

    def make(cv2: Any, picture: np.ndarray) -> np.ndarray:
        grey = picture.mean(-1, dtype=np.float32)
        wide, narrow = (cv2.GaussianBlur(grey, (0, 0), sigma * side, borderType=cv2.BORDER_REPLICATE)
                        for sigma in (1.6, 0.6))
        darker: np.ndarray = 4 * (wide - narrow)
        return darker

    return each(pixels, make)


def mask(pixels: Pixels) -> np.ndarray:
    """The alpha mask."""
    return pixels[:, 3:].copy()


def distance(pixels: Pixels) -> np.ndarray:
    """A depth-like map: the distance to the nearest pixel outside the mask or the picture, 255 at the largest."""
    cv2, found = extractors(), []
    for inside in pixels[:, 3] > 127:
        padded = np.pad(inside, 1).astype(np.uint8)
        far = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        found.append(far / max(far.max(), 1e-9) * 255)
    return np.rint(np.stack(found)).astype(np.uint8)[:, None]


def small(pixels: Pixels) -> np.ndarray:
    """The picture at an eighth of its size, enlarged again."""
    found = []
    for one in pixels[:, :3]:
        image = Image.fromarray(np.ascontiguousarray(one.transpose(1, 2, 0)))
        tiny = image.resize((max(1, image.width // 8), max(1, image.height // 8)), Image.Resampling.BOX)
        found.append(np.asarray(tiny.resize(image.size, Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    return np.stack(found)


def depth(pixels: Pixels, place: str) -> np.ndarray:
    """What a network of transformers (MiDaS's DPT, Depth Anything) says of depth, from 0 to 255 in every picture; these
    give the nearest the largest value. Pictures are resized and normalised as its own files say."""
    import torch

    network, prepare = depth_network(place)
    found = []
    for one in pixels:  # one by one: a map is the same whatever it is made beside
        given = prepare(images=[np.ascontiguousarray(one[:3].transpose(1, 2, 0))], return_tensors="pt")
        with torch.inference_mode():
            near = network(**given).predicted_depth[:, None].float()
        near = torch.nn.functional.interpolate(near, pixels.shape[-2:], mode="bicubic", antialias=True)[0]
        span = float(near.amax() - near.amin())
        found.append(((near - near.amin()) / (span or 1.0) * 255).round().clamp(0, 255).numpy())
    return np.stack(found).astype(np.uint8)


@lru_cache(maxsize=1)
def depth_network(place: str) -> tuple[Any, Any]:
    """A depth network and what prepares its pictures. Raises MissingExtraError, WeightsError."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "text", f"estimate depth by {place}") from None
    try:
        network = transformers.AutoModelForDepthEstimation.from_pretrained(place, use_safetensors=True)
        return network.eval(), transformers.AutoImageProcessor.from_pretrained(place)
    except Exception as error:  # the hub and the loader have dozens of error types
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{place} can't be loaded as a depth network ({reason}); give a folder or a hub name "
                           "such as Intel/dpt-hybrid-midas") from None


def picture(pixels: Pixels) -> np.ndarray:
    """The picture itself."""
    return pixels[:, :3].copy()


CONTROLS: dict[str, Control] = {
    "edges": Control(edges), "canny": Control(canny), "lines": Control(lines), "mask": Control(mask, alpha=True),
    "distance": Control(distance, alpha=True), "small": Control(small, 3), "picture": Control(picture, 3)}
"""Kinds of control maps by name, beside ``depth:PLACE``. Others (normals, HED) come as maps of one's own."""


def control_of(kind: str) -> Control:
    """A kind of map by name: one of ``CONTROLS``, or ``depth:PLACE`` with PLACE a folder or a hub name of a network
    that estimates depth. Raises InputError for an unknown one."""
    name, _, place = kind.partition(":")
    if name == "depth" and place:
        return Control(lambda pixels: depth(pixels, place))
    if kind not in CONTROLS:
        hint = did_you_mean(kind, CONTROLS, f"; there are {', '.join(CONTROLS)} and depth:PLACE")
        raise InputError(f"control {kind!r} is unknown{hint}")
    return CONTROLS[kind]


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Kinds of maps that can be made. Raises InputError for unknown ones and for one that is there twice."""
    for kind in kinds:
        control_of(kind)
    if len(set(kinds)) < len(kinds):
        raise InputError(f"controls {', '.join(kinds)}: one is there twice")
    return tuple(kinds)


def plane_count(kinds: Sequence[str]) -> int:
    """Planes of some kinds of maps, one behind the other."""
    return sum(control_of(kind).planes for kind in kinds)


def planes_of(wanted: Sequence[str], kinds: Sequence[str]) -> list[int]:
    """Where the planes of some kinds lie among those of all ``kinds``. Raises InputError where one isn't there."""
    starts = np.cumsum([0, *(control_of(kind).planes for kind in kinds)]).tolist()
    places: list[int] = []
    for kind in wanted:
        if kind not in kinds:
            raise InputError(f"there are no maps of {kind!r}, only of {', '.join(kinds) or 'nothing'}")
        start = starts[list(kinds).index(kind)]
        places += range(start, start + control_of(kind).planes)
    return places


def make_controls(pixels: Pixels, kinds: Sequence[str]) -> np.ndarray:
    """Maps of some kinds, their planes one behind the other, uint8 (B, P, H, W), of pixels uint8 (B, 3 or 4, H, W).

    Raises InputError for unknown kinds, and where a kind needs masks that the pixels don't have.
    """
    for kind in check_kinds(kinds):
        if control_of(kind).alpha and pixels.shape[1] < 4:
            raise InputError(f"control {kind!r} is taken from alpha masks, which these pictures don't have")
    return np.concatenate([control_of(kind).make(pixels) for kind in kinds], 1)
