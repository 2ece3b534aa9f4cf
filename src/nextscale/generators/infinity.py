"""Infinity's transformer (arXiv 2412.04431, section 3): VAR's blocks with cross-attention to text, and rotary positions
that are the same for every grid of an aspect ratio."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.conditions.text import PooledText, TextRows, key_value_heads
from nextscale.context import Context
from nextscale.devices import made_once
from nextscale.errors import InputError
from nextscale.generators.var import Block, Product, SelfAttention, VARGenerator, VARGeneratorConfig
from nextscale.layers.attention import attention
from nextscale.layers.rope import rotate, rotation
from nextscale.plan import Plan, places
from nextscale.run import Rows

SQUARE = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
TALL: dict[float, tuple[tuple[int, int], ...]] = {
    1.0: tuple((side, side) for side in SQUARE),
    1.25: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36),
           (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36),
            (60, 45), (72, 54)),
    1.5: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32), (63, 42),
          (78, 52)),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32), (70, 40),
           (84, 48)),
    2.0: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30), (74, 37),
          (90, 45)),
    2.5: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26), (80, 32),
          (100, 40)),
    3.0: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30),
          (111, 37)),
}
"""The published schedules of 13 scales by height / width, tall pictures; wide ones are these turned over."""
RATIOS: dict[float, tuple[tuple[int, int], ...]] = TALL | {
    wide: tuple((w, h) for h, w in TALL[tall]) for wide, tall in
    ((0.8, 1.25), (0.75, 1.333), (0.666, 1.5), (0.571, 1.75), (0.5, 2.0), (0.4, 2.5), (0.333, 3.0))}


def nearest_ratio(ratio: float) -> float:
    """The published aspect ratio (height / width) nearest to one."""
    return min(RATIOS, key=lambda known: abs(known - ratio))


@dataclass(frozen=True)
class InfinityGeneratorConfig(VARGeneratorConfig):
    """Sizes of the transformer.

    mlp_width: inside of the feed-forward networks, 0 for round(4 C / 256) 256, at least 256; levels: rows of the level
    table; text_width: of the encoder's features; longest_text: tokens a prompt may have; pool_heads: of the attention
    that pools a prompt, 0 for text_width / 128 (/ 64 where C is above 4096). frame: the side of the square grid that
    places are measured on, whatever size is drawn, and of grids of the same area for other aspect ratios; 0 for the
    largest published grid of the ratio.
    """

    depth: int = 32
    width: int = 2048
    heads: int = 16
    shared_modulation: bool = True
    drop_path: float = 0.1
    mlp_width: int = 0
    levels: int = 15
    text_width: int = 2048
    longest_text: int = 512
    pool_heads: int = 0
    frame: int = 0

    def __post_init__(self) -> None:
        inner = self.mlp_width or max(1, round(4 * self.width / 256)) * 256
        object.__setattr__(self, "mlp_ratio", inner / self.width)
        if not self.shared_modulation:
            raise InputError("Infinity: shared_modulation is part of the model; leave it at true")
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"Infinity: {self.heads} heads of width {self.width} don't have a multiple of 4 channels "
                             "each, which rotary positions need")

    def for_text(self, width: int, pooled_width: int, longest: int) -> InfinityGeneratorConfig:
        """The same transformer for another text encoder's features."""
        return replace(self, text_width=width, longest_text=longest, pool_heads=self.pooling_heads)

    @property
    def pooling_heads(self) -> int:
        return self.pool_heads or max(1, self.text_width // (64 if self.width > 4096 else 128))


def largest_grid(plan: Plan, side: int) -> tuple[float, float]:
    """The grid that the places of a plan's cells are measured on."""
    height, width = plan.grid
    if not side:
        return RATIOS[nearest_ratio(height / width)][-1]
    stretch = side / math.sqrt(height * width)
    return height * stretch, width * stretch


def _stretch(plan: Plan, side: int) -> Tensor:
    """Cells of the largest grid by one of each of a plan's, (K, 2). The published factor is a float that multiplies in
    single precision."""
    largest = largest_grid(plan, side)
    return torch.tensor([[big / own for big, own in zip(largest, grid, strict=True)] for grid in plan.grids],
                        dtype=torch.float32)


class RotarySelfAttention(SelfAttention):
    """Self-attention whose queries and keys are turned by their places, (row, column), at rates down to 1 / theta."""

    config: InfinityGeneratorConfig
    theta = 10000.0

    def __init__(self, config: VARGeneratorConfig):
        super().__init__(config)
        self.config = config  # type: ignore[assignment]

    def turned(self, q: Tensor, k: Tensor, rows: Rows, ctx: Context) -> tuple[Tensor, Tensor]:
        turn = self.turn(rows, ctx, q.shape[-1])
        return rotate(q, turn), rotate(k, turn)

    def turn(self, rows: Rows, ctx: Context, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1|R, 1, L, E) of rows; blocks that see the same rows share them."""
        plan = ctx.plan
        if plan is None:
            raise InputError("attention: rotary positions need the plan that the rows are of, but this pass doesn't "
                             "say which")

        def make() -> tuple[Tensor, Tensor]:
            cos, sin = rotation(self.places(plan, rows), width, self.theta)
            return cos[:, None], sin[:, None]

        found: tuple[Tensor, Tensor] = ctx.shared(("turn", width), (rows.step, rows.cell), make)
        return found

    def places(self, plan: Plan, rows: Rows) -> Tensor:
        """Where rows lie, (1|R, L, 2): round(cell * H / h) on the grid H of ``largest_grid``, of height and width."""
        factor_K2 = made_once(rows.cell.device, _stretch, plan, self.config.frame)
        return (rows.cell[..., 1:].float() * factor_K2[rows.step.long()]).round()


class TextAttention(nn.Module):
    """Attention of all rows to the text, softmax(q k^T / sqrt(E)) v; keys have no bias. Keys and values are made once a
    run.

    text_width: of the text's tokens, where it is not ``width``; unit: queries and keys of length 1, times a learned
    scale a head instead of 1 / sqrt(E). x may be that of the leading rows of the batch alone.
    """

    def __init__(self, width: int, heads: int, text_width: int = 0, unit: bool = False):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(text_width or width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)
        self.scale_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0))) if unit else None

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        text: TextRows = rows.cond
        k, v = ctx.once(f"{address}.text", lambda: self.keys_values(text))
        q, scale = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), None
        if self.scale_1H11 is not None:
            gain = self.scale_1H11.clamp_max(math.log(100.0)).exp()
            q, scale = F.normalize(q, dim=-1) * gain.to(q.dtype), 1.0
        out = attention(q, k[:len(q)], v[:len(q)], text.valid[:len(q), None, None], scale)
        found: Tensor = self.projection(out.transpose(1, 2).flatten(2))
        return found

    def keys_values(self, text: TextRows) -> tuple[Tensor, Tensor]:
        k, v = key_value_heads(self.kv(text.tokens), self.v_bias, self.heads)
        return k if self.scale_1H11 is None else F.normalize(k, dim=-1), v


class InfinityBlock(Block):
    """VAR's block with x += text attention(norm(x)), whose norm has learned weights and no gate, in the middle."""

    attention_type = RotarySelfAttention

    def __init__(self, config: VARGeneratorConfig, drop: float):
        super().__init__(config, drop)
        self.text_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.text = TextAttention(config.width, config.heads)

    def between(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        def text(x: Tensor, rows: Rows) -> Tensor:
            found: Tensor = self.text(self.text_norm(x), rows, ctx, address)
            return found

        return ctx.residual(address, "text", x, text, rows)


class InfinityGenerator(VARGenerator):
    """Infinity's transformer over any plan of scales. A level's embedding is added once, before the blocks."""

    config: InfinityGeneratorConfig
    block = InfinityBlock

    def add_positions(self) -> None:
        self.level = nn.Embedding(self.config.levels, self.config.width)

    def initialise_positions(self, std: float) -> None:
        nn.init.trunc_normal_(self.level.weight, std=std)

    def positions(self, plan: Plan, first: int, last: int) -> Tensor:
        found: Tensor = self.level(places(plan, self.level.weight.device)[1][:, plan.span(first, last)])
        return found

    def check_plan(self, plan: Plan) -> None:
        levels = self.level.num_embeddings
        if len(plan) > levels:
            raise InputError(f"{self.name}: a schedule of {len(plan)} scales is longer than the {levels} levels that "
                             "the model has")
        if plan.steps[0].rows != 1:
            raise InputError(f"{self.name}: a schedule starts with one cell, not {plan.steps[0].grid}")

    def vector(self, cond: Any) -> Tensor:
        text: TextRows = cond
        return text.vector

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        """Keys and values of every row, and of a text of full length."""
        text = 2 * self.config.depth * self.config.width * self.config.longest_text * branches
        return super().memory_bytes(plan, branches) + text * next(self.parameters()).element_size()

    def products(self, plan: Plan, pictures: int) -> list[Product]:
        config, c, depth = self.config, self.config.width, self.config.depth
        rows, width, text = pictures * plan.length, c // config.heads, config.longest_text
        block: Any = self.blocks[0]
        of_text = block.text.kv.in_features
        return [*super().products(plan, pictures), (rows, c, c, 2 * depth, 1, 1.0),
                (pictures * text, of_text, 2 * c, depth, 1, 1.0),
                (plan.length, width, text, depth, pictures * config.heads, 1.0),
                (plan.length, text, width, depth, pictures * config.heads, 1.0)]


@torch.no_grad()
def initialise(generator: InfinityGenerator, head: nn.Linear, text: PooledText, gate: float = 1e-5,
               scale: float = 1e-3) -> None:
    """Infinity's initialisation (published code): truncated normal of std sqrt(1 / 3C), small gates, a small head.

    gate: factor on the residual gates (5e-6 over blocks in the published models), scale: on scales and shifts.
    """
    width, depth = generator.config.width, generator.config.depth
    std = math.sqrt(1 / width / 3)
    for root in (generator, head, text):
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(generator.start, std=std)
    nn.init.trunc_normal_(text.pool.query, std=std)
    nn.init.trunc_normal_(text.null, std=1.2 / math.sqrt(text.null.shape[1]))
    head.weight.mul_(0.02)
    generator.head_modulation.weight.mul_(1e-3)
    for block in generator.blocks:
        assert isinstance(block, InfinityBlock)
        for layer in (block.attention.projection, block.text.projection, block.mlp.contract):
            layer.weight.div_(math.sqrt(2 * depth))
        offset = block.modulation_offset.normal_(std=1 / math.sqrt(width))
        offset[:, :, :2].mul_(gate)
        offset[:, :, 2:].mul_(scale)
