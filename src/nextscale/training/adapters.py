"""Low-rank adapters (LoRA, arXiv 2106.09685) on any system's network: attach, save, load, merge.

A layer's weight W (out, in) stays as it is and gets an update of small rank:

    W x + (alpha / rank) B A x,   A (rank, in) random, B (out, rank) zero at first

so a network with fresh adapters computes what it computed before. Layers are chosen by name.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale import hub
from nextscale.configuration import build
from nextscale.errors import InputError, MissingExtraError, WeightsError, did_you_mean
from nextscale.training.classes import ClassNames, extend_classes

FORMAT = 1
WHOLE, SAMPLED = 1 << 20, 1 << 16  # values of a tensor that a fingerprint reads: all up to WHOLE, else every n-th
NAME = "default"  # peft's own name for the only adapter of a model


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters. rank: of the update, 0 for none (full fine-tuning); alpha: the update is scaled by
    alpha / rank; dropout: share of its inputs dropped in training; targets: names or patterns of layers (see
    ``target_names``), empty for the system's own choice."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"lora.rank is {self.rank}; it must be at least 1, or 0 for no adapters")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.alpha > 0:
            raise InputError(f"lora.alpha is {self.alpha}; it must be above 0")


# Names

def network(system: nn.Module) -> dict[str, nn.Module]:
    """A system's parts that generate: all but the tokenizer."""
    return {name: part for name, part in system.named_children() if name != "tokenizer"}


def adaptable(system: nn.Module) -> dict[str, nn.Module]:
    """Layers that can be adapted, by full name: linear layers and embeddings of all parts but the tokenizer."""
    return {name: module for name, module in system.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.startswith("tokenizer.")}


def kind_of(name: str) -> str:
    """A name with ``*`` for numbers, which layers of the same kind share: ``generator.blocks.*.attention.qkv``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def select(patterns: Sequence[str], names: Iterable[str], what: str) -> list[str]:
    """Names that any pattern means, in their order. A pattern is a whole name, its end (``attention.qkv``), a part
    that holds it (``generator.blocks.0``), or one of these with ``*``, ``?``, ``[0-7]``.

    Raises InputError for a pattern that means nothing, with the nearest name.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        found = {name for name in names if any(fnmatchcase(name, form) for form in forms)}
        if not found:
            kinds = list(dict.fromkeys(kind_of(name) for name in names))
            ends = list(dict.fromkeys(".".join(kind.split(".")[-2:]).removeprefix("*.") for kind in kinds))
            wholes = list(dict.fromkeys(kind.split(".")[0] for kind in kinds))
            hint = did_you_mean(pattern, [*ends, *kinds, *wholes], f"; there are {', '.join([*wholes, *ends])}")
            raise InputError(f"{what} {pattern!r} names nothing in this model{hint}")
        chosen |= found
    return [name for name in names if name in chosen]


