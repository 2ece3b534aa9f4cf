"""HMAR's transformer (arXiv 2506.04421): VAR's blocks inside a scale alone, and a second end to redraw parts of it."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.generators.var import Block, VARGenerator, VARGeneratorConfig, head_modulated
from nextscale.layers.adaln import Modulation, modulated_norm
from nextscale.plan import Plan
from nextscale.run import Call, Run


@dataclass(frozen=True)
class HMARGeneratorConfig(VARGeneratorConfig):
    """VAR's sizes; mask_blocks: how many of the last blocks the mask module has for itself, 8 in published models."""

    mask_blocks: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.mask_blocks <= self.depth:
            raise InputError(f"mask_blocks is {self.mask_blocks}; it must be at least 1 and at most depth {self.depth}")


class HMARGenerator(VARGenerator):
    """Two modules that share their first blocks.

    The next-scale module is VAR's transformer whose rows see their own step only: what they know of coarser scales is
    the canvas that they read. The mask module sees in addition what the step itself has put there so far, with a
    learned row instead at the cells that are to be drawn anew. Nothing stays in memory.
    """

    config: HMARGeneratorConfig

    def __init__(self, config: HMARGeneratorConfig, plan: Plan, latent_width: int, name: str = "base"):
        super().__init__(config, plan, latent_width, name)
        self.mask_embed = nn.Parameter(torch.zeros(1, config.width))
        self.mask_blocks = nn.ModuleList(Block(config, 0.0) for _ in range(config.mask_blocks))
        self.mask_head_modulation = Modulation(config.width, config.width, 2)

    @property
    def remembered(self) -> tuple[str, ...]:
        """Nowhere: no key or value stays in memory."""
        return ()

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        return 0

    def call(self, run: Run) -> Call:
        """The next step's rows alone: earlier ones are hidden anyway, so none is kept."""
        first = run.cursor
        call = self.call_from(run, first, keep=0)
        rows = call.rows

        def again(own_BLC: Tensor, hidden_BL: Tensor) -> Call:
            x = self.embed_round(run.plan, call.raw[0], own_BLC, hidden_BL, rows.cond, first, first + 1)
            return Call(x, rows, call.predicts, call.raw, again, round=1)

        return replace(call, again=again)

    def embed_round(self, plan: Plan, read_BLC: Tensor | None, own_BLC: Tensor, hidden_BL: Tensor, cond_RD: Tensor,
                    first: int, last: int) -> Tensor:
        """Rows of the mask module (R, L, C): W read + (W own, or the learned row where hidden) + b + position.

        read: the steps' inputs; own: what the steps themselves put on the canvas, at their grids, (B, L, latent_width);
        hidden (B, L): which cells are to be drawn anew. The first step has no input but the start, as in VAR.
        """
        if read_BLC is None:
            return self.embed(plan, [None], cond_RD, first, last)
        dtype, copies = self.word.weight.dtype, len(cond_RD) // len(read_BLC)
        own = own_BLC.to(dtype) @ self.word.weight.T
        own = torch.where(hidden_BL[..., None], self.mask_embed.to(dtype), own)
        x = self.word(read_BLC.to(dtype)) + own
        return x.repeat(copies, 1, 1) + self.positions(plan, first, last).to(dtype)

    def forward(self, call: Call, ctx: Context) -> Tensor:
        """Hidden states (R, L, C) of all rows, of the next-scale module, or of the mask module in later rounds."""
        if call.round == 0:
            return super().forward(call, ctx)
        call = ctx.enter(call)
        x, rows = call.x, call.rows
        shared = self._shared(rows, ctx)
        x = self._through(self.blocks[:len(self.blocks) - len(self.mask_blocks)], x, rows, ctx, self.name, shared)
        x = self._through(self.mask_blocks, x, rows, ctx, f"{self.name}.mask", shared)
        gain, shift = ctx.once(f"{self.name}.mask_head_modulation",
                               lambda: head_modulated(self.mask_head_modulation, rows.cond))
        return modulated_norm(x, gain, shift)
