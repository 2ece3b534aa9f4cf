"""Crash-safe training checkpoints: a folder ``step-00001000`` of safetensors and JSON, there whole or not at all.

A checkpoint is written under a hidden temporary name in the same folder, flushed to the disk, and renamed as a whole.
Nothing is ever pickled.

Where weights are spread over processes (FSDP), every process writes its own part, as one safetensors file in the
folder ``shards``, through ``torch.distributed.checkpoint``; rank 0 renames the folder when all have written. Either
kind is read by any number of processes, with weights spread or not.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from nextscale import parallel
from nextscale.data.pictures_out import flush
from nextscale.errors import WeightsError

FORMAT = 1
SHARDS = "shards"
FOLDER = "checkpoints"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")

Group = dict[str, Tensor]


@dataclass
class Checkpoint:
    """What a training needs to go on.

    Attributes:
        step: optimiser steps done.
        tensors: group (a file, without suffix, where tensors are whole) -> name -> tensor.
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
    """Writes a checkpoint and removes all but the latest ``keep``; where tensors are sharded, with all processes.

    Raises:
        WeightsError: it could not be written (no space left, no permission); nothing half-written stays, and earlier
            checkpoints are untouched.
        ElsewhereError: the same in the other processes.
    """
    folder = Path(out) / FOLDER
    target = folder / f"step-{checkpoint.step:08d}"
    working = folder / f".step-{checkpoint.step:08d}.writing"
    sharded = any(isinstance(tensor, DTensor) for group in checkpoint.tensors.values() for tensor in group.values())
    failed = ""
    if sharded:
        parallel.on_main(lambda: _make_folder(out, working, target))
        failed = _write_shards(working / SHARDS, checkpoint.tensors)
    parallel.on_main(lambda: _finish(out, working, target, checkpoint, sharded, failed, keep))
    return target


def _make_folder(out: str | Path, working: Path, target: Path) -> None:
    try:
        working.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
    except OSError as error:
        raise _unwritten(out, target, error) from None


def _unwritten(out: str | Path, target: Path, error: Exception | str) -> WeightsError:
    kept = latest(out)
    have = f"the last good one is {kept}" if kept else "there is none yet"
    reason = getattr(error, "strerror", None) or str(error)
    return WeightsError(f"checkpoint {target} could not be written ({reason}); {have}. Free some space, then resume")


def _write_shards(folder: Path, groups: Mapping[str, Group]) -> str:
    """Writes this process's parts of all tensors, together with the other processes; returns what went wrong."""
    flat = {f"{group}/{name}": tensor.detach() for group, tensors in groups.items() for name, tensor in tensors.items()}
    failed = ""
    try:
        dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        failed = "; ".join(f"process {number}: {trace[0]}" for number, trace in error.failures.items())
    except (OSError, SafetensorError) as error:
        failed = str(error)
    return failed


