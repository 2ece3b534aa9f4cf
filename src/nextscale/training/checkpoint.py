"""Crash-safe training checkpoints: a folder ``step-00001000`` of safetensors and JSON, there whole or not at all.

A checkpoint is written under a hidden temporary name in the same folder, flushed to the disk, and renamed as a whole.
Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextscale.errors import WeightsError

FORMAT = 1
FOLDER = "checkpoints"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")

Group = dict[str, Tensor]


@dataclass
class Checkpoint:
    """What a training needs to go on.

    Attributes:
        step: optimiser steps done.
        tensors: file name (without suffix) -> name -> tensor, on the CPU.
        state: anything JSON can hold, floats kept to the last bit.
    """

    step: int
    tensors: dict[str, Group] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """Tensors of one file; empty where it had none."""
        return self.tensors.get(name, {})

    def module(self, name: str, averaged: bool = False) -> Group:
        """State dict of one of the task's modules, of its average where asked for and kept."""
        prefix = f"{name}."
        kept = self.group("averaged") if averaged else {}
        if not any(key.startswith(prefix) for key in kept):
            kept = self.group("modules")
        return {key[len(prefix) :]: tensor for key, tensor in kept.items() if key.startswith(prefix)}


def checkpoints(out: str | Path) -> list[Path]:
    """Finished checkpoints of a training folder, oldest first."""
    folder = Path(out) / FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(out: str | Path) -> Path | None:
    """The newest finished checkpoint of a training folder, if any."""
    found = checkpoints(out)
    return found[-1] if found else None


def clear_leftovers(out: str | Path) -> None:
    """Removes what a killed run left half-written or half-deleted."""
    folder = Path(out) / FOLDER
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".step-"):
                shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(out: str | Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the latest ``keep``.

    Raises:
        WeightsError: it could not be written (no space left, no permission); nothing half-written stays, and earlier
            checkpoints are untouched.
    """
    folder = Path(out) / FOLDER
    target = folder / f"step-{checkpoint.step:08d}"
    working = folder / f".step-{checkpoint.step:08d}.writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        files: dict[str, int] = {}
        for name, tensors in checkpoint.tensors.items():
            path = working / f"{name}.safetensors"
            # Clones, because safetensors refuses tensors that share memory (tied weights).
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, path)
            _flush(path)
            files[name] = path.stat().st_size
        state = {"format": FORMAT, "step": checkpoint.step, "files": files, "state": checkpoint.state}
        (working / _STATE).write_text(json.dumps(state), encoding="utf-8")
        _flush(working / _STATE)
        _flush(working)
        if target.exists():
            _remove(target)
        working.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(working, ignore_errors=True)
        kept = latest(out)
        have = f"the last good one is {kept}" if kept else "there is none yet"
        reason = getattr(error, "strerror", None) or str(error)
        raise WeightsError(
            f"checkpoint {target} could not be written ({reason}); {have}. Free some space, then resume"
        ) from None
    for old in checkpoints(out)[:-keep]:
        _remove(old)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # Renamed first, so that a kill in mid-deletion leaves no checkpoint with half its files.
    doomed = path.with_name(f".{path.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads one checkpoint folder.

    Raises:
        WeightsError: not a checkpoint of this library, or a file of it is missing, truncated or damaged.
    """
    path = Path(path)
    advice = "remove this folder to go on from the one before it"
    try:
        saved = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is not a training checkpoint: it has no {_STATE}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path / _STATE} is damaged ({error}); {advice}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or not isinstance(saved.get("files"), dict):
        raise WeightsError(f"{path / _STATE} is not a checkpoint of this version (format {FORMAT}); {advice}")
    tensors = {}
    for name, size in saved["files"].items():
        file = path / f"{name}.safetensors"
        if Path(name).name != name or not file.is_file():
            raise WeightsError(f"{file} is missing; {advice}")
        if file.stat().st_size != size:
            raise WeightsError(f"{file} is truncated ({file.stat().st_size:,} of {size:,} bytes); {advice}")
        try:
            tensors[name] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged ({error}); {advice}") from None
    return Checkpoint(int(saved["step"]), tensors, saved["state"])


def save_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Group:
    """An optimiser's state as tensors called ``<parameter name>/<state key>``."""
    found: Group = {}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def load_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: Group, where: str) -> None:
    """Puts back what :func:`save_optimiser` took out; parameters without a saved state start afresh.

    Raises:
        WeightsError: the state is of other parameters or shapes.
    """
    places: dict[str, tuple[int, Tensor]] = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            places[names[parameter]] = (len(places), parameter)
    state: dict[int, Group] = {}
    for full, value in saved.items():
        name, key = full.rsplit("/", 1)
        if name not in places:
            raise WeightsError(f"{where}: optimiser state of {name!r}, which is not trained here; same configuration?")
        place, parameter = places[name]
        if value.ndim and value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)}, the model {tuple(parameter.shape)}"
            raise WeightsError(f"{where}: optimiser state of {name!r} has shape {shapes}; same configuration?")
        state.setdefault(place, {})[key] = value
    # Through the optimiser's own method, which knows where each variant (fused, foreach) wants its step counter.
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
