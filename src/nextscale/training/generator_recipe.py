"""Training a generator by a recipe, into a folder that ``nextscale.load`` reads."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale import parallel
from nextscale.conditions.text_cached import CachedTextEncoder
from nextscale.conditions.text_encoders import open_text_encoder
from nextscale.conditions.text_pretrained import PretrainedTextEncoder
from nextscale.conditions.text_words import WordConfig
from nextscale.configuration import build
from nextscale.data.token_dataset import TokenDataset
from nextscale.devices import choose_device
from nextscale.errors import InputError, WeightsError
from nextscale.objectives.distillation import Direction
from nextscale.plan import Plan
from nextscale.registry import weights_of
from nextscale.systems import folders
from nextscale.systems.system import Config, System
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import same_codes
from nextscale.training.config import TrainConfig
from nextscale.training.generator import GeneratorTask
from nextscale.training.prefix import Prefix
from nextscale.training.recipes import DataRecipe
from nextscale.training.task import Batch
from nextscale.training.token_recipe import token_loader, training_tokens
from nextscale.training.tokenizer_recipe import load_tokenizer
from nextscale.training.trainer import Trainer, TrainResult


@dataclass(frozen=True)
class TextRecipe:
    """The text encoder of a system that text steers. encoder: ``words`` or ``bytes`` trains one with the system, of the
    sizes in ``words``; any other is opened by its name and stays as it is, its features kept in ``cache`` (by default a
    folder of the training), read up to ``max_tokens``, 0 for its own limit."""

    encoder: str = "words"
    words: WordConfig = field(default_factory=WordConfig)
    cache: str = ""
    max_tokens: int = 0


@dataclass(frozen=True)
class GeneratorTraining:
    """A generator's recipe. system: which, by slug; generator: its network, as that system's configuration has it;
    start: a trained model to begin with, by folder or name: of that system, or of the one that it is built on (VAR for
    a control, and for a pair's refiner); then ``tokenizer`` and ``generator`` may be left out; drafter: the trained
    model that drafts in a pair, by folder or name, draft_steps: how many scales, and direction: of the refiner's
    divergence from it; a pair to start with has all three; control: of a system that a picture steers, as its
    configuration has it; part: which of its parts to train, the first where
    nothing is said; tokenizer: folder that a tokenizer's training made; tokens: folder that ``nextscale tokenize`` made
    with it, in the place of the pictures of ``data``; gate: initial factor on the residual gates; prefix,
    checkpointing, compile and what comes before the gate: as ``GeneratorTask`` has them; settings: how the finished
    model samples by default; text: of a system that text steers, its encoder; correction: how bits are flipped in
    training, where a system predicts bits; threads: of the processor, 0 for all."""

    system: str = "var"
    start: str = ""
    part: str = ""
    drafter: str = ""
    draft_steps: int | None = None
    direction: Direction | None = None
    tokenizer: str = ""
    tokens: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    generator: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    label_dropout: float = 0.1
    part_dropout: float = 0.1
    label_smoothing: float = 0.0
    step_weights: tuple[float, ...] | Literal["equal", "root"] | None = None
    gate: float = 1e-3
    prefix: Prefix = field(default_factory=Prefix)
    checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    text: TextRecipe = field(default_factory=TextRecipe)
    correction: dict[str, Any] = field(default_factory=dict)
    threads: int = 0


def train_generator(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Train a system's network into ``out`` and write ``out/model/``. Raises InputError on wrong keys and values."""
    wanted = build(GeneratorTraining, recipe, "recipe")
    control = control_config(wanted)
    kinds: tuple[str, ...] = control.cached if control is not None else ()
    if control is not None and not wanted.start and getattr(control, "freeze_backbone", True):
        raise InputError(f"recipe: start is missing; {wanted.system} is trained on a finished model, name its "
                         "folder, as in start=runs/generator/model")
    check_pair(wanted)
    if not (wanted.tokenizer or wanted.start):
        raise InputError("recipe: tokenizer is missing; name the folder that `nextscale train tokenizer` made")
    device = choose_device(wanted.train.device)
    found = load_tokenizer(Path(wanted.tokenizer) if wanted.tokenizer else _start_folder(wanted.start))
    tokenizer = folders.system_type(wanted.system).fitted(found)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    # What is wrong with it is told before pictures are read.
    takes = folders.system_type(wanted.system).takes(system_config(wanted, tokenizer.config, ((),)))
    tokenizer.to(device)
    dataset, held_out = training_tokens(wanted, tokenizer, out, kinds, **takes,
                                        system=folders.system_type(wanted.system))
    names = tuple(tuple(kind) for kind in dataset.class_names)
    config = system_config(wanted, tokenizer.config, names)
    torch.manual_seed(wanted.train.seed)
    system: Any = folders.system_type(wanted.system)(config).initialise(wanted.gate)
    system.tokenizer.load_state_dict(tokenizer.state_dict())
    if wanted.start:
        _begin_with(system, _start_folder(wanted.start))
    if wanted.drafter:
        _begin_with(system, _start_folder(wanted.drafter), "drafter")
    if wanted.part or system.parts:
        system.train_part(wanted.part or system.parts[0])
    validation = None if held_out is None else whole_batch(held_out, kinds, **takes)
    labels: Any = None
    maps: Tensor | None = None
    if kinds:
        labels, maps = sheet_of(held_out or dataset, kinds)
        system.look_at(dataset.read_control(spread(dataset, 1024).numpy(), kinds))
    elif takes["captions"]:
        labels = sheet_captions(held_out or dataset)
        if system.encoder is None:
            folder = Path(wanted.text.cache) if wanted.text.cache else out / "text"
            system.encoder = kept_features(wanted.text.encoder, folder, wanted.text.max_tokens, (dataset, held_out),
                                           device)
    else:
        labels = class_sheet(config)
    system.to(device)
    task = GeneratorTask(system, wanted.label_dropout, wanted.part_dropout, wanted.label_smoothing,
                         wanted.step_weights, validation, labels, maps, wanted.prefix, wanted.checkpointing,
                         wanted.compile, plans=plans_of(system, dataset))
    loader = token_loader(dataset, wanted.data, wanted.train, kinds, **takes)
    trainer = Trainer(task, loader, wanted.train, out, resume)
    result = trainer.train()
    for name, module in trainer.averaged_modules().items():
        setattr(system, name, module)
    parallel.on_main(lambda: folders.save(system, out / "model", tokenizer_dtype=torch.float32))
    return result


def plans_of(system: System, dataset: TokenDataset) -> list[Plan]:
    """The plans of a cache's buckets, none where it has one shape. Raises InputError where the system can't follow
    them."""
    try:
        return [] if dataset.bucket_of is None else [system.plan_of(job.grids) for job in dataset.jobs]
    except InputError as error:
        raise InputError(f"{dataset.folder} has buckets of several shapes, which this {system.config.slug} can't "
                         f"follow ({error}); name tokens of one shape") from None


def whole_batch(pictures: TokenDataset, control: Sequence[str] = (), captions: bool = False,
                latents: bool = False) -> Batch:
    """All pictures of a cache as one batch, each with its canonical caption."""
    everything = range(len(pictures))
    batch: Batch = {"tokens": pictures.read(everything), "labels": pictures.labels}
    if control:
        batch["control"] = pictures.read_control(everything, control)
    if latents:
        batch["latent"] = pictures.read_latents(everything)
    return {**batch, "caption": [pictures.caption(place) for place in everything]} if captions else batch


def sheet_captions(pictures: TokenDataset, count: int = 64) -> list[str]:
    """Captions of pictures spread over a cache."""
    return [pictures.caption(place) for place in spread(pictures, count).tolist()]


def spread(pictures: TokenDataset, count: int) -> Tensor:
    """At most ``count`` places of a cache, from its first picture to its last."""
    return torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long()


def kept_features(encoder: str, folder: Path, max_tokens: int, caches: Sequence[TokenDataset | None],
                  device: torch.device) -> CachedTextEncoder:
    """A text encoder that stays as it is, with the features of all captions, and of none, on the disk before training
    begins; its weights leave memory then."""
    opened: Any = open_text_encoder(encoder, max_tokens=max_tokens or None, device=device, offload="auto")
    cached = CachedTextEncoder(opened, folder)
    for pictures in caches:
        if pictures is not None and parallel.is_main():
            captions = (caption for place in range(len(pictures)) for caption in pictures.captions(place))
            cached.fill(list(dict.fromkeys(("", *captions))))
    if isinstance(opened, PretrainedTextEncoder):
        opened.unload()
    return cached


def _begin_with(system: Any, folder: Path, role: str = "") -> None:
    """Take over a trained model's weights, for the system itself or one of its further parts that is a network too.

    Raises WeightsError where it is another system's or of other sizes.
    """
    config = folders.read_config(folder)
    own, into = system.config, getattr(system, role) if role else system
    same = config.slug == own.slug and not role
    fits = (config.generator, getattr(config, "classes", ())) == (
        getattr(own, role or "generator"), getattr(own, "classes", ())) and (
        not same or all(getattr(config, name, None) == getattr(own, name, None)
                        for name in ("control", "drafter", "words")))
    if not (same or config.slug in system.starts_from) or not fits:
        raise WeightsError(f"{folder} holds a {config.slug} of other sizes or classes than the recipe's {own.slug}; "
                           "give the sizes that it was trained with")
    trained = folders.load(folder)
    if not same_codes(system.tokenizer, trained.tokenizer):
        raise WeightsError(f"{folder} was trained on another tokenizer's codes than the recipe's tokenizer has; leave "
                           "the tokenizer out, then the model's own is taken")
    for name in (*trained.transformer_parts, *(system.further if same else ())):
        getattr(into, name).load_state_dict(getattr(trained, name).state_dict())


def check_pair(wanted: GeneratorTraining) -> None:
    """Raises InputError where a pair is to be trained and one of its networks is missing, or the other way round."""
    is_pair = hasattr(folders.system_type(wanted.system).config_type(), "drafter")
    given = {"drafter": wanted.drafter, "draft_steps": wanted.draft_steps, "direction": wanted.direction}
    for name in given if not is_pair else ():
        if given[name] not in ("", None):
            raise InputError(f"recipe: {name} is given, but the system {wanted.system!r} is no pair; use code_decoding")
    if not is_pair:
        return
    if not wanted.start:
        raise InputError("recipe: start is missing; name the folder of the refiner, or of a pair, as in "
                         "start=runs/small/model")
    if folders.read_config(_start_folder(wanted.start)).slug != wanted.system and not wanted.drafter:
        raise InputError("recipe: drafter is missing; name the folder of the model that drafts, as in "
                         "drafter=runs/large/model")


def of_pair(wanted: GeneratorTraining) -> dict[str, Any]:
    """What the recipe, or the pair that it starts from, says of a pair's drafter; the rest of its configuration."""
    started: Any = folders.read_config(_start_folder(wanted.start))
    values = {name: getattr(started, name) for name in ("drafter", "draft_steps", "direction")
              if started.slug == wanted.system}
    if wanted.drafter:
        values["drafter"] = folders.read_config(_start_folder(wanted.drafter)).generator
    return values | {name: value for name in ("draft_steps", "direction")
                     if (value := getattr(wanted, name)) is not None}


def _start_folder(start: str) -> Path:
    """Where the model to begin with lies, by folder or by the name of one that ships."""
    return folders.shipped_folder(start) if weights_of(start) == "shipped" else Path(start)


def control_config(wanted: GeneratorTraining) -> Any:
    """The configuration of the recipe's control, None for a system without one. Raises InputError on wrong keys."""
    default = getattr(folders.system_type(wanted.system).config_type(), "control", None)
    if default is not None:
        return build(type(default), wanted.control, "recipe.control")
    if wanted.control:
        raise InputError(f"recipe: control is given, but no picture steers the system {wanted.system!r}; use car or "
                         "scalar")
    return None


def system_config(wanted: GeneratorTraining, tokenizer: TokenizerConfig,
                  names: tuple[tuple[str, ...], ...]) -> Config:
    """The configuration of the system that a recipe trains. Raises InputError on wrong keys and values."""
    kind: Any = folders.system_type(wanted.system).config_type
    if wanted.start and not wanted.generator:
        network = folders.read_config(_start_folder(wanted.start)).generator
    else:
        network = build(type(kind().generator), wanted.generator, "recipe.generator")
    settings = build(type(kind().settings["pictures"]), wanted.settings, "recipe.settings")
    both = {"pictures": settings, "fid": settings}
    if hasattr(kind(), "words"):
        return text_config(wanted, tokenizer, kind, both)
    config: Any = kind(tokenizer, network, tuple(len(kind) for kind in names), names, both,
                       **(of_pair(wanted) if hasattr(kind(), "drafter") else {}))
    control = control_config(wanted)
    found: Config = config if control is None else replace(config, control=control)
    return found


def text_config(wanted: GeneratorTraining, tokenizer: TokenizerConfig, kind: Any, settings: dict[str, Any]) -> Config:
    """The same of a system that text steers: its network takes what the text encoder gives, unless the recipe says
    otherwise."""
    text, network = wanted.text, dict(wanted.generator)
    words: WordConfig | None
    if text.encoder in ("words", "bytes"):
        words = replace(text.words, kind=text.encoder)  # type: ignore[arg-type]
        network = {"text_width": words.width, "longest_text": words.max_tokens + 1, **network}
    else:
        words, encoder = None, open_text_encoder(text.encoder, max_tokens=text.max_tokens or None)
        network = {"text_width": encoder.width, **network}
    sizes = build(type(kind().generator), network, "recipe.generator")
    options: dict[str, Any] = {"encoder": text.encoder, "words": words}
    if wanted.correction and not hasattr(kind(), "correction"):
        raise InputError(f"recipe: correction is given, but {wanted.system} predicts no bits; leave it out")
    if hasattr(kind(), "correction"):
        options["correction"] = build(type(kind().correction), wanted.correction, "recipe.correction")
    found: Config = kind(tokenizer, sizes, settings, **options)
    return found


def sheet_of(pictures: TokenDataset, kinds: tuple[str, ...], count: int = 64) -> tuple[list[Any], Tensor]:
    """Labels and control maps, of the first kind, of pictures spread over a cache."""
    places = spread(pictures, count)
    maps = pictures.read_control(places.numpy(), kinds[:1])
    return [tuple(row) for row in pictures.labels[places].tolist()], maps


def class_sheet(config: Any, count: int = 64) -> list[tuple[int, ...]]:
    """Labels of ``count`` pictures of a sheet, classes in turn."""
    return [tuple((i * (1 + 6 * kind)) % size for kind, size in enumerate(config.classes)) for i in range(count)]
