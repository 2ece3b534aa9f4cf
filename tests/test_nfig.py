"""NFIG: bands of a latent, what every scale aims at and leaves over, training by the same rule, command line."""
from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers.frequency import band_gains, energy_above, filtered, radius
from nextscale.layers.resize import resize
from nextscale.objectives.reconstruction import ReconstructionWeights, reconstruction_loss
from nextscale.plan import Plan
from nextscale.systems.nfig import NFIG, NFIGConfig, preset_config
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.bands import band_edges, band_passes, band_target
from nextscale.tokenizers.config import Bands, TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask, reconstruct

RULES: tuple[Bands, ...] = ("paper", "nyquist", "soft")
TEN = tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
WIDE = ((1, 1), (1, 2), (2, 3), (3, 5), (5, 8))


def make(bands: Bands, grids: tuple[tuple[int, int], ...] = GRIDS, **changes: Any) -> Tokenizer:
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, grids, 32, bands=bands, **changes)).eval()
    fill(tokenizer)
    return tokenizer


def with_bands(tokenizer: Tokenizer, bands: Bands) -> Tokenizer:
    """The same weights under another rule."""
    other = Tokenizer(replace(tokenizer.config, bands=bands)).eval()
    other.load_state_dict(tokenizer.state_dict())
    return other


# The bands

@pytest.mark.parametrize("grids", [TEN, GRIDS, WIDE, ((4, 4),), ((1, 1), (5, 3), (4, 4))])
@pytest.mark.parametrize("bands", RULES)
def test_bands_add_up_to_the_latent(bands: Bands, grids: tuple[tuple[int, int], ...]) -> None:
    torch.manual_seed(0)
    f = torch.randn(2, 3, *grids[-1])
    gains = band_gains(band_passes(grids, bands))
    parts = [filtered(f, gain) for gain in gains]
    torch.testing.assert_close(sum(parts, torch.zeros_like(f)), f, rtol=0, atol=1e-5)
    assert bool((gains >= 0).all())
    if bands != "soft":
        assert set(gains.unique().tolist()) <= {0.0, 1.0} and bool((gains.sum(0) == 1).all())
    full = torch.fft.ifft2(torch.fft.fft2(f) * gains[0])  # the definition, over all bins
    assert float(full.imag.abs().max()) < 1e-5
    torch.testing.assert_close(full.real, parts[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[0].mean((2, 3)), f.mean((2, 3)), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(height=st.integers(1, 12), width=st.integers(1, 12))
def test_filters_are_even_on_any_grid(height: int, width: int) -> None:
    r_HW = radius((height, width))
    turned = r_HW.flip(0, 1).roll((1, 1), (0, 1))  # (ky, kx) -> (-ky, -kx)
    assert torch.equal(r_HW, turned) and float(r_HW[0, 0]) == 0 and float(r_HW.max()) <= 0.5**0.5
    assert int((r_HW == 0).sum()) == 1


def test_the_published_formula_leaves_bands_empty() -> None:
    edges = band_edges(TEN, "paper")
    assert 16 * edges[-1] == pytest.approx(8 * 2**0.5) and edges == sorted(edges)
    sums = torch.tensor([h * w for h, w in TEN]).cumsum(0) / 680
    torch.testing.assert_close(torch.tensor(edges), sums * 0.5**0.5)
    assert band_gains(band_passes(TEN, "paper")).sum((1, 2)).tolist() == [1, 0, 0, 0, 0, 8, 12, 40, 88, 107]
    assert band_gains(band_passes(TEN, "nyquist")).sum((1, 2)).tolist() == [1, 4, 4, 4, 8, 8, 20, 32, 56, 119]


def test_nyquist_edges_are_what_a_grid_can_hold_and_soft_ones_are_one_half_there() -> None:
    assert [16 * edge for edge in band_edges(TEN, "nyquist")] == [side / 2 for side, _ in TEN]
    passes, r_HW = band_passes(TEN, "soft"), radius((16, 16))
    for k, (side, _) in enumerate(TEN[:-1]):
        torch.testing.assert_close(passes[k][r_HW == side / 32], torch.full_like(passes[k][r_HW == side / 32], 0.5))
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    for k, (side, _) in enumerate(TEN):
        kept = band_target(wave, k, TEN, "nyquist")
        torch.testing.assert_close(kept, wave if side >= 6 else torch.zeros_like(wave), rtol=0, atol=1e-6)


# What scales code

@pytest.mark.parametrize("grids", [GRIDS, ((1, 1), (2, 1), (3, 4), (4, 4)), ((2, 2), (4, 4)), ((4, 4),)])
@pytest.mark.parametrize("bands", RULES)
def test_a_scale_codes_what_its_band_and_all_before_left_over(
        bands: Bands, grids: tuple[tuple[int, int], ...]) -> None:
    tokenizer = make(bands, grids)
    with torch.no_grad():
        f = tokenizer.latent(emoji(3))
        found = tokenizer.encode(emoji(3))
        gains = band_gains(band_passes(grids, bands))
        canvas, rest = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 3), torch.zeros_like(f)
        for k, tokens in enumerate(found.tokens):
            aim = band_target(f, k, grids, bands) - canvas.value
            carried = rest + filtered(f, gains[k])  # eq. 3: R_(k-1) + f_k
            torch.testing.assert_close(carried, aim, rtol=0, atol=1e-5)
            z = resize(aim, grids[k], "area").flatten(2).transpose(1, 2)
            distance = torch.cdist(z, tokenizer.quantiser.codebook.weight)
            chosen = distance.gather(2, tokens[..., None])[..., 0]
            assert bool((chosen <= distance.amin(-1) + 1e-4).all())
            rest, canvas = carried - canvas.contribution(k, tokens), canvas.write(k, tokens)
        torch.testing.assert_close(rest, f - canvas.value, rtol=0, atol=2e-5)  # R_n = f - f_hat_n
        assert torch.equal(canvas.value, found.canvas.value)


def test_filters_that_pass_everything_give_var_s_tokens() -> None:
    banded, plain = make("paper"), make("none")
    with torch.no_grad():
        f, wanted = plain.latent(emoji(8)), plain.encode(emoji(8)).tokens
        canvas = Canvas.empty(plain.plan, banded.quantiser, 8)
        passed = pyramid.encode(f, canvas, lambda k, z: banded.quantiser.quantise(z),
                                target=lambda k, f: filtered(f, torch.ones(4, 4)))
        other = banded.encode(emoji(8)).tokens
    assert all(torch.equal(a, b) for a, b in zip(passed.tokens, wanted, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(other, wanted, strict=True))


def test_any_other_target_fits_the_loop() -> None:
    tokenizer = make("none")
    with torch.no_grad():
        smooth = [tokenizer.latent(F.avg_pool2d(F.pad(emoji(2), [k] * 4, mode="replicate"), 2 * k + 1, 1))
                  for k in (3, 2, 1, 0)]  # pictures whose details come one after the other
        seen: list[Tensor] = []
        canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)
        found = pyramid.encode(smooth[-1], canvas, lambda k, z: tokenizer.quantiser.quantise(z),
                               each=lambda k, z, canvas: seen.append(z), target=lambda k, f: smooth[k])
        for k, z in enumerate(seen):
            before = pyramid.replay(found.tokens[:k], canvas).canvas.value
            torch.testing.assert_close(z, resize(smooth[k] - before, GRIDS[k], "area"), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "update"), [("vq", "gradient"), ("vq", "ema"), ("bsq", "gradient")])
