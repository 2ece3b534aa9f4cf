"""The diffusion head of MAR (arXiv 2406.11838, section 3.2): one small network denoises each token by itself."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.layers.diffusion import STEPS, cosine_chain, diffuse, variational_bits
from nextscale.layers.linear import Linear, initialise_products
from nextscale.layers.norms import layer_norm
from nextscale.layers.time_embedding import TimeEmbedding
from nextscale.parallel import rand_pictures, randn_pictures


class DenoisingBlock(nn.Module):
    """x + gate network(norm(x) (1 + scale) + shift): linear, SiLU, linear; modulated by a vector a token."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = Linear(width, width)
        self.contract = Linear(width, width)
        self.modulation = Linear(width, 3 * width)

    def forward(self, x: Tensor, lit: Tensor) -> Tensor:
        """x and SiLU of what modulates it, (..., width)."""
        shift, scale, gate = self.modulation(lit).chunk(3, -1)
        h = torch.addcmul(shift, self.norm(x), 1 + scale)
        return x + gate * self.contract(F.silu(self.expand(h)))


class DenoisingMLP(nn.Module):
    """Blocks over single tokens: noisy token (..., C) and what modulates it (..., width) to the noise and the share of
    the variance, (..., C) each, in float32."""

    def __init__(self, token_width: int, width: int, depth: int):
        super().__init__()
        self.input = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(DenoisingBlock(width) for _ in range(depth))
        self.modulation = Linear(width, 2 * width)
        self.output = nn.Linear(width, 2 * token_width)

    def forward(self, x: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        lit = F.silu(embedded)
        h = self.input(x.to(self.input.weight.dtype))
        for block in self.blocks:
            h = block(h, lit)
        shift, scale = self.modulation(lit).chunk(2, -1)
        out: Tensor = self.output(torch.addcmul(shift, layer_norm(h), 1 + scale)).float()
        epsilon, share = out.chunk(2, -1)
        return epsilon, share


class DiffusionMLPHead(nn.Module):
    """p(token | hidden) by a denoising network: noisy token (..., C), step of the 1000 and hidden state to the noise
    and the share of the variance, (..., C) each.

    width, depth: of the network; draws: how many times and noises are drawn a token in training, for each pass of the
    body. The loss of a token is mean_c (e - e')^2 plus the variational term, which teaches the variance.
    """

    def __init__(self, hidden_width: int, token_width: int, width: int, depth: int, draws: int = 1):
        super().__init__()
        self.token_width, self.draws = token_width, draws
        self.time = TimeEmbedding(width)
        self.condition = Linear(hidden_width, width)
        self.network = DenoisingMLP(token_width, width, depth)

    def forward(self, x: Tensor, time: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and share of the variance in float32 of noisy tokens x (..., C) at times (...), given (..., hidden)."""
        condition = self.condition(hidden.to(self.condition.weight.dtype))
        found: tuple[Tensor, Tensor] = self.network(x, self.time(time.flatten()).unflatten(0, time.shape) + condition)
        return found

    def loss(self, hidden_BLC: Tensor, target_BLC: Tensor) -> Tensor:
        """Loss of every token, (B, L), the mean over ``draws`` times and noises drawn with torch's generator."""
        b, length, c = target_BLC.shape
        time = (rand_pictures(b, self.draws, length, device=target_BLC.device) * STEPS).long()
        noise = randn_pictures(b, self.draws, length, c, device=target_BLC.device)
        squared, bits = self.terms(hidden_BLC[:, None], target_BLC[:, None], time, noise)
        return (squared + bits).mean(1)

    def terms(self, hidden: Tensor, target: Tensor, time: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error and the variational term in bits of tokens (..., C) at times (...): (...) each."""
        chain, target = cosine_chain(), target.float()
        x = diffuse(chain, target, noise, time)
        epsilon, share = self(x, time, hidden)
        return (noise - epsilon).square().mean(-1), variational_bits(chain, target, x, epsilon, share, time)

    @torch.no_grad()
    def initialise(self) -> None:
        """The published start: Xavier's, with modulations and output 0, so that the predicted noise is 0."""
        initialise_denoiser(self)


def initialise_denoiser(head: nn.Module) -> None:
    """Xavier's start of a diffusion head, with modulations and output of its ``network`` 0."""
    initialise_products(head)
    assert isinstance(head.time, TimeEmbedding)
    head.time.initialise()
    initialise_network(head.network)


def initialise_network(network: Any) -> None:
    """Modulations and output of a denoising network 0, so that what it says is 0 at first."""
    for layer in (*(block.modulation for block in network.blocks), network.modulation, network.output):
        nn.init.zeros_(layer.weight)
