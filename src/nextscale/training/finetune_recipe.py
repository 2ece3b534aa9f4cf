"""Fine-tuning a trained model by a recipe, into a folder that ``nextscale.load`` reads and one with adapters alone."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import nextscale
from nextscale import parallel
from nextscale.configuration import build
from nextscale.data.pictures_out import writing_folder
from nextscale.devices import choose_device
from nextscale.errors import InputError, WeightsError
from nextscale.registry import weights_of
from nextscale.systems import folders
from nextscale.systems.class_conditional import ClassConditionalSystem
from nextscale.systems.system import Config, System
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.training import adapters
from nextscale.training.adapters import AdapterConfig, AdapterFile
from nextscale.training.classes import ClassChange, ClassNames, Initial, extend_classes, translate
from nextscale.training.config import TrainConfig
from nextscale.training.finetune import FinetuneTask, check_names, choose_trained, class_tables, train_new_rows
from nextscale.training.generator_recipe import kept_features, plans_of, sheet_captions, sheet_of, whole_batch
from nextscale.training.recipes import DataRecipe
from nextscale.training.token_recipe import token_loader, training_tokens
from nextscale.training.trainer import Trainer, TrainResult

SHOWN = 32  # pictures of a sample sheet


@dataclass(frozen=True)
class ClassRecipe:
    """Classes of the data that the model doesn't know by name get rows of their own.

    keep: whether the model's other classes stay; initial: new rows start as the ``mean`` of the class rows or as the
    ``null`` row; train: the ``new`` rows alone, or ``all``.
    """

    keep: bool = True
    initial: Initial = "mean"
    train: Literal["new", "all"] = "new"


@dataclass(frozen=True)
class FinetuneTraining:
    """A fine-tuning's recipe.

    model: a name or a folder; weights, tokenizer_weights and control_weights: published files for a published size.
    tokens: folder that
    ``nextscale tokenize`` made with the model's tokenizer, in the place of the pictures of ``data``. lora.rank 0 trains
    all weights. freeze: parameters that don't train, by name or pattern; train_also: parameters that train beside the
    adapters. base_precision: in which format frozen weights are held while adapters train; full fine-tuning holds all
    in float32. checkpointing: keep blocks' inputs only and compute again in the backward pass; compile: as in a
    generator's recipe. threads: of the processor, 0 for all.
    """

    model: str = ""
    weights: str | None = None
    tokenizer_weights: str | None = None
    control_weights: str | None = None
    tokens: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    classes: ClassRecipe = field(default_factory=ClassRecipe)
    freeze: tuple[str, ...] = ()
    train_also: tuple[str, ...] = ()
    base_precision: Literal["fp32", "bf16"] = "bf16"
    train: TrainConfig = field(default_factory=TrainConfig)
    label_dropout: float = 0.1
    part_dropout: float = 0.1
    label_smoothing: float = 0.0
    checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("model is missing; give a name or a folder, as in --model runs/generator/model")
        if self.train_also and not self.lora.rank:
            raise InputError("train_also is for adapters; with lora.rank 0 everything trains that freeze doesn't name")
        if self.lora.rank and self.base_precision == "bf16" and self.train.precision != "bf16":
            raise InputError("train.precision is fp32, so base_precision must be fp32 too")


def train_finetune(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Fine-tune into ``out``: ``out/model/`` whole, and ``out/adapters/`` where adapters were trained.

    Raises InputError on wrong keys and values, WeightsError on a model that can't be loaded.
    """
    config: Any = model_config(str(recipe.get("model", "")))
    side = config.tokenizer.grids[-1][0] * config.tokenizer.factor
    wanted = build(FinetuneTraining, {**recipe, "data": {"size": side, **recipe.get("data", {})}}, "recipe")
    takes = folders.system_type(config.slug).takes(config)
    if takes["captions"] and replace(wanted.classes, train="new") != ClassRecipe():
        raise InputError("recipe: classes says what becomes of a model's classes, but text steers "
                         f"{wanted.model}; leave it out")
    with torch.device("meta"):
        targets = wanted.lora.targets if wanted.lora.rank else None
        check_names(folders.system_type(config.slug)(config), targets, wanted.freeze, wanted.train_also)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    system = open_base(wanted.model, wanted.weights, wanted.tokenizer_weights, wanted.control_weights)
    base = adapters.fingerprint(system)
    device = choose_device(wanted.train.device)
    system.tokenizer.to(device)
    control = getattr(system.config, "control", None)
    kinds: tuple[str, ...] = () if control is None else control.cached
    dataset, held_out = training_tokens(wanted, system.tokenizer, out, kinds, **takes, system=type(system))
    change, classes = prepare(system, wanted, dataset.class_names)
    system.to(device)
    validation = None if held_out is None else whole_batch(held_out, kinds, **takes)
    shown: Any = None
    maps: Tensor | None = None
    if change is None:
        shown = sheet_captions(held_out or dataset, SHOWN)
        if system.encoder is None:
            system.encoder = kept_features(config.encoder, out / "text", 0, (dataset, held_out), device)
    else:
        if validation is not None:
            validation["labels"] = translate(validation["labels"], change, system.config.classes)
        shown = sheet_labels(dataset.labels, change, system)
        if kinds:
            rows, maps = sheet_of(held_out or dataset, kinds)
            shown = names_of(translate(torch.tensor(rows), change, system.config.classes), system)
    task = FinetuneTask(system, change, base, wanted.train.ema_decay > 0, label_dropout=wanted.label_dropout,
                        part_dropout=wanted.part_dropout, label_smoothing=wanted.label_smoothing,
                        checkpointing=wanted.checkpointing, compile=wanted.compile,
                        validation=validation, sheet_labels=shown, sheet_control=maps,
                        plans=plans_of(system, dataset))
    loader = token_loader(dataset, wanted.data, wanted.train, kinds, **takes)
    trainer = Trainer(task, loader, wanted.train, out, resume)
    result = trainer.train()
    task.adopt(trainer.averaged_modules())
    trained = {name: p for name, p in system.named_parameters() if p.requires_grad}

    def write() -> None:
        if wanted.lora.rank:
            others = tuple(name for name in trained if not adapters.is_adapter(name))
            about = AdapterFile(base, Path(wanted.model).name, wanted.lora, others, classes)
            adapters.save_adapters(trained, about, out / "adapters")
        adapters.merge(system)
        folders.save(system, out / "model", tokenizer_dtype=torch.float32)

    parallel.on_main(write)
    return result


