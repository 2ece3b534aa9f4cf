"""Recipes: a data set, a model and the trainer's settings in one TOML or YAML file, and the two entry points.

A tokenizer's recipe makes ``out/tokenizer/``, a generator's recipe reads that folder and makes ``out/model/``, which
``nextscale.load`` reads.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from nextscale import hub
from nextscale.configuration import build, read_mapping
from nextscale.data import ClassBalancedOrder, Loader, PictureDataset, ShuffledOrder, open_dataset
from nextscale.data.datasets import terminal_report
from nextscale.data.orders import Order
from nextscale.errors import DataError, InputError, did_you_mean
from nextscale.generators.var import VARGeneratorConfig
from nextscale.objectives.reconstruction import FeatureDistance, lpips_distance
from nextscale.sampling.generation import Settings
from nextscale.systems import var
from nextscale.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from nextscale.training.config import TrainConfig
from nextscale.training.generator import GeneratorTask, cached_tokens
from nextscale.training.task import Task
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask
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


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer's recipe. perceptual: ``emoji`` for the shipped classifier's features, ``lpips`` for the published
    one (extra ``eval-published``), or ``none``; threads: of the processor, 0 for all."""

    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    train: TrainConfig = field(default_factory=TrainConfig)
    perceptual: Literal["emoji", "lpips", "none"] = "none"
    threads: int = 0


@dataclass(frozen=True)
class GeneratorTraining:
    """A generator's recipe. tokenizer: folder that a tokenizer's training made; gate: VAR's initial factor on the
    residual gates; settings: how the finished model samples by default; threads: of the processor, 0 for all."""

    tokenizer: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    generator: VARGeneratorConfig = field(default_factory=VARGeneratorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    label_dropout: float = 0.1
    part_dropout: float = 0.1
    label_smoothing: float = 0.0
    step_weights: tuple[float, ...] | None = None
    gate: float = 1e-3
    settings: Settings = field(default_factory=Settings)
    threads: int = 0


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


def train_tokenizer(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Train a tokenizer into ``out`` and write ``out/tokenizer/``. Raises InputError on wrong keys and values."""
    wanted = build(TokenizerTraining, recipe, "recipe")
    _check_size(wanted.tokenizer.model, wanted.data)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    dataset, held_out = _open(wanted.data)
    perceptual = _perceptual(wanted.perceptual)
    examples = None if held_out is None else _pictures(held_out, wanted.data.held_out)
    torch.manual_seed(wanted.train.seed)
    task = TokenizerTask(wanted.tokenizer, perceptual, examples)
    trainer, result = _train(task, dataset, wanted.data, wanted.train, out, resume)
    tokenizer = trainer.averaged_modules()["tokenizer"]
    assert isinstance(tokenizer, MultiScaleVQ)
    save_tokenizer(tokenizer, out / "tokenizer")
    return result


def train_generator(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Train a VAR's transformer into ``out`` and write ``out/model/``. Raises InputError on wrong keys and values."""
    wanted = build(GeneratorTraining, recipe, "recipe")
    if not wanted.tokenizer:
        raise InputError("recipe: tokenizer is missing; name the folder that `nextscale train tokenizer` made")
    tokenizer = load_tokenizer(Path(wanted.tokenizer))
    _check_size(tokenizer.config, wanted.data)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    dataset, held_out = _open(wanted.data)
    if not dataset.class_names:
        raise InputError(f"{wanted.data.spec}: the pictures have no classes, which a class-conditional VAR needs; "
                         "put them into one folder a class")
    names = tuple(tuple(kind) for kind in dataset.class_names)
    config = var.VARConfig(tokenizer.config, wanted.generator, tuple(len(kind) for kind in names), names,
                           {"pictures": wanted.settings, "fid": wanted.settings})
    torch.manual_seed(wanted.train.seed)
    system = var.VAR(config).initialise(wanted.gate)
    system.tokenizer.load_state_dict(tokenizer.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    tokens_NL = cached_tokens(system, dataset, out / "tokens-train.safetensors", terminal_report)
    validation = None
    if held_out is not None:
        validation = (cached_tokens(system, held_out, out / "tokens-held-out.safetensors"), held_out.labels)
    task = GeneratorTask(system, torch.from_numpy(dataset.rows), tokens_NL, wanted.label_dropout, wanted.part_dropout,
                         wanted.label_smoothing, wanted.step_weights, validation, _sheet_labels(config))
    trainer, result = _train(task, dataset, wanted.data, wanted.train, out, resume)
    for name, module in trainer.averaged_modules().items():
        getattr(system, name).load_state_dict(module.state_dict())
    var.save(system, out / "model")
    return result


def save_tokenizer(tokenizer: MultiScaleVQ, folder: Path) -> None:
    """Write a tokenizer's configuration and weights (float32) into a folder."""
    hub.save_tensors(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    hub.save_json(asdict(tokenizer.config), folder / "config.json")


def load_tokenizer(folder: Path) -> MultiScaleVQ:
    """A tokenizer that ``save_tokenizer`` wrote, or a model's. Raises WeightsError where there is none."""
    config = hub.read_json(folder / "config.json")
    tokenizer = MultiScaleVQ(build(MultiScaleVQConfig, config.get("tokenizer", config), str(folder / "config.json")))
    path = folder / "tokenizer.safetensors"
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in hub.read_tensors(path).items()}
    hub.load_published(tokenizer, tensors, ((r"(.*)", r"\1"),), str(path))
    return tokenizer.eval()


def _perceptual(name: str) -> torch.nn.Module | None:
    if name == "none":
        return None
    if name == "lpips":
        return lpips_distance()
    from nextscale.tokenizers.features import load_features

    return FeatureDistance(load_features())


def _check_size(model: MultiScaleVQConfig, data: DataRecipe) -> None:
    side = model.grids[-1][0] * model.autoencoder.factor
    if model.grids[-1] != (data.size // model.autoencoder.factor,) * 2 or data.size % model.autoencoder.factor:
        raise InputError(f"recipe: the schedule ends at {model.grids[-1][0]}x{model.grids[-1][1]} with factor "
                         f"{model.autoencoder.factor}, which is {side} pixels, but data.size is {data.size}")


def _open(data: DataRecipe) -> tuple[PictureDataset, PictureDataset | None]:
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


def _pictures(dataset: PictureDataset, count: int) -> torch.Tensor:
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.stack([dataset[i].picture for i in places]).float() / 127.5 - 1


def _train(task: Task, dataset: PictureDataset, data: DataRecipe, train: TrainConfig, out: Path,
           resume: bool) -> tuple[Trainer, TrainResult]:
    balanced = data.balanced and dataset.labels.shape[1] > 0
    order: Order = (ClassBalancedOrder(dataset.labels[:, 0], train.seed) if balanced
                    else ShuffledOrder(len(dataset), train.seed))
    loader = Loader(dataset, order, train.batch_size, flip=data.flip, seed=train.seed)
    trainer = Trainer(task, loader, train, out, resume)
    return trainer, trainer.train()


def _sheet_labels(config: var.VARConfig, count: int = 64) -> list[tuple[int, ...]]:
    return [tuple((i * (1 + 6 * kind)) % size for kind, size in enumerate(config.classes)) for i in range(count)]
