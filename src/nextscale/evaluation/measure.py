"""Figures of a set of pictures beside a reference, in the features of one extractor."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.evaluation.classifier import Opinion, agreement
from nextscale.evaluation.copies import coverage
from nextscale.evaluation.distances import (
    Statistics,
    classifier_score,
    frechet_at_infinity,
    frechet_distance,
    kernel_distance,
)
from nextscale.evaluation.features import Extractor, distance_name
from nextscale.evaluation.sets import match_labels

OVERLAP_PICTURES = 10_000  # of each kind, at most: the work grows with the square
NEIGHBOURS_PRECISION, NEIGHBOURS_DENSITY = 3, 5
FEWEST = 10


@dataclass(frozen=True)
class Features:
    """Features (N, D) of a set, and logits (N, classes) of every kind of label where the extractor is a classifier."""

    features_ND: Tensor
    logits: list[Tensor]

    @classmethod
    def of(cls, found: dict[str, Tensor]) -> Features:
        kinds = sorted(name for name in found if name.startswith("logits_"))
        return cls(found["features"], [found[name] for name in kinds])

    def part(self, index: Tensor) -> Features:
        return Features(self.features_ND[index], [logits[index] for logits in self.logits])

    def __len__(self) -> int:
        return len(self.features_ND)


def compare(found: Features, reference: Statistics, extractor: Extractor, seed: int = 0) -> dict[str, Any]:
    """All distances of a set from a reference; what a reference without features can't tell is left out, with a note.

    The Fréchet distance comes with its few-sample bias and the estimate without it.
    """
    figures: dict[str, Any] = {"pictures": len(found), "reference_pictures": reference.count or None}
    if len(found) < FEWEST:
        return {**figures, "note": f"{len(found)} pictures are too few to compare; draw at least {FEWEST}"}
    own = Statistics.of(found.features_ND, extractor.name)
    line = frechet_at_infinity(found.features_ND, reference, seed=seed)
    figures["frechet_distance"] = {
        "name": distance_name(extractor.name, extractor.published, len(found)),
        "value": frechet_distance(own, reference), **line._asdict(),
        "rank_deficient": min(len(found), reference.count or len(found)) <= found.features_ND.shape[1]}
    if reference.features_ND is None:
        figures["note"] = ("the reference has no features, only their mean and covariance: no kernel distance, "
                           "no overlap")
    else:
        figures["kernel_distance"] = kernel_distance(reference.features_ND, found.features_ND, seed=seed)._asdict()
        figures["overlap"] = overlap(reference.features_ND, found.features_ND, seed)
    if found.logits and found.logits[0].shape[1] > 1:
        figures["classifier_score"] = classifier_score(found.logits[0], seed=seed)._asdict()
    return figures


def overlap(real_ND: Tensor, generated_MD: Tensor, seed: int = 0) -> dict[str, Any]:
    """Precision, recall (3 neighbours), density and coverage (5) of as many pictures of each kind, chosen by seed."""
    count = min(len(real_ND), len(generated_MD), OVERLAP_PICTURES)
    generator = torch.Generator().manual_seed(seed)
    real = real_ND[torch.randperm(len(real_ND), generator=generator)[:count]]
    generated = generated_MD[torch.randperm(len(generated_MD), generator=generator)[:count]]
    near, dense = coverage(real, generated, NEIGHBOURS_PRECISION), coverage(real, generated, NEIGHBOURS_DENSITY)
    return {"pictures_of_each_kind": count, "precision": near.precision, "recall": near.recall,
            "density": dense.density, "coverage": dense.coverage,
            "neighbours": {"precision, recall": NEIGHBOURS_PRECISION, "density, coverage": NEIGHBOURS_DENSITY}}


def agree(found: Features, labels_Nn: Tensor, names: Sequence[Sequence[str]], counts: Sequence[int],
          extractor: Extractor) -> dict[str, Any] | None:
    """How often the extractor's guess is the label, where it is a classifier of these classes; None otherwise.

    labels_Nn: label rows of classes called ``names`` (``counts`` of them, which is the null row's index too): pictures
    without a label don't count.
    """
    if not found.logits or not extractor.class_names:
        return None
    asked = names if names else [[str(i) for i in range(size)] for size in counts]
    known = match_labels(asked, extractor.class_names)
    if known is None:
        return None
    labelled_N = (labels_Nn < torch.tensor([len(kind) for kind in asked])).all(1)
    if not labelled_N.any():
        return None
    guesses = torch.stack([logits.argmax(1) for logits in found.logits], 1)[labelled_N]
    wanted = known.rows(labels_Nn[labelled_N])
    figures = agreement(Opinion(guesses, found.features_ND[:0]), wanted, extractor.class_names)
    return {**figures, "pictures": int(labelled_N.sum()), "matched_by": known.how}
