"""Quantisers without a codebook: a code is the signs of its vector (BSQ, LFQ), over one map or a residual pyramid.

A token is an index, its highest bit first, or the bits themselves (B, L, C) as booleans; both decode.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.errors import InputError, MissingExtraError
from nextscale.layers.resize import ResizeRule
from nextscale.parallel import total
from nextscale.tokenizers.config import MOST_INDEX_BITS, TokenizerConfig
from nextscale.tokenizers.quantiser import MOST_COUNTED, Quantiser, StraightThrough

MOST_LOOKUP_FREE_BITS = 18
"""Of LFQ, whose entropy loss sums over all 2^d codes for every vector."""


class Bits(Quantiser):
    """Base of BSQ and LFQ. Codes are ``scale`` times +1 or -1 a channel; a zero counts as negative.

    Scales are added up bilinearly and read the same way, as Infinity does (arXiv 2412.04431, published code).
    """

    read_rule: ResizeRule = "bilinear"
    ones_KC: Tensor
    seen_K: Tensor
    powers_C: Tensor
    scale: float

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        if config.vocabulary > MOST_COUNTED:
            # Moving averages of how many of each bit were ones in a batch, and of how many there were.
            self.register_buffer("ones_KC", torch.zeros(len(config.grids), self.latent_width))
            self.register_buffer("seen_K", torch.zeros(len(config.grids)))
        if self.latent_width <= MOST_INDEX_BITS:
            powers_C = 2 ** torch.arange(self.latent_width - 1, -1, -1)
            self.register_buffer("powers_C", powers_C, persistent=False)

    def to_index(self, bits: Tensor) -> Tensor:
        """Indices (...) of bits (..., C)."""
        return (bits.long() * self.powers_C).sum(-1)

    def to_bits(self, index: Tensor) -> Tensor:
        """Bits (..., C) of indices (...)."""
        return (index[..., None] & self.powers_C) != 0

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes of indices (B, L) or bits (B, L, C) as (B, L, C); code vectors pass through."""
        if tokens.is_floating_point():
            return tokens.float()
        bits = tokens if tokens.dtype == torch.bool else self.to_bits(tokens)
        return (bits.float() * 2 - 1) * self.scale

    def contribution(self, step: int, steps: int, codes_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.resize(codes_BCHW, grid, "bilinear")

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        """Tokens of a map (B, C, h, w): indices (B, h * w) or bits (B, h * w, C), as the configuration says."""
        return self._tokens(z_BCHW.detach().flatten(2).transpose(1, 2) > 0)

    def _tokens(self, bits: Tensor) -> Tensor:
        return bits if self.config.tokens == "bits" else self.to_index(bits)

    @torch.no_grad()
    def record_usage(self, step: int, tokens: Tensor, decay: float) -> None:
        """Moving average of the hits of every code, or of every bit's ones where there are too many codes."""
        if self.config.vocabulary <= MOST_COUNTED:
            index = tokens if tokens.dtype != torch.bool else self.to_index(tokens)
            return super().record_usage(step, index, decay)
        bits = tokens if tokens.dtype == torch.bool else self.to_bits(tokens)
        rows_NC = bits.reshape(-1, self.latent_width).float()
        ones_C, count = total(rows_NC.sum(0)), total(rows_NC.new_full((), len(rows_NC)))
        self.ones_KC[step].mul_(decay).add_(ones_C, alpha=1 - decay)
        self.seen_K[step].mul_(decay).add_(count, alpha=1 - decay)

    def usage(self, share: float = 0.08) -> Tensor:
        """Share of the codes in use at every scale, (K,). Where codes are too many to count: of the bits, those that
        are neither always nor never set, up to ``share`` of an even split."""
        if self.config.vocabulary <= MOST_COUNTED:
            return super().usage(share)
        p_KC = self._ones()
        return ((torch.minimum(p_KC, 1 - p_KC) >= share / 2) & (self.seen_K[:, None] > 0)).float().mean(1)

    def balance(self) -> Tensor:
        """Mean entropy of the single bits at every scale in bits, (K,): 1 where each is set half the time, 0 where none
        ever changes. It says something of scales that have too few tokens to use all codes."""
        return binary_entropy(self._ones()).mean(1) / math.log(2)

    def perplexity(self) -> Tensor:
        """exp(entropy) of the codes at every scale, (K,). Where they are too many to count: as if bits were
        independent, which is an upper bound."""
        if self.config.vocabulary <= MOST_COUNTED:
            return super().perplexity()
        return torch.exp(binary_entropy(self._ones()).sum(1)) * (self.seen_K > 0)

    def _ones(self) -> Tensor:
        """How often every bit is set at every scale, (K, C)."""
        if self.config.vocabulary <= MOST_COUNTED:
            ones_KC = self.usage_KV @ (self.codes_VC() > 0).float()
            return ones_KC / self.usage_KV.sum(1, keepdim=True).clamp_min(1e-12)
        return self.ones_KC / self.seen_K[:, None].clamp_min(1e-12)


class SphericalBits(Bits):
    """Binary spherical quantisation (BSQ-ViT, arXiv 2406.07548, section 3; scale by scale in Infinity).

    u = z / |z|, code_j = sign(u_j) / sqrt(C), so that vectors and codes lie on the unit sphere.

    Own code, because ``vector_quantize_pytorch.LFQ(spherical=True)`` holds all 2^C codes in memory and sums its
    entropy loss over them, while the published one treats bits as independent, which is what makes 32 or 64 possible.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.scale = config.autoencoder.latent_width**-0.5

    def straight_through(self, z_NC: Tensor, entropy: bool) -> StraightThrough:
        """commitment = |u - sg(code)|^2 a channel; entropy = E[sum_j H(p_j)] - sum_j H(E[p_j]) with
        p_j = sigmoid(400 u_j / sqrt(C)), the probability of bit j under a softmax over distances at temperature
        0.01."""
        cells = self.config.patch**2  # of a patch, each of which lies on a sphere of its own
        u_NC = F.normalize(z_NC.unflatten(-1, (-1, cells)), dim=-2).flatten(-2)
        bits_NC = u_NC.detach() > 0
        codes_NC = self.embed(bits_NC)
        of_entropy = u_NC.new_zeros(())
        if entropy:
            p_NC = torch.sigmoid(400 * u_NC * self.scale)
            # A patch's cells share their bits' means, as if each stood for itself.
            p_NC = p_NC.unflatten(-1, (-1, cells)).transpose(1, 2).flatten(0, 1)
            of_entropy = binary_entropy(p_NC).sum(1).mean() - binary_entropy(p_NC.mean(0)).sum()
        return StraightThrough(codes_NC + (u_NC - u_NC.detach()), self._tokens(bits_NC), F.mse_loss(u_NC, codes_NC),
                               u_NC.new_zeros(()), of_entropy)


class LookupFreeBits(Bits):
    """Lookup-free quantisation (MAGVIT-v2, arXiv 2310.05737, section 3.1): code_j = sign(z_j), with the exact entropy
    over all 2^C codes.

    ``vector_quantize_pytorch.LFQ`` is that formula and is used as it is; it needs the extra ``tokenizers``.
    """

    scale = 1.0

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        if self.latent_width > MOST_LOOKUP_FREE_BITS:
            raise InputError(f"kind 'lfq' with {self.latent_width} bits would sum over 2^{self.latent_width} codes for "
                             f"every vector; use at most {MOST_LOOKUP_FREE_BITS} (autoencoder.latent_width), or 'bsq'")
        self.lookup_free = library().LFQ(dim=self.latent_width, codebook_size=config.vocabulary,
                                          entropy_loss_weight=1.0, commitment_loss_weight=1.0)

    def straight_through(self, z_NC: Tensor, entropy: bool) -> StraightThrough:
        """commitment = |z - sg(code)|^2 a channel; entropy = E[H(p)] - H(E[p]), p = softmax over all codes of
        200 z . code."""
        self.lookup_free.train(entropy)
        (_, index_1N, _), parts = self.lookup_free(z_NC[None], return_loss_breakdown=True)
        codes_NC = self.embed(self.to_bits(index_1N[0].long()))
        tokens = self._tokens(codes_NC > 0)
        of_entropy = parts.per_sample_entropy - parts.batch_entropy
        return StraightThrough(codes_NC + (z_NC - z_NC.detach()), tokens, F.mse_loss(z_NC, codes_NC),
                               z_NC.new_zeros(()), of_entropy if entropy else z_NC.new_zeros(()))


def binary_entropy(p: Tensor) -> Tensor:
    """H(p, 1 - p) in nats."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def library() -> Any:
    """``vector_quantize_pytorch``. Raises MissingExtraError where it is not installed."""
    try:
        import vector_quantize_pytorch
    except ImportError:
        raise MissingExtraError("vector-quantize-pytorch", "tokenizers", "quantise by LFQ or FSQ") from None
    return vector_quantize_pytorch
