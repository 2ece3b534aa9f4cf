"""Class labels as conditions: one learned row a class, and one for "no class"."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nextscale.devices import listed
from nextscale.errors import InputError
from nextscale.parallel import rand_pictures


class ClassTable(nn.Module):
    """Embeddings of one or several kinds of label; a picture's condition is their sum, (B, D).

    sizes: classes of each kind; the row behind the last class of a kind means "none given". Several kinds (what is
    drawn, in which style) let a model meet combinations that it never saw.
    """

    def __init__(self, sizes: Sequence[int], width: int):
        super().__init__()
        self.sizes = tuple(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width) for size in sizes)

    @property
    def null(self) -> Tensor:
        """The labels that mean nothing is given, (n,)."""
        return listed(self.sizes, next(self.parameters()).device)

    def forward(self, labels_Bn: Tensor) -> Tensor:
        """Labels (B, n) to conditions (B, D)."""
        total: Tensor = self.tables[0](labels_Bn[:, 0])
        for kind, table in enumerate(list(self.tables)[1:], 1):
            total = total + table(labels_Bn[:, kind])
        return total

    def drop(self, labels_Bn: Tensor, together: float, apart: float = 0.0) -> Tensor:
        """Labels for training with guidance: all kinds of a picture are dropped with one probability, each kind but
        the first by itself with another. Uses torch's generator, by ``rand_pictures``."""
        b, n = labels_Bn.shape
        device = labels_Bn.device
        gone = (rand_pictures(b, 1, device=device) < together).expand(b, n)
        if apart and n > 1:
            gone = gone | ((rand_pictures(b, n, device=device) < apart) & (torch.arange(n, device=device) > 0))
        return torch.where(gone, self.null, labels_Bn)


@dataclass(frozen=True)
class ClassCondition:
    """Labels (B, n) bound to the pictures of a run. Branches: ``conditional``, ``unconditional``, and ``without_i``,
    where the label of kind i is dropped. What a name has behind a slash is about something else than labels."""

    table: ClassTable
    labels_Bn: Tensor

    def branch(self, name: str) -> Tensor:
        labels, name = self.labels_Bn, name.partition("/")[0]
        if name == "unconditional":
            labels = self.table.null.expand_as(labels)
        elif name.startswith("without_"):
            kind = int(name.removeprefix("without_"))
            labels = labels.clone()
            labels[:, kind] = self.table.sizes[kind]
        elif name != "conditional":
            raise InputError(f"class labels have no branch {name!r}; they have conditional, unconditional, "
                             "without_0, ...")
        return self.table(labels)

    def gather(self, items: Tensor) -> ClassCondition:
        return replace(self, labels_Bn=self.labels_Bn[items])
