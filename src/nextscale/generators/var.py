"""VAR's transformer (arXiv 2404.02905, section 3.3): adaLN blocks over all scales, one learned row a position."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.layers.adaln import Modulation, gain_of, modulated_norm
from nextscale.layers.attention import unit_gains, unit_heads
from nextscale.layers.linear import Linear
from nextscale.layers.mlp import MLP, drop_path
from nextscale.plan import Plan, places
from nextscale.run import Call, Rows, Run

Product = tuple[int, int, int, int, int, float]
"""Matrix products of one shape: n, k, m, how many, batch, and the share of their arithmetic that is asked for."""


@dataclass(frozen=True)
class VARGeneratorConfig:
    """Sizes of the transformer.

    width C = 64 depth and heads = depth in the published models. shared_modulation: one adaLN layer for all blocks,
    each adding a learned offset (the 512-pixel model). l2_attention: queries and keys of unit length with a learned
    scale a head. drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: float = 4.0
    shared_modulation: bool = False
    l2_attention: bool = True
    drop_path: float = 0.0

    @classmethod
    def of_depth(cls, depth: int, **changes: object) -> VARGeneratorConfig:
        """The published rule: 64 channels a head, as many heads as blocks, stochastic depth 0.1 depth / 24."""
        values: dict[str, object] = {"depth": depth, "width": 64 * depth, "heads": depth,
                                     "drop_path": 0.1 * depth / 24, **changes}
        return cls(**values)  # type: ignore[arg-type]


