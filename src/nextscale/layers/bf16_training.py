"""Training in bfloat16 on a CPU: backward passes that leave the matrix unit less idle than autograd's.

PyTorch's own operators are right but slow here: GELU evaluates tanh one vector at a time, a product with a transposed
operand runs at half speed, unit vectors take a dozen passes over memory. Each function below gives the numbers of the
plain formula with statistics in float32, rounded to bfloat16 no more often. Where ``trains_in_bf16_on_cpu`` says no,
layers use the plain formula.
"""
from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BF16 = torch.bfloat16


@functools.cache
def has_blocked_products() -> bool:
    """Whether this torch multiplies bfloat16 by oneDNN here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trains_in_bf16_on_cpu(x: Tensor) -> bool:
    """Whether this pass has gradients, runs eagerly on a CPU and computes its products in bfloat16 (by autocast, or
    because x is). A compiler fuses by itself, and other devices have other costs."""
    return (x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and (x.dtype == BF16 or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == BF16))
            and has_blocked_products())


class Product(torch.autograd.Function):
    """y = x W^T + b, (..., I) to (..., O) in bfloat16, the bias added inside the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        rows_NI = x.reshape(-1, x.shape[-1]).to(BF16)
        used_OI = weight_OI.to(BF16)
        y_NO = torch.ops.mkldnn._linear_pointwise(rows_NI, used_OI, None if bias_O is None else bias_O.to(BF16),
                                                  "none", [], "")
        ctx.save_for_backward(rows_NI if weight_OI.requires_grad else None, used_OI if x.requires_grad else None)
        ctx.given = x.shape, x.dtype, weight_OI.dtype
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows_NI, used_OI = ctx.saved_tensors
        shape, dtype, weight_dtype = ctx.given
        dy_NO = grads[0].reshape(-1, grads[0].shape[-1]).to(BF16)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (dy_NO @ used_OI).view(shape).to(dtype)
        if ctx.needs_input_grad[1]:
            product, sums = weight_gradients(dy_NO, rows_NI)
            dweight = product.to(weight_dtype, memory_format=torch.contiguous_format)
            dbias = sums if ctx.needs_input_grad[2] else None
        elif ctx.needs_input_grad[2]:
            dbias = dy_NO.sum(0)
        return dx, dweight, dbias


def weight_gradients(dy_NO: Tensor, x_NI: Tensor, of_rows_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dW = sum_n w_n dy_n x_n^T, (O, I), and db = sum_n w_n dy_n, (O,), both in bfloat16; weights w (N,), None for 1.

    The kernel is slow on transposed operands, so the narrower one is laid out anew. Where that is x, the row weights
    are one more row of it, and db comes out of the same product.
    """
    (n, o), i = dy_NO.shape, x_NI.shape[1]
    if o <= i and of_rows_N is None:
        dy_ON = dy_NO.t().contiguous()
        return dy_ON @ x_NI, dy_ON.sum(1)
    left = torch.empty(i + 1, n, dtype=BF16)
    left[:i] = x_NI.t()
    left[i] = 1.0
    if of_rows_N is not None:
        left.mul_(of_rows_N.to(BF16))
    both = left @ dy_NO
    return both[:i].t(), both[i]


class Gelu(torch.autograd.Function):
    """GELU by its tanh approximation, and its derivative, looked up: a bfloat16 has but 65,536 values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, slope = _gelu_tables()
        index = x.contiguous().view(torch.uint16).view(-1).to(torch.int32)
        ctx.save_for_backward(slope.index_select(0, index).view(x.shape))
        return value.index_select(0, index).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


@functools.cache
def _gelu_tables() -> tuple[Tensor, Tensor]:
    """GELU and its derivative of every bfloat16, in the order of its bits, rounded once: (65536,) each."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16).double().requires_grad_()
        y = F.gelu(x, approximate="tanh")
        (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().to(BF16), slope.to(BF16)


class ModulatedNorm(torch.autograd.Function):
    """layer_norm(x) gain + shift of x (R, L, C) with gain and shift (R, 1, C); statistics in float32, the
    result in bfloat16.

    For one picture that is layer normalisation with learned scale and shift, whose kernel does it in one pass forward
    and one backward; so pictures are taken one by one.
    """

    @staticmethod
    def forward(ctx: Any, x_RLC: Tensor, gain_R1C: Tensor, shift_R1C: Tensor, eps: float) -> Tensor:
        x, c = x_RLC.float(), x_RLC.shape[-1]
        gain, shift = gain_R1C.float(), shift_R1C.float()
        y_RLC = torch.empty(x.shape, dtype=BF16)
        statistics = []
        for i in range(len(x)):
            y, mean, rstd = torch.native_layer_norm(x[i], (c,), gain[i, 0], shift[i, 0], eps)
            y_RLC[i] = y
            statistics += [mean, rstd]
        ctx.save_for_backward(x, gain, shift, *statistics)
        ctx.dtypes = x_RLC.dtype, gain_R1C.dtype, shift_R1C.dtype
        return y_RLC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gain, shift, *statistics = ctx.saved_tensors
        c = x.shape[-1]
        dx, dgain, dshift = torch.empty_like(x), torch.empty_like(gain), torch.empty_like(shift)
        for i in range(len(x)):
            dx[i], dgain[i, 0], dshift[i, 0] = torch.ops.aten.native_layer_norm_backward(
                grads[0][i].float(), x[i], (c,), statistics[2 * i], statistics[2 * i + 1], gain[i, 0], shift[i, 0],
                [True, True, True])
        of_x, of_gain, of_shift = ctx.dtypes
        return dx.to(of_x), dgain.to(of_gain), dshift.to(of_shift), None


class UnitHeads(torch.autograd.Function):
    """Queries and keys of unit length, split into heads: qkv (R, L, 3C) to q, k, v (R, H, L, E) with
    q = gain q' / |q'| and k = k' / |k'|; gain (1, H, 1, 1). Lengths are taken in float32."""

    @staticmethod
    def forward(ctx: Any, qkv_RLC: Tensor, gain_1H11: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        r, length, _ = qkv_RLC.shape
        heads = gain_1H11.shape[1]
        parts = qkv_RLC.view(r, length, 3, heads, -1)
        units = parts[:, :, :2].float()
        inverse = torch.linalg.vector_norm(units, dim=-1, keepdim=True).clamp_min_(eps).reciprocal_()
        inverse[:, :, 0].mul_(gain_1H11.view(heads, 1))
        q, k = units.mul_(inverse).permute(2, 0, 3, 1, 4).to(BF16, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, inverse, gain_1H11)
        return q, k, parts[:, :, 2].transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        q, k, inverse, gain_1H11 = ctx.saved_tensors
        r, heads, length, e = q.shape
        dqkv = torch.empty(r, length, 3, heads, e, dtype=BF16)
        # dx = (g / |x|) (dy - y <y, dy> / g^2) for y = g x / |x|
        along_q = torch.linalg.vecdot(q, grads[0])[..., None]
        along_k = torch.linalg.vecdot(k, grads[1])[..., None]
        along = (along_q / gain_1H11.square()).to(BF16), along_k
        for part, (y, dy) in enumerate(((q, grads[0]), (k, grads[1]))):
            dx = torch.addcmul(dy, y, along[part], value=-1)
            dqkv[:, :, part] = dx.transpose(1, 2).mul_(inverse[:, :, part].to(BF16))
        dqkv[:, :, 2] = grads[2].transpose(1, 2)
        dgain = along_q.float().sum((0, 2), keepdim=True) / gain_1H11 if ctx.needs_input_grad[1] else None
        return dqkv.view(r, length, -1), dgain, None
