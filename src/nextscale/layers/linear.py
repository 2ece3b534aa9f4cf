"""Linear layers that keep a CPU's matrix units busy."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.layers.bf16_training import Gelu, Product, trains_in_bf16_on_cpu
from nextscale.layers.bf16_training import has_blocked_products as _has_blocked_products
from nextscale.layers.kept import KeepsForm

WORTHWHILE = 1 << 26
"""Multiply-adds from which oneDNN's product in float32 is the quicker. Below, MKL's is (2 rows and a weight of 4096 x
1024: 1.8 ms of one core against 2.4 ms; 18 rows, GELU included: 5.0 ms against 3.8 ms), and oneDNN takes 2 ms to make a
kernel for every new shape."""


class Linear(KeepsForm, nn.Linear):
    """``torch.nn.Linear``, quicker on a CPU.

    In bfloat16 the product wants its weights in blocks; handed plain ones, the kernel rearranges them in every call,
    which takes longer than the product where rows are few. Without gradients, a rearranged copy is made at first use
    and kept. In float32 plain weights will do, but the kernel applies the GELU where the product is still in the cache
    (512 rows and a weight of 4096 x 1024: 42 ms of one core against 49 ms). Training has passes of its own
    (``layers.bf16_training``).
    """

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x (..., in) to (..., out). bias: instead of the layer's own; gelu: then GELU by its tanh approximation."""
        bias = self.bias if bias is None else bias.to(self.weight.dtype)
        if self._packs(x) or self._fuses(x):
            weight = self.kept(self.weight, _in_blocks) if x.dtype == torch.bfloat16 else self.weight
            name, variant = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], variant)
        if trains_in_bf16_on_cpu(x):
            y = Product.apply(x, self.weight, bias)
            return Gelu.apply(y) if gelu else y
        y = F.linear(x, self.weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    def _packs(self, x: Tensor) -> bool:
        return (x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == "cpu"
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
                and not self.weight.is_inference() and _has_blocked_products())

    def _fuses(self, x: Tensor) -> bool:
        return (x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
                and x.numel() * self.out_features >= WORTHWHILE and torch.backends.mkldnn.is_available()
                and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
                and not torch.is_autocast_enabled("cpu"))


def _in_blocks(weight: Tensor) -> Tensor:
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return blocked


@torch.no_grad()
def initialise_products(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of all linear layers in a module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
