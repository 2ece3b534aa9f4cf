"""A judge's opinion of pictures: class by class agreement with what was asked, averaged evenly over the classes."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextscale.data import PictureDataset
from nextscale.data.emoji_classes import FLAG_CLASSES
from nextscale.errors import InputError
from nextscale.tokenizers.features import PictureClassifier, load_classifier, load_features

__all__ = ["Opinion", "PictureSet", "accuracy", "agreement", "judge", "load_classifier", "load_features",
           "macro_average", "whole_set"]


@dataclass(frozen=True)
class PictureSet:
    """Pictures (N, 3, S, S') in [-1, 1], their labels (N, n), and alpha masks (N, 1, S, S') in [0, 1] where known."""

    pictures: Tensor
    labels: Tensor
    alpha: Tensor | None
    class_names: list[list[str]]

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, index: Tensor | slice) -> PictureSet:
        """Some of them."""
        alpha = None if self.alpha is None else self.alpha[index]
        return PictureSet(self.pictures[index], self.labels[index], alpha, self.class_names)


def whole_set(dataset: PictureDataset) -> PictureSet:
    """Every picture of a data set in memory."""
    pixels, places = dataset.read(np.arange(len(dataset)))
    alpha = torch.from_numpy(pixels[:, 3:].astype(np.float32) / np.float32(255)) if dataset.has_alpha else None
    pictures = torch.from_numpy(pixels[:, :3].astype(np.float32) / np.float32(127.5) - np.float32(1))
    return PictureSet(pictures, dataset.labels[torch.from_numpy(places)], alpha, dataset.class_names)


@dataclass(frozen=True)
class Opinion:
    """What a judge says of N pictures: its guess for every kind of label (N, n), and its features (N, D)."""

    guesses_Nn: Tensor
    features_ND: Tensor


@torch.no_grad()
def judge(classifier: PictureClassifier, pictures: Tensor, batch: int = 128,
          each: Callable[[int], None] | None = None) -> Opinion:
    """Guesses and features of pictures (N, 3, S, S') in [-1, 1]; ``each`` is called with how many are done."""
    classifier.eval()
    device = next(classifier.parameters()).device
    guesses, features = [], []
    for start in range(0, len(pictures), batch):
        found = classifier(pictures[start:start + batch].to(device))
        guesses.append(torch.stack([logits.argmax(1) for logits in found.logits], 1).cpu())
        features.append(found.features_BD.cpu())
        if each is not None:
            each(min(start + batch, len(pictures)))
    return Opinion(torch.cat(guesses), torch.cat(features))


def macro_average(right_N: Tensor, classes_N: Tensor, leave_out: Iterable[int] = ()) -> float:
    """Share that is right in each class, averaged over the classes that occur.

    right_N: bool or 0/1; classes_N: class of each; leave_out: classes that don't count. Raises InputError where no
    class is left.
    """
    left_out = set(leave_out)
    shares = [float(right_N[classes_N == c].float().mean()) for c in classes_N.unique().tolist() if c not in left_out]
    if not shares:
        raise InputError("no class is left to average over; give pictures of at least one class that counts")
    return sum(shares) / len(shares)


def agreement(opinion: Opinion, asked_Nn: Tensor, class_names: Sequence[Sequence[str]]) -> dict[str, float]:
    """How often a judge's guess is the label asked for.

    Returns ``class`` (macro-averaged over the first kind of label) and ``style`` (over the second, where there is one);
    where flags are among the classes, also ``class_without_flags``; ``class_plain`` is the plain share.
    """
    if opinion.guesses_Nn.shape != asked_Nn.shape:
        raise InputError(f"the judge gave labels {tuple(opinion.guesses_Nn.shape)}, asked {tuple(asked_Nn.shape)}")
    right_Nn = opinion.guesses_Nn == asked_Nn
    found = {"class": macro_average(right_Nn[:, 0], asked_Nn[:, 0])}
    flags = [i for i, name in enumerate(class_names[0]) if name in FLAG_CLASSES]
    if flags and not set(asked_Nn[:, 0].tolist()) <= set(flags):
        found["class_without_flags"] = macro_average(right_Nn[:, 0], asked_Nn[:, 0], flags)
    found["class_plain"] = float(right_Nn[:, 0].float().mean())
    if asked_Nn.shape[1] > 1:
        found["style"] = macro_average(right_Nn[:, 1], asked_Nn[:, 1])
    return found


def accuracy(classifier: PictureClassifier, pictures: PictureSet, batch: int = 128) -> dict[str, float]:
    """:func:`agreement` with the true labels of real pictures."""
    return agreement(judge(classifier, pictures.pictures, batch), pictures.labels, pictures.class_names)
