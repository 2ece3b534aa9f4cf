"""Finite scalar quantisation: every channel is bounded and rounded to one of a few levels (arXiv 2309.15505)."""
from __future__ import annotations

import torch
from torch import Tensor

from nextscale.tokenizers.bitwise import library
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.quantiser import Quantiser, StraightThrough


class FiniteScalars(Quantiser):
    """code_j = round(f(z_j)) / floor(levels_j / 2), f a shifted tanh with ``levels_j`` integers in its range; the
    index counts the first channel fastest. No losses: there is no codebook that could collapse.

    ``vector_quantize_pytorch.FSQ`` is used as it is (extra ``tokenizers``): the variant of the published Cosmos
    tokenizers (shift atanh(offset / half), range widened by 0.1%); the paper's appendix has a tan and a range
    narrowed by as much.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        self.scalars = library().FSQ(list(config.levels))

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes (B, L, C) of indices (B, L); code vectors pass through."""
        return tokens.float() if tokens.is_floating_point() else self.scalars.indices_to_codes(tokens)

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        with torch.autocast(z_BCHW.device.type, enabled=False), torch.no_grad():
            z_BLC = z_BCHW.float().flatten(2).transpose(1, 2)
            return self.scalars(z_BLC)[1].long()

    def straight_through(self, z_NC: Tensor, entropy: bool) -> StraightThrough:
        codes_1NC, index_1N = self.scalars(z_NC[None])
        zero = z_NC.new_zeros(())
        return StraightThrough(codes_1NC[0], index_1N[0].long(), zero, zero, zero)
