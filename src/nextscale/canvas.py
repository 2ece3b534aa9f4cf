"""The canvas: the partial latent picture that steps write into.

What a step adds and how the result is kept (sum of residuals in VAR, replacement in others) is the business of the
tokenizer's quantiser; the canvas is the value that results. It is never changed in place: writing gives a new one,
so a run that was forked keeps its own.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nextscale.errors import InputError
from nextscale.layers.resize import ResizeRule
from nextscale.plan import Plan, raster


class Codec(Protocol):
    """What a canvas asks of a tokenizer's quantiser."""

    latent_width: int
    read_rule: ResizeRule

    def contribution(self, step: int, steps: int, codes_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the codes of a step (B, C, h, w) bring to the latent: at full size ``grid``, (B, C, H, W), where steps
        add up; at any size where each replaces the one before."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (..., ) int64 to code vectors (..., C); code vectors pass through."""
        ...

    def accumulate(self, value: Tensor, contribution: Tensor) -> Tensor:
        """The new latent from the old one and a step's contribution."""
        ...

    def leftover(self, rest: Tensor, contribution: Tensor) -> Tensor:
        """What later steps have to code, from what this one had and its contribution."""
        ...

    def resize(self, map_BCHW: Tensor, grid: tuple[int, int], rule: ResizeRule) -> Tensor:
        """A map (B, C, H, W) at another grid."""
        ...

    def target(self, step: int, plan: Plan, latent: Tensor) -> Tensor:
        """What the canvas is to be after a step, (B, maps * C, H, W): the latent itself, or what of it the step aims
        at."""
        ...


@dataclass(frozen=True)
class Canvas:
    """A partial latent (B, maps * C, H, W) in float32, with the plan and the codec that give it meaning.

    H and W are those of the last grid where steps add up, and of the last step written where steps replace each other.
    """

    value: Tensor
    plan: Plan
    codec: Codec

    @classmethod
    def empty(cls, plan: Plan, codec: Codec, pictures: int, device: torch.device | str = "cpu") -> Canvas:
        """A canvas of zeros."""
        width = codec.latent_width * plan.steps[-1].maps
        return cls(torch.zeros(pictures, width, *plan.grid, device=device), plan, codec)

    def contribution(self, step: int, tokens: Tensor) -> Tensor:
        """What one step alone brings, (B, maps * C, H, W).

        ``tokens`` are indices (B, L) or code vectors (B, L, C) of that step, in the order of its cells.
        """
        at = self.plan.steps[step]
        codes_BLC = self.codec.embed(tokens)
        pictures = codes_BLC.shape[0]
        maps = codes_BLC.reshape(pictures * at.maps, *at.grid, -1).permute(0, 3, 1, 2)
        out = self.codec.contribution(step, len(self.plan), maps, self.plan.grid)
        return out.reshape(pictures, -1, *out.shape[-2:])

    def write(self, step: int, tokens: Tensor, cells: Tensor | None = None) -> Canvas:
        """The canvas after a step's tokens (or code vectors) are written.

        cells (B|1, L, 3): where, for steps that predict a part of their cells; the others keep what they hold. A canvas
        of another size first becomes what such a step reads of it.
        """
        if self.plan.steps[step].count is None:
            return self.after(self.contribution(step, tokens))
        if cells is None:
            raise InputError(f"canvas: step {step} writes a part of the {self.plan.steps[step].grid} grid; it needs "
                             "the cells of its tokens")
        at = self.plan.steps[step].grid
        value = self.value
        if at != tuple(value.shape[-2:]):
            read_BCL = self.read(step).unflatten(1, (-1, at[0] * at[1])).transpose(2, 3)
            value = read_BCL.flatten(1, 2).unflatten(2, at)
        return replace(self, value=value).placed(self.codec.embed(tokens), cells)

    def placed(self, codes_BLC: Tensor, cells: Tensor) -> Canvas:
        """The canvas with code vectors at some cells (B|1, L, 3) in the place of what was there."""
        pictures, maps = len(codes_BLC), self.value.shape[1] // self.codec.latent_width
        height, width = self.value.shape[-2:]
        value = self.value.unflatten(1, (maps, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        place_BL = raster(cells, (height, width)).expand(pictures, -1)
        value = value.scatter(1, place_BL[..., None].expand(-1, -1, value.shape[2]), codes_BLC)
        value = value.unflatten(1, (maps, height, width)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        return replace(self, value=value)

    def after(self, contribution: Tensor) -> Canvas:
        """The canvas after a contribution that is known already."""
        return replace(self, value=self.codec.accumulate(self.value, contribution))

    def read(self, step: int) -> Tensor:
        """The un-embedded input of a step: the canvas at that step's grid, (B, maps h w, C), by the codec's rule;
        all cells of it, also where the step predicts some."""
        at = self.plan.steps[step]
        maps = self.value.reshape(-1, self.codec.latent_width, *self.value.shape[-2:])
        small = self.codec.resize(maps, at.grid, self.codec.read_rule)
        return small.flatten(2).transpose(1, 2).reshape(self.value.shape[0], -1, self.codec.latent_width)

    def map(self, index: int = -1) -> Tensor:
        """One map of the latent, (B, C, H, W); the last is the picture."""
        c = self.codec.latent_width
        maps = self.value.shape[1] // c
        index = index % maps
        return self.value[:, index * c:(index + 1) * c]

    def gather(self, items: Tensor) -> Canvas:
        """The canvases of the pictures ``items``, in that order."""
        return replace(self, value=self.value[items])
