"""The decoder in strips: a large picture's finer levels, some rows at a time, with the numbers of the whole.

Cutting a picture into tiles and decoding each gives seams: group normalisation takes its statistics over the whole
map, and attention sees all of it. So the coarsest level, where attention is, runs whole. In finer levels the statistics
of a map are gathered first, strip by strip, and every strip then sees the rows that its convolutions reach. The maps
inside a residual block are computed twice, once for their statistics and once for their use, and never exist whole;
what a block adds is written over what it was given. What is left of the rounding of the whole is the order of sums.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.layers.norms import GroupNorm
from nextscale.tokenizers.autoencoder import Decoder, Level, ResidualBlock, Upsample

ROWS = 32
"""Of a strip where nobody says otherwise: of them, four are computed twice."""


class Affine(NamedTuple):
    """A group normalisation whose statistics are known: x scale + shift, each (B, C, 1, 1) in float32."""

    scale: Tensor
    shift: Tensor

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised rows, in the rows' own format."""
        return F.silu((x.float() * self.scale + self.shift).to(x.dtype), inplace=True)


@torch.no_grad()
def decode_in_strips(decoder: Decoder, features_BFHW: Tensor, rows: int) -> Tensor:
    """``decoder(features)``, (B, 3, H factor, W factor), at most ``rows`` rows of a finer map at a time.

    Each residual block of the finer levels costs half as much again, since its first convolution runs twice. Raises
    InputError for fewer than 4 rows, of which hardly any would be new.
    """
    if rows < 4:
        raise InputError(f"strips of {rows} rows; give at least 4")
    x = decoder.middle(decoder.input(features_BFHW.contiguous(memory_format=torch.channels_last)))
    for i, level in enumerate(reversed(decoder.levels)):
        assert isinstance(level, Level)
        for part in level.parts():
            if isinstance(part, Upsample):
                x = _doubled(part, x, rows)
            elif i and isinstance(part, ResidualBlock):
                x = _block(part, x, rows)
            else:
                x = part(x)
    norm = normalisation(decoder.norm, (x[:, :, lo:hi] for lo, hi in strips(x.shape[2], rows)))
    out = x.new_empty(x.shape[0], 3, *x.shape[2:])
    for lo, hi in strips(x.shape[2], rows):
        out[:, :, lo:hi] = _conv(decoder.output, x, lo, hi, norm.silu)
    return out


def strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of every strip."""
    for lo in range(0, height, rows):
        yield lo, min(lo + rows, height)


def normalisation(norm: GroupNorm, parts: Iterable[Tensor]) -> Affine:
    """A group normalisation of a map that comes in parts (B, C, h, W), whose moments are put together (Chan et al.,
    1979)."""
    counts, means, variances = [], [], []
    for part in parts:
        grouped = part.float().unflatten(1, (norm.num_groups, -1))
        variance_BG, mean_BG = torch.var_mean(grouped, (2, 3, 4), unbiased=False)
        counts.append(part.shape[2])
        means.append(mean_BG)
        variances.append(variance_BG)
    share_S = torch.tensor(counts, dtype=torch.float32, device=means[0].device)[:, None, None] / sum(counts)
    mean_SBG = torch.stack(means)
    mean_BG = (share_S * mean_SBG).sum(0)
    variance_BG = (share_S * (torch.stack(variances) + (mean_SBG - mean_BG).square())).sum(0)
    each = norm.num_channels // norm.num_groups
    mean_BC, rstd_BC = (m.repeat_interleave(each, 1) for m in (mean_BG, torch.rsqrt(variance_BG + norm.eps)))
    scale_BC = rstd_BC * norm.weight.float()
    shift_BC = norm.bias.float() - mean_BC * scale_BC
    return Affine(scale_BC[..., None, None], shift_BC[..., None, None])


def _conv(conv: nn.Conv2d, x: Tensor, lo: int, hi: int, before: Callable[[Tensor], Tensor]) -> Tensor:
    """Rows lo..hi of a 3x3 convolution of ``before(x)``, which is zero beyond the map."""
    height = x.shape[2]
    seen = before(x[:, :, max(lo - 1, 0):min(hi + 1, height)])
    seen = F.pad(seen, (0, 0, int(lo == 0), int(hi == height)))
    return F.conv2d(seen, conv.weight, conv.bias, padding=(0, 1))


def _block(block: ResidualBlock, x: Tensor, rows: int) -> Tensor:
    """A residual block; where it keeps the width, its output takes the place of its input."""
    height, spans = x.shape[2], list(strips(x.shape[2], rows))
    norm_in = normalisation(block.norm_in, (x[:, :, lo:hi] for lo, hi in spans))
    norm_out = normalisation(block.norm_out, (_conv(block.conv_in, x, lo, hi, norm_in.silu) for lo, hi in spans))
    same = isinstance(block.shortcut, nn.Identity)
    out = x if same else _empty(x, block.conv_out.out_channels, height, x.shape[3])
    above = x[:, :, :0]
    for lo, hi in spans:
        # The rows that this strip sees, as they were: those above it may have been written over.
        first, last = max(lo - 2, 0), min(hi + 2, height)
        seen = torch.cat([above, x[:, :, lo:last]], 2)
        above = x[:, :, max(hi - 2, 0):hi].clone()
        inner = F.pad(norm_in.silu(seen), (0, 0, int(first == 0), int(last == height)))
        inner = F.conv2d(inner, block.conv_in.weight, block.conv_in.bias, padding=(0, 1))
        inner = inner[:, :, :min(hi + 1, height) - max(lo - 1, 0)]
        inner = F.pad(norm_out.silu(inner), (0, 0, int(lo == 0), int(hi == height)))
        added = F.conv2d(inner, block.conv_out.weight, block.conv_out.bias, padding=(0, 1))
        out[:, :, lo:hi] = added.add_(block.shortcut(seen[:, :, lo - first:hi - first]))
    return out


def _doubled(change: Upsample, x: Tensor, rows: int) -> Tensor:
    """Twice the rows and columns by repeating cells, through the convolution behind them."""
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    out = _empty(x, change.conv.out_channels, height, width)
    for lo, hi in strips(height, rows):
        top, bottom = max(lo - 1, 0), min(hi + 1, height)
        seen = F.interpolate(x[:, :, top // 2:-(-bottom // 2)], scale_factor=2.0, mode="nearest")
        seen = seen[:, :, top % 2:top % 2 + bottom - top]
        seen = F.pad(seen, (0, 0, int(lo == 0), int(hi == height)))
        out[:, :, lo:hi] = F.conv2d(seen, change.conv.weight, change.conv.bias, padding=(0, 1))
    return out


def _empty(x: Tensor, width: int, height: int, across: int) -> Tensor:
    return torch.empty(x.shape[0], width, height, across, dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last)
