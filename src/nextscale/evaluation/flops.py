"""Floating-point operations of a method, counted while it runs, by one definition whatever kernels compute it.

Counted are *products*: matrix products, convolutions and attention; a multiply-add is two operations. A convolution
takes a product for every cell of its kernel, also where ``layers.winograd`` would take a quarter of them: that is a
property of a kernel here, not of the method. Attention takes 4 E for every head and pair of a row and a key that it
may see (arXiv 2205.14135, section 3), also where a kernel computes what a mask then hides. A linear layer counts as
one, by whichever library; with its GELU the same. Norms, sums and sorting are left out.

What a machine is asked to do, Winograd's shorter products included, is counted by ``evaluation.bench.work``.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nextscale.layers.attention import dense_mask
from nextscale.layers.winograd import Convolution3x3

__all__ = ["Flops", "attention_pairs", "counted_flops", "linear_flops"]


def linear_flops(x: Sequence[int], *given: Any, out_shape: Sequence[int], **more: Any) -> int:
    """Of a linear layer of inputs (..., in) and outputs (..., out), from their shapes; its weight may be opaque."""
    return 2 * math.prod(x) * out_shape[-1]


# oneDNN's product, which torch's own count leaves out; not in every build of torch.
UNCOUNTED = {packet: linear_flops for packet in [getattr(torch.ops.mkldnn, "_linear_pointwise", None)] if packet}


def attention_pairs(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """Pairs of a row and a key, over heads: those that see each other, and all. A mask without values hides none."""
    pairs = math.prod(q.shape[:-1]) * k.shape[-2]
    if mask is None or mask.is_meta:
        return pairs, pairs
    visible = mask if mask.dtype == torch.bool else mask > -torch.inf
    return round(int(visible.sum()) * pairs / visible.numel()), pairs


class Flops(TorchFunctionMode):
    """Operations so far: ``total``, of which ``attention``'s products of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self._products = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
        self._by_kernels = 0

    @property
    def total(self) -> int:
        return self.attention + self._products.get_total_flops() - self._by_kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self._products.get_total_flops()
        found = func(*args, **kwargs)
        self._by_kernels += self._products.get_total_flops() - before
        q, k, v = args[:3]
        seen, _ = attention_pairs(q, k, kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        self.attention += 2 * seen * (q.shape[-1] + v.shape[-1])
        return found


@contextmanager
def counted_flops() -> Iterator[Flops]:
    """Count what runs inside, forward passes in eager mode. Masks are made dense and convolutions run plainly while it
    lasts, so it is no time to measure any."""
    flops = Flops()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("nextscale.context.visibility_mask", dense_mask))
        stack.enter_context(mock.patch.object(Convolution3x3, "_pays", lambda self, x: False))
        stack.enter_context(flops)
        stack.enter_context(flops._products)
        yield flops
