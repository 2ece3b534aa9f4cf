"""Editing without training: the known tokens of a picture are forced, scale after scale (VAR, section 5.3)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.context import Hook
from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.run import Run, Sample
from nextscale.tokenizers.pyramid import cells_of

EditRule = Literal["tokens", "latent"]
"""What of the known region is kept: its tokens at every scale (VAR), or its latent after every scale (CoDe)."""


def keep_masks(keep_B1HW: Tensor, plan: Plan) -> list[Tensor]:
    """Which cells of every step are kept, (B, L_k) bool, from a mask at the last grid (1 keeps).

    VAR's rule: the mask is resized bilinearly and thresholded strictly above one half; a step of at most three cells
    is always kept, since it says little but the overall tone.
    """
    masks = []
    for step in plan:
        h, w = step.grid
        if h * w <= 3:
            kept = torch.ones(len(keep_B1HW), h * w, dtype=torch.bool, device=keep_B1HW.device)
        else:
            kept = F.interpolate(keep_B1HW.float(), size=(h, w), mode="bilinear", align_corners=False).flatten(1) > 0.5
        kept = kept.repeat(1, step.maps)
        masks.append(kept if step.places is None else kept[:, list(step.places)])
    return masks


def latent_mask(redraw_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """From pixels to redraw, (B, S, S') bool, the cells to keep, (B, 1, h, w): those that no such pixel touches."""
    touched = F.adaptive_max_pool2d(redraw_BHW[:, None].float(), grid)
    return 1 - (touched > 0).float()


def keep_first(plan: Plan, steps: int, pictures: int, device: torch.device) -> list[Tensor]:
    """Masks (B, h * w) bool that keep the first ``steps`` steps whole and nothing of the others."""
    return [torch.full((pictures, step.rows), k < steps, device=device) for k, step in enumerate(plan)]


def covered_cells(redraw_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """From pixels to redraw, (B, S, S') bool, the cells to keep, (B, 1, h, w), by the pixel nearest to each: the rule
    of CoDe's inpainting."""
    return 1 - F.interpolate(redraw_BHW[:, None].float(), size=grid, mode="nearest")


def partial_canvases(tokens: Sequence[Tensor], canvas: Canvas, order: Tensor | None = None) -> Tensor:
    """The canvas after every step of known tokens, (B, K, C, H, W). Raises InputError where steps replace each other,
    so that canvases have different sizes."""
    found = []
    for k, step_tokens in enumerate(tokens):
        canvas = canvas.write(k, step_tokens, cells_of(canvas.plan, k, order))
        found.append(canvas.value)
    if any(value.shape != found[-1].shape for value in found):
        raise InputError("edit: this tokenizer's scales replace each other, so there is no partial latent to keep; "
                         "use rule='tokens'")
    return torch.stack(found, 1)


class KnownLatent(Hook):
    """Keep the latent of known cells: after step k the canvas is g_k there, and what was drawn elsewhere.

    f_k = (f_(k-1) + phi(h_k)) (1 - m) + g_k m, with g_k the partial latent of the known picture: the zero-shot
    inpainting of CoDe's published code (arXiv 2411.17787), which fits any residual pyramid. Unlike forced tokens it
    leaves the tokens as they were drawn: they alone don't make the picture again.

    latents: g, (B, K, C, H, W); keep: m, (B, 1, H, W), 1 where the picture is known.
    """

    def __init__(self, latents: Tensor, keep: Tensor):
        self.latents, self.keep = latents, keep

    def end(self, run: Run, step: int) -> None:
        latents, keep = run.carry("known.latents", self.latents), run.carry("known.keep", self.keep)
        run.canvas = replace(run.canvas, value=torch.where(keep > 0, latents[:, step], run.canvas.value))
        if not run.done:
            run.reads[-1] = run.canvas.read(run.cursor)

    def part(self, pictures: slice) -> KnownLatent:
        """The same for some of the pictures."""
        return KnownLatent(self.latents[pictures], self.keep[pictures])


class ForcedTokens(Hook):
    """Replace chosen tokens by given ones where a mask keeps them.

    tokens: (B, L_k) or (B, L_k, C) a step; keep: (B, L_k) bool a step, for the pictures of the run at its first step; a
    gathered run carries its own. Where codes are written instead of tokens (smooth mode), the kept cells get the given
    tokens' own codes. Given tokens count as certain: their log-probability is 0, their confidence infinite.
    """

    def __init__(self, tokens: Sequence[Tensor], keep: Sequence[Tensor]):
        self.given, self.keep = tokens, keep

    def tokens(self, run: Run, sample: Sample) -> Sample:
        span = run.plan.span(run.cursor, run.cursor + 1)
        given = run.carry("forced.tokens", torch.cat(list(self.given), 1))[:, span]
        keep = run.carry("forced.keep", torch.cat(list(self.keep), 1))[:, span]
        codes, log_prob, confidence = sample.codes, sample.log_prob, sample.confidence
        if codes is not None:
            codes = torch.where(keep[..., None], run.canvas.codec.embed(given), codes)
        of_tokens = keep[..., None] if sample.tokens.ndim > keep.ndim else keep
        return replace(sample, tokens=torch.where(of_tokens, given, sample.tokens), codes=codes,
                       log_prob=None if log_prob is None else log_prob.masked_fill(keep, 0.0),
                       confidence=None if confidence is None else confidence.masked_fill(keep, torch.inf))

    def part(self, pictures: slice) -> ForcedTokens:
        """The same for some of the pictures."""
        return ForcedTokens([t[pictures] for t in self.given], [k[pictures] for k in self.keep])
