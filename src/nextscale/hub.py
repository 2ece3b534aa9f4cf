"""Weights in and out: local files or the Hugging Face hub, safetensors or published PyTorch files, never pickled code.

Published tensor names are turned into ours by a name map, a table of regular expressions that a system's file holds.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
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


def find_weights(where: str | Path) -> Path:
    """A local file, or one of a hub repository written ``owner/name/file`` or ``owner/name/folder/file@revision``.

    Raises WeightsError where neither is there.
    """
    try:
        path = Path(where).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, the home of nobody
        raise WeightsError(f"{str(where)[:80]!r} names no file ({error}); give a path or a hub name") from None
    if is_file:
        return path
    if is_folder:
        raise WeightsError(f"{path} is a folder; name the weights file in it")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/([\w./-]+?\.(?:safetensors|pth|pt|bin|ckpt))(?:@([\w.-]+))?", str(where))
    if match is None or ".." in str(where):
        shown = " ".join(str(where).split())[:200]
        raise WeightsError(f"no weights file at {shown!r}; give a path, or owner/name/file.pth of a hub repository")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match[1], match[2], revision=match[3]))
    except Exception as error:  # the hub has dozens of error types, all of which mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{where}: no such local file, and the hub did not give it ({reason})") from None


def read_tensors(where: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file by name: .safetensors, or .pth/.pt/.bin/.ckpt with ``weights_only=True``.

    Training checkpoints that nest state dicts give the averaged one (``model_ema``), else the first. Raises
    WeightsError on truncated or foreign files.
    """
    path = find_weights(where)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
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
    for inner in ([value["model_ema"]] if "model_ema" in value else value.values()):
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
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read as a model's configuration ({error})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds {type(value).__name__}; a model's configuration is an object")
    return value
