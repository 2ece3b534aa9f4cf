"""CAR's control tower (Yao et al., arXiv 2410.04671): half as many blocks as the base walk along with it and rewrite
what its later half is given.

With v_k what the base would embed at scale k without position, e_k the encoded control map and N the base's blocks:

    c_k = conv(v_k) + e_k + position;  r_0 .. r_(N/2-1) = outputs of the tower's blocks on c, seeing what the base sees
    input of base block i >= N/2:  x <- W_m norm_m([x; r_(N/2-1-m)]) + b_m,  m = i - N/2

The last r meets the first of the late blocks. x is replaced: there is no way around W_m, and nothing starts at zero.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.context import Context, Function
from nextscale.control.maps import ControlConfig, ControlHook, layer_of
from nextscale.errors import InputError
from nextscale.generators.var import Block, VARGenerator, VARGeneratorConfig
from nextscale.layers.linear import Linear
from nextscale.layers.resize import pillow_bicubic
from nextscale.plan import Plan
from nextscale.run import Call, Rows


@dataclass(frozen=True)
class TowerConfig(ControlConfig):
    """kinds: of control maps, one; drop: see ``ControlConfig``; widths: channels of the map's encoder, whose
    side halves between two of them, so that a scale of p cells a side looks at 2^(len(widths) - 1) p pixels."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kinds) != 1:
            raise InputError(f"control kinds are {', '.join(self.kinds) or 'none'}; a tower is trained with one kind, "
                             "as in control.kinds=[\"canny\"]")
        if not self.widths or min(self.widths) < 1:
            raise InputError(f"control widths are {self.widths}; give at least one, all above 0")


class MapEncoder(nn.Module):
    """3x3 convolutions and SiLU from a map (B, 3, s p, s p) to (B, C, p, p); the same for all scales."""

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        self.input = nn.Conv2d(3, widths[0], 3, padding=1)
        self.layers = nn.ModuleList()
        for a, b in itertools.pairwise(widths):
            self.layers.extend([nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)])
        self.output = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.input(x))
        for layer in self.layers:
            x = F.silu(layer(x))
        result: Tensor = self.output(x)
        return result


class Join(nn.Module):
    """W norm([x; r]) + b: two streams (R, L, C) to one; the norm in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(2 * width, eps=1e-6)
        self.linear = Linear(2 * width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        both = torch.cat([x, residual.to(x.dtype)], -1)
        norm = F.layer_norm(both.float(), both.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), 1e-6)
        found: Tensor = self.linear(norm.to(both.dtype))
        return found


class ControlTower(nn.Module):
    """The tower of a base of ``base.depth`` blocks; its blocks remember under ``control.j.kv``.

    Raises InputError for an odd number of blocks: every late block takes one of the tower's outputs.
    """

    name = "control"

    def __init__(self, config: TowerConfig, base: VARGeneratorConfig, plan: Plan):
        super().__init__()
        if base.depth % 2:
            raise InputError(f"the base has {base.depth} blocks; a control tower needs an even number")
        self.config, self.plan, self.base = config, plan, base
        half = base.depth // 2
        self.encoder = MapEncoder(config.widths, base.width)
        self.content = nn.Conv2d(base.width, base.width, 3, padding=1)
        drops = torch.linspace(0, base.drop_path, base.depth, device="cpu").tolist()[:half]
        self.blocks = nn.ModuleList(Block(base, drop) for drop in drops)
        self.joins = nn.ModuleList(Join(base.width) for _ in range(half))

    @torch.no_grad()
    def initialise(self) -> None:
        """The published start: VAR's for linear layers but without the small factors, kernels with std 0.02."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                kernel = isinstance(module, nn.Conv2d)
                nn.init.trunc_normal_(module.weight, std=0.02 if kernel else math.sqrt(1 / self.base.width / 3))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            if self.base.shared_modulation:
                block.modulation_offset.normal_(std=self.base.width**-0.5)  # type: ignore[operator]

    def pyramid(self, maps: Tensor) -> list[Tensor]:
        """A map uint8 (B, 1 or 3, H, W) in the pixels of every scale, (B, 3, s h, s w) in [-1, 1]; resized as Pillow
        does, the whole picture for each scale."""
        side = 2 ** (len(self.config.widths) - 1)
        sizes = [(side * step.grid[0], side * step.grid[1]) for step in self.plan]
        return [pillow_bicubic(maps, size).float().div(127.5).sub(1).expand(-1, 3, -1, -1) for size in sizes]

    def encode(self, maps: Tensor) -> list[Tensor]:
        """e_k of every scale, (B, L_k, C), of maps uint8 (B, 1 or 3, H, W); not under autocast."""
        with torch.autocast(maps.device.type, enabled=False):
            dtype = self.encoder.input.weight.dtype
            return [self.encoder(one.to(dtype)).flatten(2).transpose(1, 2) for one in self.pyramid(maps)]

    def forward(self, content: Tensor, encoded: Sequence[Tensor], position: Tensor, rows: Rows, ctx: Context,
                shared: Tensor | None, recompute: bool = False) -> list[Tensor]:
        """r_0 .. r_(N/2-1), (R, L, C) each. content: v of the call's rows; encoded: e of its steps; recompute: as
        ``Context.through`` has it."""
        assert rows.spans is not None
        parts = []
        for span, control in zip(rows.spans, encoded, strict=True):
            h, w = self.plan.steps[span.step].grid
            here = content[:, span.lo:span.hi].transpose(1, 2).unflatten(2, (h, w))
            parts.append(self.content(here).flatten(2).transpose(1, 2) + control.to(content.dtype))
        c = torch.cat(parts, 1) + position.to(content.dtype)
        found = []
        for j, block in enumerate(self.blocks):
            c = ctx.through(f"{self.name}.{j}", block, c, rows, shared, recompute)
            found.append(c)
        return found


class TowerHook(ControlHook):
    """A tower on its base, bound to the maps of a run's pictures, uint8 (B, 1 or 3, H, W)."""

    def __init__(self, tower: ControlTower, base: VARGenerator, maps: Tensor):
        super().__init__(tower.name, maps, tower.encode)
        self.tower, self.base = tower, base

    def part(self, pictures: slice) -> TowerHook:
        return TowerHook(self.tower, self.base, self.maps[pictures])

    def enter(self, ctx: Context, call: Call) -> Call:
        call, rows = super().enter(ctx, call), call.rows
        if rows.spans is None or len(call.raw) != len(rows.spans):
            raise InputError("control tower: it walks step by step with its base; leave out what lets pictures stand "
                             "at different steps")
        first, last = rows.spans[0].step, rows.spans[-1].step + 1
        layer = self.base.shared_modulation
        shared = None if layer is None else ctx.once(f"{self.base.name}.shared_modulation", lambda: layer(rows.cond))
        ctx.scratch["control.outputs"] = self.tower(
            self.base.content(self.base.plan, call.raw, rows.cond), self.bound(ctx).steps[first:last],
            self.base.positions(self.base.plan, first, last), rows, ctx, shared, self.base.checkpointing)
        return call

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        layer, half = layer_of(address, self.base.name), len(self.tower.joins)
        if layer is None or layer < half:
            return inner(x, rows)
        residual = ctx.scratch["control.outputs"][2 * half - 1 - layer]
        if residual.shape[1] != x.shape[1]:
            raise InputError("control tower: rows were selected before it; put the hook that does so before it")
        return inner(self.where_acts(ctx, self.tower.joins[layer - half](x, residual), x), rows)
