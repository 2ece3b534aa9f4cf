"""Layers: the same numbers as their plain definitions."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.layers.adaln import gated_sum
from nextscale.layers.attention import attention, unit_gains, unit_heads
from nextscale.layers.mlp import drop_path
from nextscale.layers.norms import GroupNorm, layer_norm
from nextscale.layers.resize import resize
from nextscale.tokenizers.autoencoder import Upsample


@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 64, 1, 1), (3, 96, 8, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_and_its_gradients_equal_torch_s(shape: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = GroupNorm(32, shape[1], eps=1e-6), torch.nn.GroupNorm(32, shape[1], eps=1e-6)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.normal_())
    x = 3 * torch.randn(shape) + 1
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    upstream = torch.randn(shape)
    outputs = [norm(i) for norm, i in zip((ours, theirs), inputs, strict=True)]
    for output in outputs:
        output.backward(upstream)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    # A group of one value has variance 0: both gradients are differences of equal numbers times 1000.
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4 if shape[2] > 1 else 2e-2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_group_norm_passes_the_numerical_gradient_check() -> None:
    torch.manual_seed(0)
    norm = GroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = norm(x).square().sum()
    (found,) = torch.autograd.grad(y, x)
    with torch.no_grad():
        for index in ((0, 0, 0, 0), (1, 3, 2, 1), (0, 2, 1, 1)):
            step = torch.zeros_like(x)
            step[index] = 1e-4
            slope = (norm(x + step).square().sum() - norm(x - step).square().sum()) / 2e-4
            assert abs(float(slope - found[index])) < 1e-3


def test_group_norm_trains_in_bf16_close_to_float32() -> None:
    torch.manual_seed(0)
    norm, x = GroupNorm(8, 32), torch.randn(2, 32, 6, 6)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype, copy=True).requires_grad_()
        norm(given).float().pow(3).mean().backward()
        assert given.grad is not None and given.grad.dtype == dtype
        grads.append(given.grad.float())
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.03


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_area_is_the_mean_of_overlapping_windows(height: int, width: int, h: int, w: int) -> None:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = resize(x, (h, w), "area")
    torch.testing.assert_close(found, F.interpolate(x, size=(h, w), mode="area"))
    top, bottom = 0, -(-height // h)  # windows run from floor(i H / h) to ceil((i + 1) H / h)
    left, right = 0, -(-width // w)
    torch.testing.assert_close(found[..., 0, 0], x[..., top:bottom, left:right].mean((2, 3)))


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.sampled_from(
    ["area", "bicubic", "bilinear", "nearest"]))
def test_constants_stay_and_the_same_size_is_untouched(height: int, width: int, h: int, w: int, rule: str) -> None:
    torch.testing.assert_close(resize(torch.full((1, 2, height, width), 3.0), (h, w), rule),  # type: ignore[arg-type]
                               torch.full((1, 2, h, w), 3.0))
    x = torch.randn(1, 2, h, w)
    assert resize(x, (h, w), rule) is x  # type: ignore[arg-type]


def test_bicubic_is_without_aligned_corners_and_antialiasing() -> None:
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(resize(x, (8, 8), "bicubic"),
                               F.interpolate(x, size=(8, 8), mode="bicubic", align_corners=False, antialias=False))
    # Twice as large, between 3 values, a = -0.75: weights of a quarter step by the cubic convolution formula.
    row = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    a, t = -0.75, 0.25
    weight = (a + 2) * t**3 - (a + 3) * t**2 + 1
    assert abs(float(resize(row, (12, 12), "bicubic")[0, 0, 6, 5]) - weight) < 1e-5


def test_layer_norm_has_no_parameters_and_the_published_eps() -> None:
    x = 1e-3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer_norm(x), plain)


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    mask = torch.rand(2, 1, 4, 6) > 0.4
    mask[..., 0] = True
    logits = (q @ k.transpose(2, 3) * 0.7).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attention(q, k, v, mask, 0.7), logits.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


def test_dropped_paths_are_whole_pictures_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = drop_path(x, 0.25, training=True)
    assert ((y == 0).all((1, 2)) | (y == 1 / 0.75).all((1, 2))).all()
    assert abs(float(y.mean()) - 1) < 0.04
    assert drop_path(x, 0.25, training=False) is x


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_training_equals_attention_in_sampling(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 9, 4, requires_grad=True) for _ in range(3))
    mask = torch.rand(1, 1, 9, 9) > 0.4 if masked else None
    if mask is not None:
        mask |= torch.eye(9, dtype=torch.bool)
    trained = attention(q, k, v, mask, 0.7)
    with torch.no_grad():
        sampled = attention(q, k, v, mask, 0.7)
    torch.testing.assert_close(trained, sampled, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 32, 16, 16), (1, 4, 1, 1)], ids=str)
@torch.no_grad()
def test_doubling_by_a_transposed_convolution_is_repeating_and_convolving(shape: tuple[int, ...]) -> None:
    layer, x = Upsample(shape[1]), torch.randn(shape).contiguous(memory_format=torch.channels_last)

    def plain() -> torch.Tensor:
        return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    with torch.enable_grad():
        assert torch.equal(layer(x), plain()) and layer._packed is None
    torch.testing.assert_close(layer(x), plain(), atol=2e-6, rtol=1e-5)
    layer.conv.weight.mul_(-2).add_(0.1)  # the kernel is made anew
    torch.testing.assert_close(layer(x), plain(), atol=1e-5, rtol=1e-5)
    layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), plain(), atol=5e-5, rtol=1e-5)
    assert set(layer.state_dict()) == {"conv.weight", "conv.bias"}


def test_a_gated_sum_is_the_same_with_and_without_gradients() -> None:
    x, y, gate = torch.randn(4, 5, 8), torch.randn(4, 5, 8), torch.randn(4, 1, 8)
    wanted = x + gate * y
    assert torch.equal(gated_sum(x, y, gate), wanted)
    with torch.no_grad():
        torch.testing.assert_close(gated_sum(x, y, gate), wanted)
        assert torch.equal(gated_sum(x, y, None), x + y)


def test_heads_of_unit_length_are_normalised_queries_and_keys() -> None:
    qkv, gain = torch.randn(2, 5, 3 * 12), torch.rand(1, 3, 1, 1) * 4
    qkv[0, 0] = 0  # nothing to divide by
    q, k, v = qkv.view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    found = unit_heads(qkv, unit_gains(gain))
    for ours, wanted in zip(found, (F.normalize(q, dim=-1) * gain, F.normalize(k, dim=-1), v), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)
