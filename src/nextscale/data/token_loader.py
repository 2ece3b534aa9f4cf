"""Batches of cached tokens for training, from any step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch

from nextscale.data.captions import choose
from nextscale.data.controls import planes_of
from nextscale.data.orders import Order, mix
from nextscale.data.token_dataset import TokenDataset
from nextscale.errors import InputError

# The loader's own word: with the same seed a picture is mirrored in the same epochs, from pixels or from the cache.
_FLIP = 0xF11B
_CROP = 0xC809


class TokenLoader:
    """Batches of a cache in a given order; batch ``step`` is a pure function of (cache, order, seed, step).

    Which crop of a picture is taken, whether its mirrored version, and which of its captions, is decided by (seed,
    epoch, id).

    Args:
        dataset: the tokens.
        order: which pictures a step sees.
        batch_size: pictures B a step over all ranks, at least 1.
        seed: for the choice of versions and captions only; the order has its own.
        rank, ranks: this process takes slice ``rank`` of ``ranks`` of each batch.
        control: kinds of the control maps that batches have, none by default.
        captions, latents: whether batches have these.

    Raises:
        InputError: sizes below 1, ranks that don't divide the batch, maps, captions or latents that the cache doesn't
            have.
    """

    def __init__(self, dataset: TokenDataset, order: Order, batch_size: int, seed: int = 0, rank: int = 0,
                 ranks: int = 1, control: Sequence[str] = (), captions: bool = False, latents: bool = False) -> None:
        if batch_size < 1 or not 0 <= rank < ranks or batch_size % ranks:
            raise InputError(f"batch_size ({batch_size}) must be a multiple of ranks ({ranks}), rank ({rank}) below it")
        self.dataset, self.order, self.batch_size, self.seed = dataset, order, batch_size, seed
        self.rank, self.ranks = rank, ranks
        planes_of(control, dataset.job.control)
        self.control = tuple(control)
        dataset.need(captions, latents)
        self.captions, self.latents = captions, latents

    def shard(self, rank: int, ranks: int) -> TokenLoader:
        """The same batches, of each of which this process takes its slice."""
        return TokenLoader(self.dataset, self.order, self.batch_size, self.seed, rank, ranks, self.control,
                           self.captions, self.latents)

    def batch_at(self, step: int) -> dict[str, Any]:
        """This rank's slice of batch number ``step``, from 0: ``tokens`` as ``TokenDataset.read`` gives them;
        ``labels`` long (B, n); ``id`` and ``epoch`` long (B,). Of a cache of several shapes ``schedule``, B times the
        grids of the step's bucket. Where asked for: ``control`` uint8 (B, P, H, W); ``caption``, a list of B texts;
        ``latent`` float16 (B, h w, C)."""
        positions, epochs = self.order.batch(step, self.batch_size)
        share = self.batch_size // self.ranks
        here = slice(self.rank * share, (self.rank + 1) * share)
        positions, epochs = positions[here], epochs[here]
        places = positions.numpy()
        ids = self.dataset.rows[places]
        versions = self.versions(epochs.numpy(), ids)
        batch: dict[str, Any] = {
            "tokens": self.dataset.read(places, versions),
            "labels": self.dataset.labels[positions],
            "id": torch.from_numpy(ids.astype(np.int64)),
            "epoch": epochs,
        }
        if self.dataset.bucket_of is not None:
            batch["schedule"] = [self.dataset.job_of(places).grids] * share
        if self.control:
            batch["control"] = self.dataset.read_control(places, self.control, versions)
        if self.latents:
            batch["latent"] = self.dataset.read_latents(places, versions)
        return {**batch, "caption": self._captions(places, epochs.numpy(), ids)} if self.captions else batch

    def _captions(self, places: np.ndarray, epochs: np.ndarray, ids: np.ndarray) -> list[str]:
        assert self.dataset.caption_counts is not None
        chosen = choose(self.dataset.caption_counts[places], self.seed, epochs, ids)
        return [self.dataset.caption(place, one) for place, one in zip(places.tolist(), chosen.tolist(), strict=True)]

    def versions(self, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Which version of each picture its epoch takes."""
        job = self.dataset.job
        found = (mix(self.seed, _CROP, epochs, ids) % np.uint64(job.crops)).astype(np.int64)
        if job.flips:
            found = found * 2 + (mix(self.seed, _FLIP, epochs, ids) & np.uint64(1)).astype(np.int64)
        return found

    def batches(self, start_step: int) -> Iterator[dict[str, Any]]:
        """Batches ``start_step``, ``start_step + 1``, ... without end."""
        return (self.batch_at(step) for step in count(start_step))
