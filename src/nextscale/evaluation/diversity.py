"""How much samples of one label differ from each other. How much of the real pictures they reach is in copies.py."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextscale.errors import InputError

MOST = 1000  # of one label, at most: the work grows with the square


class Pairwise(NamedTuple):
    """Mean Euclidean distance between two pictures of one label; how many labels and pairs it is of.

    Every label counts alike; ``nan`` where no label has two pictures.
    """

    mean: float
    labels: int
    pairs: int


@torch.no_grad()
def pairwise_distance(values_ND: Tensor, labels_Nn: Tensor, most: int = MOST) -> Pairwise:
    """How far apart pictures of the same label row lie, by pixels or features: mean over labels of the mean over pairs.

    values_ND: anything with a leading dimension; labels_Nn: rows of labels, equal where pictures were asked for in the
    same way; most: pictures of a label that are looked at, the first ones. Raises InputError where numbers differ.
    """
    if len(values_ND) != len(labels_Nn):
        raise InputError(f"{len(values_ND)} pictures have {len(labels_Nn)} labels; give one each")
    values_ND, (_, label_N) = values_ND.flatten(1).double(), labels_Nn.unique(dim=0, return_inverse=True)
    found, pairs = [], 0
    for label in label_N.unique().tolist():
        members = values_ND[label_N == label][:most]
        if len(members) > 1:
            distances = torch.nn.functional.pdist(members)
            found.append(float(distances.mean()))
            pairs += len(distances)
    return Pairwise(sum(found) / len(found) if found else float("nan"), len(found), pairs)
