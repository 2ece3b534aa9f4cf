"""Which pictures a training step sees: pure functions of (seed, step), so that resuming needs no state."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nextscale.errors import DataError

_KEPT_ENTRIES = 4_000_000


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Hashes integers (or broadcastable arrays of them) to uint64, by SplitMix64's finaliser word after word.

    Order and machine independent of anything but the words: the same words give the same number everywhere.
    """
    state: np.ndarray = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            value = np.asarray(word & 0xFFFFFFFFFFFFFFFF if isinstance(word, int) else word).astype(np.uint64)
            state = (state ^ value) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class _Permutations:
    """Permutations of ``range(count)`` named by integers, the latest ones kept up to a bound on their entries."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._entries = 0
        self._lock = threading.Lock()

    def __call__(
        self, kind: int, cycle: int, count: int, make: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> np.ndarray:
        """``make`` turns the hashes of the positions into what is kept; by default the order that sorts them."""
        key = (kind, cycle, count)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                # Sorting hashes instead of asking a library's shuffle: the order then never changes with a version.
                hashes = mix(self.seed, kind, cycle, np.arange(count))
                found = np.argsort(hashes, kind="stable") if make is None else make(hashes)
                self._kept[key] = found
                self._entries += found.size
                # Two always stay: a batch may lie across the end of an epoch.
                while self._entries > _KEPT_ENTRIES and len(self._kept) > 2:
                    self._entries -= self._kept.popitem(last=False)[1].size
            return found


class Order(Protocol):
    """A deterministic stream of positions in a data set."""

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Positions (B,) and, of each, how often its picture was drawn before, its epoch (B,); both long."""
        ...


class ShuffledOrder:
    """Every position once an epoch, each epoch in its own random order; batches run on across epochs.

    Args:
        count: number of pictures, at least 1.
        seed: any integer.
        blocks: (count,) the block that each picture is stored in, where reading one means reading its block. Each
            epoch then shuffles the blocks and takes them a few at a time, shuffled together.
        at_once: blocks that are held in memory; half of them are shuffled together, the other half is for batches
            that lie across two such groups.
    """

    def __init__(self, count: int, seed: int = 0, blocks: np.ndarray | None = None, at_once: int = 1) -> None:
        if count < 1:
            raise DataError("an order needs at least one picture; the data set is empty")
        self.count = count
        self._permutation = _Permutations(seed)
        self._blocks = None if blocks is None else np.unique(blocks, return_inverse=True)[1]
        self._together = max(1, at_once // 2)

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Order.batch`."""
        draws = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(draws, self.count)
        positions = np.empty_like(draws)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = self._epoch(int(epoch))[places[here]]
        return torch.from_numpy(positions), torch.from_numpy(epochs)

    def _epoch(self, epoch: int) -> np.ndarray:
        blocks = self._blocks
        if blocks is None:
            return self._permutation(0, epoch, self.count)
        number = int(blocks.max()) + 1
        turn_of_block = np.argsort(self._permutation(1, epoch, number), kind="stable")
        group = turn_of_block[blocks] // self._together
        return self._permutation(0, epoch, self.count, lambda hashes: np.lexsort((hashes, group)))


class BucketOrder:
    """Batches of one bucket each; over time every picture is drawn equally often, whatever its bucket's size.

    A cycle of N steps goes through all pictures in a random order; each step takes the bucket of its picture, and the
    next batch of that bucket. So no step is short, no picture is left over, and step ``s`` needs no earlier one. A
    bucket smaller than a batch repeats its pictures within it.

    Args:
        buckets: (N,) bucket of each position.
        seed: any integer.
    """

    def __init__(self, buckets: Sequence[int] | np.ndarray, seed: int = 0) -> None:
        array = np.asarray(buckets, dtype=np.int64)
        if array.ndim != 1 or not len(array):
            raise DataError("drawing by buckets needs one bucket a picture, and at least one picture")
        self._buckets = array
        self._members = {int(bucket): np.flatnonzero(array == bucket) for bucket in np.unique(array)}
        self._orders = {
            bucket: ShuffledOrder(len(members), int(mix(seed, 0xB0C7, bucket)))
            for bucket, members in self._members.items()
        }
        self._permutation = _Permutations(seed)

    def bucket(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps before it had the same."""
        cycle, place = divmod(step, len(self._buckets))
        bucket, earlier = self._permutation(0, cycle, len(self._buckets), self._cycle)[:, place].tolist()
        return bucket, cycle * len(self._members[bucket]) + earlier

    def _cycle(self, hashes: np.ndarray) -> np.ndarray:
        """(2, N): of each step of a cycle its bucket, and how many before it had the same."""
        drawn = self._buckets[np.argsort(hashes, kind="stable")]
        earlier = np.empty_like(drawn)
        for bucket in self._members:
            here = drawn == bucket
            earlier[here] = np.arange(here.sum())
        return np.stack([drawn, earlier])

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Order.batch`."""
        bucket, turn = self.bucket(step)
        places, epochs = self._orders[bucket].batch(turn, batch_size)
        return torch.from_numpy(self._members[bucket])[places], epochs


class ClassBalancedOrder:
    """Every class once a round (in a random order a round), whatever its size; classes without pictures are left out.

    Inside a class its pictures are drawn without replacement, in a new random order each time all were seen; a
    picture's epoch is how often its class was gone through before.

    Args:
        labels: (N,) class of each position.
        seed: any integer.
    """

    def __init__(self, labels: Tensor | Sequence[int], seed: int = 0) -> None:
        array = np.asarray(labels, dtype=np.int64)
        if array.ndim != 1 or not len(array):
            raise DataError("class-balanced drawing needs one label a picture, and at least one picture")
        self.classes = np.unique(array)
        self._members = [np.flatnonzero(array == label) for label in self.classes]
        self._permutation = _Permutations(seed)

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Order.batch`."""
        draws = range(step * batch_size, (step + 1) * batch_size)
        positions = np.empty(batch_size, dtype=np.int64)
        epochs = np.empty(batch_size, dtype=np.int64)
        for i, draw in enumerate(draws):
            turn, place = divmod(draw, len(self.classes))
            which = int(self._permutation(0, turn, len(self.classes))[place])
            members = self._members[which]
            # A class comes once a round, so the round counts its draws.
            cycle, inside = divmod(turn, len(members))
            positions[i] = members[self._permutation(1 + which, cycle, len(members))[inside]]
            epochs[i] = cycle
        return torch.from_numpy(positions), torch.from_numpy(epochs)
