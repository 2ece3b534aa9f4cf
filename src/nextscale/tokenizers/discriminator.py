"""The patch discriminator of pix2pix (arXiv 1611.07004, section 3.2.2), as VQGAN trains tokenizers against it."""
from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.layers.norms import GroupNorm


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, S, S') to logits (B, 1, s, s'), one a patch: high for patches taken for real.

    ``layers`` strided 4x4 convolutions halve the map each, their widths doubling up to 8 ``width``. Group
    normalisation instead of the original's batch normalisation, so that no statistics mix real and made pictures.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [3] + [width * min(2**i, 8) for i in range(layers)]
        self.strided = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(GroupNorm(8, b) for b in widths[2:])
        self.output = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.leaky_relu(self.strided[0](picture), 0.2)
        for conv, norm in zip(self.strided[1:], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.output(x).float()
