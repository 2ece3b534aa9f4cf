"""VAR's published sampling loop, written straightforwardly: what the library's speed is measured against.

Plain modules in the default memory layout, keys and values concatenated at every scale, adaLN computed in every block
at every scale, both guidance halves in one batch, filters over full logits by sort (arXiv 2404.02905, algorithm 2).
Nothing here comes from the library. Tensor names are the library's, so that both can hold the same weights.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Phase = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Sizes:
    """What a model is made of; ``phi_of_step`` says which phi convolution each scale uses, ``classes`` how many classes
    each kind of label has, ``shared_modulation`` whether all blocks share one adaLN layer (the 512-pixel model)."""

    sides: tuple[int, ...]
    depth: int
    width: int
    heads: int
    classes: tuple[int, ...]
    vocabulary: int
    latent_width: int
    phi_of_step: tuple[int, ...]
    decoder_width: int
    decoder_multipliers: tuple[int, ...]
    decoder_blocks: int
    groups: int
    level_attention: bool
    shared_modulation: bool


class Attention(nn.Module):
    """l2-normalised self-attention with a key/value cache that grows by concatenation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.scale_1H11 = nn.Parameter(torch.zeros(1, heads, 1, 1))
        self.projection = nn.Linear(width, width)
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        b, length, c = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q, dim=-1) * self.scale_1H11.clamp_max(math.log(100)).exp()
        k = F.normalize(k, dim=-1)
        if self.cached_k is not None and self.cached_v is not None:
            k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
        self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.projection(out.transpose(1, 2).reshape(b, length, c))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, shared: bool):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), FeedForward(width)
        if shared:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, cond: Tensor, shared: Tensor | None) -> Tensor:
        if shared is None:
            parts = self.modulation(F.silu(cond))[:, None].chunk(6, dim=-1)
        else:
            parts = (shared.unflatten(-1, (6, -1))[:, None] + self.modulation_offset).unbind(2)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts
        x = x + gate1 * self.attention(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        c = sizes.width
        self.word = nn.Linear(sizes.latent_width, c)
        self.start = nn.Parameter(torch.zeros(1, sizes.sides[0] ** 2, c))
        self.position = nn.Parameter(torch.zeros(1, sum(s * s for s in sizes.sides), c))
        self.level = nn.Embedding(len(sizes.sides), c)
        self.shared_modulation = nn.Linear(c, 6 * c) if sizes.shared_modulation else None
        self.blocks = nn.ModuleList(Block(c, sizes.heads, sizes.shared_modulation) for _ in range(sizes.depth))
        self.head_modulation = nn.Linear(c, 2 * c)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shared = None if self.shared_modulation is None else self.shared_modulation(F.silu(cond))
        for block in self.blocks:
            x = block(x, cond, shared)
        scale, shift = self.head_modulation(F.silu(cond))[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class ConvBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, groups: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv_in = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm_out = nn.GroupNorm(groups, width_out, eps=1e-6)
        self.conv_out = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        return self.shortcut(x) + self.conv_out(F.silu(self.norm_out(h)))


class ConvAttention(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).unbind(1)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, -1)
        return x + self.projection(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w))


class Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, widths: Sequence[int], groups: int, attention: bool, up: bool):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.blocks = nn.ModuleList(ConvBlock(a, b, groups) for a, b in pairs)
        self.attentions = nn.ModuleList(ConvAttention(b, groups) for _, b in pairs) if attention else None
        self.change = Up(widths[-1]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) if self.attentions is None else self.attentions[i](block(x))
        return x if self.change is None else self.change(x)


class Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_in = ConvBlock(width, width, groups)
        self.attention = ConvAttention(width, groups)
        self.block_out = ConvBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_out(self.attention(self.block_in(x)))


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        widths, groups = [sizes.decoder_width * m for m in sizes.decoder_multipliers], sizes.groups
        last = len(widths) - 1
        self.input = nn.Conv2d(sizes.latent_width, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], groups)
        self.levels = nn.ModuleList(
            Level([widths[min(i + 1, last)]] + [widths[i]] * sizes.decoder_blocks, groups,
                  attention=i == last and sizes.level_attention, up=i > 0) for i in range(len(widths)))
        self.norm = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.output = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.middle(self.input(latent))
        for level in reversed(self.levels):
            x = level(x)
        return self.output(F.silu(self.norm(x)))


