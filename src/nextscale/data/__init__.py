"""Data: pictures in and out, labelled sets of them, and the order in which training sees them."""

from nextscale.data.buckets import aspect_buckets
from nextscale.data.datasets import PictureDataset, Sample, open_dataset
from nextscale.data.images import open_image, resize_crop, to_pil, to_tensor
from nextscale.data.loader import Loader
from nextscale.data.orders import BucketOrder, ClassBalancedOrder, ShuffledOrder

__all__ = [
    "BucketOrder",
    "ClassBalancedOrder",
    "Loader",
    "PictureDataset",
    "Sample",
    "ShuffledOrder",
    "aspect_buckets",
    "open_dataset",
    "open_image",
    "resize_crop",
    "to_pil",
    "to_tensor",
]
