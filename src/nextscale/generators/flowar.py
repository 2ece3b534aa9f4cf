"""FlowAR's transformer (arXiv 2412.15205): adaLN blocks over all scales; its rows condition a flow."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.heads.flow_transformer import FlowHeadConfig
from nextscale.layers.adaln import Modulation
from nextscale.layers.linear import Linear, initialise_products
from nextscale.layers.mlp import GEGLU
from nextscale.layers.norms import RMSNorm, rms_norm
from nextscale.layers.rope import rotate, rotation
from nextscale.plan import Plan
from nextscale.run import Call, Rows, Run

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TwoStacksConfig:
    """Sizes of the transformer that FlowAR and xAR share.

    depth: blocks in front of the joint and behind it; heads: channels a head are a multiple of 4, for rotary positions
    in two dimensions; mlp_ratio: of a plain MLP as large as the gated one; dropout: of attention's probabilities and of
    what branches add, in training.

    Raises InputError on sizes that don't fit each other.
    """

    depth: tuple[int, int] = (6, 6)
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if len(self.depth) != 2 or min(self.depth) < 1:
            raise InputError(f"depth is {self.depth}; give two numbers of at least 1, in front of the joint and behind")
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"width {self.width} in {self.heads} heads leaves {self.width / self.heads:g} channels a "
                             "head; they must be a multiple of 4")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class FlowARGeneratorConfig(TwoStacksConfig):
    """The transformer's sizes, and those of the flow network that its hidden states condition."""

    flow: FlowHeadConfig = field(default_factory=FlowHeadConfig)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention; queries and keys are turned by their place. The softmax scale is E^-0.5."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Linear(width, 3 * width)
        self.projection = Linear(width, width)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, turn: Turn) -> Tensor:
        r, length, c = x.shape
        q, k, v = self.qkv(x).view(r, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = ctx.attend(f"{address}.kv", rotate(q, turn), rotate(k, turn), v, rows, dropout=dropout)
        out = self.projection(out.transpose(1, 2).reshape(r, length, c))
        return nn.functional.dropout(out, self.dropout, self.training)


class Block(nn.Module):
    """x += gate1 attention(norm(x)); x += gate2 GEGLU(norm(x)), RMS norms modulated by the condition."""

    def __init__(self, config: TwoStacksConfig):
        super().__init__()
        self.attention = RotarySelfAttention(config.width, config.heads, config.dropout)
        self.mlp = GEGLU(config.width, config.mlp_ratio, config.dropout)
        self.modulation = Modulation(config.width, config.width, 6)

    def modulate(self, rows: Rows, ctx: Context, address: str) -> Tensor:
        """The six parts for every condition that the rows have, (R, S, 6, C); one condition here."""
        found: Tensor = ctx.once(f"{address}.modulation", lambda: self.modulation(rows.cond))
        return found

    def parts(self, found_RS6C: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """gate1, gate2, scale1, scale2, shift1, shift2 of the rows, each (R, 1, C) or (R, L, C)."""
        return found_RS6C.unbind(2)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, turn: Callable[[Rows, Context], Turn]
                ) -> Tensor:
        found = self.modulate(rows, ctx, address)

        def attention(x: Tensor, rows: Rows) -> Tensor:
            gate, _, scale, _, shift, _ = self.parts(found, rows)
            return gate * self.attention(torch.addcmul(shift, rms_norm(x), 1 + scale), rows, ctx, address,
                                         turn(rows, ctx))

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            _, gate, _, scale, _, shift = self.parts(found, rows)
            return gate * self.mlp(torch.addcmul(shift, rms_norm(x), 1 + scale))

        x = ctx.residual(address, "attention", x, attention, rows)
        return ctx.residual(address, "mlp", x, mlp, rows)


class TwoStacks(nn.Module):
    """Blocks, a joint, blocks: norm(second(joint(norm(first(norm(x))) + second position))).

    Rows are known by their step and cell: a learned table a stack holds one row for each of the plan, and attention
    turns queries and keys by the cell's place in the last grid's frame: row i of h stands at i H / h, H being the last
    grid's height. So the scales of a plan share one frame, aligned at the top left. latent_width: channels of the
    canvas. Set ``checkpointing`` to keep only the blocks' inputs of a pass with gradients.
    """

    checkpointing = False
    live_widths = 22  # as in VARGenerator; the flow's head works on rows of its own
    grid_K2: Tensor
    row_of_KG: Tensor

    def __init__(self, config: TwoStacksConfig, plan: Plan, latent_width: int, name: str = "base",
                 block: type[Block] = Block):
        super().__init__()
        self.config, self.plan, self.name = config, plan, name
        c = config.width
        self.word = nn.Linear(latent_width, c)
        self.norm_in = RMSNorm(c)
        self.first_position = nn.Parameter(torch.zeros(1, plan.length, c))
        self.first = nn.ModuleList(block(config) for _ in range(config.depth[0]))
        self.first_norm = RMSNorm(c)
        self.joint = Linear(c, c)
        self.second_position = nn.Parameter(torch.zeros(1, plan.length, c))
        self.second = nn.ModuleList(block(config) for _ in range(config.depth[1]))
        self.second_norm = RMSNorm(c)
        with torch.device("cpu"):
            grid_K2, row_of_KG = torch.tensor([step.grid for step in plan]), _rows_of(plan)
        self.register_buffer("grid_K2", grid_K2, persistent=False)
        self.register_buffer("row_of_KG", row_of_KG, persistent=False)

    @property
    def remembered(self) -> tuple[str, ...]:
        """Where the keys and values that stay in memory lie, layer by layer."""
        return tuple(f"{self.name}.{i}.kv" for i in range(len(self.first) + len(self.second)))

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        """What a run's memory is given for one picture: keys and values of every row of the plan."""
        blocks = len(self.first) + len(self.second)
        return 2 * blocks * self.config.width * plan.length * branches * next(self.parameters()).element_size()

    def rows_at_once(self, plan: Plan) -> int:
        """Rows of a run's largest call, a branch and picture."""
        return max(step.rows for step in plan)

    def check_plan(self, plan: Plan) -> None:
        """Raises InputError for a plan that the positions are not for."""
        if plan.steps != self.plan.steps:
            raise InputError(f"{self.name}: the model's positions are learned for the schedule "
                             f"{[s.grid for s in self.plan]}, the run has {[s.grid for s in plan]}")

    def index(self, rows: Rows) -> Tensor:
        """Which row of the plan each row is, (1|R, L), by its step and cell."""
        cell = rows.cell[..., 1] * self.grid_K2[rows.step, 1] + rows.cell[..., 2]
        return self.row_of_KG[rows.step, cell]

    def turn(self, rows: Rows, ctx: Context) -> Turn:
        """Cosines and sines (1|R, 1, L, E) of the rows' places, made once a call."""
        found: Turn = ctx.shared("turn", (rows.cell, rows.step), lambda: self._turn(rows))
        return found

    def _turn(self, rows: Rows) -> Turn:
        place = rows.cell[..., 1:] * self.grid_K2[-1] / self.grid_K2[rows.step]
        cos, sin = rotation(place, self.config.width // self.config.heads)
        return cos[:, None], sin[:, None]

    def through(self, x: Tensor, rows: Rows, ctx: Context) -> Tensor:
        """Rows with their first position added, to hidden states (R, L, C)."""
        x = self._blocks(self.first, 0, self.norm_in(x), rows, ctx)
        x = self.joint(self.first_norm(x)) + self.second_position[0, self.index(rows)].to(x.dtype)
        return self.second_norm(self._blocks(self.second, len(self.first), x, rows, ctx))

    def _blocks(self, blocks: Iterable[nn.Module], number: int, x: Tensor, rows: Rows, ctx: Context) -> Tensor:
        """Rows through some blocks, each under its address ``name.i``, counted from ``number``."""
        for i, block in enumerate(blocks, number):
            x = ctx.through(f"{self.name}.{i}", block, x, rows, self.turn, self.checkpointing)
        return x

    @torch.no_grad()
    def initialise(self, std: float = 0.02) -> None:
        """The published initialisation: Xavier-uniform products, zero biases, normal tables."""
        initialise_products(self)
        for name, parameter in self.named_parameters():
            if name.endswith("position"):
                nn.init.normal_(parameter, std=std)


class FlowARGenerator(TwoStacks):
    """FlowAR's: the first scale's rows are the condition itself, others embed what they read; a third table of
    positions is added to the hidden states, which condition the flow head."""

    def __init__(self, config: FlowARGeneratorConfig, plan: Plan, latent_width: int, name: str = "base"):
        super().__init__(config, plan, latent_width, name)
        self.output_position = nn.Parameter(torch.zeros(1, plan.length, config.width))

    def embed(self, plan: Plan, reads: Sequence[Tensor | None], cond_RD: Tensor, first: int, last: int) -> Tensor:
        """Rows x (R, L, C) of the steps ``first..last`` of a plan from their inputs (B, L_k, latent_width)."""
        dtype = self.word.weight.dtype
        parts = []
        for k, read in enumerate(reads[first:last], first):
            if k == 0 or read is None:
                parts.append(cond_RD[:, None].expand(-1, plan.steps[k].rows, -1).to(dtype))
            else:
                parts.append(self.word(read.to(dtype)).repeat(len(cond_RD) // len(read), 1, 1))
        return torch.cat(parts, 1) + self.first_position[:, plan.span(first, last)].to(dtype)

    def call(self, run: Run) -> Call:
        """The call for the run's next step: all steps that memory lacks, up to the cursor, whose rows predict."""
        self.check_plan(run.plan)
        first, last = run.filled, run.cursor + 1
        cond = run.memory.constant("condition", lambda: run.conditions().to(self.word.weight.dtype))
        rows = run.rows(first, last, cond=cond)
        predicts = slice(len(rows) - run.plan.steps[run.cursor].rows, len(rows))
        return Call(self.embed(run.plan, run.reads, cond, first, last), rows, predicts, run.reads[first:last])

    def forward(self, call: Call, ctx: Context) -> Tensor:
        """Hidden states z (R, L, C) of all rows."""
        call = ctx.enter(call)
        hidden = self.through(call.x, call.rows, ctx)
        return hidden + self.output_position[0, self.index(call.rows)].to(hidden.dtype)


def _rows_of(plan: Plan) -> Tensor:
    """Row of the plan at each step and cell, (K, most cells); 0 where there is none."""
    most = max(step.grid[0] * step.grid[1] for step in plan)
    table_KG = torch.zeros(len(plan), most, dtype=torch.int64)
    widths_L = torch.tensor([step.grid[1] for step in plan])[plan.step_of_row]
    table_KG[plan.step_of_row, plan.cells[:, 1] * widths_L + plan.cells[:, 2]] = torch.arange(plan.length)
    return table_KG
