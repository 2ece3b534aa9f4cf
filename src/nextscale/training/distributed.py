"""How a task is spread over the processes of a job: not at all, by DDP, or by FSDP2.

Models and tasks know nothing of it. What is wrapped is no model but the *loss of a phase*, so a system may use its
parts in any order and through any method, as it does in one process.

- **DDP** (``torch.nn.parallel.DistributedDataParallel``): every process has all weights; gradients are averaged while
  the backward pass runs. Each phase has a wrapper of its own, through which its loss passes. Checkpoints are those of
  one process.
- **FSDP2** (``torch.distributed.fsdp.fully_shard``): every process keeps its part of each weight, gradient, optimiser
  state and average; the weights of a block are gathered for its passes. The elements of every module's ``blocks`` are
  one unit each, all other weights together another one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nextscale import parallel
from nextscale.errors import InputError
from nextscale.training.config import TrainConfig
from nextscale.training.ema import Average
from nextscale.training.task import Batch, Metrics, Task, TrainingStep

Loss = tuple["Tensor | None", Metrics]


class Together:
    """One process; the base of the others. ``sharded`` says whether weights are spread over the processes."""

    sharded = False

    def __init__(self, task: Task, averages: Mapping[str, Average]) -> None:
        self.task, self.averages = task, averages

    def begin(self, parameters: Mapping[str, list[nn.Parameter]]) -> None:
        """Called once with the trained parameters of every phase, when optimisers and a checkpoint are in place."""

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> Loss:
        """The task's loss of this process's pictures."""
        return self.task.loss(phase, batch, at)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch; only behind the last one gradients must be those of all processes."""
        return nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scales gradients to a norm of at most ``limit`` (0 for any) over all processes; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole_modules(self) -> dict[str, nn.Module]:
        """Every module of the task with whole weights, its average where it has one.

        To be called by all processes; where weights are sharded, only rank 0 gets modules that can be used.
        """
        return {**self.task.modules, **{name: average.module for name, average in self.averages.items()}}


class _Gradients(nn.Module):
    """The trained parameters of a phase, and a loss passing through: all that DDP needs to average their gradients."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameters)

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class DataParallel(Together):
    """DDP: all weights everywhere, gradients averaged."""

    def begin(self, parameters: Mapping[str, list[nn.Parameter]]) -> None:
        # A step may leave parameters out: a phi that no scale uses, the discriminator before its start.
        partly = not getattr(self.task, "uses_all_parameters", False)
        self._wrapped = {
            phase: DistributedDataParallel(_Gradients(trained), find_unused_parameters=partly)
            for phase, trained in parameters.items()
        }
        self._last = True

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> Loss:
        loss, metrics = super().loss(phase, batch, at)
        # DDP expects a backward pass behind each of its forward passes, so it sees no loss that has none to average.
        if loss is not None and self._last:
            loss = self._wrapped[phase](loss)
        return loss, metrics

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._last = last
        yield


class _TaskLoss(nn.Module):
    """``task.loss`` as the forward pass of a module of all its modules, so that FSDP gathers weights around it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        self.parts = nn.ModuleDict(task.modules)

    def forward(self, phase: str, batch: Batch, at: TrainingStep) -> Loss:
        return self._task.loss(phase, batch, at)


class Sharded(Together):
    """FSDP2: weights, gradients, optimiser states and averages spread over the processes."""

    sharded = True

    def __init__(self, task: Task, averages: Mapping[str, Average], mesh: DeviceMesh) -> None:
        super().__init__(task, averages)
        if len(task.phases) > 1 or not any(_blocks(module) for module in task.modules.values()):
            raise InputError(
                'parallel = "fsdp" shards the blocks of a generator; this training has several phases or no blocks: '
                'use parallel = "ddp"'
            )
        # Whole copies to sample with; only rank 0 does, and only it pays for them.
        self._whole: dict[str, nn.Module] = {}
        if parallel.is_main():
            self._whole = {name: copy.deepcopy(module).cpu() for name, module in super().whole_modules().items()}
        self._root = _TaskLoss(task)
        for module in task.modules.values():
            for block in _blocks(module):
                fully_shard(block, mesh=mesh)
        fully_shard(self._root, mesh=mesh)
        # Averages have no forward pass; they are sharded alike, so that each process averages what it keeps.
        for average in averages.values():
            fully_shard(average.module, mesh=mesh)

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> Loss:
        found: Loss = self._root(phase, batch, at)
        return found

    def whole_modules(self) -> dict[str, nn.Module]:
        found = dict(super().whole_modules())
        for name, module in found.items():
            state = {key: whole(value) for key, value in module.state_dict().items()}
            if parallel.is_main():
                device = next(iter(state.values())).device
                found[name] = copy.deepcopy(self._whole[name]).to(device)
                found[name].load_state_dict(state)
        return found


def _blocks(module: nn.Module) -> list[nn.Module]:
    lists = [getattr(part, "blocks", None) for part in module.modules()]
    return [block for found in lists if isinstance(found, nn.ModuleList) for block in found]


def spread(task: Task, averages: Mapping[str, Average], config: TrainConfig, device: torch.device) -> Together:
    """Spreads a task over the processes of the job as ``config.parallel`` says, before optimisers are made.

    Raises:
        InputError: the batch can't be divided evenly, or the task can't be sharded.
    """
    n = parallel.world()
    if config.batch_size % (config.accumulate * n):
        raise InputError(
            f"batch_size ({config.batch_size}) must be a multiple of the number of processes ({n}) times accumulate "
            f"({config.accumulate})"
        )
    if n == 1:
        return Together(task, averages)
    if config.parallel == "ddp":
        return DataParallel(task, averages)
    if config.optimiser != "adamw":
        raise InputError(f'parallel = "fsdp" goes with optimiser = "adamw", not with {config.optimiser!r}; use "ddp"')
    return Sharded(task, averages, init_device_mesh(device.type, (n,)))


def whole(value: Tensor) -> Tensor:
    """A tensor with all its elements; sharded ones are gathered, which all processes must do together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_rows(batch: Batch, batch_size: int) -> Batch:
    """The rows of a batch that are this process's, where a source gives every process the whole batch.

    Raises:
        InputError: the source's batches have another size.
    """
    found, wanted = len(batch["id"]), batch_size // parallel.world()
    if found == wanted:
        return batch
    if found != batch_size:
        raise InputError(f"the loader gave {found} pictures; {wanted} are process {parallel.rank()}'s share")
    mine = parallel.share(batch_size)
    return {name: rows[mine.start : mine.stop] for name, rows in batch.items()}


def settle(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Metrics as plain numbers, each the mean over the processes, which hold the same names; without those that are
    NaN: of what a step did not look at."""
    values = [float(value) for record in records for value in record.values()]
    if parallel.world() > 1:
        values = parallel.mean(torch.tensor(values, dtype=torch.float64)).tolist()
    numbers = iter(values)
    return [{name: value for name in record if not math.isnan(value := next(numbers))} for record in records]
