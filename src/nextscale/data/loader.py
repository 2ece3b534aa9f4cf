"""Batches for training, from any step on, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
import torch

from nextscale.data.captions import choose
from nextscale.data.datasets import PictureDataset
from nextscale.data.orders import Order, mix
from nextscale.errors import InputError

_FLIP = 0xF11B


class Loader:
    """Batches of a data set in a given order; batch ``step`` is a pure function of (data set, order, seed, step).

    So any step can be asked for at once (an exact resume in mid-epoch keeps no state), and the union of what all
    ranks read is the same batch whatever their number: each takes its slice of it.

    Args:
        dataset: the pictures.
        order: which of them a step sees.
        batch_size: pictures B a step over all ranks, at least 1.
        start_step: where :meth:`__iter__` begins.
        flip: mirror left to right every other time, decided by (seed, epoch, id); not where the data set says that
            left and right matter.
        seed: of flips and random crops; the order has its own.
        workers: threads that prepare batches (decoding leaves Python's lock, so threads do).
        rank, ranks: this process takes slice ``rank`` of ``ranks`` of each batch.
        captions: batches have ``caption``, one of each picture's by (seed, epoch, id).

    Raises:
        InputError: sizes below 1, ranks that don't divide the batch, captions of a set that has none, nor class names.
    """

    def __init__(
        self,
        dataset: PictureDataset,
        order: Order,
        batch_size: int,
        start_step: int = 0,
        flip: bool = False,
        seed: int = 0,
        workers: int = 1,
        rank: int = 0,
        ranks: int = 1,
        captions: bool = False,
    ) -> None:
        if batch_size < 1 or workers < 1:
            raise InputError(f"batch_size ({batch_size}) and workers ({workers}) must be at least 1")
        if not 0 <= rank < ranks or batch_size % ranks:
            raise InputError(f"batch_size ({batch_size}) must be a multiple of ranks ({ranks}), rank ({rank}) below it")
        if captions and not (dataset.has_captions or dataset.caption(0)):
            raise InputError(f"{dataset.source.name} has no captions, nor class names; add them or leave captions out")
        self.dataset, self.order, self.batch_size, self.start_step = dataset, order, batch_size, start_step
        self.flip, self.seed, self.workers = flip and not dataset.left_right_matters, seed, workers
        self.rank, self.ranks, self.captions = rank, ranks, captions

    def shard(self, rank: int, ranks: int) -> Loader:
        """The same batches, of each of which this process takes its slice."""
        return Loader(
            self.dataset, self.order, self.batch_size, self.start_step, self.flip, self.seed, self.workers, rank,
            ranks, self.captions,
        )  # fmt: skip

    def batch_at(self, step: int) -> dict[str, Any]:
        """This rank's slice of batch number ``step``, from 0.

        Returns:
            ``picture`` float (B, 3, H, W) in [-1, 1]; ``labels`` long (B, n); ``id`` and ``epoch`` long (B,);
            ``alpha`` float (B, 1, H, W) in [0, 1] where the set has masks; ``caption``, a list of B texts (empty
            where there is none), where asked for. B is the batch over ``ranks``, H and W the step's bucket's.
        """
        positions, epochs = self.order.batch(step, self.batch_size)
        share = self.batch_size // self.ranks
        here = slice(self.rank * share, (self.rank + 1) * share)
        positions, epochs = positions[here], epochs[here]
        # NumPy and not torch: its single thread leaves the cores to the training step.
        pixels, places = self.dataset.read(positions.numpy(), epochs.numpy(), self.seed)
        ids = self.dataset.rows[places]
        if self.flip:
            mirrored = (mix(self.seed, _FLIP, epochs.numpy(), ids) & np.uint64(1)).astype(bool)
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        picture = pixels[:, :3].astype(np.float32)
        picture /= np.float32(127.5)
        picture -= np.float32(1.0)
        batch: dict[str, Any] = {
            "picture": torch.from_numpy(picture),
            "labels": self.dataset.labels[torch.from_numpy(places)],
            "id": torch.from_numpy(ids.astype(np.int64)),
            "epoch": epochs,
        }
        if self.dataset.has_alpha:
            batch["alpha"] = torch.from_numpy(pixels[:, 3:].astype(np.float32) / np.float32(255.0))
        if self.captions:
            found = [self.dataset.captions(place) or ("",) for place in places.tolist()]
            chosen = choose(np.array([len(texts) for texts in found]), self.seed, epochs.numpy(), ids)
            batch["caption"] = [texts[one] for texts, one in zip(found, chosen.tolist(), strict=True)]
        return batch

    def batches(self, start_step: int) -> Iterator[dict[str, Any]]:
        """Batches ``start_step``, ``start_step + 1``, ... without end, a few prepared ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="nextscale-loader") as pool:
            ahead: deque[Future[dict[str, Any]]] = deque()
            try:
                for step in count(start_step):
                    ahead.append(pool.submit(self.batch_at, step))
                    if len(ahead) > self.workers + 1:
                        yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches(self.start_step)