class Quantiser(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        c = sizes.latent_width
        self.codebook = nn.Embedding(sizes.vocabulary, c)
        self.phis = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(max(sizes.phi_of_step) + 1))


class Tokenizer(nn.Module):
    """The half of the tokenizer that sampling needs."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.decoder, self.quantiser = Decoder(sizes), Quantiser(sizes)
        self.from_latent = nn.Conv2d(sizes.latent_width, sizes.latent_width, 3, padding=1)


class Labels(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size + 1, sizes.width) for size in sizes.classes)

    def forward(self, labels_Bn: Tensor) -> Tensor:
        return torch.stack([table(labels_Bn[:, i]) for i, table in enumerate(self.tables)]).sum(0)


class PublishedLoop(nn.Module):
    """The baseline: ``sample(labels, uniforms, ...)`` draws pictures as the published code does."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.tokenizer, self.generator = Tokenizer(sizes), Transformer(sizes)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)
        self.labels = Labels(sizes)

    @torch.no_grad()
    def sample(self, labels_Bn: Tensor, uniforms: Sequence[Tensor], cfg: float, top_k: int | None, top_p: float | None,
               temperature: float = 1.0, phase: Phase = lambda name: nullcontext()) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, S, S) in [-1, 1] and the tokens of every scale, (B, L_k).

        uniforms: one number in (0, 1) a position, (B, L_k) a scale, in place of the published multinomial draw, so
        that the library can be given the same; cfg: the published strength (1 less than the usual guidance scale);
        phase: called with the name of each part of the work, for timing.
        """
        sizes, b, device = self.sizes, len(labels_Bn), labels_Bn.device
        side, steps = sizes.sides[-1], len(sizes.sides)
        with phase("embedding"):
            for module in self.generator.modules():
                if isinstance(module, Attention):
                    module.cached_k = module.cached_v = None
            none = torch.tensor(sizes.classes, device=device).expand_as(labels_Bn)
            cond = self.labels(torch.cat([labels_Bn, none]))
            levels = torch.tensor([k for k, s in enumerate(sizes.sides) for _ in range(s * s)], device=device)
            places = self.generator.position + self.generator.level(levels)[None]
            x = cond[:, None] + self.generator.start + places[:, :sizes.sides[0] ** 2]
        f_hat = torch.zeros(b, sizes.latent_width, side, side, device=device)
        tokens, first = [], 0
        for k, p in enumerate(sizes.sides):
            first += p * p
            ratio = k / (steps - 1)
            with phase("network"):
                hidden = self.generator(x, cond)
            with phase("head"):
                logits = self.head(hidden).float()
            with phase("sampling"):
                logits = (1 + cfg * ratio) * logits[:b] - cfg * ratio * logits[b:]
                logits = logits / temperature if temperature != 1 else logits
                drawn = draw(narrow(logits, top_k, top_p), uniforms[k])
                tokens.append(drawn)
            with phase("canvas"):
                h = self.tokenizer.quantiser.codebook(drawn).transpose(1, 2).reshape(b, -1, p, p)
                if k < steps - 1:
                    h = F.interpolate(h, size=(side, side), mode="bicubic")
                f_hat = f_hat + 0.5 * h + 0.5 * self.tokenizer.quantiser.phis[sizes.phi_of_step[k]](h)
            if k < steps - 1:
                with phase("embedding"):
                    q = sizes.sides[k + 1]
                    small = F.interpolate(f_hat, size=(q, q), mode="area").flatten(2).transpose(1, 2)
                    x = (self.generator.word(small) + places[:, first:first + q * q]).repeat(2, 1, 1)
        with phase("decode"):
            return self.tokenizer.decoder(self.tokenizer.from_latent(f_hat)).clamp(-1, 1), tokens


def narrow(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Top-k by threshold, then top-p by sorting all V logits of every position."""
    if top_k:
        best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
        logits = logits.masked_fill(logits < best[..., -1:], -torch.inf)
    if top_p:
        rising, index = logits.sort(dim=-1)
        drop = rising.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The code at which the cumulative probability passes the uniform number."""
    total = logits.softmax(-1).cumsum(-1)
    index = torch.searchsorted(total, (uniform * total[..., -1])[..., None].contiguous(), right=True)[..., 0]
    return index.clamp_max(logits.shape[-1] - 1)