class SelfAttention(nn.Module):
    """Multi-head self-attention; keys have no bias. With l2 attention the softmax scale is learned a head."""

    def __init__(self, config: VARGeneratorConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.scale_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0))) \
            if config.l2_attention else None
        self.projection = Linear(config.width, config.width)
        self.plain_scale = 0.25 / math.sqrt(config.width // config.heads)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        batch, x = len(x), ctx.leading(f"{address}.kv", x, rows)
        r, length, c = x.shape
        bias, *gain = ctx.once(f"{address}.bias", self.constants)
        qkv = self.qkv(x, bias[0])
        scale = 1.0 if gain else self.plain_scale
        if gain:
            q, k, v = unit_heads(qkv, *gain)
        else:
            q, k, v = qkv.view(r, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.turned(q, k, rows, ctx)
        ctx.offer("bare query", lambda: (qkv[..., :c] - self.q_bias.to(qkv.dtype)).unflatten(
            -1, (self.heads, -1)).transpose(1, 2), rows)
        out = ctx.attend(f"{address}.kv", q, k, v.to(q.dtype), rows, scale=scale)
        y = self.projection(out.transpose(1, 2).reshape(r, length, c))
        return y if r == batch else y.repeat(batch // r, 1, 1)

    def constants(self) -> tuple[Tensor, ...]:
        """What of the weights alone a pass needs: the bias, (1, 3C), and the gains of unit queries and keys."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])[None]
        if self.scale_1H11 is None:
            return (bias,)
        return bias, unit_gains(self.scale_1H11.clamp_max(math.log(100.0)).exp())

    def turned(self, q: Tensor, k: Tensor, rows: Rows, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (R, H, L, E) as the rows' places change them; as they are where rows know their places."""
        return q, k


class Block(nn.Module):
    """x += gate1 attention(norm(x)); x += gate2 MLP(norm(x)), norms modulated by the condition.

    modulations: gates, scales and shifts together, in this order; 0 for a block whose condition does not steer them,
    which has a ``forward`` of its own, in a network whose last norm is its head's.
    """

    modulations = 6
    attention_type: type[SelfAttention] = SelfAttention

    def __init__(self, config: VARGeneratorConfig, drop: float):
        super().__init__()
        self.attention = self.attention_type(config)
        self.mlp = MLP(config.width, config.mlp_ratio)
        self.drop = drop
        if not self.modulations:
            return
        if config.shared_modulation:
            self.modulation_offset = nn.Parameter(torch.zeros(1, 1, self.modulations, config.width))
        else:
            self.modulation = Modulation(config.width, config.width, self.modulations)

    def modulate(self, cond_RD: Tensor, shared_R16C: Tensor | None) -> tuple[Tensor, ...]:
        """Gates, gains (1 + scale) and shifts of the branches, each (R, 1, C)."""
        parts = self.modulation(cond_RD) if shared_R16C is None else shared_R16C + self.modulation_offset
        gates, scales, shifts = parts.chunk(3, 2)
        return (*gates.unbind(2), *gain_of(scales).unbind(2), *shifts.unbind(2))

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Tensor | None) -> Tensor:
        gate1, gate2, gain1, gain2, shift1, shift2 = ctx.once(
            f"{address}.modulation", lambda: self.modulate(rows.cond, shared))

        def attention(x: Tensor, rows: Rows) -> Tensor:
            return drop_path(self.attention(modulated_norm(x, gain1, shift1), rows, ctx, address), self.drop,
                             self.training)

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            return drop_path(self.mlp(modulated_norm(x, gain2, shift2)), self.drop, self.training)

        x = ctx.residual(address, "attention", x, attention, rows, gate1)
        return ctx.residual(address, "mlp", self.between(x, rows, ctx, address), mlp, rows, gate2)

    def between(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        """What a block has between its attention and its MLP."""
        return x


class VARGenerator(nn.Module):
    """The transformer over a plan of scales. ``embed`` makes rows from step inputs, the call gives hidden states.

    latent_width: channels of the canvas, which step inputs are read from. Set ``checkpointing`` to keep only the
    blocks' inputs of a pass with gradients and compute the rest again in the backward pass (arXiv 1604.06174).
    """

    checkpointing = False
    block: type[Block] = Block

    # What a row of a call holds at most while a block works on it, as a multiple of the width (counted).
    live_widths = 13

    def __init__(self, config: VARGeneratorConfig, plan: Plan, latent_width: int, name: str = "base"):
        super().__init__()
        self.config, self.plan, self.name = config, plan, name
        c = config.width
        self.word = nn.Linear(latent_width, c)
        self.start = nn.Parameter(torch.zeros(1, plan.steps[0].rows, c))
        self.add_positions()
        self.shared_modulation = Modulation(c, c, self.block.modulations) if config.shared_modulation else None
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self.block(config, drop) for drop in drops)
        if self.block.modulations:
            self.head_modulation = Modulation(c, c, 2)

    def add_positions(self) -> None:
        """Make what tells rows where they are: a learned row a position, and one a level."""
        self.position = nn.Parameter(torch.zeros(1, self.plan.length, self.config.width))
        self.level = nn.Embedding(len(self.plan), self.config.width)

    def initialise_positions(self, std: float) -> None:
        nn.init.trunc_normal_(self.position, std=std)

    def positions(self, plan: Plan, first: int, last: int) -> Tensor:
        """Learned position and level of the rows of some steps, (1, L, C)."""
        span = plan.span(first, last)
        return self.position[:, span] + self.level(places(plan, self.position.device)[1][:, span])

    def check_plan(self, plan: Plan) -> None:
        """Raises InputError for a plan that the positions are not for."""
        if plan.steps != self.plan.steps:
            raise InputError(f"{self.name}: the model's positions are learned for the schedule "
                             f"{[s.grid for s in self.plan]}, the run has {[s.grid for s in plan]}")

    def use_unit_lengths(self, wanted: bool) -> None:
        """Let attention take queries and keys of unit length, or as they are, whatever the configuration said."""
        self.config = replace(self.config, l2_attention=wanted)
        for block in self.blocks:
            assert isinstance(block, Block)
            if wanted != (block.attention.scale_1H11 is not None):
                start = block.attention.q_bias.new_full((1, self.config.heads, 1, 1), math.log(4.0))
                block.attention.scale_1H11 = nn.Parameter(start) if wanted else None

    def vector(self, cond: Any) -> Tensor:
        """What of the rows' condition becomes the first row and steers the norms, (R, C)."""
        found: Tensor = cond
        return found

    def content(self, plan: Plan, reads: Sequence[Tensor | None], cond: Any) -> Tensor:
        """Rows (R, L, C) of some steps of a plan before they are told where they are: W read + b; the first step's
        rows, whose input is None, are the condition plus a learned start."""
        dtype, copies, first_RC = self.word.weight.dtype, 1, self.vector(cond)
        known = [r for r in reads if r is not None]
        if known:
            copies = len(first_RC) // len(known[0])
        parts = [self.word(r.to(dtype)).repeat(copies, 1, 1) for r in known]
        if len(known) < len(reads):
            parts.insert(0, first_RC[:, None] + self.start.to(dtype).expand(-1, plan.steps[0].rows, -1))
        return torch.cat(parts, 1)

    def embed(self, plan: Plan, reads: Sequence[Tensor | None], cond: Any, first: int, last: int) -> Tensor:
        """Rows x (R, L, C) of the steps ``first..last`` of a plan from their inputs (B, L_k, latent_width): ``content``
        plus position and level."""
        return self.content(plan, reads[first:last], cond) \
            + self.positions(plan, first, last).to(self.word.weight.dtype)

    @property
    def remembered(self) -> tuple[str, ...]:
        """Where the keys and values that stay in memory lie, layer by layer."""
        return tuple(f"{self.name}.{i}.kv" for i in range(len(self.blocks)))

    def call(self, run: Run) -> Call:
        """The call for the run's next step: all steps that memory lacks, up to the cursor, whose rows predict."""
        return self.call_from(run, run.filled)

    def call_from(self, run: Run, first: int, keep: int = -1) -> Call:
        """The call of the steps ``first`` up to the run's cursor, whose rows predict. keep: as ``Run.rows`` has it."""
        self.check_plan(run.plan)
        last = run.cursor + 1
        cond = run.memory.constant("condition", lambda: run.conditions().to(self.word.weight.dtype))
        rows = run.rows(first, last, keep, cond)
        predicts = slice(len(rows) - run.plan.steps[run.cursor].rows, len(rows))
        return Call(self.embed(run.plan, run.reads, cond, first, last), rows, predicts, run.reads[first:last])

    def forward(self, call: Call, ctx: Context) -> Tensor:
        """Hidden states (R, L, C) of all rows, normalised and modulated for the head where norms are modulated."""
        call = ctx.enter(call)
        rows = call.rows
        x = self._through(self.blocks, call.x, rows, ctx, self.name, self._shared(rows, ctx))
        if not self.block.modulations:
            return x
        gain, shift = ctx.once(f"{self.name}.head_modulation",
                               lambda: head_modulated(self.head_modulation, self.vector(rows.cond)))
        return modulated_norm(x, gain, shift)

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        """What a run's memory is given for one picture: keys and values of every row of the plan."""
        values = 2 * self.config.depth * self.config.width * plan.length * branches
        return values * next(self.parameters()).element_size()

    def rows_at_once(self, plan: Plan) -> int:
        """Rows of a run's largest call, a branch and picture."""
        return max(step.rows for step in plan)

    def products(self, plan: Plan, pictures: int) -> list[Product]:
        """The matrix products of a training pass over a plan; attention's by what the visibility shows."""
        config, c = self.config, self.config.width
        rows, inner, depth = pictures * plan.length, round(c * config.mlp_ratio), config.depth
        count, parts = 1 if config.shared_modulation else depth, self.block.modulations
        modulation = [(pictures, c, parts * c, count, 1, 1.0), (pictures, c, 2 * c, 1, 1, 1.0)] if parts else []
        shown, batch, width = plan.pairs / plan.length**2, pictures * config.heads, c // config.heads
        pieces = [(step.rows, 1.0) for step in plan] if plan.visible.previous == 0 else [(plan.length, shown)]
        attention = [product for n, share in pieces for product in ((n, width, n, depth, batch, share),
                                                                   (n, n, width, depth, batch, share))]
        return [(rows, c, 3 * c, depth, 1, 1.0), (rows, c, c, depth, 1, 1.0),
                (rows, c, inner, depth, 1, 1.0), (rows, inner, c, depth, 1, 1.0), *attention,
                (rows, self.word.in_features, c, 1, 1, 1.0), *modulation]

    def _shared(self, rows: Rows, ctx: Context) -> Tensor | None:
        """The modulation that all blocks share, where they do."""
        layer = self.shared_modulation
        return None if layer is None else ctx.once(f"{self.name}.shared_modulation",
                                                   lambda: layer(self.vector(rows.cond)))

    def _through(self, blocks: Iterable[nn.Module], x: Tensor, rows: Rows, ctx: Context, name: str,
                 shared: Tensor | None) -> Tensor:
        """Rows through some blocks, each under its address ``name.i``."""
        for i, block in enumerate(blocks):
            x = ctx.through(f"{name}.{i}", block, x, rows, shared, self.checkpointing)
        return x


def head_modulated(modulation: nn.Module, cond_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift, (R, 1, C), of the last norm."""
    scale, shift = modulation(cond_RD).unbind(2)
    return gain_of(scale), shift


@torch.no_grad()
def initialise(generator: VARGenerator, head: nn.Linear, table: nn.Module, gate: float = 1e-3, scale: float = 0.5,
               head_scale: float = 0.02) -> None:
    """VAR's initialisation: truncated normal of std sqrt(1 / 3C) everywhere, then small gates and a small head.

    gate: factor on the adaLN weights of the residual gates (``alng``: smaller for deeper models); scale: on those of
    scales and shifts; head_scale: on the output layer.
    """
    width, depth = generator.config.width, generator.config.depth
    std = math.sqrt(1 / width / 3)
    for root in (generator, head, table):
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)
    nn.init.trunc_normal_(generator.start, std=std)
    generator.initialise_positions(std)
    head.weight.mul_(head_scale)
    generator.head_modulation.weight.mul_(scale)
    if generator.shared_modulation is not None:
        generator.shared_modulation.weight[:2 * width].mul_(gate)
        generator.shared_modulation.weight[2 * width:].mul_(scale)
    for block in generator.blocks:
        assert isinstance(block, Block)
        block.attention.projection.weight.div_(math.sqrt(2 * depth))
        block.mlp.contract.weight.div_(math.sqrt(2 * depth))
        if generator.config.shared_modulation:
            offset = block.modulation_offset.normal_(std=1 / math.sqrt(width))
            offset[:, :, :2].mul_(gate)
            offset[:, :, 2:].mul_(scale)
        else:
            block.modulation.weight[:2 * width].mul_(gate)
            block.modulation.weight[2 * width:].mul_(scale)
