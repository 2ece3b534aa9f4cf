"""LlamaGen's quantiser: maps of codes of length 1 (arXiv 2406.06525, section 2.1; ViT-VQGAN, arXiv 2110.04627).

LlamaGen codes one map. FlexVAR (arXiv 2502.20313) codes a whole draft at every scale with the same codebook: the latent
itself, resized by area; drafts replace each other instead of adding up, and the next step's input is the last draft's
codes, resized bicubically.

Own code, because ``vector_quantize_pytorch.VectorQuantize`` moves a cosine codebook by moving averages only and
refuses a learned one with ``use_cosine_sim``, while LlamaGen trains its codebook by gradients and normalises at use.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.quantiser import CodebookQuantiser, StraightThrough

TEMPERATURE = 0.01
"""Of the entropy loss's softmax over distances, as published."""


class L2Quantiser(CodebookQuantiser):
    """Latent vectors z and codes e count by their direction alone:

    index = argmin_i |z/|z| - e_i/|e_i||^2, and the code is e_i/|e_i|.
    """

    read_rule = "bicubic"

    def __init__(self, config: TokenizerConfig):
        super().__init__(config)
        with torch.no_grad():
            weight = self.codebook.weight.uniform_(-1 / config.vocabulary, 1 / config.vocabulary)
            if not weight.is_meta:  # there it would import the compiler, which takes seconds
                weight.copy_(F.normalize(weight, dim=-1))

    def codes_VC(self) -> Tensor:
        """Every code, normalised, with its gradient."""
        return F.normalize(self.codebook.weight.float(), dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens.float() if tokens.is_floating_point() else F.normalize(
            self.codebook.weight[tokens].float(), dim=-1)

    def accumulate(self, value: Tensor, contribution: Tensor) -> Tensor:
        return contribution

    def leftover(self, rest: Tensor, contribution: Tensor) -> Tensor:
        return rest

    def quantise(self, z_BCHW: Tensor) -> Tensor:
        with torch.autocast(z_BCHW.device.type, enabled=False), torch.no_grad():
            z_NC = F.normalize(z_BCHW.float().permute(0, 2, 3, 1).reshape(-1, self.latent_width), dim=-1)
            # Between vectors of length 1 the nearest is the one of the largest product.
            return (z_NC @ self.codes_VC().T).argmax(1).view(z_BCHW.shape[0], -1)

    def straight_through(self, z_NC: Tensor, entropy: bool) -> StraightThrough:
        """commitment = |sg(e) - z|^2, codebook = |e - sg(z)|^2, of the normalised vectors; the entropy loss is
        E[H(p)] - H(E[p]) of p = softmax(-|z - e_i|^2 / 0.01) over the codes."""
        z_NC, codes_VC = F.normalize(z_NC, dim=-1), self.codes_VC()
        products_NV = z_NC @ codes_VC.T
        index_N = products_NV.detach().argmax(1)
        codes_NC = codes_VC[index_N]
        of_entropy = z_NC.new_zeros(())
        if entropy:
            log_p_NV = ((2 * products_NV - 2) / TEMPERATURE).log_softmax(1)
            p_NV = log_p_NV.exp()
            mean_V = p_NV.mean(0)
            of_entropy = (mean_V * (mean_V + 1e-5).log()).sum() - (p_NV * log_p_NV).sum(1).mean()
        return StraightThrough(codes_NC.detach() + (z_NC - z_NC.detach()), index_N,
                               F.mse_loss(z_NC, codes_NC.detach()), F.mse_loss(codes_NC, z_NC.detach()), of_entropy)
