"""Data: pictures in and out, labelled sets of them, and the order in which training sees them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextscale.data.buckets import aspect_buckets
    from nextscale.data.datasets import PictureDataset, Sample, open_dataset
    from nextscale.data.images import open_image, resize_crop, to_pil, to_tensor
    from nextscale.data.loader import Loader
    from nextscale.data.orders import BucketOrder, ClassBalancedOrder, ShuffledOrder
    from nextscale.data.prompts import Prompt, read_prompts

__all__ = [
    "BucketOrder",
    "ClassBalancedOrder",
    "Loader",
    "PictureDataset",
    "Prompt",
    "Sample",
    "ShuffledOrder",
    "aspect_buckets",
    "open_dataset",
    "open_image",
    "read_prompts",
    "resize_crop",
    "to_pil",
    "to_tensor",
]

# Imported on use: drawing a picture needs none of the readers of data sets.
_HOMES = {
    **dict.fromkeys(("aspect_buckets",), "buckets"),
    **dict.fromkeys(("PictureDataset", "Sample", "open_dataset"), "datasets"),
    **dict.fromkeys(("open_image", "resize_crop", "to_pil", "to_tensor"), "images"),
    **dict.fromkeys(("Loader",), "loader"),
    **dict.fromkeys(("BucketOrder", "ClassBalancedOrder", "ShuffledOrder"), "orders"),
    **dict.fromkeys(("Prompt", "read_prompts"), "prompts"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"nextscale.data.{_HOMES[name]}"), name)
