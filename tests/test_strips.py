"""The decoder in strips gives the whole's picture, and holds far fewer bytes."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import fill

from nextscale.errors import InputError
from nextscale.evaluation.cost import LiveBytes
from nextscale.layers.norms import GroupNorm
from nextscale.tokenizers.autoencoder import AutoencoderConfig, Decoder
from nextscale.tokenizers.strips import decode_in_strips, normalisation

SMALL = AutoencoderConfig(32, (1, 2, 2), 1, 2, 8, 32, "level")
CONFIGS = {"var": SMALL, "middle": replace(SMALL, attention="middle"), "no attention": replace(SMALL, attention="none"),
           "one level": replace(SMALL, multipliers=(2,)), "wider above": replace(SMALL, multipliers=(2, 1, 1))}


def decoder_of(config: AutoencoderConfig) -> Decoder:
    decoder = Decoder(config).eval().requires_grad_(False)
    fill(decoder)
    return decoder.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [(8, 8), (5, 9)], ids=str)
def test_strips_give_the_whole_picture_to_float_noise(name: str, grid: tuple[int, int]) -> None:
    decoder = decoder_of(CONFIGS[name])
    features = torch.randn(2, CONFIGS[name].features, *grid, generator=torch.Generator().manual_seed(1))
    whole = decoder(features)
    for rows in (4, 5, 7, 16, 1000):
        found = decode_in_strips(decoder, features, rows)
        assert found.shape == whole.shape
        assert float((found - whole).abs().max()) < 2e-5 * float(whole.abs().max()), f"{rows} rows"


def test_a_strip_with_statistics_of_its_own_would_differ() -> None:
    """What the test above would let through, if it let anything through: the error of naive tiles."""
    decoder = decoder_of(SMALL)
    features = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = decoder(features)
    naive = torch.cat([decoder(features[:, :, :4]), decoder(features[:, :, 4:])], 2)
    assert float((naive - whole).abs().max()) > 1e-2 * float(whole.abs().max())


def test_bfloat16_strips_are_as_near_to_float32_as_the_whole_is() -> None:
    decoder = decoder_of(SMALL)
    features = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    exact = decoder(features)
    decoder.to(torch.bfloat16)
    errors = [float((found.float() - exact).abs().mean())
              for found in (decoder(features.bfloat16()), decode_in_strips(decoder, features.bfloat16(), 8))]
    assert errors[1] < 1.2 * errors[0]


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(2, 8, 10, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    norm = GroupNorm(4, 8, eps=1e-6).requires_grad_(False)
    fill(norm)
    found = normalisation(norm, x.split([4, 4, 2], 2))
    torch.testing.assert_close(x * found.scale + found.shift, norm(x), atol=2e-5, rtol=0)


def test_strips_hold_less_than_half_of_what_the_whole_holds() -> None:
    decoder = decoder_of(replace(SMALL, multipliers=(1, 1, 2)))
    features = torch.randn(1, 8, 32, 32)
    peaks = []
    for rows in (None, 8):
        with torch.no_grad(), LiveBytes() as live:
            _ = decoder(features) if rows is None else decode_in_strips(decoder, features, rows)
        peaks.append(live.peak)
    one_map = 32 * 128 * 128 * 4
    assert peaks[0] > 2.9 * one_map and peaks[1] < 1.6 * one_map and peaks[1] < 0.5 * peaks[0], peaks


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4"):
        decode_in_strips(decoder_of(SMALL), torch.zeros(1, 8, 4, 4), 3)
