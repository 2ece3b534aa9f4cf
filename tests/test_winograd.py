"""Winograd's convolution is torch's, but for rounding, and only where it is meant to be used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nextscale.layers import winograd
from nextscale.layers.winograd import Convolution3x3, convolve, transformed
from nextscale.tokenizers.autoencoder import AutoencoderConfig, Decoder, Encoder


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (13, 18), (1, 1), (3, 37)])
@pytest.mark.parametrize("tiles", [1, 3, 100])
def test_it_is_a_convolution_of_any_size_in_any_strips(size: tuple[int, int], tiles: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3) / 45**0.5, torch.randn(7)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        ours, theirs = convolve(given, transformed(weight), bias, tiles), F.conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        assert ours.stride(1) == 1


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Convolution3x3:
    monkeypatch.setattr(winograd, "LEAST_CELLS", 64)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 4)
    torch.manual_seed(0)
    return Convolution3x3(4, 6)


def fast(layer: Convolution3x3, x: torch.Tensor) -> bool:
    layer._packed = None
    layer(x)
    return layer._packed is not None


def test_it_serves_large_float32_maps_that_nobody_differentiates(layer: Convolution3x3) -> None:
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert fast(layer, x)
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), rtol=1e-5, atol=1e-5)
        assert not fast(layer, x[..., :7])
        assert not fast(Convolution3x3(3, 6), x[:, :3])
        assert layer.kept_bytes() == layer.kept(layer.weight, transformed).nbytes
        assert Convolution3x3(3, 6).kept_bytes() == 0
    assert not fast(layer, x)
    with torch.no_grad():
        assert not fast(layer.bfloat16(), x.bfloat16())


def test_a_changed_weight_is_seen_and_pictures_of_a_batch_are_as_alone(layer: Convolution3x3) -> None:
    x = torch.randn(3, 4, 9, 11)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x)[1:2], layer(x[1:2]))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_decoders_have_it_and_encoders_whose_codes_it_could_change_do_not() -> None:
    config = AutoencoderConfig(width=32, multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, latent_width=8)
    levels, middle = ([m for m in part.modules() if isinstance(m, Convolution3x3)]
                      for part in (Decoder(config).levels, Encoder(config)))  # fmt: skip
    assert len(levels) == 4 and not middle