def target_names(system: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Full names of the layers to adapt. Raises InputError for a target that names none, with the nearest."""
    layers = adaptable(system)
    wanted = targets or getattr(system, "adapter_targets", ())
    if not wanted:  # a system without a choice of its own: all products of its network
        return [name for name, layer in layers.items()
                if name.startswith("generator.") and isinstance(layer, nn.Linear)]
    return select(wanted, layers, "target")


def target_table(system: nn.Module) -> list[tuple[str, int, str, bool]]:
    """Kinds of layers that can be adapted: name, how many, ``in -> out``, and whether they are by default."""
    chosen = set(target_names(system))
    rows: dict[str, tuple[str, int, str, bool]] = {}
    for name, layer in adaptable(system).items():
        shape = (f"{layer.in_features} -> {layer.out_features}" if isinstance(layer, nn.Linear)
                 else f"{layer.num_embeddings} x {layer.embedding_dim}" if isinstance(layer, nn.Embedding) else "")
        count = rows[kind_of(name)][1] if kind_of(name) in rows else 0
        rows[kind_of(name)] = (kind_of(name), count + 1, shape, name in chosen)
    return list(rows.values())


# Attaching and merging

def attach(system: nn.Module, config: AdapterConfig) -> list[str]:
    """Put fresh adapters on a system's layers, in place; everything else stops training. Returns the layers' names.

    A is drawn with torch's generator. Adapters are float32 whatever the weights are.
    """
    if adapter_layers(system):
        raise InputError("the model has adapters already; merge them first")
    names = target_names(system, config.targets)
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "train", "fine-tune with low-rank adapters") from None
    from nextscale.training.adapter_layers import CLASSES

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number works
                               lora_dropout=config.dropout, target_modules="|".join(re.escape(name) for name in names))
    settings._register_custom_module(CLASSES)
    peft.inject_adapter_in_model(settings, system, NAME)
    for name, parameter in system.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return names


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def adapter_layers(system: nn.Module) -> dict[str, Any]:
    """Adapted layers by name."""
    return {name: module for name, module in system.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merge(system: nn.Module) -> None:
    """Write every update into its weight and put the plain layers back, in place: W + (alpha / rank) B A."""
    for name, layer in adapter_layers(system).items():
        layer.merge()
        base = layer.get_base_layer().requires_grad_(True)
        system.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], base)
    if hasattr(system, "peft_config"):
        del system.peft_config


# Which base

def fingerprint(system: nn.Module) -> str:
    """What tells a model's weights from others': SHA-256 over names, shapes and values of its parameters, values
    rounded to bfloat16, so that a model and its bf16 copy are one. Of those above a million every n-th counts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(system.named_parameters()):
        flat = tensor.detach().reshape(-1)
        step = 1 if len(flat) <= WHOLE else len(flat) // SAMPLED
        values = flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


# Files

@dataclass(frozen=True)
class AdapterFile:
    """``adapters.json``: of which base they are, how they were made, and the classes that the table was given.

    trained: further weights that the folder holds whole, by name."""

    base: str
    base_name: str
    lora: AdapterConfig
    trained: tuple[str, ...] = ()
    classes: ClassNames | None = None
    format: int = FORMAT


def save_adapters(tensors: Mapping[str, Tensor], about: AdapterFile, folder: Path) -> None:
    """Write ``adapters.safetensors`` (adapters and other trained weights, float32) and ``adapters.json``."""
    hub.save_tensors({name: tensor.detach().float() for name, tensor in tensors.items()},
                     folder / "adapters.safetensors", {"kind": "nextscale adapters"})
    hub.save_json(asdict(about), folder / "adapters.json")


def load_adapters(system: Any, folder: Path) -> AdapterFile:
    """Put saved adapters and trained weights onto their base, in place, unmerged.

    Raises WeightsError where the folder is damaged, or the model is not the one that they were trained on.
    """
    path = folder / "adapters.json"
    if not path.is_file():
        raise WeightsError(f"{folder} holds no adapters (no adapters.json); give the folder that `nextscale train "
                           "finetune` wrote as OUT/adapters")
    try:
        about = build(AdapterFile, hub.read_json(path), str(path))
    except InputError as error:
        raise WeightsError(f"{error}; the file is damaged or of another version") from None
    if about.format != FORMAT:
        raise WeightsError(f"{path} has format {about.format}; this version reads {FORMAT}")
    found = fingerprint(system)
    if found != about.base:
        raise WeightsError(f"{folder}: these adapters were trained on another model ({about.base_name}, fingerprint "
                           f"{about.base[:8]}; this one has {found[:8]}); give that model as --model")
    tensors = hub.read_tensors(folder / "adapters.safetensors")
    if about.classes is not None:
        extend_classes(system, about.classes.names, about.classes.keep, about.classes.initial)
    if about.lora.rank:
        attach(system, about.lora)
    own = dict(system.named_parameters())
    expected = {name for name in own if is_adapter(name)} | set(about.trained)
    wrong = sorted(expected ^ set(tensors)) or [n for n in expected if own[n].shape != tensors[n].shape]
    if wrong:
        raise WeightsError(f"{folder / 'adapters.safetensors'} doesn't fit {path.name}: {', '.join(wrong[:5])}; the "
                           "folder is incomplete or mixed from two runs")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return about
