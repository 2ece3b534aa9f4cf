"""Low-rank adapters of this library's own layers, which do more than a product.

peft adds its update behind whatever a linear layer returns. Here a layer may apply GELU itself, a modulation applies
SiLU before its product and splits the result, and a head has methods of its own: these classes put the update where
the weight's own product is, so that merged and unmerged weights give the same. Importing this file needs ``peft``.
"""
from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LowRankLinear
from torch import Tensor, nn

from nextscale.layers.adaln import Modulation
from nextscale.layers.bf16_training import Gelu, trains_in_bf16_on_cpu
from nextscale.layers.linear import Linear


class AdaptedLinear(LowRankLinear):
    """y = W x + b + (alpha / rank) B A dropout(x) (LoRA, arXiv 2106.09685, eq. 3), with the layer's other methods."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            # A method of the layer must call the adapted layer, not the one inside.
            base = super().__getattr__("base_layer")
            method = getattr(type(base), name, None)
            return MethodType(method, self) if callable(method) else getattr(base, name)

    def update(self, x: Tensor) -> Tensor:
        """What the adapters in use add to W x."""
        total: Any = 0.0
        for adapter in self.active_adapters:
            down: Any = self.lora_A[adapter]
            up: Any = self.lora_B[adapter]
            total = total + up(down(self.lora_dropout[adapter](x.to(down.weight.dtype)))) * self.scaling[adapter]
        return total

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        return y if self.merged or self.disable_adapters else (y + self.update(x)).to(y.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        super().merge(safe_merge, adapter_names)
        self._forget()

    def unmerge(self) -> None:
        super().unmerge()
        self._forget()

    def _forget(self) -> None:
        # peft writes through ``weight.data``, which the layer's copy of its weights in blocks cannot notice.
        base = self.get_base_layer()
        if isinstance(base, Linear):
            base._packed = None


class AdaptedBlockedLinear(AdaptedLinear):
    """The same for ``layers.linear.Linear``: the update comes before GELU."""

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        if self.merged or self.disable_adapters:
            plain: Tensor = self.base_layer(x, bias, gelu)
            return plain
        y: Tensor = self.base_layer(x, bias)
        y = (y + self.update(x)).to(y.dtype)
        if gelu:
            y = Gelu.apply(y) if trains_in_bf16_on_cpu(y) else F.gelu(y, approximate="tanh")
        return y


class AdaptedModulation(AdaptedLinear):
    """The same for ``layers.adaln.Modulation``: the update acts on SiLU of the condition."""

    def update(self, x: Tensor) -> Tensor:
        return super().update(F.silu(x)).unflatten(-1, (self.get_base_layer().parts, -1))[:, None]


# Subclasses of nn.Linear before nn.Linear: the first match counts.
CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Linear: AdaptedBlockedLinear, Modulation: AdaptedModulation, nn.Linear: AdaptedLinear}
