"""Distillation of a trained model into fewer scales by a recipe."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nextscale import parallel
from nextscale.configuration import build
from nextscale.devices import choose_device
from nextscale.errors import InputError
from nextscale.plan import parse_grids
from nextscale.systems import folders
from nextscale.training import adapters
from nextscale.training.classes import extend_classes, translate
from nextscale.training.config import TrainConfig
from nextscale.training.finetune_recipe import open_trained
from nextscale.training.generator_recipe import class_sheet, whole_batch
from nextscale.training.recipes import DataRecipe
from nextscale.training.scale_distillation import ScaleDistillationTask, shortened
from nextscale.training.token_recipe import token_loader, training_tokens
from nextscale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class DistillTraining:
    """A distillation's recipe.

    teacher: a name or a folder; weights and tokenizer_weights: published files for a published size. grids: the
    student's, as in "1,3,4,8". tokens: folder of tokens of the student's tokenizer, as an earlier run to these grids
    left one in its folder, in the place of the pictures of ``data``. Others: as in a generator's recipe.
    """

    teacher: str = ""
    grids: str = ""
    weights: str | None = None
    tokenizer_weights: str | None = None
    tokens: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainConfig = field(default_factory=TrainConfig)
    label_dropout: float = 0.1
    part_dropout: float = 0.1
    step_weights: tuple[float, ...] | Literal["equal", "root"] | None = None
    checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    threads: int = 0


def train_distill(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Distil a model into fewer scales in ``out`` and write ``out/model/``, a model of the teacher's system.

    Raises InputError on wrong keys and values and on a model whose scales can't be dropped, WeightsError on one that
    can't be loaded.
    """
    name = str(recipe.get("teacher", ""))
    if not name:
        raise InputError("recipe: teacher is missing; give a name or a folder, as in --teacher runs/srdd/model")
    config = folders.model_config(name)
    side = 0 if config is None else config.tokenizer.grids[-1][0] * config.tokenizer.factor
    wanted = build(DistillTraining, {**recipe, "data": {"size": side, **recipe.get("data", {})}}, "recipe")
    grids = parse_grids(wanted.grids) if wanted.grids else ()
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    teacher = open_trained(wanted.teacher, wanted.weights, wanted.tokenizer_weights)
    base, device = adapters.fingerprint(teacher), choose_device(wanted.train.device)
    student, kept = shortened(teacher.to(device), grids)
    dataset, held_out = training_tokens(wanted, student.tokenizer, out, system=type(student))
    change = extend_classes(student, dataset.class_names)
    if change.changed:
        raise InputError(f"recipe: {dataset.folder} has classes that {wanted.teacher} doesn't know by name and so "
                         "can't teach; leave their pictures out")
    for cache in (dataset, *([] if held_out is None else [held_out])):
        cache.labels = translate(cache.labels, change, student.config.classes)
    torch.manual_seed(wanted.train.seed)
    task = ScaleDistillationTask(student, teacher, kept, base, wanted.train.ema_decay > 0,
                                 label_dropout=wanted.label_dropout, part_dropout=wanted.part_dropout,
                                 step_weights=wanted.step_weights,
                                 validation=None if held_out is None else whole_batch(held_out),
                                 sheet_labels=class_sheet(student.config), checkpointing=wanted.checkpointing,
                                 compile=wanted.compile)
    trainer = Trainer(task, token_loader(dataset, wanted.data, wanted.train), wanted.train, out, resume)
    result = trainer.train()
    task.adopt(trainer.averaged_modules())
    parallel.on_main(lambda: folders.save(student, out / "model", tokenizer_dtype=torch.float32))
    return result
