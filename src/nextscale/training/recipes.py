"""Recipes: a data set, a model and the trainer's settings in one TOML or YAML file.

``tokenizer_recipe`` and ``generator_recipe`` hold the two kinds; this file what they share.
"""
from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from nextscale.configuration import read_mapping
from nextscale.data import ClassBalancedOrder, Loader, PictureDataset, ShuffledOrder, open_dataset
from nextscale.data.datasets import terminal_report
from nextscale.data.orders import Order
from nextscale.errors import DataError, InputError, did_you_mean
from nextscale.tokenizers.multiscale_vq import MultiScaleVQConfig
from nextscale.training.config import TrainConfig
from nextscale.training.task import Task
from nextscale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class DataRecipe:
    """Which pictures: ``spec`` as ``open_dataset`` takes it, the side in pixels, splits, whether classes are drawn
    evenly, whether pictures may be mirrored, and how many held-out pictures sample sheets and checks use."""

    spec: str = "emoji"
    size: int = 64
    split: str = "train"
    held_out_split: str = "concept-test"
    balanced: bool = True
    flip: bool = False
    held_out: int = 128


def named_recipes() -> list[str]:
    """Recipes that come with the package."""
    return sorted(Path(str(p)).stem for p in files("nextscale").joinpath("recipes").iterdir()
                  if str(p).endswith(".toml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by file or by the name of one that comes with the package. Raises InputError for unknown ones."""
    if name.endswith((".toml", ".yaml", ".yml")):
        return read_mapping(name)
    if name not in named_recipes():
        raise InputError(f"no recipe {name!r}{did_you_mean(name, named_recipes(), '; give a .toml or .yaml file')}")
    return read_mapping(str(files("nextscale").joinpath("recipes").joinpath(f"{name}.toml")))


def check_size(model: MultiScaleVQConfig, data: DataRecipe) -> None:
    """Raises InputError where a schedule of scales does not end at the pictures' latent."""
    side = model.grids[-1][0] * model.autoencoder.factor
    if model.grids[-1] != (data.size // model.autoencoder.factor,) * 2 or data.size % model.autoencoder.factor:
        raise InputError(f"recipe: the schedule ends at {model.grids[-1][0]}x{model.grids[-1][1]} with factor "
                         f"{model.autoencoder.factor}, which is {side} pixels, but data.size is {data.size}")


def open_splits(data: DataRecipe) -> tuple[PictureDataset, PictureDataset | None]:
    """The pictures to train on and the held-out ones, None where the recipe or the set has none."""
    dataset = open_dataset(data.spec, data.size, data.split, report=terminal_report)
    print(dataset.summary())
    for title, reason in dataset.skipped[:20]:
        print(f"  skipped {title}: {reason}")
    if not data.held_out:
        return dataset, None
    split = data.held_out_split if data.held_out_split in dataset.source.named_splits() else "validation"
    try:
        return dataset, open_dataset(data.spec, data.size, split)
    except DataError as error:  # a small folder may hash nothing into the validation split
        print(f"no held-out pictures: {error}")
        return dataset, None


def train_on(task: Task, dataset: PictureDataset, data: DataRecipe, train: TrainConfig, out: Path,
           resume: bool) -> tuple[Trainer, TrainResult]:
    """Train a task on a data set, in the recipe's order."""
    balanced = data.balanced and dataset.labels.shape[1] > 0
    order: Order = (ClassBalancedOrder(dataset.labels[:, 0], train.seed) if balanced
                    else ShuffledOrder(len(dataset), train.seed))
    loader = Loader(dataset, order, train.batch_size, flip=data.flip, seed=train.seed)
    trainer = Trainer(task, loader, train, out, resume)
    return trainer, trainer.train()
