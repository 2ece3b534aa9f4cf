"""Linear layers with rounded weights, and, to see what it would cost, rounded inputs."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.layers.linear import Linear


class QuantisedLinear(nn.Module):
    """y = W x + b with W = scale * values: integers of ``bits`` bits in int8, one scale an output channel (symmetric).

    The scales are bfloat16 numbers, whatever holds them, so that both precisions multiply by the same weights. The
    product is made with weights of the scales' type, written anew in every call: torch's own product with int8 weights
    (``_weight_int8pack_mm``) is slower than that from a few rows on. activation_bits: round inputs, too, to that many
    bits: a row by its own largest value, or with ``per_tensor`` all of a call by theirs. That saves nothing here, it
    shows what integer products would give.

    Raises InputError for bits outside 2..8.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, bits: int = 8, activation_bits: int | None = None, per_tensor: bool = False):
        super().__init__()
        for name, given in (("bits", bits), ("activation_bits", 8 if activation_bits is None else activation_bits)):
            if not 2 <= given <= 8:
                raise InputError(f"quantised weights: {name} is {given}; use 2 to 8")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.activation_bits, self.per_tensor = bits, activation_bits, per_tensor
        weight = layer.weight.detach()
        values, scale = rounded(weight, bits, weight.abs().amax(1, keepdim=True))
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.to(weight.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weights that it multiplies by, made anew."""
        return self.values.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        """x (..., in) to (..., out), as ``Linear`` has it."""
        bias = self.bias if bias is None else bias
        if self.activation_bits is not None:
            largest = x.abs().amax() if self.per_tensor else x.abs().amax(-1, keepdim=True)
            steps, scale = rounded(x, self.activation_bits, largest)
            x = (steps.to(torch.float32) * scale).to(x.dtype)
        y = F.linear(x, self.weight, None if bias is None else bias.to(x.dtype))
        return F.gelu(y, approximate="tanh") if gelu else y

    def extra_repr(self) -> str:
        inputs = "" if self.activation_bits is None else f", inputs of {self.activation_bits} bits"
        return f"{self.in_features}, {self.out_features}, {self.bits} bits{inputs}"


def rounded(x: Tensor, bits: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """x as integers in int8, round(x / s), and the scale s = largest / (2^(bits-1) - 1) that gives it back, float32."""
    top = 2 ** (bits - 1) - 1
    scale = (largest.float() / top).bfloat16().float().clamp_min(torch.finfo(torch.bfloat16).tiny)
    return (x.float() / scale).round().clamp(-top, top).to(torch.int8), scale


def quantise(module: nn.Module, bits: int = 8, activation_bits: int | None = None, per_tensor: bool = False,
             keep: Sequence[str] = ()) -> list[str]:
    """Round the weights of all ``Linear`` layers inside a module, but those whose name ends in one of ``keep``.

    Plain ``nn.Linear`` layers (modulations, embeddings, heads) are left alone. Returns the names of the layers that
    were rounded. Raises InputError where there is none, or where all are rounded already.
    """
    found = [name for name, layer in module.named_modules()
             if isinstance(layer, Linear) and not name.endswith(tuple(keep))]
    if not found:
        raise InputError("quantise: the module has no linear layers left to round")
    for name in found:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute,
                QuantisedLinear(module.get_submodule(name), bits, activation_bits, per_tensor))  # type: ignore[arg-type]
    return found


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
