"""Training a picture classifier: the judge of what a generator draws, or the features of a perceptual distance."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.parallel import rand_pictures
from nextscale.tokenizers.features import ClassifierConfig, PictureClassifier
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups


@dataclass(frozen=True)
class Augmentation:
    """Small changes that leave a picture's meaning alone; nothing is mirrored, since arrows and letters would change.

    shift: of the picture's side, either way; scale: either way; degrees: of rotation; brightness: of the colours;
    blur: share of the pictures that are made coarser (to a half or more of their size and back), as codes do to them;
    fill: colour of what comes in at the edges (1 is white).
    """

    shift: float = 0.08
    scale: float = 0.12
    degrees: float = 8.0
    brightness: float = 0.1
    blur: float = 0.3
    fill: float = 1.0

    def __call__(self, picture: Tensor) -> Tensor:
        """Pictures (B, 3, S, S') in [-1, 1], each changed by draws of its own."""
        b = len(picture)
        draw_B4 = rand_pictures(b, 4) * 2 - 1
        angle_B = draw_B4[:, 0] * math.radians(self.degrees)
        size_B = torch.exp(-draw_B4[:, 1] * self.scale)
        theta = torch.zeros(b, 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = angle_B.cos() * size_B, -angle_B.sin() * size_B
        theta[:, 1, 0], theta[:, 1, 1] = angle_B.sin() * size_B, angle_B.cos() * size_B
        theta[:, :, 2] = draw_B4[:, 2:] * 2 * self.shift
        grid = F.affine_grid(theta.to(picture), list(picture.shape), align_corners=False)
        # Nothing is drawn outside the picture, so the sampled value is shifted to make the outside the fill colour.
        moved = F.grid_sample(picture - self.fill, grid, align_corners=False) + self.fill
        gain_B, offset_B = ((rand_pictures(b, 2, 1, 1, 1) * 2 - 1).to(picture) * self.brightness).unbind(1)
        moved = (moved * (1 + gain_B) + offset_B).clamp(-1, 1)
        chosen = rand_pictures(b) < self.blur
        # Drawn in any case, so that the draws behind it don't hang on which pictures are here.
        side = int(picture.shape[-1] * (0.5 + 0.4 * float(torch.rand(()))))
        if chosen.any():
            coarse = F.interpolate(moved[chosen], size=(side, side), mode="area")
            moved[chosen] = F.interpolate(coarse, size=picture.shape[-2:], mode="bilinear")
        return moved


@dataclass(frozen=True)
class ClassifierRecipe:
    """What training adds to a classifier and the trainer's settings.

    label_weights: of every kind of label's cross-entropy; label_smoothing: in [0, 1).
    """

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    augmentation: Augmentation = field(default_factory=Augmentation)
    label_weights: tuple[float, ...] = (1.0, 0.5)
    label_smoothing: float = 0.1


class ClassifierTask:
    """Trains a :class:`PictureClassifier` by the cross-entropy of every kind of label.

    held_out: pictures (N, 3, S, S') in [-1, 1] and labels (N, n), on which accuracy is measured as training goes.
    """

    phases: tuple[str, ...] = ("main",)

    def __init__(self, recipe: ClassifierRecipe, held_out: tuple[Tensor, Tensor] | None = None):
        self.recipe, self.held_out = recipe, held_out
        self.classifier = PictureClassifier(recipe.model)
        self.modules: dict[str, nn.Module] = {"classifier": self.classifier}

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups([self.classifier], weight_decay)

    def averaged(self) -> dict[str, nn.Module]:
        return {"classifier": self.classifier}

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        logits = self.classifier(self.recipe.augmentation(batch["picture"])).logits
        total, metrics = logits[0].new_zeros(()), {}
        for kind, (of_kind, weight) in enumerate(zip(logits, self.recipe.label_weights, strict=True)):
            wanted_B = batch["labels"][:, kind]
            total = total + weight * F.cross_entropy(of_kind, wanted_B, label_smoothing=self.recipe.label_smoothing)
            metrics[f"accuracy_{kind}"] = (of_kind.detach().argmax(1) == wanted_B).float().mean()
        return total, metrics

    def after_step(self, at: TrainingStep) -> Metrics:
        return {}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        if self.held_out is None:
            return None
        classifier = averaged["classifier"].eval()
        device = next(classifier.parameters()).device
        pictures, labels = self.held_out
        found = [classifier(part.to(device)).logits for part in pictures.split(128)]
        right = [torch.cat([logits[kind].argmax(1).cpu() for logits in found]) == labels[:, kind]
                 for kind in range(labels.shape[1])]
        return {f"held_out/accuracy_{kind}": float(hits.float().mean()) for kind, hits in enumerate(right)}

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None
