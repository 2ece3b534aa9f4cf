"""A tokenizer: picture <-> latent <-> codes, the same for every kind of quantiser."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.layers.resize import resize
from nextscale.plan import Plan
from nextscale.registry import import_target
from nextscale.tokenizers import gaussian, pyramid
from nextscale.tokenizers.autoencoder import Decoder
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.quantiser import Quantiser
from nextscale.tokenizers.strips import decode_in_strips

QUANTISERS = {
    "vq": "nextscale.tokenizers.multiscale_vq:MultiScaleQuantiser",
    "l2-vq": "nextscale.tokenizers.l2_vq:L2Quantiser",
    "bsq": "nextscale.tokenizers.bitwise:SphericalBits",
    "lfq": "nextscale.tokenizers.bitwise:LookupFreeBits",
    "fsq": "nextscale.tokenizers.finite_scalar:FiniteScalars",
    "kl": "nextscale.tokenizers.gaussian:GaussianLatents",
}
"""Kind to class, imported on use."""
AUTOENCODERS = {
    "vqgan": ("nextscale.tokenizers.autoencoder:Encoder", "nextscale.tokenizers.autoencoder:Decoder"),
    "taesd": ("nextscale.tokenizers.tiny_autoencoder:TinyEncoder", "nextscale.tokenizers.tiny_autoencoder:TinyDecoder"),
}
"""Network to encoder and decoder, imported on use."""


MAKES_CODES = ("encoder.", "to_latent.", "quantiser.")
"""What of a tokenizer's tensors decides its codes, by how their names begin."""
STATISTICS = (".usage_KV", ".ones_KC", ".seen_K", ".assigned_V", ".assigned_sum_VC")
"""Which of these only count, by how their names end."""


class TrainingOutput(NamedTuple):
    """What the training pass of a tokenizer gives: the picture (not clamped), its tokens, and the latent losses.

    residuals_NC: the vectors that looked for a code, from which dead codes are revived. kl_loss: of kind ``kl`` alone,
    whose other latent losses are 0. latent_loss: |f - f_hat|^2 of the sum of all scales, where there is one.
    """

    reconstruction: Tensor
    tokens: list[Tensor]
    commitment_loss: Tensor
    codebook_loss: Tensor
    entropy_loss: Tensor
    residuals_NC: Tensor
    kl_loss: Tensor | None = None
    latent_loss: Tensor | None = None


