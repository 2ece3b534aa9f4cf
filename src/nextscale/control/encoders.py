"""Frozen vision encoders that look at control maps as if they were photos. Named by text:

    dinov2:PLACE           DINOv2 through transformers; PLACE is a folder or a hub name
    emoji-features         the small classifier that ships, or FOLDER: another one that this library trained
    package.module:name    a function of yours: grid (h, w) to a module from (B, 3, S, S') in [-1, 1] to (B, C, h, w)
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError, MissingExtraError, WeightsError
from nextscale.layers.resize import ResizeRule, resize
from nextscale.registry import import_target
from nextscale.tokenizers.features import PictureClassifier, load_classifier

QUARTERS = (0.25, 0.5, 0.75, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fitted(map_BCHW: Tensor, grid: tuple[int, int], shrink: ResizeRule = "area") -> Tensor:
    """A feature map at another grid, by ``shrink`` where it shrinks, else bilinear; float32."""
    shrinks = grid[0] <= map_BCHW.shape[2] and grid[1] <= map_BCHW.shape[3]
    return resize(map_BCHW, grid, shrink if shrinks else "bilinear").float()


class ClassifierFeatures(nn.Module):
    """The maps after every stage of a classifier, at one grid, one behind the other: (B, sum of widths, h, w)."""

    def __init__(self, classifier: PictureClassifier, grid: tuple[int, int]):
        super().__init__()
        self.classifier, self.grid = classifier, grid

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.cat([fitted(one, self.grid) for one in self.classifier.maps(pictures)], 1)


class Dinov2Features(nn.Module):
    """Patch features of DINOv2 (arXiv 2304.07193) after the shares ``after`` of its blocks, each through the last norm,
    without class and register tokens: (B, shares x width, side / patch, side / patch).

    Pictures are resized to ``side`` pixels and normalised as DINOv2's own. Raises InputError for a side that patches
    don't divide.
    """

    def __init__(self, network: nn.Module, side: int = 224, after: Sequence[float] = QUARTERS):
        super().__init__()
        self.network, self.side = network, side
        depth = int(network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        self.after = tuple(max(1, round(depth * share)) for share in after)
        self.patch = int(network.config.patch_size)  # type: ignore[union-attr, arg-type]
        if side % self.patch:
            raise InputError(f"control.encoder_side is {side}, which patches of {self.patch} pixels don't divide; "
                             f"use {side // self.patch * self.patch or self.patch}")

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.interpolate(pictures, size=(self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        x = ((x + 1) / 2 - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
        hidden = self.network(x, output_hidden_states=True).hidden_states
        cells = (self.side // self.patch) ** 2
        norm: nn.Module = self.network.layernorm  # type: ignore[assignment]
        found = [norm(hidden[i])[:, -cells:] for i in self.after]
        return torch.cat(found, 2).transpose(1, 2).unflatten(2, (self.side // self.patch, -1))


@lru_cache(maxsize=4)
def open_encoder(spec: str, grid: tuple[int, int], side: int = 224, after: tuple[float, ...] = QUARTERS) -> nn.Module:
    """An encoder by text, see this file's head, frozen; grid: of the features, where the encoder can choose; side and
    after: of DINOv2.

    Raises:
        InputError: unknown.
        WeightsError: its weights are missing or damaged.
        MissingExtraError: its package is not installed.
    """
    name, _, place = spec.partition(":")
    if name == "dinov2" and place:
        found: nn.Module = Dinov2Features(_dinov2(place), side, after)
    elif spec == "emoji-features" or Path(spec).is_dir():
        found = ClassifierFeatures(load_classifier(spec), grid)
    elif place:
        made = import_target(spec)(grid)  # type: ignore[operator]
        if not isinstance(made, nn.Module):
            raise InputError(f"encoder {spec!r} gave {type(made).__name__}; its function must give a torch module")
        found = made
    else:
        raise InputError(f"unknown encoder {spec!r}; use dinov2:PLACE, emoji-features, a classifier's folder, or "
                         "package.module:name")
    return found.eval().requires_grad_(False)


def _dinov2(place: str) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "text", f"look at control maps by {place}") from None
    try:
        network: nn.Module = transformers.Dinov2Model.from_pretrained(place, use_safetensors=True)
    except Exception as error:  # the hub and the loader have dozens of error types
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{place} can't be loaded as DINOv2 ({reason}); give a folder or a hub name") from None
    return network
