"""Class-table surgery: other classes on a trained model, the rows of known ones kept bit for bit."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextscale.conditions.class_label import ClassTable
from nextscale.errors import InputError

Initial = Literal["mean", "null"]


@dataclass(frozen=True)
class ClassNames:
    """A change of classes, as ``extend_classes`` takes it."""

    names: tuple[tuple[str, ...], ...]
    keep: bool = True
    initial: Initial = "mean"


@dataclass(frozen=True)
class ClassChange:
    """What became of the classes. places: for each kind, the model's row of each of the data's classes, the row for
    "none given" last; new: for each kind of the model, whether a row is new."""

    places: tuple[Tensor, ...]
    new: tuple[Tensor, ...]

    @property
    def changed(self) -> bool:
        return any(bool(rows.any()) for rows in self.new)


@torch.no_grad()
def extend_classes(system: Any, names: Sequence[Sequence[str]], keep: bool = True,
                   initial: Initial = "mean") -> ClassChange:
    """Give a system's class table rows for the named classes, in place; its configuration follows.

    names: a list for each kind of label that the data has; kinds that it lacks stay as they are. A class that the
    model knows by name keeps its row; a model whose classes have no names knows them by index ("207"). New rows start
    as the mean of the class rows, or as the row for "none given"; that row stays, behind all others.
    keep: whether classes that the data lacks stay too. Old rows are copied, so the model's logits for old classes stay
    what they were, bit for bit.

    Raises InputError where the data has more kinds of label than the model, or a name twice.
    """
    config, table = system.config, system.labels
    if len(names) > len(config.classes):
        raise InputError(f"the data has {len(names)} kinds of label, the model {len(config.classes)}; leave out "
                         f"{len(names) - len(config.classes)}")
    sizes, all_names, places, new, weights = [], [], [], [], []
    for kind, old in enumerate(table.tables):
        known = list(config.class_names[kind]) if kind < len(config.class_names) else []
        known = known or [str(i) for i in range(config.classes[kind])]
        given = list(names[kind]) if kind < len(names) else known
        twice = sorted({name for name in given if given.count(name) > 1}) if kind < len(names) else []
        if twice:
            raise InputError(f"class {twice[0]!r} is there twice; give every class a name of its own")
        place_of = {name: i for i, name in reversed(list(enumerate(known)))}  # of two of a name, the first
        final = [*known, *(name for name in given if name not in place_of)] if keep else given
        fresh = torch.tensor([name not in place_of for name in final] + [False])
        start = old.weight[:-1].mean(0) if initial == "mean" else old.weight[-1]
        rows = [start if name not in place_of else old.weight[place_of[name]] for name in final]
        weights.append(torch.stack([*rows, old.weight[-1]]))
        final_place = {name: i for i, name in enumerate(final)}
        places.append(torch.tensor([*(final_place[name] for name in given), len(final)]))
        sizes.append(len(final))
        all_names.append(tuple(final))
        new.append(fresh)
    if tuple(sizes) != tuple(table.sizes) or any(bool(rows.any()) for rows in new) or not keep:
        system.labels = _table(sizes, weights, table)
        system.config = replace(config, classes=tuple(sizes), class_names=tuple(all_names))
    return ClassChange(tuple(places[:len(names)]), tuple(new))


def _table(sizes: Sequence[int], weights: Sequence[Tensor], like: nn.Module) -> ClassTable:
    found = ClassTable(sizes, weights[0].shape[1]).to(weights[0].device, weights[0].dtype).train(like.training)
    for table, weight in zip(found.tables, weights, strict=True):
        table.load_state_dict({"weight": weight})
    return found


def translate(labels_Bn: Tensor, change: ClassChange, sizes: Sequence[int]) -> Tensor:
    """Labels of the data (B, n) as labels of the model (B, m); kinds that the data lacks are "none given"."""
    found = torch.tensor(list(sizes), device=labels_Bn.device).repeat(len(labels_Bn), 1)
    for kind, place in enumerate(change.places):
        found[:, kind] = place.to(labels_Bn.device)[labels_Bn[:, kind]]
    return found
