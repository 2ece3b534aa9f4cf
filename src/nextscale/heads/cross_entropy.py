"""Cross-entropy of a linear layer's logits, a few rows at a time."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nextscale.layers.bf16_training import BF16, weight_gradients

CHUNK = 1 << 17
"""Logits in float32 at a time: half a megabyte, which stays in a core's cache through all of their passes."""


def cross_entropy(logits_NV: Tensor, target_N: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and whether no other code is likelier than the target, (N,) float32 each.

    With smoothing e the target is (1 - e) one-hot + e / V.
    """
    logits_NV = logits_NV.float()
    entropy_N = F.cross_entropy(logits_NV, target_N, reduction="none", label_smoothing=label_smoothing)
    with torch.no_grad():
        right_N = logits_NV.gather(1, target_N[:, None])[:, 0] >= logits_NV.amax(1)
    return entropy_N, right_N.float()


class LinearCrossEntropy(torch.autograd.Function):
    """``cross_entropy(hidden W^T + b)`` with bfloat16 products on a CPU, its gradient made in the forward pass.

    The logits exist once, in bfloat16 as their product leaves them; chunk by chunk they are taken to float32, and
    softmax(logits) - target, the gradient of the cross-entropy, is written over them. A row's weight in the loss
    scales the thin operands of the backward pass's products instead of all its gradients.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor, target_N: Tensor,
                smoothing: float) -> tuple[Tensor, Tensor]:
        hidden, weight = hidden_NC.to(BF16), weight_VC.to(BF16)
        logits_NV = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias_V.to(BF16), "none", [], "")
        n, v = logits_NV.shape
        entropy_N, right_N = torch.empty(n), torch.empty(n)
        rows = max(1, CHUNK // v)
        for lo in range(0, n, rows):
            part, target = logits_NV[lo:lo + rows], target_N[lo:lo + rows, None]
            log_p = torch._log_softmax(part.float(), -1, False)
            chosen = log_p.gather(1, target)[:, 0]
            right_N[lo:lo + rows] = chosen >= log_p.amax(1)
            entropy_N[lo:lo + rows] = -chosen
            if smoothing:
                entropy_N[lo:lo + rows] = -(1 - smoothing) * chosen - smoothing * log_p.mean(1)
            gradient = log_p.exp_()
            if smoothing:
                gradient.sub_(smoothing / v)
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, smoothing - 1))
            part.copy_(gradient)
        ctx.save_for_backward(hidden, weight, logits_NV)
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype, bias_V.dtype
        ctx.mark_non_differentiable(right_N)
        return entropy_N, right_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NC, weight_VC, gradient_NV = ctx.saved_tensors
        weight_N1 = grads[0][:, None]
        dhidden = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dhidden = (gradient_NV @ weight_VC).mul_(weight_N1).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            # Relative to the largest, equal weights are exactly 1 in bfloat16.
            top = grads[0].abs().max().clamp_min(1e-30)
            product, sums = weight_gradients(gradient_NV, hidden_NC, grads[0] / top)
            dweight = product.to(ctx.dtypes[1], memory_format=torch.contiguous_format).mul_(top)
            dbias = sums.to(ctx.dtypes[2]).mul_(top)
        return dhidden, dweight, dbias, None, None