class Tokenizer(nn.Module):
    """Encoder, quantiser and decoder.

    Raises MissingExtraError where the kind needs a package that isn't installed.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        sizes = config.autoencoder
        moments = 2 if config.continuous else 1  # a mean and a log-variance
        encoder, decoder = (cast("type[nn.Module]", import_target(name)) for name in AUTOENCODERS[sizes.network])
        self.encoder: nn.Module = encoder(sizes, moments * sizes.features)
        self.decoder: Any = decoder(sizes)
        kernel, padding = sizes.latent_kernel, sizes.latent_kernel // 2
        self.to_latent: nn.Module = nn.Identity()
        self.from_latent: nn.Module = nn.Identity()
        if kernel:
            self.to_latent = nn.Conv2d(moments * sizes.features, moments * sizes.latent_width, kernel, padding=padding)
            self.from_latent = nn.Conv2d(sizes.latent_width, sizes.features, kernel, padding=padding)
        kind = cast("type[Quantiser]", import_target(QUANTISERS[config.kind]))
        self.quantiser: Any = kind(config)

    @property
    def plan(self) -> Plan:
        """The schedule that the tokenizer was trained with."""
        return self.config.plan

    def plan_for(self, picture: Tensor) -> Plan:
        """The tokenizer's schedule stretched to pictures (B, 3, S, S') of another size, as aspect-ratio buckets have
        them; its own for its own size."""
        factor = self.config.factor
        return self.plan.stretched((picture.shape[-2] // factor, picture.shape[-1] // factor))

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width in pixels of the trained schedule."""
        h, w = self.plan.grid
        return h * self.config.factor, w * self.config.factor

    def latent(self, picture: Tensor) -> Tensor:
        """Continuous latent (B, C, H, W) in float32, its patches folded, of pictures (B, 3, S, S') in [-1, 1]; of kind
        ``kl`` the scaled mean."""
        found = self.to_latent(self.encoder(picture.to(self.decoder.output.weight.dtype))).float()
        return self.quantiser.scaled(gaussian.mean_of(found)) if self.config.continuous else self.quantiser.fold(found)

    def moments(self, picture: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, H, W) of the latent of pictures, not scaled. Raises InputError for kinds whose
        latent is no Gaussian."""
        if not self.config.continuous:
            raise InputError(f"kind {self.config.kind!r} codes its latent; moments are those of kind 'kl'")
        raw = self.to_latent(self.encoder(self.whole_cells(picture).to(self.decoder.output.weight.dtype))).float()
        return gaussian.clamped(raw)

    def cached_moments(self, picture: Tensor) -> Tensor:
        """The moments (B, L, 2C) that a token cache holds, of all ``cached_grids``; those of a coarser one are of the
        picture reduced to its size, bicubically as Hi-MAR's published code does it."""
        factor, parts = self.config.factor, []
        for h, w in self.config.cached_grids:
            parts.append(self.moments(resize(picture, (h * factor, w * factor), "bicubic")).flatten(2).transpose(1, 2))
        return torch.cat(parts, 1)

    def encode(self, picture: Tensor, plan: Plan | None = None, corrupt: Callable[[int, Tensor], Tensor] | None = None,
               order: Tensor | None = None) -> pyramid.Pyramid:
        """Tokens of every scale, the teacher-forcing input of every scale, and the full canvas. corrupt, order: as
        ``pyramid.encode`` has them.

        Any schedule whose last grid is the latent's size will do. Raises InputError for others, and for a picture
        whose sides the factor doesn't divide.
        """
        plan = plan or self.plan
        self._check(picture, plan)
        latent = self.latent(picture)
        canvas = Canvas.empty(plan, self.quantiser, picture.shape[0], latent.device)
        return pyramid.encode(latent, canvas, lambda k, z: self.quantiser.quantise(z), corrupt, order=order)

    def decode(self, canvas: Canvas | Tensor, strips: int | None = None) -> Tensor:
        """Picture (B, 3, S, S') in [-1, 1] of a canvas (its last map) or a latent; a partial canvas gives a preview.

        strips: without gradients, in strips of so many rows, see ``decode_in_strips``; None for whole maps."""
        latent = canvas.map(-1) if isinstance(canvas, Canvas) else canvas
        dtype = self.decoder.output.weight.dtype
        if self.config.continuous:
            latent = self.quantiser.unscaled(latent)
        features = self.from_latent(self.quantiser.unfold(latent).to(dtype))
        if strips is None or not isinstance(self.decoder, Decoder):  # a tiny one holds little
            found = self.decoder(features)
        else:
            found = decode_in_strips(self.decoder, features, strips)
        return found.float().clamp(-1, 1)

    def decode_tokens(self, tokens: list[Tensor], plan: Plan | None = None, order: Tensor | None = None) -> Tensor:
        """Picture of the tokens of every scale; fewer scales than the plan has give a coarse preview."""
        plan = plan or self.plan
        canvas = Canvas.empty(plan, self.quantiser, tokens[0].shape[0], tokens[0].device)
        return self.decode(pyramid.replay(tokens, canvas, order=order).canvas)

    def forward(self, picture: Tensor, entropy: bool = True, plan: Plan | None = None) -> TrainingOutput:
        """Training pass: straight-through reconstruction and the latent losses (see the kind's ``train_pass``).

        entropy: whether the entropy loss is wanted; zero is given otherwise. plan: another schedule than the
        tokenizer's own, with as many scales, for pictures of another size.
        """
        plan = plan or self.plan
        self._check(picture, plan)
        if self.config.continuous:
            return self._continuous_pass(picture)
        latent = self.latent(picture)
        canvas = Canvas.empty(plan, self.quantiser, picture.shape[0], latent.device)
        found = self.quantiser.train_pass(latent, canvas, entropy)
        if self.training:
            for k, tokens in enumerate(found.tokens):
                self.quantiser.record_usage(k, tokens, self.config.codebook_decay)
        picture_out = self.decoder(self.from_latent(self.quantiser.unfold(found.latent_BCHW)))
        return TrainingOutput(picture_out, found.tokens, found.commitment_loss, found.codebook_loss,
                              found.entropy_loss, found.vectors_NC, latent_loss=found.latent_loss)

    def _continuous_pass(self, picture: Tensor) -> TrainingOutput:
        """The pass of latent diffusion's autoencoder: a draw of the latent is decoded, with torch's generator."""
        moments = self.moments(picture)
        if self.training:
            self.quantiser.record_scale(moments)
        found = self.decoder(self.from_latent(gaussian.draw(moments)))
        none = picture.new_zeros(())
        # A colour value's share, so that its weight is the published one beside a mean over colour values.
        divergence = gaussian.divergence(moments) / picture[0].numel()
        return TrainingOutput(found, [], none, none, none, picture.new_zeros(0, self.quantiser.latent_width),
                              divergence)

    def decode_only(self, picture: Tensor, plan: Plan | None = None) -> TrainingOutput:
        """Training pass of the decoder alone: codes and canvas get no gradient, and the latent losses are 0."""
        with torch.no_grad():
            found = self.encode(picture, plan)
            latent = found.canvas.value
            latent = self.quantiser.unscaled(latent) if self.config.continuous else latent
        none, width = picture.new_zeros(()), self.config.autoencoder.latent_width
        latent = self.quantiser.unfold(latent)
        return TrainingOutput(self.decoder(self.from_latent(latent)), found.tokens, none, none, none,
                              picture.new_zeros(0, width))

    def draft(self, picture: Tensor, step: int, entropy: bool = True) -> TrainingOutput:
        """Training pass of one scale alone, where scales replace each other: the latent resized to its grid, coded and
        decoded to a picture of its own size (B, 3, factor h, factor w)."""
        latent = self.latent(self.whole_cells(picture))
        plan = Plan((self.plan.steps[step],), self.plan.visible)
        small = resize(latent, plan.grid, "area")
        canvas = Canvas.empty(plan, self.quantiser, len(picture), latent.device)
        found = self.quantiser.train_pass(small, canvas, entropy)
        if self.training:
            self.quantiser.record_usage(step, found.tokens[0], self.config.codebook_decay)
        return TrainingOutput(self.decoder(self.from_latent(found.latent_BCHW)), found.tokens, found.commitment_loss,
                              found.codebook_loss, found.entropy_loss, found.vectors_NC, latent_loss=found.latent_loss)

    def whole_cells(self, picture: Tensor) -> Tensor:
        """The pictures (B, 3, S, S'), whose sides must be multiples of the factor. Raises InputError for others."""
        factor = self.config.factor
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise InputError(f"picture: expected a batch (B, 3, height, width), got shape {tuple(picture.shape)}")
        h, w = picture.shape[-2:]
        if h % factor or w % factor:
            raise InputError(f"picture: {h}x{w} pixels are not a multiple of the tokenizer's factor {factor}; "
                             f"resize to {h // factor * factor or factor}x{w // factor * factor or factor}")
        return picture

    def _check(self, picture: Tensor, plan: Plan) -> None:
        factor = self.config.factor
        h, w = self.whole_cells(picture).shape[-2:]
        if plan.grid != (h // factor, w // factor):
            raise InputError(f"schedule: its last scale is {plan.grid[0]}x{plan.grid[1]} but a picture of {h}x{w} "
                             f"pixels has a latent of {h // factor}x{w // factor}; end the schedule there or resize "
                             "the picture")
        if len(plan) > 1 and self.config.kind == "fsq":
            raise InputError(f"schedule: kind {self.config.kind!r} codes a single map, not {len(plan)} scales")


def same_codes(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers make the same codes, but for a rounding to bf16, which models are saved in."""
    ours, theirs = ({name: tensor.detach().bfloat16().cpu() for name, tensor in each.state_dict().items()
                     if name.startswith(MAKES_CODES) and not name.endswith(STATISTICS)} for each in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
