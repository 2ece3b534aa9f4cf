"""VAR's multi-scale residual VQ tokenizer (arXiv 2404.02905, section 3.2).

A latent is coded scale after scale by one codebook: each scale looks up the nearest code of what is left, the code
map is resized up (bicubic), passed through a convolution phi, and added to the canvas.
"""
from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.layers.resize import resize
from nextscale.parallel import total
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.quantiser import CodebookQuantiser, Quantised


@functools.lru_cache
def phi_table(steps: int, phi_count: int) -> tuple[int, ...]:
    """Which phi each scale uses: the one whose tick lies nearest to k / (K - 1).

    Ten scales on four phis have two exact ties, which the published code leaves to float64 rounding: the ticks are
    computed as it does, since float32 or exact arithmetic gives another table and silently worse pictures.
    """
    if phi_count == 0:
        return tuple(range(steps))
    if phi_count == 1:
        return (0,) * steps
    edge = 1 / 3 / phi_count if phi_count == 4 else 1 / 2 / phi_count
    ticks = np.linspace(edge, 1 - edge, phi_count)
    return tuple(int(np.argmin(np.abs(ticks - k / max(steps - 1, 1)))) for k in range(steps))


class MultiScaleQuantiser(CodebookQuantiser):
    """Codebook and phi convolutions: the codec of VAR's canvas."""

    assigned_V: Tensor
    assigned_sum_VC: Tensor

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        steps = len(config.grids)
        phis = [nn.Conv2d(self.latent_width, self.latent_width, 3, padding=1)
                for _ in range(config.phi_count or steps)]
        self.phis = nn.ModuleList(phis)
        for phi in phis:  # starts as the identity, so a code means itself before phi has learned anything
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)  # type: ignore[arg-type]
        if config.codebook_update == "ema":
            self.register_buffer("assigned_V", torch.zeros(config.vocabulary))
            self.register_buffer("assigned_sum_VC", torch.zeros(config.vocabulary, self.latent_width))

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes of tokens (B, L) as (B, L, C); code vectors (B, L, C) pass through."""
        return tokens.float() if tokens.is_floating_point() else self.codebook.weight.float()[tokens]

    def contribution(self, step: int, steps: int, codes_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """phi_k(bicubic(codes)), the residual that a scale adds, (B, C, H, W)."""
        with torch.autocast(codes_BCHW.device.type, enabled=False):
            h = resize(codes_BCHW, grid, "bicubic")
            phi, ratio = self.phis[phi_table(steps, self.config.phi_count)[step]], self.config.phi_ratio
            weight, bias = phi.get_parameter("weight").float(), phi.get_parameter("bias").float()
            return h * (1 - ratio) + F.conv2d(h, weight, bias, padding=1) * ratio

    def nearest(self, z_BCHW: Tensor) -> Tensor:
        """Index of the nearest code for every cell, (B, h * w): least Euclidean distance, or angle if ``cosine``."""
        with torch.autocast(z_BCHW.device.type, enabled=False), torch.no_grad():
            z_NC = z_BCHW.float().permute(0, 2, 3, 1).reshape(-1, self.latent_width)
            codes_VC = self.codebook.weight.float()
            if self.config.cosine:
                index_N = (F.normalize(z_NC, dim=-1) @ F.normalize(codes_VC, dim=-1).T).argmax(1)
            else:
                distance_NV = torch.addmm(codes_VC.square().sum(1)[None] + z_NC.square().sum(1, keepdim=True),
                                          z_NC, codes_VC.T, alpha=-2)
                index_N = distance_NV.argmin(1)
        return index_N.reshape(z_BCHW.shape[0], -1)

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        return self.nearest(z_BCHW)

    def train_pass(self, latent_BCHW: Tensor, canvas: Canvas, entropy: bool = True) -> Quantised:
        """One straight-through step over the whole pyramid, and the latent losses, means over the scales:

        commitment = mean_k |sg(f_hat_k) - f_k|^2, codebook = mean_k |f_hat_k - sg(f_k)|^2, of the cumulative f_hat and
        of what scale k aims at: f_k = f in VAR (published ``VectorQuantizer2.forward``), its frequencies up to the
        scale's edge with ``bands``. With an EMA codebook the second trains phi alone. There is no entropy loss.
        """
        commitment, codebook, vectors = [], [], []

        def each(k: int, z: Tensor, canvas: Canvas) -> None:
            goal = self.target(k, canvas.plan, latent_BCHW)
            commitment.append(F.mse_loss(canvas.value.detach(), goal))
            codebook.append(F.mse_loss(canvas.value, goal.detach()))
            vectors.append(z.flatten(2).transpose(1, 2))

        with torch.autocast(latent_BCHW.device.type, enabled=False):
            latent_BCHW = latent_BCHW.float()
            if self.config.codebook_update == "ema":
                canvas = replace(canvas, codec=_FrozenCodebook(self))
            found = pyramid.encode(latent_BCHW.detach(), canvas, lambda k, z: self.nearest(z), each=each)
            vectors_NC = torch.cat(vectors, 1).detach().flatten(0, 1)
            if self.training and self.config.codebook_update == "ema":
                self.move_codebook(torch.cat(found.tokens, 1), vectors_NC)
            out = latent_BCHW + (found.canvas.value - latent_BCHW).detach()
            return Quantised(out, found.tokens, torch.stack(commitment).mean(), torch.stack(codebook).mean(),
                             out.new_zeros(()), vectors_NC, F.mse_loss(found.canvas.value, latent_BCHW))

    @torch.no_grad()
    def move_codebook(self, tokens: Tensor, z_NC: Tensor) -> None:
        """EMA codebook: each code becomes the moving average of what chose it (arXiv 1711.00937, appendix A)."""
        decay, index = self.config.codebook_decay, tokens.flatten()
        hits_V = total(torch.bincount(index, minlength=self.config.vocabulary).float())
        sums_VC = total(torch.zeros_like(self.assigned_sum_VC).index_add_(0, index, z_NC.float()))
        self.assigned_V.mul_(decay).add_(hits_V, alpha=1 - decay)
        self.assigned_sum_VC.mul_(decay).add_(sums_VC, alpha=1 - decay)
        known = self.assigned_V > 1e-3
        self.codebook.weight[known] = (self.assigned_sum_VC[known] / self.assigned_V[known, None]).to(
            self.codebook.weight.dtype)

    def on_revival(self, codes_D: Tensor, vectors_DC: Tensor, hits: float) -> None:
        if self.config.codebook_update == "ema":
            self.assigned_V[codes_D] = hits
            self.assigned_sum_VC[codes_D] = vectors_DC * hits


class _FrozenCodebook:
    """The quantiser as a codec whose codes get no gradient, since they follow their moving average."""

    def __init__(self, quantiser: MultiScaleQuantiser):
        self.quantiser = quantiser
        self.latent_width, self.read_rule = quantiser.latent_width, quantiser.read_rule
        self.contribution, self.accumulate = quantiser.contribution, quantiser.accumulate
        self.leftover, self.target, self.resize = quantiser.leftover, quantiser.target, quantiser.resize

    def embed(self, tokens: Tensor) -> Tensor:
        return self.quantiser.embed(tokens).detach()
