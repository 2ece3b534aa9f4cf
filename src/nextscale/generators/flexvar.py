"""FlexVAR's transformer (arXiv 2502.20313, section 3.3): VAR's, with positions that follow any schedule."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.generators.var import VARGenerator, VARGeneratorConfig
from nextscale.layers.resize import resize
from nextscale.plan import Plan


@dataclass(frozen=True)
class FlexVARGeneratorConfig(VARGeneratorConfig):
    """VAR's sizes; table: cells a side of the position table, and the largest grid that can be drawn."""

    table: int = 32


class FlexVARGenerator(VARGenerator):
    """No level embedding; a step's positions are the learned table (1, C, T, T), resized to its grid by area. The first
    grid, of whatever size, has one learned start in all its cells.

    The table starts as channel 2i = sin(y w_i), channel 2i + 1 = cos(x w_i), w_i = 10000^(-2i / C).
    """

    config: FlexVARGeneratorConfig

    def add_positions(self) -> None:
        side = self.config.table
        self.start = nn.Parameter(torch.zeros(1, 1, self.config.width))
        self.position = nn.Parameter(torch.zeros(1, self.config.width, side, side))

    def initialise_positions(self, std: float) -> None:
        width, side = self.config.width, self.config.table
        rate_F = 10000.0 ** (-torch.arange(0, width, 2, device=self.position.device) / width)
        angle_FT = rate_F[:, None] * torch.arange(side, device=self.position.device)
        with torch.no_grad():
            self.position[0, 0::2] = angle_FT.sin()[:, :, None].expand(-1, side, side)
            self.position[0, 1::2] = angle_FT.cos()[:, None, :].expand(-1, side, side)

    def check_plan(self, plan: Plan) -> None:
        largest = max(max(step.grid) for step in plan)
        if largest > self.config.table:
            raise InputError(f"{self.name}: a grid of {largest} cells a side is beyond the position table's "
                             f"{self.config.table}; end the schedule there")

    def positions(self, plan: Plan, first: int, last: int) -> Tensor:
        table = self.position.float()
        return torch.cat([resize(table, step.grid, "area").flatten(2).transpose(1, 2)
                          for step in plan.steps[first:last]], 1)
