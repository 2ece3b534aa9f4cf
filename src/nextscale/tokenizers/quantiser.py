"""What all quantisers share: the codec of a canvas, the training pass, and the record of which codes are used.

A quantiser turns a latent into tokens and tokens into a latent. It computes in float32 whatever the precision around
it: a code looked up in bfloat16 is often another code.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.layers.resize import ResizeRule, resize
from nextscale.parallel import gather, total
from nextscale.plan import Plan
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.bands import band_target
from nextscale.tokenizers.config import TokenizerConfig

MOST_COUNTED = 2**18
"""Vocabularies up to here have every code counted; of larger ones (bitwise) the single bits are."""


class Quantised(NamedTuple):
    """A quantiser's training pass.

    latent_BCHW: what the decoder sees, its gradient passed straight through to the encoder; tokens: of every scale;
    commitment_loss, codebook_loss, entropy_loss: unweighted, zero where the kind has none; vectors_NC: the vectors
    that looked for a code, without gradient, picture after picture; latent_loss: |f - f_hat|^2 of the whole sum of the
    scales, with a gradient to the latent, and to codes and what follows them where these learn by gradient.
    """

    latent_BCHW: Tensor
    tokens: list[Tensor]
    commitment_loss: Tensor
    codebook_loss: Tensor
    entropy_loss: Tensor
    vectors_NC: Tensor
    latent_loss: Tensor


class StraightThrough(NamedTuple):
    """One scale of the training pass: codes (N, C) with a gradient to what they stand for, tokens (N, ...), losses."""

    codes_NC: Tensor
    tokens: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    entropy_loss: Tensor


class Quantiser(nn.Module):
    """Base of the kinds; itself a :class:`nextscale.canvas.Codec`.

    A kind gives ``quantise`` (vectors to tokens), ``embed`` (tokens to codes) and ``straight_through`` (the same with
    gradients and losses); one with a pyramid of its own overrides ``train_pass``.
    """

    read_rule: ResizeRule = "area"
    usage_KV: Tensor

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config, self.latent_width = config, config.latent_width
        if config.vocabulary <= MOST_COUNTED and not config.continuous:
            self.register_buffer("usage_KV", torch.zeros(len(config.grids), config.vocabulary))

    # The codec

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes (B, L, C) of tokens (B, L) (or of bits (B, L, C)); code vectors (B, L, C) pass through."""
        raise NotImplementedError

    def codes_VC(self) -> Tensor:
        """Every code. Raises InputError where there are too many to list (bitwise kinds)."""
        if self.config.vocabulary > MOST_COUNTED:
            raise InputError(f"kind {self.config.kind!r} has 2^{self.latent_width} codes here, too many to list")
        return self.embed(torch.arange(self.config.vocabulary, device=self.usage_KV.device)[None])[0]

    def contribution(self, step: int, steps: int, codes_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the codes of a scale (B, C, h, w) add to the latent, (B, C, H, W)."""
        return codes_BCHW

    def accumulate(self, value: Tensor, contribution: Tensor) -> Tensor:
        return value + contribution

    def leftover(self, rest: Tensor, contribution: Tensor) -> Tensor:
        # Data for the scales behind, not a path for gradients (published code of VAR and Infinity).
        return rest - contribution.detach()

    def fold(self, latent: Tensor) -> Tensor:
        """A latent (B, C, p H, p W) with every patch of p x p cells as one, (B, p p C, H, W): channel c of the cell at
        (y, x) of a patch becomes channel c p p + y p + x."""
        return F.pixel_unshuffle(latent, self.config.patch) if self.config.patch > 1 else latent

    def unfold(self, latent: Tensor) -> Tensor:
        """The way back."""
        return F.pixel_shuffle(latent, self.config.patch) if self.config.patch > 1 else latent

    def resize(self, map_BCHW: Tensor, grid: tuple[int, int], rule: ResizeRule) -> Tensor:
        """A folded map at another grid: its cells, not its patches, are what is resized."""
        p = self.config.patch
        return self.fold(resize(self.unfold(map_BCHW), (p * grid[0], p * grid[1]), rule))

    def target(self, step: int, plan: Plan, latent: Tensor) -> Tensor:
        if self.config.bands == "none":
            return latent
        return band_target(latent, step, plan.grids, self.config.bands)

    # Encoding

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        """Tokens (B, h * w) of a map (B, C, h, w), without gradient."""
        raise NotImplementedError

    def train_pass(self, latent_BCHW: Tensor, canvas: Canvas, entropy: bool = True) -> Quantised:
        """Quantise a latent (B, C, H, W) with gradients and losses, scale by scale on an empty canvas.

        Every scale passes its gradient straight through; losses are means over the scales. entropy: whether its loss
        is wanted, which may cost more than all the rest.
        """
        scales: list[StraightThrough] = []
        vectors: list[Tensor] = []  # of every scale, (B, h * w, C)
        pictures = latent_BCHW.shape[0]

        def quantise(k: int, z: Tensor) -> Tensor:
            vectors.append(z.flatten(2).transpose(1, 2))
            scales.append(self.straight_through(vectors[-1].flatten(0, 1), entropy))
            return scales[-1].codes_NC.view(pictures, -1, self.latent_width)

        with torch.autocast(latent_BCHW.device.type, enabled=False):
            canvas = pyramid.encode(latent_BCHW.float(), canvas, quantise).canvas
            commitment, codebook, of_entropy = torch.stack([torch.stack(scale[2:]) for scale in scales]).mean(0)
        tokens = [scale.tokens.view(pictures, -1, *scale.tokens.shape[1:]) for scale in scales]
        return Quantised(canvas.value, tokens, commitment, codebook, of_entropy,
                         torch.cat(vectors, 1).detach().flatten(0, 1),
                         F.mse_loss(latent_BCHW.float(), canvas.value.detach()))

    def straight_through(self, z_NC: Tensor, entropy: bool) -> StraightThrough:
        """Quantise vectors (N, C) with gradients and losses."""
        raise NotImplementedError

    # The record of usage

    @torch.no_grad()
    def record_usage(self, step: int, tokens: Tensor, decay: float) -> None:
        """Moving average of how often each code is hit at a scale in a batch (``usage_KV``), over all processes."""
        hits_V = total(torch.bincount(tokens.flatten(), minlength=self.config.vocabulary).float())
        self.usage_KV[step].mul_(decay).add_(hits_V, alpha=1 - decay)

    def usage(self, share: float = 0.08) -> Tensor:
        """Share of the codes in use at every scale, (K,): hit at least ``share`` of the scale's even share."""
        even_K1 = self.usage_KV.sum(1, keepdim=True) / self.config.vocabulary
        return ((self.usage_KV >= even_K1 * share) & (self.usage_KV > 0)).float().mean(1)

    def perplexity(self) -> Tensor:
        """How many codes, used evenly, would vary as much as those recorded at every scale, (K,): exp(entropy)."""
        share_KV = self.usage_KV / self.usage_KV.sum(1, keepdim=True).clamp_min(1e-12)
        return torch.exp(-(share_KV * share_KV.clamp_min(1e-12).log()).sum(1))


class CodebookQuantiser(Quantiser):
    """A quantiser with a learned codebook, whose dead codes can be revived."""

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.codebook = nn.Embedding(config.vocabulary, self.latent_width)

    @torch.no_grad()
    def revive(self, z_NC: Tensor, share: float) -> int:
        """Dead-code revival: codes hit less than ``share`` of the mean are replaced by vectors of the last batch.

        Returns how many were replaced; the vectors are drawn with torch's generator, from those of all processes.
        """
        hits_V, z_NC = self.usage_KV.sum(0), gather(z_NC)
        dead_D = (hits_V < share * hits_V.mean()).nonzero().flatten()[:len(z_NC)]
        if len(dead_D) == 0:
            return 0
        chosen = z_NC[torch.randperm(len(z_NC))[:len(dead_D)]].float()
        self.codebook.weight[dead_D] = chosen.to(self.codebook.weight.dtype)
        start = float(hits_V.mean())
        self.usage_KV[:, dead_D] = start / len(self.usage_KV)
        self.on_revival(dead_D, chosen, start)
        return len(dead_D)

    def on_revival(self, codes_D: Tensor, vectors_DC: Tensor, hits: float) -> None:
        """What else has to be set where codes were replaced."""
