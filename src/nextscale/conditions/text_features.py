"""What a text encoder makes of prompts: features a token, padded over a batch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.errors import InputError


@dataclass(frozen=True)
class TextFeatures:
    """Features of B prompts of at most T tokens.

    values (B, T, W): of every token, zero where there is none; valid (B, T) bool: which there are, at least one a
    prompt, those of a prompt lead its row; pooled (B, P): one vector a prompt, where the encoder has one.
    """

    values: Tensor
    valid: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def gather(self, items: Tensor | slice | list[int]) -> TextFeatures:
        """The features of the prompts ``items``."""
        return TextFeatures(self.values[items], self.valid[items], None if self.pooled is None else self.pooled[items])

    def padded(self, length: int) -> TextFeatures:
        """The same with rows of ``length`` tokens. Raises InputError where that cuts some off."""
        more = length - self.valid.shape[1]
        if more < 0:
            raise InputError(f"text: prompts of {self.valid.shape[1]} tokens don't fit {length}")
        return replace(self, values=F.pad(self.values, (0, 0, 0, more)), valid=F.pad(self.valid, (0, more)))

    def replaced(self, others: TextFeatures, at_B: Tensor) -> TextFeatures:
        """These features, those of ``others`` where ``at_B`` (B,) is true, padded to the longer of the two."""
        length = max(self.valid.shape[1], others.valid.shape[1])
        ours, theirs = self.padded(length), others.padded(length)
        pooled = None
        if ours.pooled is not None and theirs.pooled is not None:
            pooled = torch.where(at_B[:, None], theirs.pooled, ours.pooled)
        return TextFeatures(torch.where(at_B[:, None, None], theirs.values, ours.values),
                            torch.where(at_B[:, None], theirs.valid, ours.valid), pooled)

    def to(self, device: torch.device | str) -> TextFeatures:
        pooled = None if self.pooled is None else self.pooled.to(device)
        return TextFeatures(self.values.to(device), self.valid.to(device), pooled)

    @classmethod
    def join(cls, parts: Sequence[TextFeatures]) -> TextFeatures:
        """The features of several batches behind each other, padded to the longest."""
        length = max(part.valid.shape[1] for part in parts)
        wide = [part.padded(length) for part in parts]
        pooled = None if parts[0].pooled is None else torch.cat([p.pooled for p in parts if p.pooled is not None])
        return cls(torch.cat([p.values for p in wide]), torch.cat([p.valid for p in wide]), pooled)

    @classmethod
    def pack(cls, rows: Sequence[Tensor], pooled: Tensor | None = None) -> TextFeatures:
        """From the features (T_i, W) of single prompts. Raises InputError where a prompt has none."""
        if not rows or min(len(row) for row in rows) < 1:
            raise InputError("text: every prompt needs at least one token; encode the empty prompt by an end token")
        values = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        length = torch.tensor([len(row) for row in rows], device=values.device)
        return cls(values, torch.arange(values.shape[1], device=values.device) < length[:, None], pooled)


class TextEncoder(Protocol):
    """Prompts to features.

    name tells encoders apart whose features differ, in caches and in saved models; width W of the values and
    pooled_width P of the pooled vectors, 0 where there are none.
    """

    name: str
    width: int
    pooled_width: int

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, the empty one among them. Long prompts are cut, with one line of the log."""
        ...
