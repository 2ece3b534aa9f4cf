"""Recipes: a data set, a model and the trainer's settings in one TOML or YAML file.

``tokenizer_recipe`` and ``generator_recipe`` hold the two kinds; this file what they share.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nextscale import parallel
from nextscale.configuration import read_mapping
from nextscale.data import (
    BucketOrder,
    ClassBalancedOrder,
    Loader,
    PictureDataset,
    ShuffledOrder,
    aspect_buckets,
    open_dataset,
)
from nextscale.data.buckets import Bucket
from nextscale.data.crops import CROP_AREA, RANDOM_CROPS, Crop, check_crop
from nextscale.data.datasets import terminal_report
from nextscale.data.orders import Order
from nextscale.errors import DataError, InputError, did_you_mean
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.config import TrainConfig
from nextscale.training.task import Task
from nextscale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class DataRecipe:
    """Which pictures, and how they are drawn and cut.

    Attributes:
        spec: as ``open_dataset`` takes it.
        size: side in pixels; of the square bucket where there are buckets.
        split, held_out_split: to train on, and to check on (``validation`` where the set has no such split).
        balanced: classes are drawn evenly, whatever their sizes.
        flip: pictures are mirrored every other time, unless the set says that left and right matter.
        held_out: how many held-out pictures sample sheets and checks use, 0 for none.
        crop: how pictures are cut, see ``nextscale.data.crops``; held-out ones are cut from the middle where it is
            random.
        crop_area: least share of the area that ``random-resized`` keeps.
        largest_ratio: of the longer to the shorter side of aspect-ratio buckets; 1 for squares alone. For tokenizers,
            and for systems that draw several shapes (``System.schedules``).
        bucket_multiple: sides of buckets are multiples of it, in pixels; the tokenizer's factor divides it. Infinity's
            buckets are its own.
        workers: threads that prepare batches.
        allow_empty_classes: train although classes have no picture.
        caption_field: column or field that holds captions, as ``open_dataset`` takes it; "" for the usual ones.
    """

    spec: str = "emoji"
    size: int = 64
    split: str = "train"
    held_out_split: str = "concept-test"
    balanced: bool = True
    flip: bool = False
    held_out: int = 128
    crop: Crop = "center"
    crop_area: float = CROP_AREA
    largest_ratio: float = 1.0
    bucket_multiple: int = 32
    workers: int = 1
    allow_empty_classes: bool = False
    caption_field: str = ""

    def __post_init__(self) -> None:
        check_crop(self.crop, self.crop_area)
        if self.workers < 1 or self.held_out < 0 or self.largest_ratio < 1:
            raise InputError(f"workers is {self.workers} and largest_ratio {self.largest_ratio}, which must be at "
                             f"least 1; held_out is {self.held_out}, which must not be negative")


def named_recipes() -> list[str]:
    """Recipes that come with the package."""
    return sorted(Path(str(p)).stem for p in files("nextscale").joinpath("recipes").iterdir()
                  if str(p).endswith(".toml"))


def recipe_of(system: str | None) -> str:
    """The name of the recipe that a system's training starts from where none is named: its own, else VAR's."""
    own = f"own-64-{system}"
    return own if own in named_recipes() else "own-64-generator"


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by file or by the name of one that comes with the package. Raises InputError for unknown ones."""
    if name.endswith((".toml", ".yaml", ".yml")):
        return read_mapping(name)
    if name not in named_recipes():
        raise InputError(f"no recipe {name!r}{did_you_mean(name, named_recipes(), '; give a .toml or .yaml file')}")
    return read_mapping(str(files("nextscale").joinpath("recipes").joinpath(f"{name}.toml")))


