"""The tiny autoencoder has TAEF2's tensors, and is a tokenizer of kind kl like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextscale.errors import InputError, WeightsError
from nextscale.generators.flowar import FlowARGeneratorConfig
from nextscale.heads.flow_transformer import FlowHeadConfig
from nextscale.systems.flowar import FlowAR, FlowARConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.published import PUBLISHED, load_published, published_tokenizer, taesd_config
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer_recipe import load_tokenizer, save_tokenizer

TAEF2_SIZES = {"encoder": 1_338_528, "decoder": 1_338_499}
"""Values in the published files, whose 79 tensors each are listed below by where they stand in a sequence."""


def published(width: int = 64, latent_width: int = 32) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the published encoder and decoder."""
    found: dict[str, dict[str, tuple[int, ...]]] = {"encoder": {}, "decoder": {}}

    def convolution(of: dict[str, tuple[int, ...]], name: str, a: int, b: int, bias: bool = True) -> None:
        of[f"{name}.weight"] = (b, a, 3, 3)
        if bias:
            of[f"{name}.bias"] = (b,)

    def block(of: dict[str, tuple[int, ...]], place: int, pooled: bool) -> None:
        for part in (0, 2, 4):
            convolution(of, f"{place}.conv.{part}", width, width)
        if pooled:
            of |= {f"{place}.pool.0.weight": (4 * width, width, 1, 1), f"{place}.pool.1.weight": (4 * width,)}
            of |= {f"{place}.pool.1.bias": (4 * width,), f"{place}.pool.3.weight": (width, 4 * width, 1, 1)}

    encoder, decoder = found["encoder"], found["decoder"]
    convolution(encoder, "0", 3, width)
    for place in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(encoder, place, place > 10)
    for place in (2, 6, 10):
        convolution(encoder, str(place), width, width, bias=False)
    convolution(encoder, "14", width, latent_width)
    convolution(decoder, "1", latent_width, width)
    for place in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(decoder, place, place < 6)
    for place in (7, 12, 17):
        convolution(decoder, str(place), width, width, bias=False)
    convolution(decoder, "19", width, 3)
    return found


def random_files(folder: Path, width: int = 8, latent_width: int = 4) -> Path:
    torch.manual_seed(0)
    for part, shapes in published(width, latent_width).items():
        tensors = {name: torch.randn(shape) / 10 for name, shape in shapes.items()}
        torch.save(tensors, folder / f"tiny_{part}.pth")
    return folder / "tiny_encoder.pth"


def test_the_published_lists_of_tensors_fit() -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(PUBLISHED["taef2"])
    names = published()
    for part, shapes in names.items():
        own = {name.removeprefix(f"{part}.layers."): tuple(tensor.shape)
               for name, tensor in tokenizer.state_dict().items() if name.startswith(f"{part}.")}  # fmt: skip
        assert own == shapes and len(own) == 79
        assert sum(tensor.numel() for tensor in tokenizer.get_submodule(part).parameters()) == TAEF2_SIZES[part]


def test_two_files_make_one_tokenizer(tmp_path: Path) -> None:
    file = random_files(tmp_path)
    tokenizer = load_published(Tokenizer(taesd_config(4, width=8, side=32)), file)
    wanted = torch.load(tmp_path / "tiny_decoder.pth", weights_only=True)
    assert torch.equal(tokenizer.decoder.output.weight, wanted["19.weight"])
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    latent = tokenizer.latent(picture)
    assert latent.shape == (2, 4, 4, 4) and tokenizer.config.grids == ((1, 1), (2, 2), (4, 4))
    # Nothing is drawn: mean and a certain log-variance.
    mean, log_variance = tokenizer.moments(picture).chunk(2, 1)
    torch.testing.assert_close(mean * tokenizer.config.latent_scale, latent)
    assert (log_variance == -30).all()
    assert torch.equal(tokenizer.decode(latent), tokenizer.decode(latent, strips=8))
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    torch.testing.assert_close(again.latent(picture), latent, rtol=0.05, atol=0.05)
    with pytest.raises(InputError, match="name the encoder's"):
        load_published(tokenizer, tmp_path / "tiny.pth")
    with pytest.raises(WeightsError, match="decoder"):
        load_published(tokenizer, {f"encoder.{name}": tensor for name, tensor in torch.load(
            file, weights_only=True).items()})  # fmt: skip
    with pytest.raises(InputError, match="unknown tokenizer"):
        published_tokenizer("taef3", file)


@pytest.mark.parametrize("wrong", [{"multipliers": (1, 2)}, {"latent_kernel": 3}, {"attention": "middle"}])
def test_what_it_has_not_is_refused(wrong: dict[str, object]) -> None:
    settings = {"multipliers": (1, 1), "latent_kernel": 0, "attention": "none", "groups": 8, "width": 8, **wrong}
    with pytest.raises(InputError, match="taesd"):
        AutoencoderConfig(network="taesd", **settings)  # type: ignore[arg-type]


def test_a_generator_of_vectors_draws_and_trains_on_it() -> None:
    torch.manual_seed(0)
    network = FlowARGeneratorConfig((1, 1), 16, 2, flow=FlowHeadConfig(1, 16, 2))
    system = FlowAR(FlowARConfig(taesd_config(4, width=8, side=32), network, (3,))).initialise().eval()
    found = system.generate([0, 1], solver_steps=2, output="torch").images
    assert found.shape == (2, 3, 32, 32) and bool(found.isfinite().all())
    tokens: list[Tensor] = system.encode(found)
    assert [t.shape[1] for t in tokens] == [1, 4, 16]
