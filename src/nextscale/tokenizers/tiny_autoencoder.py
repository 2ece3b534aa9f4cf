"""The tiny autoencoder: plain convolutions of one width, a few megabytes, for the latents of a large one.

TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd, MIT licence) is distilled to give and read the latents of
Stable Diffusion's autoencoder; TAEF2 those of FLUX.2. Blocks are three convolutions with ReLU and a shortcut, without
normalisation, so all but the coarsest level of TAEF2, which looks at means and variances of the whole map, is local.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.gaussian import LOG_VARIANCE

CERTAIN = LOG_VARIANCE[0]
"""Log-variance of a latent that is no draw, the least that a Gaussian's is clamped to."""
_POOL_RATIO = 4
_BOUND = 3.0


def _convolution(width_in: int, width_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=bias)


class TinyBlock(nn.Module):
    """ReLU(conv(x) + x), conv three convolutions with ReLU between; pooled: of x + mix(x), where mix is an MLP over
    channels whose hidden values are normalised over the whole map."""

    def __init__(self, width: int, pooled: bool, groups: int):
        super().__init__()
        self.conv = nn.Sequential(_convolution(width, width), nn.ReLU(), _convolution(width, width), nn.ReLU(),
                                  _convolution(width, width))
        hidden = _POOL_RATIO * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.GroupNorm(groups, hidden), nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False)) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _blocks(config: AutoencoderConfig, count: int, coarsest: bool) -> list[nn.Module]:
    pooled = coarsest and config.attention == "level"
    return [TinyBlock(config.width, pooled, config.groups) for _ in range(count)]


class TinyEncoder(nn.Module):
    """Picture (B, 3, S, S') in [-1, 1] to a latent (B, C, S / factor, S' / factor).

    features: channels that are asked for; twice the latent's ask for a Gaussian, whose log-variance is ``CERTAIN``.
    """

    def __init__(self, config: AutoencoderConfig, features: int | None = None):
        super().__init__()
        width, last = config.width, len(config.multipliers) - 1
        layers: list[nn.Module] = [_convolution(3, width), *_blocks(config, 1, last == 0)]
        for level in range(1, last + 1):
            layers += [_convolution(width, width, 2, bias=False),
                       *_blocks(config, config.encoder_blocks, level == last)]
        self.layers = nn.Sequential(*layers, _convolution(width, config.latent_width))
        self.gaussian = features == 2 * config.latent_width

    def forward(self, picture: Tensor) -> Tensor:
        found: Tensor = self.layers((picture.contiguous(memory_format=torch.channels_last) + 1) / 2)
        return torch.cat([found, torch.full_like(found, CERTAIN)], 1) if self.gaussian else found


class Bound(nn.Module):
    """3 tanh(x / 3): latents that no picture has do no harm."""

    def forward(self, x: Tensor) -> Tensor:
        return _BOUND * torch.tanh(x / _BOUND)


class TinyDecoder(nn.Module):
    """Latent (B, C, h, w) to a picture (B, 3, h * factor, w * factor), not clamped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width, last = config.width, len(config.multipliers) - 1
        layers: list[nn.Module] = [Bound(), _convolution(config.latent_width, width), nn.ReLU()]
        for level in reversed(range(1, last + 1)):
            layers += [*_blocks(config, config.decoder_blocks, level == last), nn.Upsample(scale_factor=2),
                       _convolution(width, width, bias=False)]
        self.layers = nn.Sequential(*layers, *_blocks(config, 1, last == 0), _convolution(width, 3))

    @property
    def output(self) -> nn.Module:
        """The last convolution."""
        return self.layers[-1]

    def forward(self, latent: Tensor) -> Tensor:
        found: Tensor = self.layers(latent.contiguous(memory_format=torch.channels_last))
        return 2 * found - 1
