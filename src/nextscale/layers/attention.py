"""The one attention of the library: picks the kernel from the device and the mask."""
from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from nextscale.layers.bf16_training import UnitHeads, trains_in_bf16_on_cpu
from nextscale.layers.memory import Tags

Marks = tuple[Tensor, ...]
"""Numbers of rows that a rule goes by, each of the shape of the rows' steps."""

GRAPHS = 4096
"""Shapes that FlexAttention may be compiled for: every step of every plan, batch and mask is one, and beyond the
compiler's own limit of 8 it would be left as it is, with all scores in memory."""

NARROWEST = 16
"""Channels of a head, from which on FlexAttention can multiply on a GPU."""

SHORT = 256
"""Keys up to which training on a CPU multiplies out the scores: the fused kernel's backward pass is slower there
(138 ms against 84 ms of one core for 32 sequences of 130, forward and backward in bf16)."""


class Rule(ABC):
    """Who sees whom among rows that carry tags. It is hashable: equal rules share a mask.

    In two parts, since a kernel asks for one pair of rows at a time and compiles the answer: what can be known of a row
    by itself is worked out before (``marks``), and what is left (``shown``) takes single numbers, and no vectors.
    """

    @abstractmethod
    def marks(self, tags: Tags) -> Marks:
        """What the rule goes by."""

    @abstractmethod
    def shown(self, device: torch.device) -> Callable[[Marks, Marks], Tensor]:
        """What tells by the marks of a query and of a key, which broadcast, whether the one sees the other: a function
        of element-wise operations and of look-ups in tables that it holds on the device."""

    def sees(self, query: Tags, key: Tags) -> Tensor:
        """Boolean tensor, the broadcast of the two rows' tags: may the one see the other?"""
        return self.shown(query.step.device)(self.marks(query), self.marks(key))


def attention(q_RHLE: Tensor, k_RHNE: Tensor, v_RHNE: Tensor, mask: Any = None, scale: float | None = None,
              dropout: float = 0.0) -> Tensor:
    """softmax(scale q k^T + mask) v for L queries and N keys of width E a head, (R, H, L, E).

    mask: None (everything is visible), a boolean tensor broadcastable to (R, H, L, N) with True for visible, or a
    FlexAttention ``BlockMask``. scale defaults to E^-0.5. dropout: share of the probabilities that are set to zero,
    with torch's generator, the others growing in their place.
    """
    if mask is not None and not isinstance(mask, Tensor) and (dropout or q_RHLE.shape[-1] < NARROWEST):
        # Which FlexAttention can't do: it has no dropout, and on CUDA no products of narrower heads.
        mask = create_mask(mask.mask_mod, None, None, q_RHLE.shape[2], k_RHNE.shape[2], q_RHLE.device)
    if mask is None or isinstance(mask, Tensor):
        if q_RHLE.device.type == "cpu" and q_RHLE.requires_grad and k_RHNE.shape[2] <= SHORT \
                and not dropout and not torch.compiler.is_compiling():
            return _Explicit.apply(q_RHLE, k_RHNE, v_RHNE, mask, q_RHLE.shape[-1]**-0.5 if scale is None else scale)
        return F.scaled_dot_product_attention(q_RHLE, k_RHNE, v_RHNE, attn_mask=mask, dropout_p=dropout, scale=scale)
    flexible: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    return flexible(q_RHLE, k_RHNE, v_RHNE, block_mask=mask, scale=scale)


