"""M-VAR's transformer (arXiv 2411.10433): attention inside a scale, a Mamba-2 scan across scales."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.generators.var import Block, Product, VARGenerator, VARGeneratorConfig
from nextscale.layers.adaln import modulated_norm
from nextscale.layers.mamba2 import Mamba2, scan_products
from nextscale.layers.mlp import drop_path
from nextscale.plan import Plan
from nextscale.run import Call, Rows, Run


class MVARBlock(Block):
    """x += gate1 attention(norm(x)); x += gate2 Mamba-2(norm(x)); x += gate3 MLP(norm(x)), norms modulated.

    Attention sees the rows of its own step and remembers nothing; the scan goes through all rows, scale after scale,
    row after row inside a scale.
    """

    modulations = 9

    def __init__(self, config: VARGeneratorConfig, drop: float):
        super().__init__(config, drop)
        self.mamba = Mamba2(config.width)

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Tensor | None) -> Tensor:
        gate1, gate2, gate3, gain1, gain2, gain3, shift1, shift2, shift3 = ctx.once(
            f"{address}.modulation", lambda: self.modulate(rows.cond, shared))

        def attention(x: Tensor, rows: Rows) -> Tensor:
            own = rows.part(0, len(rows), keep=0)  # none of its keys stays, though the scan goes on behind the rows
            return drop_path(self.attention(modulated_norm(x, gain1, shift1), own, ctx, address), self.drop,
                             self.training)

        def scan(x: Tensor, rows: Rows) -> Tensor:
            y = ctx.recur(f"{address}.scan", modulated_norm(x, gain2, shift2), rows, self.mamba)
            return drop_path(y, self.drop, self.training)

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            return drop_path(self.mlp(modulated_norm(x, gain3, shift3)), self.drop, self.training)

        x = ctx.residual(address, "attention", x, attention, rows, gate1)
        x = ctx.residual(address, "scan", x, scan, rows, gate2)
        return ctx.residual(address, "mlp", x, mlp, rows, gate3)


class MVARGenerator(VARGenerator):
    """VAR's transformer of such blocks. Memory holds each block's scan state and the last inputs of its convolution,
    however many scales there were."""

    block = MVARBlock
    live_widths = 72  # the scan works in float32 on twice the width

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        """The scans' states and the last inputs of their convolutions, in float32."""
        layers = [module for module in self.modules() if isinstance(module, Mamba2)]
        return 4 * branches * sum(layer.inner * layer.state_width + layer.convolution.weight.shape[0]
                                  * (layer.convolution.weight.shape[2] - 1) for layer in layers)

    @property
    def remembered(self) -> tuple[str, ...]:
        """Nowhere: no key or value stays in memory."""
        return ()

    def call(self, run: Run) -> Call:
        """The rows of all steps that the scans have not been through, up to the cursor. A step alone needs no mask:
        there is nothing in memory that attention could see."""
        call = super().call(run)
        return replace(call, rows=replace(call.rows, masked=run.cursor > run.filled))

    def products(self, plan: Plan, pictures: int) -> list[Product]:
        depth = self.config.depth
        return [*super().products(plan, pictures),
                *((n, k, m, depth * times, batch, share)
                  for n, k, m, times, batch, share in scan_products(self.config.width, plan.length, pictures))]


@torch.no_grad()
def initialise_scans(generator: MVARGenerator) -> None:
    """The published initialisation of what VAR doesn't have: the convolutions. Linear layers are initialised as VAR's
    are; rates and norms keep what Mamba-2 gives them."""
    for block in generator.blocks:
        assert isinstance(block, MVARBlock) and block.mamba.convolution.bias is not None
        torch.nn.init.trunc_normal_(block.mamba.convolution.weight, std=0.02)
        block.mamba.convolution.bias.zero_()
