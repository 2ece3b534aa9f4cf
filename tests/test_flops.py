"""A method's operations are counted by one definition, whatever kernels compute them."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_var
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextscale.evaluation.bench.work import Ledger
from nextscale.evaluation.flops import counted_flops
from nextscale.layers import winograd
from nextscale.layers.linear import WORTHWHILE, Linear
from nextscale.layers.winograd import Convolution3x3


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_counts_as_one_by_whichever_kernel(gelu: bool, bias: bool) -> None:
    layer, rows = Linear(256, 1024, bias=bias), WORTHWHILE >> 18
    for x in (torch.randn(2, rows // 2, 256), torch.randn(8, 256)):  # oneDNN's product, MKL's
        with counted_flops() as flops:
            layer(x, gelu=gelu)
        assert flops.total == 2 * x.numel() * 1024, tuple(x.shape)
    packed = Linear(256, 1024, bias=bias).bfloat16()
    with counted_flops() as flops:
        packed(torch.randn(8, 256).bfloat16(), gelu=gelu)
    assert flops.total == 2 * 8 * 256 * 1024


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_torch_leaves_the_fused_product_out() -> None:
    x = torch.randn(WORTHWHILE >> 18, 256)
    with FlopCounterMode(display=False) as counter:
        Linear(256, 1024)(x)
    assert counter.get_total_flops() == 0, "torch counts it now: counting it here, too, would count it twice"


def test_a_convolution_counts_all_its_products_though_the_machine_is_asked_for_fewer() -> None:
    layer = Convolution3x3(winograd.LEAST_CHANNELS, winograd.LEAST_CHANNELS)
    x = torch.randn(1, winograd.LEAST_CHANNELS, 64, 64)
    with counted_flops() as flops:
        plain = layer(x)
    assert flops.total == 2 * 9 * x.numel() * winograd.LEAST_CHANNELS
    with Ledger() as ledger:
        torch.testing.assert_close(layer(x), plain, atol=1e-4, rtol=1e-4)
    assert 0.25 * flops.total < ledger.work.flops() < 0.75 * flops.total


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_the_pairs_that_see_each_other(backend: SDPBackend) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    with sdpa_kernel(backend):
        for visible in (None, mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            seen = 3 * (70 if visible is None else int(mask.sum()))
            with counted_flops() as flops:
                F.scaled_dot_product_attention(q, k, v, visible)
            assert flops.total == flops.attention == 4 * 8 * seen


def test_all_together_are_torch_s_count_of_plain_kernels() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(2, 3, 4, 4)
    with FlopCounterMode(display=False) as counter:
        layers(x)
    with counted_flops() as flops:
        layers(x)
    assert flops.total == counter.get_total_flops() > 0


def test_a_training_pass_takes_the_plan_s_visible_pairs_and_the_products_of_its_weights() -> None:
    """The kernel computes what the mask hides, too; that is no work of the method."""
    system = tiny_var()
    tokens = [torch.zeros(1, step.rows, dtype=torch.int64) for step in system.plan]
    with counted_flops() as flops:
        system.hooked_loss(tokens, torch.zeros(1, 1, dtype=torch.int64), [], 0.0)
    width, depth = system.config.generator.width, system.config.generator.depth
    assert flops.attention == 4 * width * depth * system.plan.pairs
    products = 2 * system.plan.length * width * (12 * width * depth + system.config.tokenizer.vocabulary)
    # Beside them are the embeddings of codes, the canvas and modulations.
    assert products < flops.total - flops.attention < 1.3 * products
