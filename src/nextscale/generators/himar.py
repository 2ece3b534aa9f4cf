"""Hi-MAR's transformer (arXiv 2505.20288): MAR's over a coarse and a fine map, one set of weights for two phases."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.context import Context
from nextscale.devices import made_once
from nextscale.errors import InputError
from nextscale.generators.mar import Block, MARGenerator, MARGeneratorConfig, MaskedCall, take
from nextscale.layers.adaln import Modulation
from nextscale.layers.linear import Linear
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import Rows, Run

PIVOTS = "himar.pivots"
"""What a run carries: the embedded pivots, (B, S, C), hidden states of the coarse cells as they were when their tokens
were drawn. Cells whose tokens were given have a learned token instead."""


@dataclass(frozen=True)
class HiMARGeneratorConfig(MARGeneratorConfig):
    """MAR's sizes, and those of the joint head's transformer: joint_width, joint_depth, joint_heads, joint_mlp_ratio.

    pivot_share: share of pictures that phase 1 learns from pivots, the others from the learned coarse tokens alone; it
    rises from 0 over ``pivot_warmup``, a share of the training.
    """

    joint_width: int = 512
    joint_depth: int = 6
    joint_heads: int = 8
    joint_mlp_ratio: float = 4.0
    pivot_share: float = 0.25
    pivot_warmup: float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head != "diffusion":
            raise InputError(f"head is {self.head!r}; Hi-MAR has diffusion heads alone")
        if self.joint_width % self.joint_heads or self.joint_width % 4:
            raise InputError(f"joint_width {self.joint_width} must be a multiple of 4 and of {self.joint_heads} heads")
        if not (0 <= self.pivot_share <= 1 and 0 <= self.pivot_warmup <= 1):
            raise InputError("pivot_share and pivot_warmup are shares from 0 to 1")


class PhaseBlock(Block):
    """x += gate1 attention(norm(x) (1 + scale1)); x += gate2 MLP(norm(x) (1 + scale2)).

    scale1, gate1, scale2, gate2 = a * scale[phase] + shift[phase], a (1, 1, 4C) shared by all blocks.
    """

    def __init__(self, config: MARGeneratorConfig):
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(2, 1, 1, 4 * config.width))
        self.shift = nn.Parameter(torch.zeros(2, 1, 1, 4 * config.width))

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Any = None) -> Tensor:
        modulation, phase = shared
        scale1, gate1, scale2, gate2 = (modulation * self.scale[phase] + self.shift[phase]).to(x.dtype).chunk(4, -1)

        def attention(x: Tensor, rows: Rows) -> Tensor:
            return gate1 * self.attention(self.attention_norm(x) * (1 + scale1), rows, ctx, address)

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            return gate2 * self.mlp(self.mlp_norm(x) * (1 + scale2))

        x = ctx.residual(address, "attention", x, attention, rows)
        return ctx.residual(address, "mlp", x, mlp, rows)

    @torch.no_grad()
    def initialise(self) -> None:
        """Both phases start as a plain block: scales 0, gates 1."""
        self.scale.zero_()
        self.shift.copy_(self.shift.new_tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(self.shift.shape[-1] // 4))


class HiMARGenerator(MARGenerator):
    """Hidden states of the coarse cells in phase 0, of the fine ones in phase 1.

    The rows of both maps take part in both phases: in phase 0 all fine cells are masked; in phase 1 the coarse cells
    are known and hold pivots, hidden states of phase 0. Positions and masked rows are learned for each phase. small,
    grid: the coarse and the fine map's.
    """

    config: HiMARGeneratorConfig
    block = PhaseBlock

    def __init__(self, config: HiMARGeneratorConfig, small: tuple[int, int], grid: tuple[int, int], token_width: int,
                 name: str = "base"):
        super().__init__(config, grid, token_width, name)
        c, self.small = config.width, small
        self.coarse = small[0] * small[1]
        self.cells += self.coarse
        for table in ("encoder_position", "decoder_position"):
            setattr(self, table, nn.Parameter(torch.zeros(1, 2 * (config.buffer + self.cells), c)))
        self.masked = nn.Parameter(torch.zeros(1, 2 * self.cells, c))
        self.output_position = nn.Parameter(torch.zeros(1, self.cells, c))
        self.coarse_word = nn.Linear(token_width, c)
        self.coarse_tokens = nn.Parameter(torch.zeros(1, self.coarse, token_width))
        self.pivot = Linear(c, c)
        self.encoder_phase, self.decoder_phase = nn.Embedding(2, c), nn.Embedding(2, c)
        self.encoder_modulation, self.decoder_modulation = Modulation(c, 4 * c, 1), Modulation(c, 4 * c, 1)

    def check_plan(self, plan: Plan) -> None:
        """Raises InputError for a plan that isn't the coarse map's cells, each once, and then steps of the fine map."""
        phase = [step.grid == self.grid for step in plan]
        coarse = sum(step.rows for step in plan if step.grid == self.small)
        if phase != sorted(phase) or not any(phase) or coarse != self.coarse:
            raise InputError(f"{self.name}: the plan has the grids {[step.grid for step in plan]}; this model draws "
                             f"each cell of {self.small} once, then {self.grid}")

    def call(self, run: Run) -> MaskedCall:
        """The call for the run's next step."""
        self.check_plan(run.plan)
        step = run.plan.steps[run.cursor]
        cond = run.memory.constant("condition", lambda: run.conditions().to(self.word.weight.dtype))
        if step.grid == self.small:
            known = run.plan.starts[run.cursor]
            order = run.order[:, :self.coarse]
            places = order[:, :known, 1] * self.small[1] + order[:, :known, 2]
            return self.coarse_call(take(run.reads[run.cursor], places, run.canvas.value), order, cond, run.cursor,
                                    slice(known, known + step.rows))
        # The first step of this phase draws all cells, in the order in which they are settled.
        order = run.order[:, self.coarse:self.coarse + self.grid[0] * self.grid[1]]
        known = order.shape[1] - step.rows
        tokens = take(run.reads[run.cursor], self.raster(order[:, :known]), run.canvas.value)
        pivots = run.carry(PIVOTS, self.learned_pivots(run.pictures))
        return self.fine_call(pivots.to(self.word.weight.dtype), tokens, order, cond, run.cursor)

    def learned_pivots(self, pictures: int) -> Tensor:
        """Pivots of no cell: the embedded learned tokens, (B, S, C)."""
        return self.coarse_word(self.coarse_tokens.to(self.word.weight.dtype)).expand(pictures, -1, -1)

    def keep_pivots(self, run: Run, hidden_RNC: Tensor) -> None:
        """Keep the hidden states of the coarse cells that the run's step draws: the first branch's, for all."""
        cells = run.order[:, run.plan.span(run.cursor, run.cursor + 1)]
        places = (cells[..., 1] * self.small[1] + cells[..., 2]).expand(run.pictures, -1)[..., None]
        new = self.pivot(hidden_RNC[:run.pictures].to(self.pivot.weight.dtype))
        old = run.carry(PIVOTS, self.learned_pivots(run.pictures))
        run.carried[PIVOTS] = old.scatter(1, places.expand_as(new), new.to(old.dtype))

    def coarse_call(self, known_BnC: Tensor, cell_BS3: Tensor, cond_RD: Tensor, step: int,
                    predicts: slice) -> MaskedCall:
        """Phase 0, given the tokens of the first n coarse cells (B|1, S, 3), in that order."""
        embedded = self.coarse_word(known_BnC.to(self.coarse_word.weight.dtype))
        fine = _tagged(self.grid, cell_BS3).expand(len(cell_BS3), -1, -1)
        places = torch.cat([cell_BS3[..., 1] * self.small[1] + cell_BS3[..., 2],
                            self.coarse + self.raster(fine)], 1)
        return self._masked_call(embedded, torch.cat([cell_BS3, fine], 1), places, cond_RD, step, predicts)

    def fine_call(self, pivots_BSC: Tensor, known_BnC: Tensor, cell_BL3: Tensor, cond_RD: Tensor,
                  step: int) -> MaskedCall:
        """Phase 1, given embedded pivots and the tokens of the first n fine cells (B|1, L, 3), in that order; all fine
        cells predict, also the known ones, for the joint head looks at the whole map."""
        tokens = self.word(known_BnC.to(self.word.weight.dtype)).expand(len(pivots_BSC), -1, -1)
        small = torch.arange(self.coarse, device=cell_BL3.device).expand(len(cell_BL3), -1)
        coarse = made_once(cell_BL3.device, grid_cells, Step(self.small)).expand(len(cell_BL3), -1, -1)
        cells = torch.cat([coarse, cell_BL3 + cell_BL3.new_tensor([1, 0, 0])], 1)
        places = torch.cat([small, self.coarse + self.raster(cell_BL3)], 1)
        return self._masked_call(torch.cat([pivots_BSC, tokens], 1), cells, places, cond_RD, step,
                                 slice(self.coarse, self.cells), phase=1)

    def raster_of(self, call: MaskedCall) -> Tensor:
        """Raster numbers of the cells of a call's rows in their map, (1|R, N), without the buffer's."""
        places = call.places[:, self.config.buffer:] - self.config.buffer
        return torch.where(places < self.coarse, places, places - self.coarse)

    def _masked_rows(self, place_BN: Tensor, phase: int) -> Tensor:
        return self.masked[0][place_BN - self.config.buffer + phase * self.cells]

    def _shared(self, phase: int) -> tuple[Any, Any]:
        of = torch.full((1,), phase, device=self.masked.device)
        return tuple((modulation(table(of))[:, 0], phase) for modulation, table in (  # type: ignore[return-value]
            (self.encoder_modulation, self.encoder_phase), (self.decoder_modulation, self.decoder_phase)))

    @torch.no_grad()
    def initialise(self) -> None:
        super().initialise()
        for block in (*self.encoder, *self.decoder):
            assert isinstance(block, PhaseBlock)
            block.initialise()


def _tagged(grid: tuple[int, int], like: Tensor) -> Tensor:
    """All cells of the fine map, (1, L, 3), tagged as the second map."""
    return made_once(like.device, grid_cells, Step(grid, maps=2))[None, grid[0] * grid[1]:]
