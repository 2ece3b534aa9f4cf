"""The processes of one job, as ``torchrun`` starts them: who am I, what is my share, what do the others have.

Everything here works in a single process too, where rank is 0, world is 1 and nothing is exchanged. Two rules keep the
numbers of a job independent of how many processes it has:

- *Work is shared by position*: process ``r`` of ``n`` takes ``share(count)``, the positions
  ``count * r // n .. count * (r + 1) // n`` of a batch, a list of pictures or seeds that all processes know alike.
- *A draw a picture is made for the whole batch*: :func:`rand_pictures` draws for all pictures of the batch, wherever
  they are, and gives the rows of those that are here. Draws a step (one number for everybody) come from torch's
  generator as always, which every process seeds alike.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nextscale.errors import NextscaleError

T = TypeVar("T")

# Others wait while rank 0 draws samples or writes a checkpoint; a process that died is told by torchrun, not by this.
PATIENCE = timedelta(hours=1)


class ElsewhereError(NextscaleError):
    """Rank 0 could not do what the others waited for; rank 0 says why."""


class RankLostError(NextscaleError):
    """A process of the job is gone."""


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _started() -> bool:
    """Whether ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leave(status: int) -> NoReturn:
    """Ends the program with an exit code, as ``sys.exit`` does, and in a job at once, without taking Python down.

    Threads of gloo live on after their group, whom caches of torch still know, and one that frees its last tensor while
    Python is being taken down aborts the process, all of whose work is done ("terminate called without an active
    exception", pytorch/pytorch#179291). What is to be written at the end has to be written before.
    """
    if not _started():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def processes() -> Iterator[None]:
    """Joins the job that ``torchrun`` started, for the time of the block; does nothing where none was started.

    gloo carries what lies on the CPU, NCCL what lies on GPUs. Only rank 0's standard output is seen.
    """
    if not _started() or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, nullcontext() if is_main() else redirect_stdout(nowhere):
        yield
    # Not when something failed: taking the group down waits for processes that may be gone.
    dist.destroy_process_group()


def share(count: int, of: int | None = None, among: int | None = None) -> range:
    """The positions of ``range(count)`` that are this process's; sizes differ by one at most.

    Args:
        count: how many there are in all.
        of, among: another rank and world than this process's.
    """
    r, n = rank() if of is None else of, world() if among is None else among
    return range(count * r // n, count * (r + 1) // n)


def barrier() -> None:
    """Waits for all processes."""
    total(torch.zeros(1))


def total(value: Tensor) -> Tensor:
    """Sum over all processes, written into ``value`` and returned."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """Mean over all processes, written into ``value`` and returned."""
    return total(value).div_(world()) if world() > 1 else value


def gather(value: Tensor) -> Tensor:
    """The values of all processes one after another along the first axis; all have the same shape."""
    if world() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def on_main(act: Callable[[], T]) -> T | None:
    """Calls ``act`` in rank 0 alone, while the others wait; they get None.

    Raises:
        ElsewhereError: in the others, where ``act`` failed; in rank 0 what ``act`` raised.
    """
    if world() == 1:
        return act()
    if not is_main():
        if total(torch.zeros(1)):
            raise ElsewhereError("stopped with rank 0, whose message says why")
        return None
    try:
        result = act()
    except Exception:
        total(torch.ones(1))
        raise
    total(torch.zeros(1))
    return result


def lost(error: Exception) -> bool:
    """Whether an exception says that another process cannot be reached any more."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "NCCL", "onnection"))


class _Pictures(NamedTuple):
    first: int
    here: int
    whole: int


# One for the process and not one a thread: gradients, and with them recomputed activations, run in threads of torch.
_pictures: _Pictures | None = None


@contextmanager
def pictures_of_batch(first: int, count: int, whole: int) -> Iterator[None]:
    """Inside, this process works on ``count`` pictures from number ``first`` on of a batch of ``whole``."""
    global _pictures
    before, _pictures = _pictures, _Pictures(first, count, whole)
    try:
        yield
    finally:
        _pictures = before


def rand_pictures(count: int, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """Uniform numbers in [0, 1) for the pictures at hand, (count, *shape), alike on any number of processes.

    Drawn from torch's generator for the whole batch and cut to the rows of these pictures. Outside of a training step
    it is ``torch.rand``.

    Args:
        count: pictures at hand; inside of a training step those of its (micro-)batch.
    """
    return _drawn(torch.rand, count, shape, device)


def randn_pictures(count: int, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """Standard normal numbers for the pictures at hand, by the rule of ``rand_pictures``."""
    return _drawn(torch.randn, count, shape, device)


def _drawn(draw: Callable[..., Tensor], count: int, shape: tuple[int, ...],
           device: torch.device | str | None) -> Tensor:
    if _pictures is None:
        return draw(count, *shape, device=device)
    if count != _pictures.here:
        raise ValueError(f"{count} pictures draw in a (micro-)batch of {_pictures.here}; draw once a picture")
    return draw(_pictures.whole, *shape, device=device)[_pictures.first : _pictures.first + count]
