"""Tokenizers of LlamaGen, Infinity and MAR: recorded published outputs, published sizes, names that load strictly."""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import test_infinity
import torch
from published_shapes import Shapes, kl_16, on_meta, vq_16
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "parity"
sys.path.insert(0, str(FOLDER))

import run as parity  # noqa: E402

from nextscale.canvas import Canvas  # noqa: E402
from nextscale.errors import InputError, WeightsError  # noqa: E402
from nextscale.tokenizers import gaussian, pyramid  # noqa: E402
from nextscale.tokenizers.published import (  # noqa: E402
    PUBLISHED,
    infinity_config,
    kl_config,
    llamagen_config,
    load_published,
    published_tokenizer,
)
from nextscale.tokenizers.tokenizer import Tokenizer  # noqa: E402


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The golden set's description, recorded tensors, and weights by rule under published names."""
    path = FOLDER / "tokenizers" / f"{name}_tokenizer_tiny.json"
    found = json.loads(path.read_text())
    (weights,) = parity.fill(found).values()
    return found, load_file(path.with_suffix(".safetensors")), weights


def llamagen() -> tuple[Tokenizer, dict[str, Tensor], dict[str, Tensor]]:
    found, recorded, weights = golden("llamagen")
    given = found["constructor"]["vq"]
    config = llamagen_config(16, recorded["image"].shape[-1], given["ch"], given["z_channels"], given["codebook_size"])
    return load_published(Tokenizer(config), weights), recorded, weights


def infinity(kind: str) -> tuple[Tokenizer, dict[str, Tensor]]:
    found, recorded, weights = golden("infinity")
    grids = tuple((h, w) for _, h, w in found["run"][kind]["schedule"])
    given = found["constructor"]["vae"]
    tokenizer = Tokenizer(infinity_config(given["codebook_dim"], width=given["base_ch"], grids=grids))
    mine = {name.split(".", 1)[1]: t for name, t in recorded.items() if name.startswith(f"{kind}.")}
    return load_published(tokenizer, weights), mine


def close(ours: Tensor, recorded: Tensor, limit: float) -> None:
    torch.testing.assert_close(ours, recorded.float(), rtol=0, atol=limit)


@torch.no_grad()
def test_llamagen_s_tokenizer_gives_the_published_outputs() -> None:
    tokenizer, recorded, _ = llamagen()
    found = tokenizer.encode(recorded["image"])  # the repository's copy has the first picture alone
    close(tokenizer.latent(recorded["image"]), recorded["image_features"][:1], 3e-4)
    assert torch.equal(found.tokens[0].flatten(), recorded["image_tokens"][0].long())
    close(found.canvas.value, recorded["image_quantized"][:1], 3e-4)

    canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)
    canvas = pyramid.replay([recorded["image_tokens"].long().view(2, -1)], canvas).canvas
    close(canvas.value, recorded["image_quantized"], 3e-4)
    picture = tokenizer.decoder(tokenizer.from_latent(canvas.value))
    close(picture[:1, :, ::4, ::4], recorded["image_reconstruction"], 1e-3)


def test_llamagen_s_three_latent_losses_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, recorded, _ = llamagen()
    monkeypatch.setattr(tokenizer, "latent", lambda picture: recorded["image_features"])  # of both pictures
    found = tokenizer.train()(recorded["image"].expand(2, -1, -1, -1))
    weighted = torch.stack([found.codebook_loss, 0.25 * found.commitment_loss, 0.1 * found.entropy_loss])
    close(weighted.detach(), recorded["image_quantizer_losses"], 1e-4)


@pytest.mark.parametrize("kind", ["wide"])  # the square run is left out of the repository's copy
@torch.no_grad()
def test_infinity_s_tokenizer_gives_the_published_outputs(kind: str) -> None:
    tokenizer, recorded = infinity(kind)
    found = tokenizer.encode(recorded["image"])
    close(tokenizer.latent(recorded["image"]), recorded["encoder_features"], 3e-4)
    for k, bits in enumerate(found.tokens):
        assert torch.equal(bits, recorded[f"bits.{k}"].bool().reshape(bits.shape))
    close(found.canvas.value, recorded["quantized"].reshape(found.canvas.value.shape), 3e-4)
    close(tokenizer.decode(found.canvas)[..., ::2, ::2], recorded["reconstruction"], 1e-3)
    close(torch.cat([read for read in found.reads if read is not None], 1), recorded["tf_input"], 3e-4)


@pytest.mark.parametrize("kind", ["wide"])  # the square run is left out of the repository's copy
@torch.no_grad()
def test_flipped_bits_change_later_inputs_and_labels_as_published(kind: str) -> None:
    tokenizer, recorded = infinity(kind)

    def flip(k: int, bits: Tensor) -> Tensor:
        mask = recorded.get(f"bsc_flip_mask.{k}")
        return bits if mask is None else bits ^ mask.bool().reshape(bits.shape)

    found = tokenizer.encode(recorded["image"], corrupt=flip)
    close(torch.cat([read for read in found.reads if read is not None], 1), recorded["bsc_input"], 3e-4)
    assert torch.equal(torch.cat(found.tokens, 1).float(), recorded["bsc_labels"].float())
    assert any(bool(recorded[name].any()) for name in recorded if name.startswith("bsc_flip_mask"))


