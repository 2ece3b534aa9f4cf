"""Adaptive layer normalisation: scale, shift and gate from the condition (DiT, arXiv 2212.09748)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.layers.bf16_training import ModulatedNorm, trains_in_bf16_on_cpu
from nextscale.layers.norms import layer_norm


def gain_of(scale: Tensor) -> Tensor:
    """1 + scale, which a run computes once; where gradients are asked for in float32, lest a small scale is rounded
    away beside the 1."""
    return 1 + (scale.float() if scale.dtype == torch.bfloat16 and torch.is_grad_enabled() else scale)


def modulated_norm(x_RLC: Tensor, gain_R1C: Tensor, shift_R1C: Tensor) -> Tensor:
    """layer_norm(x) * gain + shift, gain = 1 + scale."""
    if trains_in_bf16_on_cpu(x_RLC) and gain_R1C.shape[0] == len(x_RLC) and gain_R1C.shape[1] == 1:
        return ModulatedNorm.apply(x_RLC, gain_R1C, shift_R1C, 1e-6)
    return torch.addcmul(shift_R1C, layer_norm(x_RLC), gain_R1C.to(shift_R1C.dtype))


def gated_sum(x_RLC: Tensor, y_RLC: Tensor, gate_R1C: Tensor | None) -> Tensor:
    """x + gate y, in one pass where no gradient is asked for; gate None is 1."""
    if gate_R1C is None:
        return x_RLC + y_RLC
    return x_RLC + gate_R1C * y_RLC if torch.is_grad_enabled() else torch.addcmul(x_RLC, gate_R1C, y_RLC)


class Modulation(nn.Linear):
    """SiLU, then a linear layer to ``parts`` vectors of width C: conditions (R, D) to (R, 1, parts, C)."""

    def __init__(self, condition_width: int, width: int, parts: int):
        super().__init__(condition_width, parts * width)
        self.parts = parts

    def forward(self, cond_RD: Tensor) -> Tensor:
        return super().forward(F.silu(cond_RD)).unflatten(-1, (self.parts, -1))[:, None]
