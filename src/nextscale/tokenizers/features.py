"""A small residual classifier of pictures, and the feature maps inside it.

Two trained ones ship, of different size and seed: ``emoji-features`` measures the perceptual distance when a tokenizer
is trained, ``emoji-judge`` is kept out of all training and judges what a generator draws.
"""
from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale import hub
from nextscale.configuration import build
from nextscale.errors import InputError, WeightsError
from nextscale.layers.norms import GroupNorm


@dataclass(frozen=True)
class ClassifierConfig:
    """Size and labels of a classifier.

    patch: pixels a side that the first map takes together; widths: channels of the first map and of those of half its
    side, a quarter, ...; blocks: residual blocks at each of these sizes; classes: how many classes each kind of label
    has; class_names: their names, one list a kind; dropout: of the pooled features, in training.
    """

    patch: int = 2
    widths: tuple[int, ...] = (32, 64, 80, 96)
    blocks: tuple[int, ...] = (0, 1, 1, 1)
    classes: tuple[int, ...] = (51, 5)
    class_names: tuple[tuple[str, ...], ...] = ()
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if not self.widths or any(width < 8 or width % 8 for width in self.widths):
            raise InputError(f"widths are {self.widths}; each must be a positive multiple of 8")
        if self.patch < 1:
            raise InputError(f"patch is {self.patch}; it must be at least 1 pixel")
        if len(self.blocks) != len(self.widths):
            raise InputError(f"blocks are {self.blocks}; give one count for each of the {len(self.widths)} widths")
        if not self.classes or any(count < 2 for count in self.classes):
            raise InputError(f"classes are {self.classes}; every kind of label needs at least 2")


class Judgement(NamedTuple):
    """What a classifier says of pictures: logits (B, classes) of every kind of label, and the features (B, D)."""

    logits: list[Tensor]
    features_BD: Tensor


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))"""

    def __init__(self, width: int):
        super().__init__()
        self.norm_in, self.conv_in = _norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_out, self.conv_out = _norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        # Every block starts as the identity.
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        result: Tensor = x + self.conv_out(F.silu(self.norm_out(h)))
        return result


def _norm(width: int) -> GroupNorm:
    return GroupNorm(width // 8, width)


class PictureClassifier(nn.Module):
    """Pictures (B, 3, S, S') in [-1, 1], to logits of every kind of label."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.shrink = nn.ModuleList([nn.Conv2d(3, config.widths[0], config.patch + 2, stride=config.patch, padding=1)])
        self.shrink.extend(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(config.widths))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(count)), _norm(width), nn.SiLU())
            for width, count in zip(config.widths, config.blocks, strict=True))
        # The heads see every stage: what is drawn shows in the coarse maps, how it is drawn in the fine ones.
        self.heads = nn.ModuleList(nn.Linear(sum(config.widths), count) for count in config.classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def maps(self, picture: Tensor) -> list[Tensor]:
        """The map after every stage, (B, width, S / (patch 2^i), S' / (patch 2^i)), fine to coarse.

        Raises InputError where the picture's shape doesn't fit.
        """
        factor = self.config.patch * 2 ** (len(self.config.widths) - 1)
        if picture.ndim != 4 or picture.shape[1] != 3 or picture.shape[2] % factor or picture.shape[3] % factor:
            raise InputError(f"pictures must be (B, 3, S, S') with sides divisible by {factor}, "
                             f"not {tuple(picture.shape)}")
        x = picture.contiguous(memory_format=torch.channels_last)
        found = []
        for shrink, stage in zip(self.shrink, self.stages, strict=True):
            x = stage(shrink(x))
            found.append(x)
        return found

    def forward(self, picture: Tensor) -> Judgement:
        """Logits from the means of all maps over positions, and the mean of the last map as features."""
        pooled = [found.mean((2, 3)).float() for found in self.maps(picture)]
        dropped_BD = F.dropout(torch.cat(pooled, 1), self.config.dropout, self.training)
        return Judgement([head(dropped_BD).float() for head in self.heads], pooled[-1])


class FeatureMaps(nn.Module):
    """A frozen classifier as ``features(picture) -> [maps]``, for the perceptual distance. Gradients reach the picture,
    never the weights."""

    def __init__(self, classifier: PictureClassifier):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, picture: Tensor) -> list[Tensor]:
        return self.classifier.maps(picture)

    def train(self, mode: bool = True) -> FeatureMaps:
        """Stays in evaluation mode."""
        return super().train(False)


def save_classifier(classifier: PictureClassifier, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``classifier.safetensors`` into a folder."""
    tensors = {name: tensor.to(dtype) for name, tensor in classifier.state_dict().items()}
    hub.save_tensors(tensors, folder / "classifier.safetensors", {"part": "classifier"})
    hub.save_json(asdict(classifier.config), folder / "config.json")


def load_classifier(where: str | Path) -> PictureClassifier:
    """A classifier by the name it ships under (``emoji-judge``, ``emoji-features``) or from a folder.

    It comes in evaluation mode. Raises WeightsError where it is missing, damaged or doesn't fit its configuration.
    """
    folder = Path(where)
    if not folder.is_dir():
        folder = Path(str(files("nextscale").joinpath("weights"))) / where
    if not folder.is_dir():
        raise WeightsError(f"no classifier at {where}; give a folder that holds config.json and classifier.safetensors")
    config = build(ClassifierConfig, hub.read_json(folder / "config.json"), str(folder / "config.json"))
    classifier = PictureClassifier(config)
    path = folder / "classifier.safetensors"
    tensors = {name: tensor.float() for name, tensor in hub.read_tensors(path).items()}
    hub.load_published(classifier, tensors, ((r"(.*)", r"\1"),), str(path))
    return classifier.eval()


def load_features() -> FeatureMaps:
    """The feature maps that training a tokenizer uses by default for its perceptual distance."""
    return FeatureMaps(load_classifier("emoji-features"))
