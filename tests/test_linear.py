"""The quick linear layer gives what the plain one gives, whatever became of its weights since the last call."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.layers.linear import WORTHWHILE, Linear, _has_blocked_products

needs_bf16 = pytest.mark.skipif(not _has_blocked_products(), reason="this CPU or torch has no bfloat16 products")


def plain(layer: Linear, x: Tensor, gelu: bool = False) -> Tensor:
    """The same product in float32."""
    bias = None if layer.bias is None else layer.bias.float()
    y = F.linear(x.float(), layer.weight.float(), bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def close(a: Tensor, b: Tensor) -> bool:
    return float((a.detach().float() - b).norm() / b.norm()) < 1e-2


@pytest.fixture
def layer() -> Linear:
    torch.manual_seed(0)
    return Linear(64, 96).to(torch.bfloat16)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("gelu", [False, True])
def test_blocked_product_equals_the_plain_one(layer: Linear, rows: int, gelu: bool) -> None:
    x = torch.randn(2, rows, 64).bfloat16()
    with torch.no_grad():
        assert layer._packs(x)
        assert close(layer(x, gelu=gelu), plain(layer, x, gelu))


@needs_bf16
@torch.no_grad()
def test_it_follows_weights_that_change(layer: Linear) -> None:
    x = torch.randn(3, 64).bfloat16()
    layer(x)
    layer.weight.mul_(2).add_(0.1)
    assert close(layer(x), plain(layer, x))
    layer.load_state_dict({name: torch.randn_like(t) for name, t in layer.state_dict().items()})
    assert close(layer(x), plain(layer, x))
    assert close(layer.float().to(torch.bfloat16)(x), plain(layer, x))


@needs_bf16
def test_the_copy_is_no_part_of_the_state(layer: Linear) -> None:
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        wanted = layer(x)
        assert set(layer.state_dict()) == {"weight", "bias"}
        twin = copy.deepcopy(layer)
        assert twin._packed is None and torch.equal(twin(x), wanted)
        twin.weight.zero_()
        assert torch.equal(layer(x), wanted)


def test_gradients_take_the_plain_way(layer: Linear) -> None:
    x = torch.randn(3, 64).bfloat16()
    layer(x, gelu=True).float().sum().backward()
    assert layer.weight.grad is not None and layer._packed is None


@pytest.mark.parametrize("least", [0, WORTHWHILE])
@pytest.mark.parametrize("gelu", [False, True])
@torch.no_grad()
def test_float32_products_are_the_plain_ones_and_keep_no_copy(least: int, gelu: bool,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextscale.layers.linear.WORTHWHILE", least)
    layer, x = Linear(64, 96), torch.randn(2, 5, 64)
    assert layer._fuses(x) == (least == 0)
    for bias in (None, torch.randn(96)):
        wanted = F.linear(x, layer.weight, layer.bias if bias is None else bias)
        wanted = F.gelu(wanted, approximate="tanh") if gelu else wanted
        torch.testing.assert_close(layer(x, bias, gelu), wanted, atol=2e-6, rtol=1e-5)
    assert layer._packed is None