def _finish(
    out: str | Path, working: Path, target: Path, checkpoint: Checkpoint, sharded: bool, failed: str, keep: int
) -> None:
    """What one process does: tensors that are not sharded, the state, the renaming."""
    folder = working.parent
    try:
        if failed:
            raise OSError(failed)
        files: dict[str, int] = {}
        if sharded:
            for path in sorted((working / SHARDS).iterdir()):
                files[f"{SHARDS}/{path.name}"] = path.stat().st_size
            flush(working / SHARDS)
        else:
            _make_folder(out, working, target)
        for name, tensors in {} if sharded else checkpoint.tensors.items():
            path = working / f"{name}.safetensors"
            # Clones, because safetensors refuses tensors that share memory (tied weights).
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, path)
            flush(path)
            files[name] = path.stat().st_size
        state = {"format": FORMAT, "step": checkpoint.step, "sharded": sharded, "files": files}
        state["state"] = checkpoint.state
        (working / _STATE).write_text(json.dumps(state), encoding="utf-8")
        flush(working / _STATE)
        flush(working)
        if target.exists():
            _remove(target)
        working.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(working, ignore_errors=True)
        raise _unwritten(out, target, error) from None
    for old in checkpoints(out)[:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    # Renamed first, so that a kill in mid-deletion leaves no checkpoint with half its files.
    doomed = path.with_name(f".{path.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_checkpoint(path: str | Path, patterns: Mapping[str, Tensor] | None = None) -> Checkpoint:
    """Reads one checkpoint folder, whichever number of processes wrote it.

    Args:
        path: the folder.
        patterns: parameters by name; what was saved under such a name (the weight, its average, its optimiser state)
            is sharded as the parameter is, of which each process then reads only its part. Tensors are whole without.

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
    sharded = bool(saved.get("sharded"))
    tensors: dict[str, Group] = {}
    for name, size in saved["files"].items():
        file = path / (name if sharded else f"{name}.safetensors")
        if Path(name).name != name.removeprefix(f"{SHARDS}/") or not file.is_file():
            raise WeightsError(f"{file} is missing; {advice}")
        if file.stat().st_size != size:
            raise WeightsError(f"{file} is truncated ({file.stat().st_size:,} of {size:,} bytes); {advice}")
        if sharded:
            continue
        try:
            tensors[name] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged ({error}); {advice}") from None
        if patterns:
            loaded = tensors[name].items()
            tensors[name] = {key: _sharded_like(patterns.get(_owner(key)), value) for key, value in loaded}
    if sharded:
        try:
            tensors = _read_shards(path / SHARDS, patterns or {})
        except (SafetensorError, OSError, CheckpointException, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise WeightsError(f"{path / SHARDS} is damaged ({reason}); {advice}") from None
    return Checkpoint(int(saved["step"]), tensors, saved["state"])


def _read_shards(folder: Path, patterns: Mapping[str, Tensor]) -> dict[str, Group]:
    """All tensors of a sharded checkpoint; each process reads what it keeps of them."""
    reader = HuggingFaceStorageReader(str(folder))
    flat: dict[str, Tensor] = {}
    for full, about in reader.read_metadata().state_dict_metadata.items():
        pattern = patterns.get(_owner(full.partition("/")[2]))
        empty = torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        flat[full] = _sharded_like(pattern, empty)
    with warnings.catch_warnings():
        # Reading alone what a job wrote is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(flat, storage_reader=reader, no_dist=not patterns)
    tensors: dict[str, Group] = {}
    for full, tensor in flat.items():
        group, _, name = full.partition("/")
        tensors.setdefault(group, {})[name] = tensor
    return tensors


def _owner(name: str) -> str:
    """The parameter that a saved tensor belongs to: optimiser states are called ``<parameter>/<state key>``."""
    return name.partition("/")[0]


def _sharded_like(pattern: Tensor | None, value: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as the pattern is where their shapes agree."""
    if not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    # Every process cuts its part out of its own copy instead of waiting for rank 0's.
    value = value.to(pattern.device)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements, src_data_rank=None)


def save_optimiser(optimiser: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Group:
    """An optimiser's state as tensors called ``<parameter name>/<state key>``."""
    found: Group = {}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            found[f"{names[parameter]}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return found


def _state_shape(key: str, parameter: Tensor) -> torch.Size:
    """Shape of an optimiser's state: the parameter's, but for the factors of Adafactor's second moments."""
    shape = list(parameter.shape)
    if key in ("row_var", "col_var"):
        shape[-1 if key == "row_var" else -2] = 1
    return torch.Size(shape)


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
        if value.ndim and value.shape != _state_shape(key, parameter):
            shapes = f"{tuple(value.shape)}, the model {tuple(parameter.shape)}"
            raise WeightsError(f"{where}: optimiser state of {name!r} has shape {shapes}; same configuration?")
        if value.shape == parameter.shape and not parameter.is_contiguous():
            # The fused kernels walk through memory: state of a channels-last weight must lie as the weight does.
            value = torch.empty_strided(value.shape, parameter.stride(), dtype=value.dtype).copy_(value)
        state.setdefault(place, {})[key] = value
    # Through the optimiser's own method, which knows where each variant (fused, foreach) wants its step counter.
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