def check_size(model: TokenizerConfig, data: DataRecipe) -> None:
    """Raises InputError where a schedule of scales does not end at the pictures' latent, or cannot follow buckets."""
    factor = model.factor
    side = model.grids[-1][0] * factor
    if model.grids[-1] != (data.size // factor,) * 2 or data.size % factor:
        raise InputError(f"recipe: the schedule ends at {model.grids[-1][0]}x{model.grids[-1][1]} with factor "
                         f"{factor}, which is {side} pixels, but data.size is {data.size}")
    if data.largest_ratio > 1 and data.bucket_multiple % factor:
        raise InputError(f"recipe: data.bucket_multiple is {data.bucket_multiple}, it must be a multiple of the "
                         f"tokenizer's factor {factor}")


def open_splits(data: DataRecipe,
                buckets: Sequence[Bucket] | None = None) -> tuple[PictureDataset, PictureDataset | None]:
    """The pictures to train on and the held-out ones, None where the recipe or the set has none. buckets: of the
    former, in the place of those that the recipe means; held-out ones are all of one size."""
    if buckets is None and data.largest_ratio > 1:
        buckets = aspect_buckets(data.size, data.largest_ratio, data.bucket_multiple)
    field = data.caption_field or None
    dataset = open_dataset(data.spec, data.size, data.split, report=terminal_report, crop=data.crop,
                           crop_area=data.crop_area, buckets=buckets, caption_field=field)
    if parallel.is_main():
        _describe(dataset, data)
    if not data.held_out:
        return dataset, None
    split = data.held_out_split if data.held_out_split in dataset.source.named_splits() else "validation"
    fixed: Crop = "center" if data.crop in RANDOM_CROPS else data.crop
    try:
        return dataset, open_dataset(data.spec, data.size, split, crop=fixed, caption_field=field)
    except DataError as error:  # a small folder may hash nothing into the validation split
        print(f"no held-out pictures: {error}")
        return dataset, None


def _describe(dataset: PictureDataset, data: DataRecipe) -> None:
    """What is known of a set before training, and what of the recipe it cannot have, a line each."""
    print(dataset.summary())
    for title, reason in dataset.skipped[:20]:
        print(f"  skipped {title}: {reason}")
    if dataset.empty_classes:
        print(f"  without pictures: {len(dataset.empty_classes)} classes, the first is {dataset.empty_classes[0]!r}")
    if data.flip and dataset.left_right_matters:
        print("  nothing is mirrored: the set says that left and right matter")
    if dataset.bucket_of is not None:
        print("  buckets (height x width): " + ", ".join(f"{k} {n:,}" for k, n in dataset.bucket_counts().items()))
    if data.balanced and dataset.class_names and (dataset.bucket_of is not None or dataset.blocks is not None):
        why = "batches share a bucket" if dataset.bucket_of is not None else "the files are larger than memory"
        print(f"  classes are drawn as often as they occur: {why}")


def order_of(dataset: PictureDataset, data: DataRecipe, seed: int) -> Order:
    """The recipe's order of a set: by buckets, by blocks where files are larger than memory, balanced, or shuffled."""
    if dataset.bucket_of is not None:
        return BucketOrder(dataset.bucket_of, seed)
    if dataset.blocks is not None:
        return ShuffledOrder(len(dataset), seed, dataset.blocks, dataset.blocks_at_once)
    if data.balanced and dataset.labels.shape[1] > 0:
        return ClassBalancedOrder(dataset.labels[:, 0], seed)
    return ShuffledOrder(len(dataset), seed)


def train_on(task: Task, dataset: PictureDataset, data: DataRecipe, train: TrainConfig, out: Path,
           resume: bool) -> tuple[Trainer, TrainResult]:
    """Train a task on a data set, in the recipe's order; each process reads its share of a batch."""
    loader = Loader(dataset, order_of(dataset, data, train.seed), train.batch_size, flip=data.flip, seed=train.seed,
                    workers=data.workers, rank=parallel.rank(), ranks=parallel.world())
    trainer = Trainer(task, loader, train, out, resume)
    return trainer, trainer.train()
