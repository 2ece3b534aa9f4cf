"""Aspect-ratio buckets: the sizes that pictures of different proportions are fitted to, all of about one area.

A batch shares one bucket. A bucket is (height, width) in pixels, and a schedule of scales follows it (its last grid is
the bucket over the tokenizer's factor). The sizes are chosen as in NovelAI's bucketing: for every width the largest
height that keeps the area.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nextscale.errors import InputError

Bucket = tuple[int, int]


def aspect_buckets(size: int, largest_ratio: float = 2.0, multiple: int = 32) -> list[Bucket]:
    """(height, width) of buckets whose area is at most size x size, tall to wide.

    Args:
        size: side of the square bucket in pixels, a multiple of ``multiple``.
        largest_ratio: of the longer to the shorter side, at least 1; 1 leaves the square alone.
        multiple: both sides are multiples of it; the tokenizer's factor must divide it.

    Raises:
        InputError: a size that is not a multiple, a ratio below 1, a multiple below 1.
    """
    if multiple < 1 or size < multiple or size % multiple:
        raise InputError(f"buckets: size {size} is not a multiple of {multiple}; choose another size or multiple")
    if not (largest_ratio >= 1 and math.isfinite(largest_ratio)):
        raise InputError(f"buckets: the largest ratio is {largest_ratio}, it must be at least 1")
    found = set()
    for short in range(multiple, size + 1, multiple):
        long = size * size // short // multiple * multiple
        if long <= largest_ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda bucket: (bucket[1] / bucket[0], bucket))


def bucket_name(bucket: Bucket) -> str:
    """``256x192``, height x width."""
    return f"{bucket[0]}x{bucket[1]}"


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Index of the bucket whose proportions are nearest (in the logarithm), for (N, 2) widths and heights."""
    wanted = np.log(sizes[:, 0] / sizes[:, 1])
    offered = np.log([width / height for height, width in buckets])
    return np.abs(wanted[:, None] - offered[None]).argmin(1)
