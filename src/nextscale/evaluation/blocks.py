"""Long work in blocks: shared between processes, kept on disk, gone on with after a kill.

A block is a range of pictures; its result is one safetensors file, written whole or not at all. What a block holds must
be a function of the request and of the pictures' numbers alone, so that it doesn't matter who computes it, or when.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale import hub
from nextscale.errors import DataError, InputError, WeightsError

BLOCK = 64


@dataclass(frozen=True)
class Shard:
    """Which of ``count`` processes this is: ``index`` from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index}/{self.count} is not one; write i/n with i from 0 to n - 1")

    @classmethod
    def read(cls, text: str) -> Shard:
        """``i/n``. Raises InputError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise InputError(f"shard {text!r} is not of the form i/n, as in 0/4")
        return cls(int(index), int(count))

    @classmethod
    def of_environment(cls) -> Shard:
        """The rank that ``torchrun`` (or SLURM through it) gave this process; 0 of 1 without."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def owns(self, block: int) -> bool:
        return block % self.count == self.index


@dataclass(frozen=True)
class Blocks:
    """Results about pictures 0 to ``total`` in a folder of their own, named by what they answer to.

    place: the evaluation's folder; kind: what is computed; request: everything the result depends on, in words that
    JSON can say. Another request has another folder, so nothing stale is ever read.
    """

    place: Path
    kind: str
    request: Mapping[str, Any]
    total: int

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.request, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.place / "blocks" / f"{self.kind}-{digest}"

    @property
    def ranges(self) -> list[range]:
        return [range(start, min(start + BLOCK, self.total)) for start in range(0, self.total, BLOCK)]

    def path(self, block: range) -> Path:
        return self.folder / f"{block.start:08d}-{block.stop:08d}.safetensors"

    def missing(self) -> list[range]:
        return [block for block in self.ranges if not self.path(block).is_file()]

    def compute(self, shard: Shard, make: Callable[[range], Mapping[str, Tensor]],
                each: Callable[[int], None] | None = None) -> None:
        """Compute the shard's blocks that are not there yet; ``each`` is called with how many pictures are done.

        Raises WeightsError when the disk is full.
        """
        if not (self.folder / "request.json").is_file():
            hub.save_json(dict(self.request), self.folder / "request.json")
        done = 0
        for number, block in enumerate(self.ranges):
            if not shard.owns(number):
                continue
            if not self._whole(block):
                hub.save_tensors(make(block), self.path(block))
            done += len(block)
            if each is not None:
                each(done)

    def _whole(self, block: range) -> bool:
        path = self.path(block)
        if not path.is_file():
            return False
        try:
            self._read(block)
        except WeightsError:  # damaged by something else than us: made again
            path.unlink()
            return False
        return True

    def _read(self, block: range) -> dict[str, Tensor]:
        found = hub.read_tensors(self.path(block))
        if any(len(tensor) != len(block) for tensor in found.values()):
            raise WeightsError(f"{self.path(block)} holds another number of pictures than {len(block)}")
        return found

    def gather(self) -> dict[str, Tensor]:
        """All results in the order of the pictures. Raises DataError while blocks are missing."""
        missing = self.missing()
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {len(self.ranges)} blocks are missing; run the other "
                            "shards, or once without --shard, which computes what is left")
        parts = [self._read(block) for block in self.ranges]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def shard_size(self, shard: Shard) -> int:
        """How many pictures a shard works on."""
        return sum(len(block) for number, block in enumerate(self.ranges) if shard.owns(number))