def prepare(system: Any, wanted: FinetuneTraining, class_names: Any) -> tuple[ClassChange | None, ClassNames | None]:
    """A trained system made ready, in place: classes, precision, adapters, and what trains. Returns what became of the
    classes, None where it has none, and how to repeat it, None where they stayed as they were."""
    change, classes = None, None
    if class_tables(system):
        names = tuple(tuple(kind) for kind in class_names)
        before = system.labels
        change = extend_classes(system, names, wanted.classes.keep, wanted.classes.initial)
        if system.labels is not before:
            classes = ClassNames(names, wanted.classes.keep, wanted.classes.initial)
    torch.manual_seed(wanted.train.seed)
    if wanted.lora.rank:
        if wanted.base_precision == "bf16":
            for part in adapters.network(system).values():
                part.to(torch.bfloat16)
        adapters.attach(system, wanted.lora)
    choose_trained(system, wanted.lora.rank > 0, wanted.freeze, (*wanted.train_also, *class_tables(system)))
    if change is not None and wanted.classes.train == "new":
        train_new_rows(system, change.new)
    return change, classes


def model_config(name: str) -> Config:
    """A model's configuration without its weights. Raises InputError on names that are none."""
    if not name:
        raise InputError("recipe: model is missing; give a name or a folder, as in --model runs/generator/model")
    config = folders.model_config(name)
    if config is None:
        raise InputError(f"{name} comes from another package and can't be fine-tuned by name; give its folder")
    if hasattr(config, "drafter"):
        raise InputError(f"{name} is a pair of networks, each tuned for its part: use `nextscale train generator "
                         f"--system {config.slug} --set start=...`")
    return config


def open_base(name: str, weights: str | None = None, tokenizer_weights: str | None = None,
              control_weights: str | None = None) -> System:
    """The model to fine-tune, in float32. Raises WeightsError for a published size without its files."""
    system = open_trained(name, weights, tokenizer_weights, control_weights)
    if not isinstance(system, (ClassConditionalSystem, TextConditionalSystem)):
        raise InputError(f"{name} is a {type(system).__name__}, which fine-tuning does not know")
    return system


def open_trained(name: str, weights: str | None = None, tokenizer_weights: str | None = None,
                 control_weights: str | None = None) -> Any:
    """A model of any kind with trained weights. Raises WeightsError for a published size without its files."""
    published = not Path(name).is_dir() and weights_of(name) in ("published", "base")
    if published and not (weights and tokenizer_weights):
        raise WeightsError(f"{name} comes without weights; give --weights and --tokenizer-weights, or a folder that "
                           "`nextscale convert` wrote as --model")
    return nextscale.load(name, tokenizer=tokenizer_weights, generator=weights, control=control_weights)


def model_targets(name: str) -> list[tuple[str, int, str, bool]]:
    """``adapters.target_table`` of a model by name or folder, without reading its weights."""
    with torch.device("meta"):
        system = folders.build_system(model_config(name))
    return adapters.target_table(system)


def merge_adapters(model: str, folder: Path, out: Path, dtype: str = "bf16", weights: str | None = None,
                   tokenizer_weights: str | None = None, control_weights: str | None = None) -> None:
    """Write the model that saved adapters and their base make, in ``fp32`` or ``bf16``, into a folder.

    Raises WeightsError where the adapters are damaged or of another base.
    """
    system = open_base(model, weights, tokenizer_weights, control_weights)
    adapters.load_adapters(system, folder)
    adapters.merge(system)
    with writing_folder(out) as temporary:
        folders.save(system, temporary, torch.float32 if dtype == "fp32" else torch.bfloat16)


def names_of(labels_Nn: Tensor, system: Any) -> list[Any]:
    """Labels of the model as ``generate`` takes them, None where there is none."""
    sizes = system.config.classes
    return [tuple(None if i == size else i for i, size in zip(row, sizes, strict=True)) for row in labels_Nn.tolist()]


def sheet_labels(labels_Nn: Tensor, change: ClassChange, system: Any, count: int = SHOWN) -> list[Any]:
    """Labels of sample sheets: those of the data, each once before any again, as ``generate`` takes them."""
    found = names_of(translate(torch.unique(labels_Nn, dim=0), change, system.config.classes), system)
    return (found * (count // len(found) + 1))[:count] if len(found) < count else found[::len(found) // count][:count]
