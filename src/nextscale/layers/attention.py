"""The one attention of the library: picks the kernel from the device and the mask."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256
"""Keys up to which training on a CPU multiplies out the scores: the fused kernel's backward pass is slower there
(138 ms against 84 ms of one core for 32 sequences of 130, forward and backward in bf16)."""


def attention(q_RHLE: Tensor, k_RHNE: Tensor, v_RHNE: Tensor, mask: Any = None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T + mask) v for L queries and N keys of width E a head, (R, H, L, E).

    mask: None (everything is visible), a boolean tensor broadcastable to (R, H, L, N) with True for visible, or a
    FlexAttention ``BlockMask``. scale defaults to E^-0.5.
    """
    if mask is None or isinstance(mask, Tensor):
        if q_RHLE.device.type == "cpu" and q_RHLE.requires_grad and k_RHNE.shape[2] <= SHORT:
            return _explicit(q_RHLE, k_RHNE, v_RHNE, mask, scale)
        return F.scaled_dot_product_attention(q_RHLE, k_RHNE, v_RHNE, attn_mask=mask, scale=scale)
    return _compiled_flex_attention()(q_RHLE, k_RHNE, v_RHNE, block_mask=mask, scale=scale)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = ((q * (q.shape[-1]**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


@functools.lru_cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def visibility_mask(sees: Callable[[Tensor, Tensor], Tensor], query_step: Tensor, key_step: Tensor,
                    valid: Tensor | None = None) -> Any:
    """The mask of rows that carry step tags, in the form that the device computes fastest.

    query_step (1|R, L) and key_step (1|R, N) int64; ``sees(query_step, key_step)`` broadcasts; valid (R, N): keys
    that count, None for all. On CUDA, where all rows share their tags, a FlexAttention block mask, which skips the
    blocks that nothing sees; else booleans (1|R, 1, L, N).
    """
    if query_step.device.type == "cuda" and len(query_step) == 1 and len(key_step) == 1 and valid is None:
        from torch.nn.attention.flex_attention import create_block_mask

        query, key = query_step[0], key_step[0]
        return create_block_mask(lambda b, h, i, j: sees(query[i], key[j]), None, None, len(query), len(key),
                                 device=query.device.type)
    mask = sees(query_step[:, :, None], key_step[:, None, :])[:, None]
    return mask if valid is None else mask & valid[:, None, None, :]
