"""The pyramid loop: a latent is taken apart scale after scale, each scale coding what the scales before left over.

One loop serves every pyramid: vector quantisation, bitwise codes, frequency bands, whole drafts that replace each
other, and the objectives that corrupt what is written and let the later scales code the correction. What a scale aims
at and what is left over are the codec's rules.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.plan import Plan, raster


class Pyramid(NamedTuple):
    """The tokens of every step (B, L_k), the un-embedded input that each step had (None for the first), the canvas."""

    tokens: list[Tensor]
    reads: list[Tensor | None]
    canvas: Canvas


def encode(latent_BCHW: Tensor, canvas: Canvas, quantise: Callable[[int, Tensor], Tensor],
           corrupt: Callable[[int, Tensor], Tensor] | None = None,
           each: Callable[[int, Tensor, Canvas], None] | None = None, order: Tensor | None = None,
           target: Callable[[int, Tensor], Tensor] | None = None) -> Pyramid:
    """Residual encoding (VAR, arXiv 2404.02905, algorithm 1; NFIG, arXiv 2503.07076, eq. 3).

    For every step k: rest += target_k - target_(k-1), z = area-resize(rest), r_k = quantise(k, z), rest -=
    contribution(r_k), canvas += the same (or as the codec has it). So a step codes target_k - canvas; VAR's target is
    the latent at every step.

    latent_BCHW: (B, maps * C, H, W); quantise: (k, z of (B, C, h, w)) -> tokens (B, h * w) or codes (B, h * w, C);
    corrupt: (k, tokens) -> the tokens that are written instead, so that later scales code against the corrupted
    canvas; each: called after every step with (k, z, canvas). Two maps in a step are coded side by side. order
    (B|1, L, 3): the cells of all rows, where steps predict a part of theirs; by default the plan's own. target:
    (k, latent) -> (B, maps * C, H, W), in the place of the codec's own rule.
    """
    latent, tokens, reads = latent_BCHW.float(), [], []
    rest, aimed = latent, latent
    width, codec, plan = canvas.codec.latent_width, canvas.codec, canvas.plan
    for k, step in enumerate(plan):
        goal = codec.target(k, plan, latent) if target is None else target(k, latent)
        if goal is not aimed:  # the latent itself at every step costs nothing, and no rounding
            rest, aimed = rest + (goal - aimed), goal
        reads.append(canvas.read(k) if k else None)
        z = codec.resize(rest.reshape(-1, width, *rest.shape[-2:]), step.grid, "area")
        found = quantise(k, z)
        found = found.reshape(rest.shape[0], -1, *found.shape[2:])
        if step.count is not None:
            cells = cells_of(canvas.plan, k, order)
            found = chosen(found, cells, step.grid)
            tokens.append(found)
            canvas = canvas.write(k, found if corrupt is None else corrupt(k, found), cells)
            continue
        tokens.append(found)
        written = found if corrupt is None else corrupt(k, found)
        contribution = canvas.contribution(k, written)
        rest = codec.leftover(rest, contribution)
        canvas = canvas.after(contribution)
        if each is not None:
            each(k, z, canvas)
    return Pyramid(tokens, reads, canvas)


def replay(tokens: list[Tensor], canvas: Canvas, until: int | None = None, order: Tensor | None = None) -> Pyramid:
    """Write known tokens step after step: the canvas and the input of every step (teacher forcing, flow 2)."""
    reads: list[Tensor | None] = []
    for k, step_tokens in enumerate(tokens[:until]):
        reads.append(canvas.read(k) if k else None)
        canvas = canvas.write(k, step_tokens, cells_of(canvas.plan, k, order))
    return Pyramid(tokens[:until], reads, canvas)


def cells_of(plan: Plan, step: int, order: Tensor | None) -> Tensor:
    """The cells (B|1, L, 3) of a step's rows in an order of all rows (B|1, L, 3), by default the plan's own."""
    whole = plan.cells[None] if order is None else order
    return whole[:, plan.span(step, step + 1)]


def chosen(tokens: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens (B, L, ...) at some cells (B|1, L, 3), of those of whole maps of a grid, (B, maps h w, ...)."""
    place_BL = raster(cells, grid).expand(len(tokens), -1).to(tokens.device)
    shape = (*place_BL.shape, *tokens.shape[2:])
    return tokens.gather(1, place_BL.reshape(*place_BL.shape, *(1,) * (tokens.ndim - 2)).expand(shape))


def signal_to_noise(latent_BCHW: Tensor, tokens: list[Tensor], canvas: Canvas) -> Tensor:
    """SNR of the partial canvas after every step, (B, K): |f|^2 / |f - f_k|^2 for the latent f that the tokens code."""
    found, latent = [], latent_BCHW.float()
    for k, step_tokens in enumerate(tokens):
        canvas = canvas.write(k, step_tokens)
        noise = (latent - canvas.value).square().sum((1, 2, 3))
        found.append(latent.square().sum((1, 2, 3)) / noise)
    return torch.stack(found, 1)
