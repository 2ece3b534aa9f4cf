"""The convolutional encoder and decoder between pictures and latents.

The network of VQGAN (arXiv 2012.09841) as VAR uses it: residual blocks with group normalisation, a factor of two
between levels, attention only at the coarsest level. A picture of side S becomes a latent of side S / 2^(levels-1).
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.layers.kept import KeepsForm
from nextscale.layers.norms import GroupNorm
from nextscale.layers.winograd import Convolution3x3


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the encoder and the decoder.

    network: ``vqgan``, or ``taesd`` (``tokenizers.tiny_autoencoder``), whose levels have one width and no middle, the
    finest of them one block; attention ``"level"`` means its pooled blocks there, and latent_kernel must be 0.

    width: channels of the finest level (a multiple of ``groups``); multipliers: channels of each level as a multiple
    of ``width``, finest first; encoder_blocks, decoder_blocks: residual blocks a level; latent_width: channels of the
    latent; groups: of every group normalisation; attention: self-attention at the coarsest level, in the middle of
    the network (``"middle"``), after every block of that level too (``"level"``, as VAR and LlamaGen have it), after
    those of the encoder alone (``"encoder"``, KL-16), or nowhere (``"none"``, Infinity). feature_width: channels that
    the networks hand over to the convolutions around the latent, 0 for ``latent_width`` itself; latent_kernel: size of
    those two convolutions, 3 (VAR), 1 (LlamaGen), or 0 for none (Infinity).

    Raises InputError on sizes that don't fit each other.
    """

    width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent_width: int = 32
    groups: int = 32
    attention: Literal["level", "encoder", "middle", "none"] = "level"
    feature_width: int = 0
    latent_kernel: Literal[0, 1, 3] = 3
    network: Literal["vqgan", "taesd"] = "vqgan"

    def __post_init__(self) -> None:
        for name in ("width", "groups", "encoder_blocks", "decoder_blocks", "latent_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"multipliers are {self.multipliers}; give at least one, each at least 1")
        wrong = [width for width in self.widths if width % self.groups]
        if wrong:
            raise InputError(f"a level has {wrong[0]} channels, which {self.groups} groups don't divide; "
                             "change width, multipliers or groups")
        if self.network == "taesd" and (set(self.multipliers) != {1} or self.latent_kernel
                                        or self.attention not in ("level", "none")):
            raise InputError("network 'taesd' has levels of one width, no convolution around the latent and pooled "
                             "blocks in place of attention: set multipliers to ones, latent_kernel to 0 and attention "
                             "to 'level' or 'none'")
        if self.latent_kernel == 0 and self.feature_width not in (0, self.latent_width):
            raise InputError(f"feature_width is {self.feature_width} and latent_width {self.latent_width}, but "
                             "latent_kernel 0 leaves no convolution between them; use 1 or 3")

    @property
    def features(self) -> int:
        """Channels of the encoder's output and the decoder's input."""
        return self.feature_width or self.latent_width

    @property
    def factor(self) -> int:
        """Pixels a latent cell is wide."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.multipliers)


def _norm(width: int, groups: int) -> GroupNorm:
    return GroupNorm(groups, width, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    """SiLU of a map that nothing else holds: in place where no gradient asks for it, since new pages cost more."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _plus(x: Tensor, other: Tensor) -> Tensor:
    """The sum of a map that nothing else holds and another; in place as above."""
    return x + other if torch.is_grad_enabled() else x.add_(other)


def _plain(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes.

    convolution: makes the two of 3x3, by widths. The decoder's take fewer products; the encoder's are torch's own,
    since codes that lie near each other are told apart by the last digits.
    """

    def __init__(self, width_in: int, width_out: int, groups: int,
                 convolution: Callable[[int, int], nn.Conv2d] = _plain):
        super().__init__()
        self.norm_in = _norm(width_in, groups)
        self.conv_in = convolution(width_in, width_out)
        self.norm_out = _norm(width_out, groups)
        self.conv_out = convolution(width_out, width_out)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # In one expression, and the shortcut last: so no map is kept that the next convolution doesn't read.
        return _plus(self.conv_out(_silu(self.norm_out(self.conv_in(_silu(self.norm_in(x)))))), self.shortcut(x))


class SelfAttention2d(nn.Module):
    """Single-head self-attention over all cells of a map, with a residual connection."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(width, groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3)
        out = F.scaled_dot_product_attention(qkv[:, 0:1], qkv[:, 1:2], qkv[:, 2:3])[:, 0]
        return x + self.projection(out.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halve a map: one zero row below and one zero column at the right, then a 3x3 convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(KeepsForm):
    """Double a map by repeating cells, then a 3x3 convolution.

    Of the nine cells that the convolution reads, at most four differ. Both together are one transposed convolution of
    stride 2, which takes 4/9 of the products; its 4x4 kernel is made where no gradient is asked for, on a CPU (160
    channels at 128x128 cells: 151 ms of one core against 292 ms in float32, 32 ms against 38 ms in bfloat16).
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if (x.device.type not in ("cpu", "meta") or torch.is_grad_enabled() or torch.compiler.is_compiling()
                or self.conv.weight.is_inference()):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernel = self.kept(self.conv.weight, doubling_kernel)
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def doubling_kernel(weight_OI33: Tensor) -> Tensor:
    """The kernel (I, O, 4, 4) of the transposed convolution of stride 2 and padding 1 that is a 3x3 convolution of a
    map with every cell repeated, 2x2.

    A cell reaches the 3x3 outputs around each of its four copies: its kernel is the mirrored one, added up at four
    places. The sum is made in float32.
    """
    mirrored = F.pad(weight_OI33.float().transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
    rows = mirrored[:, :, :-1] + mirrored[:, :, 1:]
    kernel = (rows[..., :-1] + rows[..., 1:]).to(weight_OI33.dtype)
    return kernel.contiguous(memory_format=torch.channels_last)


class Level(nn.Module):
    """The residual blocks (and attentions) at one resolution, and the change to the next."""

    def __init__(self, widths: list[int], groups: int, attention: bool, change: nn.Module | None,
                 convolution: Callable[[int, int], nn.Conv2d] = _plain):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups, convolution) for a, b in pairs)
        self.attentions = nn.ModuleList(SelfAttention2d(b, groups) for _, b in pairs) if attention else None
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts():
            x = part(x)
        return x

    def parts(self) -> Iterator[nn.Module]:
        """What a map goes through, one after the other. Who walks them holds one map; who calls the level holds its
        input to the end."""
        for i, block in enumerate(self.blocks):
            yield block
            if self.attentions is not None:
                yield self.attentions[i]
        if self.change is not None:
            yield self.change


def _parts(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for level in levels:
        assert isinstance(level, Level)
        yield from level.parts()


class Middle(nn.Module):
    """Residual block, attention where there is any, residual block at the coarsest level."""

    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.block_in = ResidualBlock(width, width, groups)
        self.attention = SelfAttention2d(width, groups) if attention else nn.Identity()
        self.block_out = ResidualBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_out(self.attention(self.block_in(x)))


class Encoder(nn.Module):
    """Picture (B, 3, S, S') in [-1, 1] to features (B, F, S / factor, S' / factor), F = ``config.features`` or
    ``features``."""

    def __init__(self, config: AutoencoderConfig, features: int | None = None):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.input = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level([widths[max(i - 1, 0)]] + [widths[i]] * config.encoder_blocks, config.groups,
                  attention=i == last and config.attention in ("level", "encoder"),
                  change=Downsample(widths[i]) if i < last else None)
            for i in range(len(widths)))
        self.middle = Middle(widths[-1], config.groups, config.attention != "none")
        self.norm = _norm(widths[-1], config.groups)
        self.output = nn.Conv2d(widths[-1], features or config.features, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.input(picture.contiguous(memory_format=torch.channels_last))
        for part in _parts(self.levels):
            x = part(x)
        return self.output(_silu(self.norm(self.middle(x))))


class Decoder(nn.Module):
    """Features (B, F, h, w) to a picture (B, 3, h * factor, w * factor), not clamped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.input = nn.Conv2d(config.features, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], config.groups, config.attention != "none")
        # Index 0 is the finest level, as in the encoder; the forward pass walks from the coarsest.
        self.levels = nn.ModuleList(
            Level([widths[min(i + 1, last)]] + [widths[i]] * config.decoder_blocks, config.groups,
                  attention=i == last and config.attention == "level",
                  change=Upsample(widths[i]) if i > 0 else None, convolution=Convolution3x3)
            for i in range(len(widths)))
        self.norm = _norm(widths[0], config.groups)
        self.output = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.middle(self.input(latent.contiguous(memory_format=torch.channels_last)))
        for part in _parts(reversed(self.levels)):
            x = part(x)
        return self.output(_silu(self.norm(x)))
