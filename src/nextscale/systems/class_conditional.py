"""What class-conditional systems share: labels, and the training loss by them."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextscale.conditions.class_label import ClassCondition, ClassTable
from nextscale.errors import InputError, did_you_mean
from nextscale.sampling.generation import Settings
from nextscale.systems.system import Config, Schedule, System, Transformer
from nextscale.tokenizers.config import TokenizerConfig

__all__ = ["ClassConditionalSystem", "Label", "Schedule", "SystemConfig", "Transformer"]

Label = Any  # an index, a name, None for no class, or a tuple with one of these for every kind of label


@dataclass(frozen=True)
class SystemConfig(Config):
    """A whole system: tokenizer, network, labels and its published sampling settings; a system adds its network's.

    classes: how many classes each kind of label has; class_names: their names, where known (one list a kind);
    settings: by purpose, ``pictures`` (what generate uses by default) and ``fid``.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: Any = None
    classes: tuple[int, ...] = (1000,)
    class_names: tuple[tuple[str, ...], ...] = ()
    settings: dict[str, Any] = field(default_factory=lambda: {"pictures": Settings(), "fid": Settings()})


class ClassConditionalSystem(System):
    """A system whose pictures are of classes, of one kind or several."""

    transformer_parts = ("generator", "head", "labels")
    labels: ClassTable

    def label_rows(self, labels: Sequence[Label] | Label, count: int | None = None) -> Tensor:
        """Label indices (B, n) of names, indices, None or tuples of these; one label serves ``count`` pictures.

        Raises InputError on unknown names (the nearest is suggested) and indices out of range.
        """
        if labels is None or isinstance(labels, (int, str, tuple)):
            if count is not None and count < 1:
                raise InputError(f"count is {count}; it must be at least 1")
            labels = [labels] * (count or 1)
        rows = []
        for label in labels:
            parts = label if isinstance(label, tuple) else (label,)
            if len(parts) > len(self.config.classes):
                raise InputError(f"label {label!r} has {len(parts)} parts; the model has {len(self.config.classes)}")
            parts = parts + (None,) * (len(self.config.classes) - len(parts))
            rows.append([self._label_index(kind, part) for kind, part in enumerate(parts)])
        if count is not None and len(rows) != count:
            raise InputError(f"{len(rows)} labels were given for {count} pictures")
        if not rows:
            raise InputError("no labels were given; give at least one, or None for no class")
        return torch.tensor(rows, device=self.device)

    def _label_index(self, kind: int, label: int | str | None) -> int:
        size = self.config.classes[kind]
        if label is None:
            return size
        names = self.config.class_names[kind] if kind < len(self.config.class_names) else ()
        if isinstance(label, str) and not re.fullmatch(r"-?[0-9]+", label):
            if label in names:
                return names.index(label)
            hint = did_you_mean(label, names, f"; use an index from 0 to {size - 1}")
            raise InputError(f"unknown class {label!r}{hint}")
        if not 0 <= int(label) < size:
            raise InputError(f"class {label} is out of range; use 0 to {size - 1}")
        return int(label)

    def label_names(self, row: Tensor) -> Any:
        """What a row of label indices is called: a name or index, a tuple for several kinds, None for no class."""
        found = []
        for kind, index in enumerate(row.tolist()):
            names = self.config.class_names[kind] if kind < len(self.config.class_names) else ()
            found.append(None if index == self.config.classes[kind] else names[index] if names else index)
        return found[0] if len(found) == 1 else tuple(found)

    def condition(self, rows: Tensor) -> ClassCondition:
        return ClassCondition(self.labels, rows)

    def dropped(self, labels_Bn: Tensor, label_dropout: float, part_dropout: float) -> Tensor:
        found: Tensor = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        return found
