"""Weights in and out: local files or the Hugging Face hub, safetensors or published PyTorch files, never pickled code.

Published tensor names are turned into ours by a name map, a table of regular expressions that a system's file holds.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nextscale.errors import WeightsError

NameMap = Sequence[tuple[str, str | None]]
"""Pairs (regular expression of the whole published name, our name), the first match counts; None drops the tensor."""


class WithoutInitialisation(TorchFunctionMode):
    """While it lasts, layers are made without drawing their first weights (``torch.nn.init`` does nothing): for weights
    that are read from files, or only counted. They hold whatever was in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_INDEX = ".index.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # as they are called on the hub
_AVERAGED = ("model_ema", "gpt_ema_fsdp")


def find_weights(where: str | Path) -> Path:
    """A local file or folder, or one of a hub repository written ``owner/name/file`` or ``owner/name/folder@revision``.

    Of a folder of sharded weights its index, ``*.index.json``, once all shards that it names are there. Raises
    WeightsError where they aren't, or nothing is there.
    """
    try:
        path = Path(where).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, the home of nobody
        raise WeightsError(f"{str(where)[:80]!r} names no file ({error}); give a path or a hub name") from None
    if is_folder:
        indices = sorted(path.glob(f"*{_INDEX}"))
        if len(indices) != 1:
            raise WeightsError(f"{path} is a folder with {len(indices) or 'no'} {_INDEX[1:]} of sharded weights; name "
                               "the weights file or the index in it")
        path, is_file = indices[0], True
    if is_file:
        for shard in shards_of(path) if path.name.endswith(_INDEX) else ():
            if not shard.is_file():
                raise WeightsError(f"{path} names {shard.name}, which is not beside it; copy all shards there")
        return path
    file = rf"[\w./-]+?(?:{'|'.join(map(re.escape, (*_FILES, _INDEX)))})"
    match = re.fullmatch(rf"([\w.-]+/[\w.-]+)/({file}|(?:[\w.-]+/)*[\w-]+)(?:@([\w.-]+))?", str(where))
    if match is None or ".." in str(where):
        shown = " ".join(str(where).split())[:200]
        raise WeightsError(f"no weights file at {shown!r}; give a path, or owner/name/file.pth of a hub repository")
    try:
        return _of_hub(match[1], match[2], match[3])
    except WeightsError:
        raise
    except Exception as error:  # the hub has dozens of error types, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{where}: no such local file, and the hub did not give it ({reason})") from None


def _of_hub(repository: str, name: str, revision: str | None) -> Path:
    """A file of a hub repository, or the index of a folder with all of its shards."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if name.endswith(_FILES):
        return Path(hf_hub_download(repository, name, revision=revision))
    folder, names = (name.rpartition("/")[0], [name]) if name.endswith(_INDEX) else (
        name, [f"{name}/{index}" for index in _INDICES])
    try:
        index = Path(hf_hub_download(repository, names[0], revision=revision))
    except EntryNotFoundError:
        index = Path(hf_hub_download(repository, names[-1], revision=revision))
    for shard in shards_of(index):
        hf_hub_download(repository, f"{folder}/{shard.name}".lstrip("/"), revision=revision)
    return index


def shards_of(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, whether they are there or not, all beside it.

    Raises WeightsError where it is no index, or names files elsewhere or of another kind.
    """
    named = read_json(index).get("weight_map")
    if not (isinstance(named, dict) and named and all(isinstance(name, str) for name in named.values())):
        raise WeightsError(f"{index} has no weight_map from tensors to files; it is no index of sharded weights")
    for name in named.values():
        if re.fullmatch(r"[\w.-]+", name) is None or not name.endswith(_FILES):
            raise WeightsError(f"{index} names {name[:80]!r}; shards are files beside it that end in "
                               f"{', '.join(_FILES)}")
    return [index.parent / name for name in sorted(set(named.values()))]


