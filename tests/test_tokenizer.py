"""The multi-scale VQ tokenizer: what is coded, what is left, and what the canvas holds."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import AUTOENCODER, GRIDS, emoji, empty_canvas, fill, random_tokens, tiny_var
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.objectives.reconstruction import psnr
from nextscale.plan import Plan
from nextscale.systems.folders import load, save
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.multiscale_vq import phi_table
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask, reconstruct
from nextscale.training.tokenizer_recipe import replace_tokenizer, save_tokenizer

SCHEDULES = [GRIDS, ((1, 1), (2, 1), (3, 4), (4, 4)), ((2, 2), (4, 4)), ((4, 4),), ((1, 1), (5, 3), (4, 4))]


def make(grids: tuple[tuple[int, int], ...] = GRIDS, **changes: object) -> Tokenizer:
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, grids, vocabulary=32, **changes)).eval()  # type: ignore[arg-type]
    fill(tokenizer)
    return tokenizer


def test_the_published_phi_tables() -> None:
    assert phi_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_table(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert phi_table(10, 0) == tuple(range(10)) and phi_table(10, 1) == (0,) * 10
    for steps in range(1, 20):
        for count in range(1, 8):
            table = phi_table(steps, count)
            assert list(table) == sorted(table) and set(table) <= set(range(count))


@pytest.mark.parametrize("phi_count", [0, 1, 2, 4])
@pytest.mark.parametrize("grids", SCHEDULES)
def test_latent_is_canvas_plus_rest_after_every_scale(grids: tuple[tuple[int, int], ...], phi_count: int) -> None:
    tokenizer = make(grids, phi_count=phi_count)
    with torch.no_grad():
        latent = tokenizer.latent(emoji(3))
        rest = latent
        canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 3)
        for k, tokens in enumerate(tokenizer.encode(emoji(3)).tokens):
            z = F.interpolate(rest, size=grids[k], mode="area")
            expected = torch.cdist(z.flatten(2).transpose(1, 2), tokenizer.quantiser.codebook.weight).argmin(-1)
            assert torch.equal(tokens, expected)
            contribution = canvas.contribution(k, tokens)
            rest, canvas = rest - contribution, canvas.write(k, tokens)
            assert float((canvas.value + rest - latent).abs().max() / latent.abs().max()) <= 1e-5


@pytest.mark.parametrize("grids", SCHEDULES)
def test_tokens_give_back_the_encoder_s_canvas(grids: tuple[tuple[int, int], ...]) -> None:
    tokenizer = make(grids)
    with torch.no_grad():
        found = tokenizer.encode(emoji(2))
        again = pyramid.replay(found.tokens, Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2))
    assert torch.equal(again.canvas.value, found.canvas.value)
    for ours, theirs in zip(again.reads[1:], found.reads[1:], strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert again.reads[0] is None


def test_a_step_s_contribution_is_phi_of_the_enlarged_codes() -> None:
    tokenizer = make()
    quantiser = tokenizer.quantiser
    tokens = random_tokens(tokenizer.plan, 2)
    canvas = Canvas.empty(tokenizer.plan, quantiser, 2)
    with torch.no_grad():
        for k, (h, w) in enumerate(GRIDS):
            codes = quantiser.codebook.weight[tokens[k]].transpose(1, 2).reshape(2, -1, h, w)
            up = F.interpolate(codes, size=(4, 4), mode="bicubic") if k < 3 else codes
            phi = quantiser.phis[phi_table(4, 4)[k]]
            torch.testing.assert_close(canvas.contribution(k, tokens[k]), 0.5 * up + 0.5 * phi(up))
            vectors = quantiser.codebook.weight[tokens[k]]
            assert torch.equal(canvas.contribution(k, vectors), canvas.contribution(k, tokens[k]))


def test_reading_the_canvas_is_area_resizing_row_by_row() -> None:
    tokenizer = make(((1, 1), (2, 3), (4, 4)))
    canvas = Canvas(torch.randn(2, 8, 4, 4), tokenizer.plan, tokenizer.quantiser)
    small = F.interpolate(canvas.value, size=(2, 3), mode="area")
    assert torch.equal(canvas.read(1)[:, 4], small[:, :, 1, 1])


def test_writing_never_changes_a_canvas_in_place() -> None:
    tokenizer = make()
    canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)
    with torch.no_grad():
        after = canvas.write(0, torch.zeros(2, 1, dtype=torch.int64))
    assert float(canvas.value.abs().max()) == 0 and float(after.value.abs().max()) > 0


def test_a_corrupted_scale_is_corrected_by_the_scales_behind_it() -> None:
    tokenizer = make()
    with torch.no_grad():
        latent = tokenizer.latent(emoji(2))
        wrong = {1: torch.zeros(2, 4, dtype=torch.int64)}
        found = tokenizer.encode(emoji(2), corrupt=lambda k, tokens: wrong.get(k, tokens))
        written = [found.tokens[0], wrong[1], *found.tokens[2:]]
        canvas = pyramid.replay(written, Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)).canvas
        rest = latent - pyramid.replay(written[:3], Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)).canvas.value
        assert torch.equal(canvas.value, found.canvas.value)
        assert torch.equal(found.tokens[3], tokenizer.quantiser.nearest(rest))


def test_looking_codes_up_by_angle_ignores_length() -> None:
    quantiser = make(cosine=True).quantiser
    z = torch.randn(1, 8, 3, 3)
    assert torch.equal(quantiser.nearest(z), quantiser.nearest(5 * z))


def test_any_schedule_that_ends_at_the_latent_s_size_codes_any_size_of_picture() -> None:
    tokenizer = make(phi_count=1)
    plan = Plan.scales([1, (2, 3), (4, 6)])
    with torch.no_grad():
        pictures = F.interpolate(emoji(2), size=(16, 24), mode="bilinear")
        found = tokenizer.encode(pictures, plan)
        assert [t.shape[1] for t in found.tokens] == [1, 6, 24]
        assert tokenizer.decode_tokens(found.tokens, plan).shape == (2, 3, 16, 24)


def test_pictures_and_schedules_that_do_not_fit_are_refused() -> None:
    tokenizer = make()
    with pytest.raises(InputError, match="multiple of the tokenizer's factor 4"):
        tokenizer.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="5x5"):
        tokenizer.encode(torch.zeros(1, 3, 20, 20), Plan.scales([1, 4]))
    with pytest.raises(InputError, match="schedule"):
        tokenizer.encode(torch.zeros(1, 3, 20, 16))
    for shape in ((3, 16, 16), (1, 1, 16, 16), (1, 4, 16, 16)):
        with pytest.raises(InputError, match="shape"):
            tokenizer.encode(torch.zeros(shape))


def test_previews_are_decoded_from_any_number_of_scales() -> None:
    system = tiny_var()
    tokens = system.encode(emoji(2))
    for k in range(1, 5):
        canvas = pyramid.replay(tokens[:k], empty_canvas(system, 2)).canvas
        with torch.no_grad():
            assert torch.equal(system.decode(tokens[:k]), system.tokenizer.decode(canvas))


def test_training_pass_is_straight_through_with_cumulative_losses() -> None:
    tokenizer = make().train()
    pictures = emoji(2)
    output = tokenizer(pictures)
    with torch.no_grad():
        latent = tokenizer.latent(pictures)
        errors, canvas = [], Canvas.empty(tokenizer.plan, tokenizer.quantiser, 2)
        for k, tokens in enumerate(output.tokens):
            canvas = canvas.write(k, tokens)
            errors.append(F.mse_loss(canvas.value, latent))
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(output.commitment_loss, expected)
    torch.testing.assert_close(output.codebook_loss, expected)
    (by_commitment,) = torch.autograd.grad(output.commitment_loss, tokenizer.to_latent.weight, retain_graph=True)
    assert float(by_commitment.abs().max()) > 0
    for wrong, loss in ((tokenizer.quantiser.codebook.weight, output.commitment_loss),
                        (tokenizer.to_latent.weight, output.codebook_loss)):
        assert torch.autograd.grad(loss, wrong, retain_graph=True, allow_unused=True)[0] is None
    codes, encoder = torch.autograd.grad(output.reconstruction.square().mean(),
                                         (tokenizer.quantiser.codebook.weight, tokenizer.to_latent.weight),
                                         allow_unused=True)
    assert codes is None and float(encoder.abs().max()) > 0
    assert float(tokenizer.quantiser.usage_KV.sum()) > 0


def test_dead_codes_are_revived_and_used_ones_are_left_alone() -> None:
    torch.manual_seed(0)
    quantiser = make().quantiser
    quantiser.usage_KV[:, :20] = 1.0
    before = quantiser.codebook.weight.detach().clone()
    vectors = torch.randn(50, 8)
    assert quantiser.revive(vectors, 0.03) == 12
    assert torch.equal(quantiser.codebook.weight[:20], before[:20])
    assert all((vectors == code).all(1).any() for code in quantiser.codebook.weight[20:])
    assert quantiser.revive(vectors, 0.03) == 0


def test_an_ema_codebook_moves_to_the_mean_of_what_chose_it() -> None:
    quantiser = make(codebook_update="ema", codebook_decay=0.0).quantiser
    z = torch.randn(40, 8)
    index = torch.arange(40) % 5
    before = quantiser.codebook.weight.detach().clone()
    quantiser.move_codebook(index, z)
    for code in range(5):
        torch.testing.assert_close(quantiser.codebook.weight[code], z[index == code].mean(0))
    assert torch.equal(quantiser.codebook.weight[5:], before[5:])


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_some_dozens_of_steps_on_real_pictures_lower_the_loss(codebook_update: str) -> None:
    torch.manual_seed(0)
    model = TokenizerConfig(AUTOENCODER, GRIDS, 32, codebook_update=codebook_update)  # type: ignore[arg-type]
    task = TokenizerTask(TokenizerRecipe(model, revive_every=8))
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
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < 0.75 * first
    assert float(psnr(pictures, reconstruct(task.tokenizer.eval(), pictures)).mean()) > 8


def test_training_the_decoder_alone_lowers_the_loss_and_leaves_every_code_as_it_was() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, GRIDS, 32, codebook_update="ema"))
    pictures = emoji(32)
    before = tokenizer.eval().encode(pictures)
    task = TokenizerTask(TokenizerRecipe(tokenizer.config, revive_every=1), codes_of=tokenizer)
    optimiser = torch.optim.AdamW(task.parameter_groups("main", 0.01), lr=3e-3)
    losses = []
    tokenizer.train()
    for step in range(12):
        at = TrainingStep(step, 12, step / 12, 0, 0)
        loss, _ = task.loss("main", {"picture": pictures[step % 2 * 16:][:16]}, at)
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        task.after_step(at)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = tokenizer.eval().encode(pictures)
    assert all(torch.equal(a, b) for a, b in zip(before.tokens, after.tokens, strict=True))
    assert torch.equal(before.canvas.value, after.canvas.value)


def test_a_model_takes_a_decoder_of_the_same_codes_and_no_other(tmp_path: Path) -> None:
    save(tiny_var(), tmp_path / "model")
    model, other = load(tmp_path / "model"), load(tmp_path / "model").tokenizer
    tokens = model.encode(emoji(2))
    with torch.no_grad():
        other.decoder.output.bias.add_(0.25)
    save_tokenizer(other, tmp_path / "decoder")
    replace_tokenizer(tmp_path / "model", tmp_path / "decoder", tmp_path / "both")
    found = load(tmp_path / "both").tokenizer.decode_tokens(tokens)
    torch.testing.assert_close(found, other.decode_tokens(tokens), rtol=0, atol=1e-2)
    assert float((found - model.decode(tokens)).abs().max()) > 0.1
    with torch.no_grad():
        other.quantiser.codebook.weight.neg_()
    save_tokenizer(other, tmp_path / "others")
    with pytest.raises(InputError, match="makes other codes than the tokenizer of"):
        replace_tokenizer(tmp_path / "model", tmp_path / "others", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_trained_tokenizer_s_error_falls_with_every_decoded_scale() -> None:
    import nextscale

    system = nextscale.load("emoji-text-64", device="cpu")
    pictures = emoji(24, 64, held_out=True)
    tokens = system.encode(pictures)
    errors = [float((system.decode(tokens[:k]) - pictures).square().mean()) for k in range(1, len(tokens) + 1)]
    assert errors == sorted(errors, reverse=True)
    assert float(psnr(pictures, system.decode(tokens)).mean()) > 20


def test_a_config_knows_its_bits_and_its_plan() -> None:
    config = replace(TokenizerConfig(), vocabulary=4096)
    assert config.bits == 680 * 12 and config.plan.length == 680 and config.autoencoder.factor == 16


def psnr_by_hand(x: Tensor, y: Tensor) -> float:
    return float(10 * torch.log10(1 / ((x - y) / 2).square().mean()))


def test_psnr_counts_pictures_in_minus_1_to_1_and_masks() -> None:
    x, y = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)
    assert abs(float(psnr(x, y)) - psnr_by_hand(x, y)) < 1e-4
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    y[..., 2:] = 5.0
    assert abs(float(psnr(x, y, mask)) - 20) < 1e-4
