"""MAR's transformer (arXiv 2406.11838, section 3.4): an encoder over the known tokens, a decoder over all cells."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.layers.linear import Linear, initialise_products
from nextscale.layers.mlp import MLP
from nextscale.plan import OWN_STEP, Plan, Span
from nextscale.run import Call, Rows, Run


@dataclass(frozen=True)
class MARGeneratorConfig:
    """Sizes of the network and of its training.

    width, heads, mlp_ratio: of both transformers, with so many blocks each; buffer: rows in front that carry the class;
    head_width, head_depth: of the denoising network; head_draws: times and noises a token for each pass of the
    transformers; dropout: in attention and behind each linear layer of a block; least_masked: the smallest share of
    tokens that training masks, below 1; head: ``diffusion``, or ``l2``, the same network that says a token's mean, to
    measure the former against.
    """

    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    buffer: int = 64
    head_width: int = 1024
    head_depth: int = 6
    head_draws: int = 4
    dropout: float = 0.1
    least_masked: float = 0.7
    head: str = field(default="diffusion", kw_only=True)

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise InputError(f"buffer is {self.buffer}; the class needs at least 1 row")
        if self.head not in ("diffusion", "l2"):
            raise InputError(f"head is {self.head!r}; it must be 'diffusion' or 'l2'")
        if not 0 <= self.least_masked < 1:
            raise InputError(f"least_masked is {self.least_masked}; it must be at least 0 and below 1")
        if self.width % self.heads:
            raise InputError(f"width {self.width} can't be split into {self.heads} heads")


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, scale E^-0.5."""

    def __init__(self, config: MARGeneratorConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = Linear(config.width, 3 * config.width)
        self.projection = Linear(config.width, config.width)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = ctx.attend(f"{address}.kv", q, k, v, rows, dropout=self.dropout if self.training else 0.0)
        return F.dropout(self.projection(out.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)): a plain pre-norm block of a vision transformer."""

    def __init__(self, config: MARGeneratorConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width, config.mlp_ratio, exact=True, dropout=config.dropout)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Any = None) -> Tensor:
        def attention(x: Tensor, rows: Rows) -> Tensor:
            return self.attention(self.attention_norm(x), rows, ctx, address)

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            return self.mlp(self.mlp_norm(x))

        x = ctx.residual(address, "attention", x, attention, rows)
        return ctx.residual(address, "mlp", x, mlp, rows)


@dataclass(frozen=True)
class MaskedCall(Call):
    """A call whose x holds the rows of the encoder alone, the first of all rows.

    places (1|R, N): where every row stands among the buffer's rows and the cells behind them; phase: which part of the
    tables the rows take their positions from, where there are several.
    """

    places: Tensor = field(kw_only=True)
    phase: int = 0


class MARGenerator(nn.Module):
    """Hidden states of all cells from the tokens of some.

    The encoder sees rows with the class in front (``buffer`` copies, each with a position of its own) and the known
    tokens alone; the decoder sees what comes out and a learned row at every masked cell. Attention is full in both, so
    nothing can stay in memory: every step evaluates everything anew. grid: the tokens'; token_width: their channels.

    Rows of a call stand in the order of the plan, behind the buffer: cells that are known first. All belong to the step
    that is drawn. Set ``checkpointing`` to compute blocks again in the backward pass (arXiv 1604.06174).
    """

    checkpointing = False
    block: type[Block] = Block
    live_widths = 20  # as in VARGenerator; the denoising head works on rows of its own

    def __init__(self, config: MARGeneratorConfig, grid: tuple[int, int], token_width: int, name: str = "base"):
        super().__init__()
        self.config, self.grid, self.name = config, grid, name
        c, self.cells = config.width, grid[0] * grid[1]
        self.word = nn.Linear(token_width, c)
        self.word_norm = nn.LayerNorm(c, eps=1e-6)
        self.encoder_position = nn.Parameter(torch.zeros(1, config.buffer + self.cells, c))
        self.encoder = nn.ModuleList(self.block(config) for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(c, eps=1e-6)
        self.between = Linear(c, c)
        self.masked = nn.Parameter(torch.zeros(1, 1, c))
        self.decoder_position = nn.Parameter(torch.zeros(1, config.buffer + self.cells, c))
        self.decoder = nn.ModuleList(self.block(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(c, eps=1e-6)
        self.output_position = nn.Parameter(torch.zeros(1, self.cells, c))

    def compile(self, *args: Any, **options: Any) -> None:
        """``torch.nn.Module.compile`` for any number of rows: how many tokens are known changes with every call."""
        super().compile(*args, **{**options, "dynamic": True})

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        return 0

    def rows_at_once(self, plan: Plan) -> int:
        """Rows of every call, a branch and picture."""
        return self.config.buffer + self.cells

    def check_plan(self, plan: Plan) -> None:
        """Raises InputError for a plan that isn't of the model's grid, or doesn't draw each of its cells once."""
        if any(step.grid != self.grid or step.maps != 1 for step in plan) or plan.length != self.cells:
            raise InputError(f"{self.name}: the plan draws {plan.length} cells of {sorted({s.grid for s in plan})}; "
                             f"this model draws each of {self.grid[0]}x{self.grid[1]} once")

    def call(self, run: Run) -> MaskedCall:
        """The call for the run's next step: what is known so far, and the cells that the step draws."""
        self.check_plan(run.plan)
        known, count = run.plan.starts[run.cursor], run.plan.steps[run.cursor].rows
        cond = run.memory.constant("condition", lambda: run.conditions().to(self.word.weight.dtype))
        tokens = take(run.reads[run.cursor], self.raster(run.order[:, :known]), run.canvas.value)
        return self.call_of(tokens, run.order, cond, run.cursor, slice(known, known + count))

    def call_of(self, known_BnC: Tensor, cell_BL3: Tensor, cond_RD: Tensor, step: int, predicts: slice) -> MaskedCall:
        """A call given the tokens of the first n of all cells (B|1, L, 3), in that order."""
        dtype, places = self.word.weight.dtype, self.raster(cell_BL3)
        return self._masked_call(self.word(known_BnC.to(dtype)), cell_BL3, places, cond_RD, step, predicts)

    def _masked_call(self, known_BnC: Tensor, cell_BL3: Tensor, place_BL: Tensor, cond_RD: Tensor, step: int,
                     predicts: slice, phase: int = 0) -> MaskedCall:
        """A call of embedded known rows, given cells and places of all rows but the buffer's."""
        buffer, n = self.config.buffer, known_BnC.shape[1]
        cells, places = (torch.cat([t.new_zeros(len(t), buffer, *t.shape[2:]), t], 1)
                         for t in (cell_BL3, place_BL + buffer))
        places[:, :buffer] = torch.arange(buffer, device=places.device)
        if len(places) > 1:
            copies = len(cond_RD) // len(places)
            cells, places = cells.repeat(copies, 1, 1), places.repeat(copies, 1)
        steps = torch.full((1, cells.shape[1]), step, device=cells.device)
        rows = Rows(cells, steps, (Span(step, 0, cells.shape[1]),), 0, OWN_STEP, masked=False, cond=cond_RD)
        known = known_BnC.repeat(len(cond_RD) // len(known_BnC), 1, 1)
        x = torch.cat([cond_RD.to(known.dtype)[:, None].expand(-1, buffer, -1), known], 1)
        x = self.word_norm(x + self._positions(self.encoder_position, places[:, :buffer + n], phase).to(x.dtype))
        return MaskedCall(x, rows, predicts, places=places, phase=phase)

    def raster(self, cell_BL3: Tensor) -> Tensor:
        """Raster numbers of cells in their map, (B, L), whichever map it is."""
        return cell_BL3[..., 1] * self.grid[1] + cell_BL3[..., 2]

    def _positions(self, table_1NC: Tensor, place_BN: Tensor, phase: int) -> Tensor:
        """Rows of a position table, (B, N, C); tables of several phases lie one behind the other."""
        return table_1NC[0][place_BN + phase * (self.config.buffer + self.cells)]

    def _masked_rows(self, place_BN: Tensor, phase: int) -> Tensor:
        """The decoder's learned rows at masked places, (1|B, N, C)."""
        return self.masked.expand(-1, place_BN.shape[1], -1)

    def _shared(self, phase: int) -> tuple[Any, Any]:
        """What all blocks of the encoder, and of the decoder, are given."""
        return None, None

    def forward(self, call: MaskedCall, ctx: Context) -> Tensor:
        """Hidden states (R, L, C) of all cells in the order of the call's rows, those of known cells among them."""
        entered = ctx.enter(call)
        assert isinstance(entered, MaskedCall)
        return self.decode(self.encode(entered, ctx), entered, ctx)

    def encode(self, call: MaskedCall, ctx: Context) -> Tensor:
        """The encoder's rows, (R, buffer + n, C)."""
        rows = call.rows.part(0, call.x.shape[1], 0)
        x = self._through(self.encoder, call.x, rows, ctx, f"{self.name}.encoder", self._shared(call.phase)[0])
        encoded: Tensor = self.encoder_norm(x)
        return encoded

    def decode(self, encoded: Tensor, call: MaskedCall, ctx: Context) -> Tensor:
        """The decoder's rows behind the buffer, (R, L, C)."""
        x, places, buffer = self.between(encoded), call.places, self.config.buffer
        masked = self._masked_rows(places[:, x.shape[1]:], call.phase).to(x.dtype)
        x = torch.cat([x, masked.expand(len(x), -1, -1)], 1)
        x = x + self._positions(self.decoder_position, places, call.phase).to(x.dtype)
        x = self._through(self.decoder, x, call.rows, ctx, f"{self.name}.decoder", self._shared(call.phase)[1])
        return self.decoder_norm(x)[:, buffer:] + self.output_position[0][places[:, buffer:] - buffer].to(x.dtype)

    def _through(self, blocks: Iterable[nn.Module], x: Tensor, rows: Rows, ctx: Context, name: str,
                 shared: Any = None) -> Tensor:
        for i, block in enumerate(blocks):
            x = ctx.through(f"{name}.{i}", block, x, rows, shared, self.checkpointing)
        return x

    @torch.no_grad()
    def initialise(self) -> None:
        """The published start: Xavier's for linear layers, normal of standard deviation 0.02 for learned rows."""
        initialise_products(self)
        for name, parameter in self.named_parameters():
            if "." not in name:
                nn.init.normal_(parameter, std=0.02)


def take(read_BLC: Tensor | None, place_BN: Tensor, like: Tensor) -> Tensor:
    """Vectors (B, n, C) at places (B|1, n) of a map in raster order, (B, L, C); none where nothing was read yet."""
    if read_BLC is None:
        return like.new_zeros(1, 0, like.shape[1])
    index = place_BN.expand(len(read_BLC), -1)[..., None]
    return read_BLC.gather(1, index.expand(-1, -1, read_BLC.shape[-1]))