def read_tensors(where: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file by name: .safetensors, or .pth/.pt/.bin/.ckpt with ``weights_only=True``; of a
    folder with an index (``*.index.json``) those of all its shards.

    Training checkpoints that nest state dicts give the averaged one (``model_ema``, ``gpt_ema_fsdp``), else the first.
    Shards are mapped: their values come into memory where they are used. Raises WeightsError on truncated or foreign
    files, and where a shard or a tensor that the index names is missing or there twice.
    """
    path = find_weights(where)
    if not path.name.endswith(_INDEX):
        return _read_file(path)
    found: dict[str, Tensor] = {}
    for shard in shards_of(path):
        tensors = _read_file(shard, mapped=True)
        if twice := sorted(found.keys() & tensors.keys()):
            raise WeightsError(f"{shard} holds {twice[0]}, which another shard of {path} holds too; the folder is "
                               "mixed from two models")
        found |= tensors
    if missing := [name for name in read_json(path)["weight_map"] if name not in found]:
        raise WeightsError(f"{path} names {_some(missing)}, which none of its shards holds; the folder is mixed from "
                           "two models")
    return found


def _read_file(path: Path, mapped: bool = False) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Files of PyTorch before 1.6 are no archives, and can't be mapped.
        mapped = mapped and zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{path} can't be read as weights ({type(error).__name__}: {reason}); "
                           "it is cut short, damaged, or holds more than tensors") from None
    tensors = _first_state_dict(found)
    if tensors is None:
        raise WeightsError(f"{path} holds no tensors by name; expected a state dict")
    return tensors


def _first_state_dict(value: Any) -> dict[str, Tensor] | None:
    if not isinstance(value, Mapping):
        return None
    tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
    if tensors:
        return tensors
    averaged = [value[name] for name in _AVERAGED if name in value]
    for inner in averaged or value.values():
        found = _first_state_dict(inner)
        if found:
            return found
    return None


def rename(tensors: Mapping[str, Tensor], names: NameMap) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the published names that no entry of the map knows."""
    renamed, unknown = {}, []
    for name, tensor in tensors.items():
        for pattern, ours in names:
            match = re.fullmatch(pattern, name)
            if match:
                if ours is not None:
                    renamed[match.expand(ours)] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


def load_published(module: nn.Module, tensors: Mapping[str, Tensor], names: NameMap, where: str = "checkpoint",
                   optional: Sequence[str] = ()) -> None:
    """Load published tensors into a module, strictly.

    optional: regular expressions of our names that may be absent or of another shape (counters). Raises WeightsError
    naming the tensors that are missing (by our names), unknown or of another shape (by the checkpoint's).
    """
    renamed, unknown = rename(tensors, names)
    own = module.state_dict()

    def may_lack(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in optional)

    published = {ours: name for name, tensor in tensors.items() for ours in rename({name: tensor}, names)[0]}
    foreign = [published[n] for n in renamed if n not in own]
    shapes = [f"{published[n]} {tuple(renamed[n].shape)} instead of {tuple(own[n].shape)}"
              for n in renamed if n in own and renamed[n].shape != own[n].shape and not may_lack(n)]
    covered = {n for n in renamed if n in own and renamed[n].shape == own[n].shape}
    missing = [n for n in own if n not in covered and n not in renamed and not may_lack(n)]
    problems = [f"{label}: {_some(found)}" for label, found in
                (("unknown", unknown + foreign), ("missing", missing), ("wrong shape", shapes)) if found]
    if problems:
        raise WeightsError(f"{where} doesn't fit the model; " + "; ".join(problems))
    module.load_state_dict({n: renamed[n] for n in covered}, strict=False)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write safetensors under a temporary name, then rename. Raises WeightsError when the disk refuses."""
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().contiguous().cpu() for n, t in tensors.items()}, temporary, dict(metadata or {}))
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except Exception as error:
        _remove(temporary)
        raise WeightsError(f"{path} can't be written ({error}); {_free_space(path.parent)}") from None
    return path


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _free_space(folder: Path) -> str:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"


def save_json(value: Mapping[str, Any], path: Path) -> Path:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise WeightsError(f"{path} can't be written ({error}); {_free_space(path.parent)}") from None
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises WeightsError where it isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read as a model's configuration ({error})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds {type(value).__name__}; a model's configuration is an object")
    return value