class _Explicit(torch.autograd.Function):
    """softmax(scale q k^T + mask) v with the scores multiplied out and kept; the softmax of bfloat16 scores is
    computed in float32 inside its kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        shapes = q.shape, k.shape, v.shape
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if scale != 1.0:
            scores.mul_(scale)
        if mask is not None:
            hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
            scores.view(*shapes[0][:3], -1).add_(hidden)
        probability = torch._softmax(scores, -1, False)
        ctx.save_for_backward(q, k, v, probability)
        ctx.given = shapes, scale
        return torch.bmm(probability, v).view(*shapes[0][:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probability = ctx.saved_tensors
        (of_q, of_k, of_v), scale = ctx.given
        dout = grads[0].reshape(len(q), q.shape[1], -1)
        dv = torch.bmm(probability.transpose(1, 2), dout)
        dscores = torch._softmax_backward_data(torch.bmm(dout, v.transpose(1, 2)), probability, -1, q.dtype)
        if scale != 1.0:
            dscores.mul_(scale)
        dq, dk = torch.bmm(dscores, k), torch.bmm(dscores.transpose(1, 2), q)
        return dq.view(of_q), dk.view(of_k), dv.view(of_v), None, None


def unit_gains(gain_1H11: Tensor) -> Tensor:
    """Gains of queries and keys for ``unit_heads``, (1, 1, 2, H, 1): those of the heads, and 1."""
    return torch.stack([gain_1H11, torch.ones_like(gain_1H11)], 1)[:, None, ..., 0]


def unit_heads(qkv_RLC: Tensor, gain_R12H1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (R, L, 3C) to heads q, k, v (R, H, L, E); q and k of length 1 times the gains of ``unit_gains``."""
    if qkv_RLC.dtype == torch.bfloat16 and trains_in_bf16_on_cpu(qkv_RLC):
        return UnitHeads.apply(qkv_RLC, gain_R12H1[:1, 0, 0, :, None], 1e-12)
    # Queries and keys together, before they are split: half the passes over memory of normalising each.
    parts_RL3HE = qkv_RLC.unflatten(-1, (3, gain_R12H1.shape[3], -1))
    units_RL2HE = parts_RL3HE[:, :, :2]
    length = torch.linalg.vector_norm(units_RL2HE, dim=-1, keepdim=True).clamp_min(1e-12)
    q, k = (units_RL2HE * (gain_R12H1.to(length.dtype) / length)).permute(2, 0, 3, 1, 4)
    return q, k, parts_RL3HE[:, :, 2].transpose(1, 2)


@functools.lru_cache
def compiled_flex_attention(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention, compiled for every shape that comes; an error where it can't be, since as it is it would be slow
    and keep all scores."""
    limited: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False, backend=backend)

    def called(*given: Any, **options: Any) -> Tensor:
        # While it runs alone: the limits are everybody's.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
            out: Tensor = limited(*given, **options)
        return out

    return called


def visibility_mask(rules: Sequence[Rule], query: Tags, key: Tags) -> Any:
    """The mask of what all of some rules show of rows that carry tags, in the form that the device computes fastest.

    The query's tags are (1|R, L), the key's (1|R, N) or, where heads have other keys, (R, H, N); keys that don't count
    (``key.valid``) are hidden. On CUDA, where all rows share their tags, a FlexAttention block mask, which skips the
    blocks that nothing sees; else booleans (1|R, 1|H, L, N).
    """
    if query.step.device.type == "cuda" and key.valid is None and key.step.ndim == 2 \
            and max(len(tags) for tags in (query.step, query.cell, key.step, key.cell)) == 1:
        return block_mask(rules, query, key)
    return dense_mask(rules, query, key)


def dense_mask(rules: Sequence[Rule], query: Tags, key: Tags) -> Tensor:
    """The same as booleans (1|R, 1|H, L, N)."""
    of_query, of_key = pairs(query, key)
    mask = _everything(of_query.step, of_key.step)
    for rule in rules:
        mask = mask & rule.sees(of_query, of_key)
    return mask if key.valid is None else mask & by_head(key.valid)[:, :, None]


def block_mask(rules: Sequence[Rule], query: Tags, key: Tags) -> BlockMask:
    """The same as a FlexAttention block mask, of tags (1, L) and (1, N) that the whole batch shares."""
    device = query.step.device
    parts = [(rule.shown(device), _flat(rule.marks(query)), _flat(rule.marks(key))) for rule in rules]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = _everything(i, j)
        for shown, of_query, of_key in parts:
            seen = seen & shown(tuple(mark[i] for mark in of_query), tuple(mark[j] for mark in of_key))
        return seen

    return create_block_mask(sees, None, None, len(query), len(key), device=device)


def _flat(marks: Marks) -> Marks:
    return tuple(mark.reshape(-1).contiguous() for mark in marks)


def _everything(query: Tensor, key: Tensor) -> Tensor:
    return (query == query) & (key == key)


def pairs(query: Tags, key: Tags) -> tuple[Tags, Tags]:
    """Tags that broadcast to pairs: (1|R, 1, L, 1) and (1|R, 1|H, 1, N)."""
    return (Tags(query.step[:, None, :, None], query.cell[:, None, :, None]),
            Tags(by_head(key.step)[:, :, None], (key.cell if key.cell.ndim == 4 else key.cell[:, None])[:, :, None]))


def by_head(tags: Tensor) -> Tensor:
    """Tags (1|R, N) or (R, H, N) with a head axis, (1|R, 1|H, N)."""
    return tags if tags.ndim == 3 else tags[:, None]
