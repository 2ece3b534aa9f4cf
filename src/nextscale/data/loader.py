"""Batches for training, from any step on, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from torch import Tensor

from nextscale.data.datasets import PictureDataset
from nextscale.data.orders import Order, mix
from nextscale.errors import InputError

_FLIP = 0xF11B


class Loader:
    """Batches of a data set in a given order; batch ``step`` is a pure function of (data set, order, seed, step).

    Args:
        dataset: the pictures.
        order: which of them a step sees.
        batch_size: pictures B a step, at least 1.
        start_step: where :meth:`__iter__` begins.
        flip: mirror left to right every other time, decided by (seed, epoch, id).
        seed: for flips only; the order has its own.
        workers: threads that prepare batches (decoding leaves Python's lock, so threads do).
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
    ) -> None:
        if batch_size < 1 or workers < 1:
            raise InputError(f"batch_size ({batch_size}) and workers ({workers}) must be at least 1")
        self.dataset, self.order, self.batch_size, self.start_step = dataset, order, batch_size, start_step
        self.flip, self.seed, self.workers = flip, seed, workers

    def batch_at(self, step: int) -> dict[str, Tensor]:
        """Batch number ``step``, from 0.

        Returns:
            ``picture`` float (B, 3, H, W) in [-1, 1]; ``labels`` long (B, n); ``id`` and ``epoch`` long (B,); and
            ``alpha`` float (B, 1, H, W) in [0, 1] where the set has masks.
        """
        positions, epochs = self.order.batch(step, self.batch_size)
        # NumPy and not torch: its single thread leaves the cores to the training step.
        pixels, places = self.dataset.read(positions.numpy())
        ids = self.dataset.rows[places]
        if self.flip:
            mirrored = (mix(self.seed, _FLIP, epochs.numpy(), ids) & np.uint64(1)).astype(bool)
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        batch = {
            "picture": torch.from_numpy(pixels[:, :3].astype(np.float32) / np.float32(127.5) - np.float32(1.0)),
            "labels": self.dataset.labels[torch.from_numpy(places)],
            "id": torch.from_numpy(ids.astype(np.int64)),
            "epoch": epochs,
        }
        if self.dataset.has_alpha:
            batch["alpha"] = torch.from_numpy(pixels[:, 3:].astype(np.float32) / np.float32(255.0))
        return batch

    def batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        """Batches ``start_step``, ``start_step + 1``, ... without end, a few prepared ahead."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="nextscale-loader") as pool:
            ahead: deque[Future[dict[str, Tensor]]] = deque()
            try:
                for step in count(start_step):
                    ahead.append(pool.submit(self.batch_at, step))
                    if len(ahead) > self.workers + 1:
                        yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.batches(self.start_step)