def test_the_training_pass_aims_at_what_encoding_aims_at(kind: Any, update: Any) -> None:
    vocabulary = 32 if kind == "vq" else 2**AUTOENCODER.latent_width
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, GRIDS, vocabulary, codebook_update=update, kind=kind,
                                          bands="nyquist")).eval()
    fill(tokenizer)
    output = tokenizer(emoji(4))
    with torch.no_grad():
        found, f = tokenizer.encode(emoji(4)), tokenizer.latent(emoji(4))
    assert all(torch.equal(a, b) for a, b in zip(output.tokens, found.tokens, strict=True))
    torch.testing.assert_close(output.latent_loss, F.mse_loss(found.canvas.value, f))
    if kind == "vq":
        canvas, errors = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 4), []
        with torch.no_grad():
            for k, tokens in enumerate(found.tokens):
                canvas = canvas.write(k, tokens)
                errors.append(F.mse_loss(canvas.value, band_target(f, k, GRIDS, "nyquist")))
        torch.testing.assert_close(output.commitment_loss, torch.stack(errors).mean())
    (gradient,) = torch.autograd.grad(output.latent_loss, tokenizer.to_latent.weight)
    assert float(gradient.abs().max()) > 0


def test_the_latent_term_counts_in_the_loss_where_it_is_asked_for() -> None:
    output = make("nyquist")(emoji(4))
    with_it, terms = reconstruction_loss(emoji(4), output, ReconstructionWeights(latent=2.0))
    without, named = reconstruction_loss(emoji(4), output, ReconstructionWeights())
    torch.testing.assert_close(with_it - without, 2 * output.latent_loss)
    assert "latent" in terms and "latent" not in named


