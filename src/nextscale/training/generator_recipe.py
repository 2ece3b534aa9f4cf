"""Training a generator by a recipe, into a folder that ``nextscale.load`` reads."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nextscale.configuration import build
from nextscale.data.datasets import terminal_report
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.sampling.generation import Settings
from nextscale.systems import var
from nextscale.training.config import TrainConfig
from nextscale.training.generator import GeneratorTask
from nextscale.training.recipes import DataRecipe, check_size, open_splits, train_on
from nextscale.training.tokenizer_recipe import load_tokenizer
from nextscale.training.tokens import cached_tokens
from nextscale.training.trainer import TrainResult


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


def train_generator(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Train a VAR's transformer into ``out`` and write ``out/model/``. Raises InputError on wrong keys and values."""
    wanted = build(GeneratorTraining, recipe, "recipe")
    if not wanted.tokenizer:
        raise InputError("recipe: tokenizer is missing; name the folder that `nextscale train tokenizer` made")
    tokenizer = load_tokenizer(Path(wanted.tokenizer))
    check_size(tokenizer.config, wanted.data)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    dataset, held_out = open_splits(wanted.data)
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
    trainer, result = train_on(task, dataset, wanted.data, wanted.train, out, resume)
    for name, module in trainer.averaged_modules().items():
        getattr(system, name).load_state_dict(module.state_dict())
    var.save(system, out / "model")
    return result


def _sheet_labels(config: var.VARConfig, count: int = 64) -> list[tuple[int, ...]]:
    return [tuple((i * (1 + 6 * kind)) % size for kind, size in enumerate(config.classes)) for i in range(count)]