@torch.no_grad()
def test_kl_16_gives_the_published_outputs() -> None:
    found, recorded, weights = golden("kl")
    given = found["constructor"]["vae"]
    config = kl_config(given["ch"], given["embed_dim"], tuple(given["ch_mult"]), ((4, 4),))
    tokenizer = load_published(Tokenizer(config), weights)
    moments = tokenizer.moments(recorded["image"])
    close(moments, recorded["vae_moments"], 3e-4)
    drawn = tokenizer.quantiser.scaled(gaussian.draw(moments, recorded["vae_noise"]))
    close(drawn, recorded["vae_latent"], 3e-4)
    close(tokenizer.latent(recorded["image"]), 0.2325 * moments[:, :given["embed_dim"]], 1e-6)
    torch.testing.assert_close(gaussian.divergence(moments), recorded["vae_kl"][0], rtol=1e-4, atol=1e-4)
    unclamped = tokenizer.decoder(tokenizer.from_latent(tokenizer.quantiser.unscaled(drawn)))
    close(unclamped[..., ::4, ::4], recorded["vae_decoded"], 1e-3)
    close(tokenizer.decode(drawn)[..., ::4, ::4], recorded["vae_decoded"].clamp(-1, 1), 1e-3)


@pytest.mark.parametrize("name, parameters", [
    ("kl-16", 66_456_019),  # 253.5 MiB in float32, the size of the published file
    ("llamagen-vq-16", 71_883_403), ("llamagen-vq-8", 70_109_835), ("infinity-d16", 44_951_952 + 65_018_627),
    ("infinity-d24", 44_988_824 + 65_055_491),
    ("infinity-d32", 45_025_696 + 65_092_355), ("infinity-d64", 45_173_184 + 65_239_811),
    ("infinity-d14-f8", 33_139_598 + 48_484_611)])
def test_published_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(PUBLISHED[name])
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("infinity-")])
def test_infinity_s_tokenizers_load_by_name(name: str) -> None:
    with torch.device("meta"):
        weights = test_infinity.published_tokenizer(Tokenizer(PUBLISHED[name]))
        tokenizer = published_tokenizer(name, weights)
        assert tokenizer.config == PUBLISHED[name] and not tokenizer.training
        width = tokenizer.config.autoencoder.latent_width
        weights["decoder.conv_in.conv.weight"] = torch.empty(512, width + 2, 3, 3)
        with pytest.raises(WeightsError, match=r"wrong shape: decoder\.conv_in\.conv\.weight"):
            published_tokenizer(name, weights)
        del weights["decoder.conv_in.conv.weight"]
        with pytest.raises(WeightsError, match=r"missing: decoder\.input\.weight"):
            published_tokenizer(name, weights)


@pytest.mark.parametrize(("name", "shapes"), [
    ("llamagen-vq-16", vq_16(8, 16384)), ("kl-16", kl_16())], ids=["llamagen-vq-16", "kl-16"])
def test_the_published_tensor_lists_load_strictly(name: str, shapes: Shapes) -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(PUBLISHED[name])
    load_published(tokenizer, on_meta(shapes))
    listed = sum(math.prod(shape) for key, shape in shapes.items() if key != "quantize.codebook_used")
    assert listed == sum(parameter.numel() for parameter in tokenizer.parameters())
    for gone in [*shapes][::29]:
        with pytest.raises(WeightsError, match="missing"):
            load_published(tokenizer, on_meta({key: shape for key, shape in shapes.items() if key != gone}))


def test_infinity_s_names_load_with_and_without_the_extra_wrapping() -> None:
    _, _, weights = golden("infinity")
    plain = {name.replace(".conv.weight", ".weight").replace(".conv.bias", ".bias").replace(".norm.weight", ".weight")
             .replace(".norm.bias", ".bias"): t for name, t in weights.items()}
    assert "encoder.conv_in.weight" in plain and "encoder.down.0.downsample.conv.weight" in plain
    assert "encoder.conv_in.conv.weight" in weights
    grids = ((1, 1), (2, 2), (4, 4), (6, 6))
    one, other = (load_published(Tokenizer(infinity_config(8, width=32, grids=grids)), given)
                  for given in (weights, plain))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("change, named", [
    (lambda w: w.pop("quantize.embedding.weight"), "quantiser.codebook.weight"),
    (lambda w: w.pop("encoder.mid.1.k.bias"), "encoder.mid.1.q.bias"),
    (lambda w: w.update(stranger=torch.zeros(2)), "stranger"),
    (lambda w: w.update({"quant_conv.bias": torch.zeros(9)}), "quant_conv.bias")])
def test_weights_that_do_not_fit_are_refused_by_name(change: Any, named: str) -> None:
    tokenizer, _, weights = llamagen()
    weights = dict(weights)
    change(weights)
    with pytest.raises(WeightsError, match=named):
        load_published(tokenizer, weights)


def test_unknown_names_kinds_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="llamagen-vq-16"):
        published_tokenizer("llamagen-vq16", {})
    with pytest.raises(InputError, match="factor 8 or 16"):
        llamagen_config(4)
    from tiny import AUTOENCODER, GRIDS

    from nextscale.tokenizers.config import TokenizerConfig

    with pytest.raises(InputError, match="'vq'"):
        load_published(Tokenizer(TokenizerConfig(AUTOENCODER, GRIDS, 32)), {})
    with pytest.raises(WeightsError, match="no weights file"):
        load_published(Tokenizer(llamagen_config(16, 32, 32, 64, 64)), tmp_path / "absent.pt")
