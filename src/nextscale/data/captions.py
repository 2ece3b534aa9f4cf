"""Captions: what a picture shows, in words; which of several a training sees, and how they are kept as bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.data.orders import mix

CAPTION_FIELDS = ("text", "caption", "prompt")
LONGEST_CAPTION = 4096
"""Characters that are kept of a caption."""

# The loaders' own word: with the same seed a picture has the same caption in an epoch, from pixels or from a cache.
_CAPTION = 0xCA97


def texts_of(value: Any) -> tuple[str, ...]:
    """The captions in a field, which holds one text or a list: white space collapsed, cut at ``LONGEST_CAPTION``
    characters; empty and repeated ones are left out, and what is no text."""
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    found = (" ".join(one.split())[:LONGEST_CAPTION].strip() for one in values if isinstance(one, str))
    # Half a surrogate pair, which JSON can hold, has no UTF-8.
    return tuple(dict.fromkeys(one.encode("utf-8", "replace").decode() for one in found if one))


def texts_in(row: dict[str, Any], field: str | None = None) -> tuple[str, ...]:
    """The captions of a row: those of a field, by default of the first of ``CAPTION_FIELDS`` that has any."""
    names = CAPTION_FIELDS if field is None else (field,)
    return next((texts for name in names if (texts := texts_of(row.get(name)))), ())


def texts_of_classes(names: Iterable[str]) -> tuple[str, ...]:
    """What the names of a picture's classes say of it (``golden retriever, photo``), nothing where there are none."""
    return texts_of(", ".join(name.replace("_", " ") for name in names))


def choose(counts: np.ndarray | int, seed: int, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which of its captions each picture has, of ``counts`` that there are, by (seed, epoch, id)."""
    return (mix(seed, _CAPTION, epochs, ids) % np.asarray(counts).astype(np.uint64)).astype(np.int64)


def captions_fingerprint(captions: Iterable[Sequence[str]]) -> str:
    """A fingerprint of the captions of all pictures, in their order."""
    digest = hashlib.sha256()
    for texts in captions:
        digest.update(json.dumps(list(texts)).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PackedCaptions:
    """The captions of N pictures as tensors, which a safetensors file can hold.

    text: uint8, the UTF-8 of all T captions one behind the other; starts: int64 (T + 1,), where in it each begins, and
    its length; firsts: int64 (N + 1,), which caption is the first of each picture, and T.
    """

    text: Tensor
    starts: Tensor
    firsts: Tensor

    @classmethod
    def pack(cls, captions: Sequence[Sequence[str]]) -> PackedCaptions:
        encoded = [text.encode("utf-8") for texts in captions for text in texts]
        text = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
        starts = np.cumsum([0, *(len(one) for one in encoded)], dtype=np.int64)
        firsts = np.cumsum([0, *(len(texts) for texts in captions)], dtype=np.int64)
        return cls(*(torch.from_numpy(array) for array in (text, starts, firsts)))

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @property
    def counts(self) -> Tensor:
        """How many captions each picture has, int64 (N,)."""
        return self.firsts.diff()

    def of(self, picture: int) -> tuple[str, ...]:
        """All captions of a picture, the canonical one first."""
        first, end = self.firsts[picture : picture + 2].tolist()
        return tuple(self.one(picture, number) for number in range(end - first))

    def one(self, picture: int, number: int) -> str:
        """Caption ``number`` of a picture."""
        place = int(self.firsts[picture]) + number
        start, end = self.starts[place : place + 2].tolist()
        return self.text[start:end].numpy().tobytes().decode("utf-8")

    def misfit(self, pictures: int) -> str:
        """What is wrong with captions that should be those of so many pictures, nothing where all is well."""
        text, starts, firsts = self.text, self.starts, self.firsts
        kinds = [(tensor.dtype, tensor.ndim) for tensor in (text, starts, firsts)]
        if kinds != [(torch.uint8, 1), (torch.int64, 1), (torch.int64, 1)] or len(firsts) != pictures + 1:
            return f"of other types or numbers than {pictures} pictures need"
        if not (len(starts) and _rises(firsts, len(starts) - 1, 1) and _rises(starts, len(text), 1)):
            return "whose places are out of order"
        whole = text.numpy()
        # A byte of the form 10xxxxxx goes on with a character that began before it.
        if len(whole) and bool(((whole[starts[:-1].numpy()] & 0xC0) == 0x80).any()):
            return "that begin in mid-character"
        try:
            whole.tobytes().decode("utf-8")
        except UnicodeDecodeError:
            return "that are no UTF-8"
        return ""


def _rises(places: Tensor, end: int, least: int) -> bool:
    """Whether places go from 0 to an end in steps of at least so much."""
    return int(places[0]) == 0 and int(places[-1]) == end and bool((places.diff() >= least).all())