def test_some_dozens_of_steps_on_real_pictures_lower_the_loss() -> None:
    torch.manual_seed(0)
    config = TokenizerConfig(AUTOENCODER, GRIDS, 32, codebook_update="ema", bands="nyquist")
    task = TokenizerTask(TokenizerRecipe(config, ReconstructionWeights(latent=1.0), revive_every=8))
    optimiser = torch.optim.AdamW(task.parameter_groups("main", 0.0), lr=3e-3)
    pictures, losses = emoji(64), []
    task.tokenizer.train()
    for step in range(24):
        at = TrainingStep(step, 24, step / 24, 0, 0)
        loss, _ = task.loss("main", {"picture": pictures[step % 4 * 16:][:16]}, at)
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        task.after_step(at)
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert reconstruct(task.tokenizer.eval(), pictures).isfinite().all()


def test_pictures_of_other_sizes_have_bands_of_their_own() -> None:
    tokenizer = make("nyquist", phi_count=1)
    plan = Plan.scales((*WIDE[:-1], (4, 6)))
    with torch.no_grad():
        found = tokenizer.encode(F.interpolate(emoji(2), size=(16, 24), mode="bilinear"), plan)
    assert [t.shape[1] for t in found.tokens] == [1, 2, 6, 15, 24]


def test_kinds_whose_scales_do_not_add_up_have_no_bands() -> None:
    for kind in ("l2-vq", "fsq"):
        with pytest.raises(InputError, match="bands 'paper' are for kinds whose scales add up"):
            TokenizerConfig(AUTOENCODER, GRIDS[-1:], kind=kind, bands="paper",
                            levels=(3,) * 8 if kind == "fsq" else ())


# A trained tokenizer


@cache
def trained() -> Tokenizer:
    return nextscale.load("emoji-text-64", device="cpu").tokenizer


def partial_canvases(tokenizer: Tokenizer, pictures: Tensor) -> list[Tensor]:
    """The canvas after every scale."""
    found: list[Tensor] = []
    with torch.no_grad():
        canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, len(pictures))
        pyramid.encode(tokenizer.latent(pictures), canvas, lambda k, z: tokenizer.quantiser.quantise(z),
                       each=lambda k, z, canvas: found.append(canvas.value))
    return found


@pytest.mark.parametrize("bands", RULES)
def test_partial_canvases_hold_less_beyond_their_band_than_var_s(bands: Bands) -> None:
    pictures = emoji(24, 64, held_out=True)
    plain, banded = trained(), with_bands(trained(), bands)
    ours, theirs = partial_canvases(banded, pictures), partial_canvases(plain, pictures)
    assert torch.equal(ours[0], theirs[0]) or bands == "soft", "1x1 cells see the mean alone"
    edges = band_edges(plain.config.grids, bands)
    for k, edge in list(enumerate(edges))[1:-1]:
        assert float(energy_above(ours[k], edge).mean()) < float(energy_above(theirs[k], edge).mean()), k


@pytest.mark.parametrize("bands", ["nyquist", "soft"])
def test_the_error_falls_with_every_band(bands: Bands) -> None:
    """Not with ``paper``: on an 8x8 latent its second and third bands hold nothing."""
    pictures, banded = emoji(24, 64, held_out=True), with_bands(trained(), bands)
    with torch.no_grad():
        f, canvases = banded.latent(pictures), partial_canvases(banded, pictures)
        of_latent = [float((value - f).square().mean()) for value in canvases]
        of_pictures = [float((banded.decode(value[:8]) - pictures[:8]).square().mean()) for value in canvases]
    assert of_latent == sorted(of_latent, reverse=True)
    assert of_pictures == sorted(of_pictures, reverse=True)


# The system

def tiny() -> NFIG:
    system = NFIG(NFIGConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32, bands="nyquist"),
                             VARGeneratorConfig.of_depth(2, width=48, heads=3), (5,))).eval()
    fill(system)
    return system


def test_one_call_equals_the_loop() -> None:
    system = tiny()
    drawn = system.generate([1, 2], guidance_scale=1, top_k=None, output="torch", progress=False)
    scored = system.log_prob(drawn.tokens, [1, 2])
    torch.testing.assert_close(scored.picture, drawn.log_prob, rtol=1e-4, atol=1e-3)


def test_it_is_var_on_other_tokens() -> None:
    system = tiny()
    plain = VAR(VARConfig(replace(system.config.tokenizer, bands="none"), system.config.generator, (5,)))
    plain.load_state_dict(system.state_dict())
    tokens = system.encode(emoji(4))
    assert any(not torch.equal(a, b) for a, b in zip(tokens, plain.encode(emoji(4)), strict=True))
    with torch.no_grad():
        assert torch.equal(system.loss(tokens, labels(4), 0.0)[0], plain.eval().loss(tokens, labels(4), 0.0)[0])


