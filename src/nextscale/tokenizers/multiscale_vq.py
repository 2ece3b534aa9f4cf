"""VAR's multi-scale residual VQ tokenizer (arXiv 2404.02905, section 3.2).

A latent is coded scale after scale by one codebook: each scale looks up the nearest code of what is left, the code
map is resized up (bicubic), passed through a convolution phi, and added to the canvas.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.layers.resize import ResizeRule, resize
from nextscale.plan import Plan
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig, Decoder, Encoder


@dataclass(frozen=True)
class MultiScaleVQConfig:
    """Everything that makes a multi-scale VQ tokenizer; the defaults are VAR's published one for 256 pixels.

    grids: the schedule, coarse to fine, as (h, w) pairs; its last grid is the latent's size at the trained resolution.
    phi_count: 0 gives every scale its own phi, 1 shares one, n > 1 shares n over the schedule. phi_ratio: share of
    the convolution in phi(h) = (1 - ratio) h + ratio conv(h). cosine: look codes up by angle. codebook_update:
    ``"gradient"`` as published, or ``"ema"``, an exponential moving average of what each code was used for.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    grids: tuple[tuple[int, int], ...] = tuple((g, g) for g in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    vocabulary: int = 4096
    phi_count: int = 4
    phi_ratio: float = 0.5
    cosine: bool = False
    commitment: float = 0.25
    codebook_update: Literal["gradient", "ema"] = "gradient"
    codebook_decay: float = 0.99

    @property
    def plan(self) -> Plan:
        return Plan.scales(self.grids)

    @property
    def bits(self) -> float:
        """Bits of a coded picture: tokens times log2 of the vocabulary."""
        return self.plan.length * float(np.log2(self.vocabulary))


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


class MultiScaleQuantiser(nn.Module):
    """Codebook and phi convolutions: the codec of VAR's canvas. Always computes in float32."""

    read_rule: ResizeRule = "area"
    usage_KV: Tensor
    assigned_V: Tensor
    assigned_sum_VC: Tensor

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        self.latent_width = config.autoencoder.latent_width
        self.config = config
        steps = len(config.grids)
        self.codebook = nn.Embedding(config.vocabulary, self.latent_width)
        phis = [nn.Conv2d(self.latent_width, self.latent_width, 3, padding=1)
                for _ in range(config.phi_count or steps)]
        self.phis = nn.ModuleList(phis)
        for phi in phis:  # starts as the identity, so a code means itself before phi has learned anything
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)  # type: ignore[arg-type]
        self.register_buffer("usage_KV", torch.zeros(steps, config.vocabulary))
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

    def accumulate(self, value: Tensor, contribution: Tensor) -> Tensor:
        return value + contribution

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

    @torch.no_grad()
    def record_usage(self, step: int, tokens: Tensor, decay: float) -> None:
        """Moving average of how often each code is hit at a scale in a batch (``usage_KV``)."""
        hits_V = torch.bincount(tokens.flatten(), minlength=self.config.vocabulary).float()
        self.usage_KV[step].mul_(decay).add_(hits_V, alpha=1 - decay)

    @torch.no_grad()
    def move_codebook(self, tokens: Tensor, z_NC: Tensor) -> None:
        """EMA codebook: each code becomes the moving average of what chose it (arXiv 1711.00937, appendix A)."""
        decay, index = self.config.codebook_decay, tokens.flatten()
        hits_V = torch.bincount(index, minlength=self.config.vocabulary).float()
        sums_VC = torch.zeros_like(self.assigned_sum_VC).index_add_(0, index, z_NC.float())
        self.assigned_V.mul_(decay).add_(hits_V, alpha=1 - decay)
        self.assigned_sum_VC.mul_(decay).add_(sums_VC, alpha=1 - decay)
        known = self.assigned_V > 1e-3
        self.codebook.weight[known] = (self.assigned_sum_VC[known] / self.assigned_V[known, None]).to(
            self.codebook.weight.dtype)

    @torch.no_grad()
    def revive(self, z_NC: Tensor, share: float) -> int:
        """Dead-code revival: codes hit less than ``share`` of the mean are replaced by vectors of the last batch.

        Returns how many were replaced; the vectors are drawn with torch's generator.
        """
        hits_V = self.usage_KV.sum(0)
        dead_D = (hits_V < share * hits_V.mean()).nonzero().flatten()[:len(z_NC)]
        if len(dead_D) == 0:
            return 0
        chosen = z_NC[torch.randperm(len(z_NC))[:len(dead_D)]].float()
        self.codebook.weight[dead_D] = chosen.to(self.codebook.weight.dtype)
        start = float(hits_V.mean())
        self.usage_KV[:, dead_D] = start / len(self.usage_KV)
        if self.config.codebook_update == "ema":
            self.assigned_V[dead_D] = start
            self.assigned_sum_VC[dead_D] = chosen * start
        return len(dead_D)

    def usage(self, share: float = 0.08) -> Tensor:
        """Share of the codes in use at every scale, (K,): hit at least ``share`` of the scale's even share."""
        even_K1 = self.usage_KV.sum(1, keepdim=True) / self.config.vocabulary
        return ((self.usage_KV >= even_K1 * share) & (self.usage_KV > 0)).float().mean(1)


class TrainingOutput(NamedTuple):
    """What the training pass of a tokenizer gives: the picture, its tokens, and the two latent losses."""

    reconstruction: Tensor
    tokens: list[Tensor]
    commitment_loss: Tensor
    codebook_loss: Tensor
    residuals_NC: Tensor


