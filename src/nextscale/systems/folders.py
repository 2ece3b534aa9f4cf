"""Systems from and into folders, configurations and published files; any system that the table knows."""
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale import hub
from nextscale.configuration import build
from nextscale.errors import InputError, WeightsError, did_you_mean
from nextscale.registry import import_target, models, resolve, weights_of
from nextscale.systems.system import Config, System, Transformer

TOKENIZER_STATISTICS = (r"quantiser\.(usage_KV|ones_KC|seen_K|assigned.*)",)
"""What published tokenizers may lack: only a training from these weights would want it."""


def system_type(slug: str) -> type[System]:
    """The class of a system, by slug. Raises InputError where there is none, or none that has folders."""
    found = resolve(slug)
    if not (isinstance(found, type) and issubclass(found, System)):
        raise InputError(f"{slug!r} is no system that is trained, saved and loaded here")
    return found


def save(system: System, folder: Path, dtype: torch.dtype = torch.bfloat16,
         tokenizer_dtype: torch.dtype | None = None) -> None:
    """Write ``config.json``, ``tokenizer.safetensors``, ``generator.safetensors`` and a file for every further part
    into a folder, in ``dtype`` where nothing must stay in float32.

    tokenizer_dtype: the tokenizer's, where it is another: cached tokens are bound to its weights to the bit. Raises
    InputError where the network's weights were rounded to integers.
    """
    if system.rounded:
        raise InputError("save: the weights were rounded to int8; save the model before that, or load it again")
    slug = system.config.slug
    for name, module in files_of(system).items():
        exact = {f"{path}.{n}" for path, part in module.named_modules() if getattr(part, "stays_float32", False)
                 for n in part.state_dict()}
        to = (tokenizer_dtype or dtype) if name == "tokenizer" else dtype
        tensors = {n: t.to(to) if t.is_floating_point() and n not in exact else t
                   for n, t in module.state_dict().items()}
        hub.save_tensors(tensors, folder / f"{name}.safetensors", {"system": slug, "part": name})
    hub.save_json({"system": slug, **asdict(system.config)}, folder / "config.json")


def files_of(system: System) -> dict[str, nn.Module]:
    """What a system's weights files hold, by their names."""
    return {"tokenizer": system.tokenizer, "generator": Transformer(system),
            **{name: getattr(system, name) for name in system.further}}


def read_config(folder: Path) -> Any:
    """The configuration, of its system's type, of a model's folder, without its weights.

    Raises WeightsError, InputError on wrong files.
    """
    config = hub.read_json(folder / "config.json")
    slug = config.pop("system", "var")
    try:
        kind = system_type(str(slug))
    except InputError as error:
        raise WeightsError(f"{folder} holds a model of the system {slug!r}: {error}") from None
    return build(kind.config_type, config, str(folder / "config.json"))


def load(folder: Path, precision: str = "fp32") -> System:
    """A system that ``save`` wrote. Raises WeightsError where files are missing, damaged or don't fit."""
    config = read_config(folder)
    try:
        with hub.WithoutInitialisation():
            system = build_system(config)
    except Exception as error:  # sizes that cannot be, which every layer refuses in a way of its own
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{folder / 'config.json'} doesn't describe a model ({reason})") from None
    for name, module in files_of(system).items():
        path = folder / f"{name}.safetensors"
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in hub.read_tensors(path).items()}
        hub.load_published(module, tensors, ((r"(.*)", r"\1"),), str(path))
    return system.to_precision(precision)


def build_system(config: Config) -> System:
    """A system of a configuration, with weights as its layers make them."""
    return system_type(config.slug)(config).eval()


def load_published(system: System, tokenizer: Any = None,
                   generator: Any = None, **further: Any) -> System:
    """Fill a system with published weights: state dicts, local paths, or ``owner/name/file`` of the Hugging Face hub.

    Any may be left out; further: of the system's further parts, by name. Raises WeightsError naming the tensors that
    don't fit, or a part that the system doesn't have.
    """
    files = files_of(system)
    given = {name: found for name, found in {"tokenizer": tokenizer, "generator": generator, **further}.items()
             if found is not None}
    for name in given:
        if name not in files:
            raise WeightsError(f"{name} weights were given, but {system.config.slug} has no such part; it has "
                               f"{', '.join(files)}")
    for (part, module), names in zip(files.items(), system.published_names() if given else (), strict=bool(given)):
        if part in given:
            tensors = given[part] if isinstance(given[part], dict) else hub.read_tensors(given[part])
            where = "state dict" if isinstance(given[part], dict) else str(given[part])
            optional = TOKENIZER_STATISTICS if part == "tokenizer" else ()
            hub.load_published(module, system.published_tensors(part, tensors), names, where, optional)
    return system


# Models by name

def shipped_folder(name: str) -> Path:
    """Where a trained model that comes with the package lies. Raises WeightsError where it isn't there."""
    folder = Path(str(files("nextscale").joinpath("weights").joinpath(name)))
    if not (folder / "config.json").is_file():
        raise WeightsError(f"the trained model {name!r} is not in this installation (no {folder}); install again")
    return folder


def shipped(name: str) -> System:
    """A trained model that comes with the package."""
    return load(shipped_folder(name))


def model_config(name: str) -> Any:
    """The configuration of a model by name or folder, without its weights; None for a model of another package, which
    tells about itself. Raises InputError on names that are none."""
    if Path(name).is_dir():
        return read_config(Path(name))
    if name not in models():
        hint = did_you_mean(name, models(), "; `nextscale models` lists them")
        raise InputError(f"no model or folder {name!r}{hint}")
    if weights_of(name) == "shipped":
        return read_config(shipped_folder(name))
    return import_target(models()[name])(name) if weights_of(name) != "unknown" else None  # type: ignore[operator]


def open_model(name: str, filled: bool = False) -> Any:
    """The system of a name or folder on the CPU in float32: trained where weights come with it, a small size of this
    project initialised for training (with the same weights every time), a published size with random weights.

    filled: tokenizer and transformer will be loaded, so those of a published size, if it has no more, are not drawn."""
    config = model_config(name)
    if Path(name).is_dir():
        return load(Path(name))
    if config is None or weights_of(name) == "shipped":
        return import_target(models()[name])(name)  # type: ignore[operator]
    if weights_of(name) in ("published", "base"):
        with nullcontext() if system_type(config.slug).further or not filled else hub.WithoutInitialisation():
            return build_system(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return system_type(config.slug)(config).initialise().eval()
