"""Linear layers that keep a CPU's matrix units busy."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.layers.bf16_training import Gelu, Product, trains_in_bf16_on_cpu
from nextscale.layers.bf16_training import has_blocked_products as _has_blocked_products


class Linear(nn.Linear):
    """``torch.nn.Linear``, quicker on a CPU in bfloat16.

    There the product wants its weights in blocks; handed plain ones, the kernel rearranges them in every call, which
    takes longer than the product where rows are few. Without gradients, a rearranged copy is made at first use and
    lives beside the weights until they change (in place or by a move); it is not part of the state. Training has
    passes of its own (``layers.bf16_training``).
    """

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x (..., in) to (..., out). bias: instead of the layer's own; gelu: then GELU by its tanh approximation."""
        bias = self.bias if bias is None else bias.to(self.weight.dtype)
        if self._packs(x):
            name, variant = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self._blocked(), bias, name, [], variant)
        if trains_in_bf16_on_cpu(x):
            y = Product.apply(x, self.weight, bias)
            return Gelu.apply(y) if gelu else y
        y = F.linear(x, self.weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    def _packs(self, x: Tensor) -> bool:
        return (x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == "cpu"
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
                and not self.weight.is_inference() and _has_blocked_products())

    def _blocked(self) -> Tensor:
        made_of = (self.weight._version, self.weight.data_ptr())
        if self._packed is None or self._packed[0] != made_of:
            self._packed = made_of, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        return self._packed[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        self._packed = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


@torch.no_grad()
def initialise_products(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of all linear layers in a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
