"""Continuous latents: the codec of vectors, the measured scale, caches of moments, and steps that write some cells."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_task import draw_pictures
from tiny import AUTOENCODER, emoji, tiny_var

from nextscale.canvas import Canvas
from nextscale.data import open_dataset
from nextscale.data.token_dataset import TokenDataset
from nextscale.errors import DataError, InputError, WeightsError
from nextscale.layers.resize import resize
from nextscale.objectives.reconstruction import ReconstructionWeights
from nextscale.plan import Plan, Step, grid_cells
from nextscale.tokenizers import gaussian, pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer_recipe import load_tokenizer, save_tokenizer, train_tokenizer
from nextscale.training.tokens import check_fits, tokenize

GRIDS = ((1, 1), (2, 2), (4, 4))


def tokenizer(latent_scale: float = 0.5, seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    sizes = replace(AUTOENCODER, multipliers=(1, 1, 1), attention="encoder", latent_kernel=1)
    return Tokenizer(TokenizerConfig(sizes, GRIDS, kind="kl", latent_scale=latent_scale)).eval()


@torch.no_grad()
def test_every_scale_s_tokens_are_the_latent_itself_and_the_next_reads_them_enlarged() -> None:
    model, pictures = tokenizer(), emoji(3)
    latent = model.latent(pictures)
    torch.testing.assert_close(latent, 0.5 * model.moments(pictures)[:, :8])
    found = model.encode(pictures)
    for k, (tokens, grid) in enumerate(zip(found.tokens, GRIDS, strict=True)):
        small = resize(latent, grid, "area")
        torch.testing.assert_close(tokens, small.flatten(2).transpose(1, 2))
        if k + 1 < len(GRIDS):
            wanted = resize(resize(small, GRIDS[-1], "bicubic"), GRIDS[k + 1], "area")
            torch.testing.assert_close(found.reads[k + 1], wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.canvas.value, latent)
    torch.testing.assert_close(model.decode_tokens(found.tokens), model.decode(latent))
    assert model.decode_tokens(found.tokens[:1]).shape == pictures.shape
    assert model.config.bits is None and model.config.vocabulary == 0


@torch.no_grad()
def test_training_measures_the_scale_and_the_saved_tokenizer_has_it(tmp_path: Path) -> None:
    model, pictures = tokenizer(0.0).train(), emoji(16)
    moments = 7 * model.moments(pictures)
    for _ in range(900):
        model.quantiser.record_scale(moments)
    wanted = moments[:, :8].var() ** -0.5
    assert float(model.quantiser.scale) == pytest.approx(float(wanted), rel=1e-2)
    save_tokenizer(model, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.config.latent_scale == pytest.approx(float(wanted), rel=1e-2)
    torch.testing.assert_close(again.latent(pictures), model.eval().latent(pictures), rtol=1e-4, atol=1e-5)
    before = float(again.quantiser.scale)
    again.train().quantiser.record_scale(model.moments(pictures))
    assert float(again.quantiser.scale) == before


def test_the_divergence_pulls_a_latent_to_the_normal_distribution() -> None:
    moments = torch.zeros(2, 8, 3, 3)
    assert float(gaussian.divergence(moments)) == 0
    moments[:, 0] = 2.0
    assert float(gaussian.divergence(moments)) == pytest.approx(9 * 2.0)  # half a square a cell
    noise = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(gaussian.draw(moments, noise), moments[:, :4] + noise)
    wild = gaussian.clamped(torch.full((1, 2, 1, 1), 99.0))
    assert wild.flatten().tolist() == [99.0, 20.0]


def test_a_recipe_trains_a_continuous_tokenizer(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    recipe = {"data": {"spec": str(pictures), "size": 16, "split": "all", "held_out": 0},
              "tokenizer": {"model": {"kind": "kl", "grids": [[1, 1], [2, 2], [4, 4]], "autoencoder": {
                  "width": 32, "multipliers": [1, 1, 1], "encoder_blocks": 1, "decoder_blocks": 1, "latent_width": 4,
                  "attention": "encoder", "latent_kernel": 1}}, "weights": {"kl": 1e-3}},
              "train": {"steps": 12, "batch_size": 4, "learning_rate": 3e-3, "device": "cpu", "log_every": 1,
                        "sample_every": 0}}
    train_tokenizer(recipe, tmp_path / "out")
    model = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert model.config.continuous and model.config.latent_scale > 0
    from nextscale.training import read_metrics

    steps = [record for record in read_metrics(tmp_path / "out") if "main/loss" in record]
    assert steps[-1]["l2"] < steps[0]["l2"] and steps[0]["kl"] > 0 and "commitment" not in steps[0]
    assert "usage_0" not in steps[0] and steps[-1]["latent_scale"] > 0


def test_the_kl_term_counts_by_its_weight() -> None:
    from nextscale.objectives.reconstruction import reconstruction_loss

    model, pictures = tokenizer().train(), emoji(2)
    torch.manual_seed(0)
    output = model(pictures)
    one, terms = reconstruction_loss(pictures, output, ReconstructionWeights(kl=1.0), kind="kl")
    none, _ = reconstruction_loss(pictures, output, ReconstructionWeights(kl=0.0), kind="kl")
    torch.testing.assert_close(one - none, terms["kl"])
    torch.testing.assert_close(terms["kl"], gaussian.divergence(model.moments(pictures)) / pictures[0].numel())


def test_a_cache_of_moments_gives_them_back_and_refuses_another_tokenizer(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    model = tokenizer()
    dataset = open_dataset(folder, 16, split="all")
    assert tokenize(model, dataset, tmp_path / "tokens", flips=True)
    cache = TokenDataset(tmp_path / "tokens")
    found = cache.read(range(3), [0, 1, 0])
    assert found.dtype == torch.float16 and found.shape == (3, 16, 16) and "16 vectors" in cache.summary()
    pixels, _ = dataset.read([0, 1, 2])
    pictures = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    pictures[1] = pictures[1].flip(-1)
    with torch.no_grad():
        wanted = model.moments(pictures).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=2e-3)
    check_fits(tmp_path / "tokens", cache.job, model)
    with pytest.raises(InputError, match="another tokenizer, with the fingerprint"):
        check_fits(tmp_path / "tokens", cache.job, tokenizer(seed=1))
    with pytest.raises(InputError, match="another tokenizer, with the schedule"):
        check_fits(tmp_path / "tokens", cache.job, tiny_var().tokenizer)


def test_moments_that_are_no_numbers_are_noticed(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "pictures")
    model = tokenizer()
    with torch.no_grad():
        model.encoder.output.bias.fill_(torch.nan)
    with pytest.raises((InputError, DataError), match="no finite numbers"):
        tokenize(model, open_dataset(folder, 16, split="all"), tmp_path / "tokens")


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), pictures=st.integers(1, 3), seed=st.integers(0, 99))
def test_steps_that_write_some_cells_fill_the_canvas_in_any_order(sizes: list[int], pictures: int, seed: int) -> None:
    total = sum(sizes)
    grid = next((h, total // h) for h in range(int(total**0.5), 0, -1) if total % h == 0)
    plan = Plan(tuple(Step(grid, count=size) for size in sizes))
    generator = torch.Generator().manual_seed(seed)
    cells = grid_cells(Step(grid))
    order = torch.stack([cells[torch.randperm(total, generator=generator)] for _ in range(pictures)])
    codec = tokenizer().quantiser
    latent = torch.randn(pictures, 8, *grid, generator=generator)
    found = pyramid.encode(latent, Canvas.empty(plan, codec, pictures), lambda k, z: codec.quantise(z), order=order)
    assert [tokens.shape[1] for tokens in found.tokens] == sizes
    assert torch.equal(found.canvas.value, latent)
    half = pyramid.replay(found.tokens, Canvas.empty(plan, codec, pictures), 1, order).canvas
    written = half.value.ne(0).any(1).flatten(1).sum(1)
    assert written.tolist() == [sizes[0]] * pictures
    reads = half.read(1) if len(sizes) > 1 else half.read(0)
    assert reads.shape == (pictures, total, 8)
    back = half.gather(torch.arange(pictures).flip(0))
    assert torch.equal(back.value, half.value.flip(0))


def test_a_step_of_some_cells_must_be_told_which() -> None:
    plan = Plan((Step((2, 2), count=2), Step((2, 2), count=2)))
    canvas = Canvas.empty(plan, tokenizer().quantiser, 1)
    with pytest.raises(InputError, match="needs the cells"):
        canvas.write(0, torch.zeros(1, 2, 8))


@pytest.mark.parametrize(("changes", "named"), [
    ({"latent_scale": -1.0}, "latent_scale"), ({"kind": "vq", "latent_scale": 1.0}, "latent_scale"),
    ({"vocabulary": 12}, "leave it out"), ({"levels": (3, 3)}, "levels are for"), ({"tokens": "bits"}, "bits")])
def test_values_that_a_continuous_tokenizer_cannot_have_are_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TokenizerConfig(AUTOENCODER, GRIDS, **{"kind": "kl", **changes})  # type: ignore[arg-type]


def test_other_kinds_have_no_moments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'vq' codes its latent"):
        tiny_var().tokenizer.moments(emoji(1))
    with pytest.raises(WeightsError):
        load_tokenizer(tmp_path)
