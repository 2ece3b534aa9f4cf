"""Retargeting a trained text-to-picture model to another text encoder by a recipe."""
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
from nextscale.objectives.distillation import Direction
from nextscale.systems import folders
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.training import adapters
from nextscale.training.config import TrainConfig
from nextscale.training.finetune_recipe import open_trained
from nextscale.training.generator_recipe import TextRecipe, kept_features, sheet_captions, whole_batch
from nextscale.training.recipes import DataRecipe
from nextscale.training.retargeting import RetargetTask, in_front, retargeted
from nextscale.training.token_recipe import token_loader, training_tokens
from nextscale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class TeacherRecipe:
    """The teacher's text encoder. encoder: by name, "" for the one that the model names (which may lie in a folder of
    yours); cache: where its features are kept, by default a folder of the training; max_tokens: as much of a prompt is
    read, 0 for its own limit."""

    encoder: str = ""
    cache: str = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class RetargetTraining:
    """A retargeting's recipe.

    model: a name or a folder; weights and tokenizer_weights: published files for a published size. text: the new text
    encoder; teacher: the model's own. tokens: folder that ``nextscale tokenize`` made with the model's tokenizer, in
    the place of the pictures of ``data``. base_precision: in which format the transformer, which doesn't train, is
    held. direction: of the divergence. Others: as in a generator's recipe.
    """

    model: str = ""
    weights: str | None = None
    tokenizer_weights: str | None = None
    text: TextRecipe = field(default_factory=TextRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    tokens: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    base_precision: Literal["fp32", "bf16"] = "bf16"
    train: TrainConfig = field(default_factory=TrainConfig)
    label_dropout: float = 0.1
    step_weights: tuple[float, ...] | Literal["equal", "root"] | None = "equal"
    direction: Direction = "teacher-student"
    checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.base_precision == "bf16" and self.train.precision != "bf16":
            raise InputError("train.precision is fp32, so base_precision must be fp32 too")


def train_retarget(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Retarget a model into ``out`` and write ``out/model/``, a model that reads the new text encoder.

    Raises InputError on wrong keys and values and on a model that no text steers, WeightsError on one that can't be
    loaded.
    """
    config = text_model_config(str(recipe.get("model", "")))
    side = config.tokenizer.grids[-1][0] * config.tokenizer.factor
    wanted = build(RetargetTraining, {**recipe, "data": {"size": side, **recipe.get("data", {})}}, "recipe")
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    teacher = open_trained(wanted.model, wanted.weights, wanted.tokenizer_weights)
    base, device = adapters.fingerprint(teacher), choose_device(wanted.train.device)
    teacher.to(device)
    torch.manual_seed(wanted.train.seed)
    student = retargeted(teacher, wanted.text.encoder, wanted.text.words)
    if wanted.base_precision == "bf16":
        for name, parameter in student.named_parameters():
            if not (name.startswith("tokenizer.") or in_front(student, name)):
                parameter.data = parameter.data.to(torch.bfloat16)
    takes = type(teacher).takes(teacher.config)
    dataset, held_out = training_tokens(wanted, teacher.tokenizer, out, (), **takes)
    caches = dataset, held_out
    if teacher.config.words is None:
        place = Path(wanted.teacher.cache) if wanted.teacher.cache else out / "text-of-teacher"
        teacher.encoder = kept_features(wanted.teacher.encoder or teacher.config.encoder, place,
                                        wanted.teacher.max_tokens, caches, device)
    if student.config.words is None:
        place = Path(wanted.text.cache) if wanted.text.cache else out / "text"
        student.encoder = kept_features(wanted.text.encoder, place, wanted.text.max_tokens, caches, device)
    task = RetargetTask(student, teacher, base, wanted.train.ema_decay > 0, wanted.direction,
                        label_dropout=wanted.label_dropout, step_weights=wanted.step_weights,
                        validation=None if held_out is None else whole_batch(held_out, (), **takes),
                        sheet_labels=sheet_captions(held_out or dataset), checkpointing=wanted.checkpointing,
                        compile=wanted.compile)
    trainer = Trainer(task, token_loader(dataset, wanted.data, wanted.train, (), **takes), wanted.train, out, resume)
    result = trainer.train()
    task.adopt(trainer.averaged_modules())
    parallel.on_main(lambda: folders.save(student, out / "model", tokenizer_dtype=torch.float32))
    return result


def text_model_config(name: str) -> Any:
    """The configuration of a model that text steers. Raises InputError for others and for names that are none."""
    if not name:
        raise InputError("recipe: model is missing; give a name or a folder, as in --model infinity-2b/")
    config = folders.model_config(name)
    if config is None or not issubclass(folders.system_type(config.slug), TextConditionalSystem):
        raise InputError(f"{name} takes no prompts; a model that text steers is retargeted, such as infinity-2b")
    return config
