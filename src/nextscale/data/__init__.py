"""Data: pictures in and out, labelled sets of them, and the order in which training sees them."""

from nextscale.data.datasets import PictureDataset, Sample, open_dataset
from nextscale.data.images import open_image, resize_crop, to_pil, to_tensor
from nextscale.data.loader import Loader
from nextscale.data.orders import ClassBalancedOrder, ShuffledOrder

__all__ = [
    "ClassBalancedOrder",
    "Loader",
    "PictureDataset",
    "Sample",
    "ShuffledOrder",
    "open_dataset",
    "open_image",
    "resize_crop",
    "to_pil",
    "to_tensor",
]
