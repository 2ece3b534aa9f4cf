"""Text encoders whose features are kept on the disk."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from nextscale.conditions.text_features import TextEncoder, TextFeatures
from nextscale.conditions.text_prompts import check_prompts
from nextscale.data.text_cache import TextCache, TextSource
from nextscale.errors import InputError

SHARD_BYTES = 1 << 26
"""Features of new prompts that ``fill`` gathers before it writes them."""


class FrozenTextEncoder(TextEncoder, Protocol):
    """A text encoder that doesn't learn: fingerprint tells apart whose features differ."""

    @property
    def fingerprint(self) -> str: ...


class CachedTextEncoder:
    """A text encoder that encodes a prompt once: what is in the folder is read, what isn't is encoded and written.

    Args:
        encoder: the encoder; a pretrained one loads its weights at the first prompt that isn't there.
        folder: see :mod:`nextscale.data.text_cache`; filled by this very encoder, or new.
        dtype: number format on the disk, float16, bfloat16 or float32; "" for the folder's, float16 in a new one.
        batch: prompts that are encoded at once.

    A prompt gives the same features whether they were there or not: what is new is rounded and read back too.

    Raises:
        InputError: an encoder that learns, or a folder of another one.
        DataError: the folder can't be read or written.
    """

    def __init__(self, encoder: FrozenTextEncoder, folder: str | Path, dtype: str = "", batch: int = 32):
        if not getattr(encoder, "fingerprint", ""):
            raise InputError(f"features of the text encoder {encoder.name!r} can't be kept: it has no fingerprint, as "
                             "it learns with its model; use it without a cache")
        if batch < 1:
            raise InputError(f"batch is {batch}; it must be at least 1")
        self.encoder, self.batch = encoder, batch
        self.name, self.width, self.pooled_width = encoder.name, encoder.width, encoder.pooled_width
        self.fingerprint = encoder.fingerprint
        self.cache = TextCache(folder, TextSource(self.name, self.fingerprint, self.width, self.pooled_width, dtype))

    @property
    def device(self) -> torch.device:
        """Where features land: the encoder's device."""
        return torch.device(getattr(self.encoder, "device", "cpu"))

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, float32, from the disk where they are there. Raises as the encoder and the cache."""
        prompts = check_prompts(prompts)
        # Features are the same inside a training's autocast, which also refuses to join float16.
        with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
            self.fill(prompts)
            rows, pooled = self.cache.read(prompts)
            return TextFeatures.pack([row.float() for row in rows],
                                     None if pooled is None else pooled.float()).to(self.device)

    def fill(self, prompts: Sequence[str], on_progress: Callable[[int, int], None] | None = None) -> int:
        """Encode the prompts that aren't there, short ones first so that little is padded, and say how many those were.

        Written in shards of 64 MiB: a job that is killed goes on behind the last of them. on_progress: called with
        prompts done and to do.
        """
        missing = sorted(self.cache.missing(check_prompts(prompts)), key=len)
        waiting: list[tuple[list[str], TextFeatures]] = []
        held = 0
        for first in range(0, len(missing), self.batch):
            texts = missing[first : first + self.batch]
            waiting.append((texts, self.encoder.encode(texts).to("cpu")))
            held += waiting[-1][1].values.nbytes
            if held >= SHARD_BYTES or first + self.batch >= len(missing):
                self._write(waiting)
                waiting, held = [], 0
            if on_progress is not None:
                on_progress(first + len(texts), len(missing))
        return len(missing)

    def _write(self, batches: Sequence[tuple[list[str], TextFeatures]]) -> None:
        rows = [one.values[i, one.valid[i]] for _, one in batches for i in range(len(one))]
        pooled = [one.pooled for _, one in batches if one.pooled is not None]
        self.cache.write([text for texts, _ in batches for text in texts], rows, torch.cat(pooled) if pooled else None)