class MultiScaleVQ(nn.Module):
    """VAR's tokenizer: picture <-> latent <-> multi-scale codes."""

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        self.config = config
        width = config.autoencoder.latent_width
        self.encoder = Encoder(config.autoencoder)
        self.decoder = Decoder(config.autoencoder)
        self.to_latent = nn.Conv2d(width, width, 3, padding=1)
        self.from_latent = nn.Conv2d(width, width, 3, padding=1)
        self.quantiser = MultiScaleQuantiser(config)

    @property
    def plan(self) -> Plan:
        """The schedule that the tokenizer was trained with."""
        return self.config.plan

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the trained schedule."""
        h, w = self.plan.grid
        return h * self.config.autoencoder.factor, w * self.config.autoencoder.factor

    def latent(self, picture: Tensor) -> Tensor:
        """Continuous latent (B, C, H, W) in float32 of pictures (B, 3, S, S') in [-1, 1]."""
        return self.to_latent(self.encoder(picture.to(self.to_latent.weight.dtype))).float()

    def encode(self, picture: Tensor, plan: Plan | None = None,
               corrupt: Callable[[int, Tensor], Tensor] | None = None) -> pyramid.Pyramid:
        """Tokens of every scale, the teacher-forcing input of every scale, and the full canvas.

        Any schedule whose last grid is the latent's size will do. Raises InputError for others, and for a picture
        whose sides the factor doesn't divide.
        """
        plan = plan or self.plan
        self._check(picture, plan)
        latent = self.latent(picture)
        canvas = Canvas.empty(plan, self.quantiser, picture.shape[0], latent.device)
        return pyramid.encode(latent, canvas, lambda k, z: self.quantiser.nearest(z), corrupt)

    def decode(self, canvas: Canvas | Tensor) -> Tensor:
        """Picture (B, 3, S, S') in [-1, 1] of a canvas (its last map) or a latent; a partial canvas gives a preview."""
        latent = canvas.map(-1) if isinstance(canvas, Canvas) else canvas
        dtype = self.from_latent.weight.dtype
        return self.decoder(self.from_latent(latent.to(dtype))).float().clamp(-1, 1)

    def decode_tokens(self, tokens: list[Tensor], plan: Plan | None = None) -> Tensor:
        """Picture of multi-scale tokens; fewer scales than the plan has give a coarse preview."""
        plan = plan or self.plan
        canvas = Canvas.empty(plan, self.quantiser, tokens[0].shape[0], tokens[0].device)
        return self.decode(pyramid.replay(tokens, canvas).canvas)

    def forward(self, picture: Tensor) -> TrainingOutput:
        """Training pass: straight-through reconstruction and the latent losses, means over the scales.

        commitment = mean_k |sg(f_hat_k) - f|^2, codebook = mean_k |f_hat_k - sg(f)|^2, of the cumulative f_hat
        (published ``VectorQuantizer2.forward``). With an EMA codebook the second trains phi alone.
        """
        self._check(picture, self.plan)
        latent = self.latent(picture)
        commitment, codebook, vectors = [], [], []
        ema = self.config.codebook_update == "ema"

        def each(k: int, z: Tensor, canvas: Canvas) -> None:
            commitment.append(F.mse_loss(canvas.value.detach(), latent))
            codebook.append(F.mse_loss(canvas.value, latent.detach()))
            vectors.append(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))

        codec = _FrozenCodebook(self.quantiser) if ema else self.quantiser
        canvas = Canvas.empty(self.plan, codec, picture.shape[0], latent.device)
        found = pyramid.encode(latent.detach(), canvas, lambda k, z: self.quantiser.nearest(z), each=each)
        residuals_NC = torch.cat(vectors).detach()
        if self.training:
            for k, tokens in enumerate(found.tokens):
                self.quantiser.record_usage(k, tokens, self.config.codebook_decay)
            if ema:
                flat = torch.cat([t.flatten() for t in found.tokens])
                self.quantiser.move_codebook(flat, residuals_NC)
        quantised = latent + (found.canvas.value - latent).detach()
        picture_out = self.decoder(self.from_latent(quantised))
        return TrainingOutput(picture_out, found.tokens, torch.stack(commitment).mean(),
                              torch.stack(codebook).mean(), residuals_NC)

    def decode_only(self, picture: Tensor) -> TrainingOutput:
        """Training pass of the decoder alone: codes and canvas get no gradient, and the latent losses are 0."""
        with torch.no_grad():
            found = self.encode(picture)
        none = picture.new_zeros(())
        return TrainingOutput(self.decoder(self.from_latent(found.canvas.value)), found.tokens, none, none,
                              found.canvas.value.new_zeros(0, self.config.autoencoder.latent_width))

    def _check(self, picture: Tensor, plan: Plan) -> None:
        factor = self.config.autoencoder.factor
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise InputError(f"picture: expected a batch (B, 3, height, width), got shape {tuple(picture.shape)}")
        h, w = picture.shape[-2:]
        if h % factor or w % factor:
            raise InputError(f"picture: {h}x{w} pixels are not a multiple of the tokenizer's factor {factor}; "
                             f"resize to {h // factor * factor or factor}x{w // factor * factor or factor}")
        if plan.grid != (h // factor, w // factor):
            raise InputError(f"schedule: its last scale is {plan.grid[0]}x{plan.grid[1]} but a picture of {h}x{w} "
                             f"pixels has a latent of {h // factor}x{w // factor}; end the schedule there or resize "
                             "the picture")


class _FrozenCodebook:
    """The quantiser as a codec whose codes get no gradient, since they follow their moving average."""

    def __init__(self, quantiser: MultiScaleQuantiser):
        self.quantiser = quantiser
        self.latent_width, self.read_rule = quantiser.latent_width, quantiser.read_rule
        self.contribution, self.accumulate = quantiser.contribution, quantiser.accumulate

    def embed(self, tokens: Tensor) -> Tensor:
        return self.quantiser.embed(tokens).detach()