@pytest.mark.parametrize(("name", "depth", "millions"), [("nfig-310m", 16, 310.28), ("nfig-600m", 20, 600.92)])
def test_sizes_of_the_paper_have_its_parameters(name: str, depth: int, millions: float) -> None:
    config = preset_config(name)
    with torch.device("meta"):
        system = NFIG(config)
    parts = (system.generator, system.head, system.labels)
    assert round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 2) == millions
    assert (config.generator.depth, config.generator.width) == (depth, 64 * depth)
    assert config.tokenizer.plan.length == 680
    used = config.settings["fid"]
    assert (used.guidance_scale, used.guidance_schedule, used.top_k) == (4.5, "ramp", 990)
    with pytest.raises(InputError, match="no published weights of nfig are known"):
        system.published_names()


def test_a_tokenizer_without_bands_is_refused() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model\.bands=nyquist"):
        NFIGConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32))


def test_the_command_line_trains_both_and_refuses_tokens_of_other_bands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import load_tokenizer, save_tokenizer

    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    train = ["train.steps=2", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=2", "data.size=16",
             "data.held_out=0", "train.precision=fp32", "train.minutes=5"]

    def command(*words: str, sets: tuple[str, ...] = ()) -> int:
        return main.run([*words, *(part for one in (*train, *sets) for part in ("--set", one))])

    sizes = ("tokenizer.model.bands=nyquist", "tokenizer.model.vocabulary=32", "tokenizer.weights.latent=1",
             "tokenizer.model.grids=[[1,1],[2,2],[3,3],[4,4]]", "tokenizer.model.autoencoder.width=32",
             "tokenizer.model.autoencoder.multipliers=[1,1,2]", "tokenizer.model.autoencoder.latent_width=8",
             "tokenizer.model.autoencoder.decoder_blocks=1", "tokenizer.revive_every=0")
    assert command("train", "tokenizer", "--data", "pictures", "--out", "coded", sets=sizes) == 0
    coded = load_tokenizer(Path("coded/tokenizer"))
    assert coded.config.bands == "nyquist"
    for bands in ("paper", "none"):
        save_tokenizer(with_bands(coded, bands), tmp_path / bands)  # type: ignore[arg-type]
    network = ("generator.depth=2", "generator.width=32", "generator.heads=2")
    nfig = ("train", "generator", "--system", "nfig", "--data", "pictures", "--out")
    assert command(*nfig, "model", "--tokenizer", "coded/tokenizer", sets=network) == 0
    assert nextscale.load("model/model").config.tokenizer.bands == "nyquist"
    assert main.run(["generate", "--model", "model/model", "--count", "2", "--out", "a.png"]) == 0
    assert main.run(["tokenize", "--data", "pictures", "--tokenizer", "coded/tokenizer", "--out", "tokens"]) == 0
    capsys.readouterr()
    assert command(*nfig, "others", "--tokenizer", "paper", sets=(*network, "tokens=tokens")) == 2
    assert "these tokens were made by another tokenizer, with the fingerprint" in capsys.readouterr().err
    assert command(*nfig, "without", "--tokenizer", "none", sets=network) == 2
    assert "NFIG needs a tokenizer of frequency bands" in capsys.readouterr().err
    assert not Path("without").exists(), "told before pictures were coded"


def test_the_experiment_tells_of_every_rule_and_trains_one_where_steps_are_given(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    path = Path(__file__).resolve().parents[1] / "experiments" / "nfig_bands.py"
    spec = importlib.util.spec_from_file_location("nfig_bands", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    save_tokenizer(make("none"), tmp_path / "tokenizer")
    arguments = ["--data", str(draw_pictures(tmp_path / "pictures", each=14, size=32)), "--held-out", "4",
                 "--out", str(tmp_path / "out")]
    assert script.main([*arguments, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    found = nextscale.hub.read_json(tmp_path / "out" / "result.json")["results"]
    assert [one["bands"] for one in found] == ["none", *RULES]
    assert [one["empty"] for one in found] == [0, 1, 0, 0] and found[2]["bins"] == [1, 4, 4, 7]
    assert len(found[0]["latent_error"]) == 4 and found[0]["pictures"] == 4
    assert script.main([*arguments, "--steps", "1", "--batch-size", "2"]) == 0
    assert "| nyquist | 0 | 1 4 4 4 16 35 |" in (tmp_path / "out" / "table.md").read_text()
    assert script.main([*arguments, "--steps", "1", "--tokenizer", "x"]) == 2
    assert "give one of the two" in capsys.readouterr().err
