"""Every kind of quantiser behind one interface: codes both ways, previews, float32, usage, and what is refused."""
from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale.canvas import Canvas
from nextscale.configuration import build
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.plan import Plan
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.bitwise import SphericalBits
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer import usage_metrics
from nextscale.training.tokens import tokenizer_hash

ONE = ((4, 4),)
CASES: dict[str, dict[str, Any]] = {
    "vq one map": {"grids": ONE, "vocabulary": 32, "phi_count": 1},
    "vq scales": {"vocabulary": 32},
    "l2-vq": {"kind": "l2-vq", "grids": ONE, "vocabulary": 32},
    "bsq one map": {"kind": "bsq", "grids": ONE},
    "bsq scales": {"kind": "bsq"},
    "bsq scales, bits": {"kind": "bsq", "tokens": "bits"},
    "bsq 64 bits": {"kind": "bsq", "tokens": "bits", "latent_width": 64},
    "lfq one map": {"kind": "lfq", "grids": ONE},
    "lfq scales": {"kind": "lfq"},
    "fsq": {"kind": "fsq", "grids": ONE, "levels": (8, 5, 5, 5), "latent_width": 4},
}
BITWISE = [name for name in CASES if name.startswith(("bsq", "lfq"))]


def make(case: str, **changes: Any) -> Tokenizer:
    given = {"grids": GRIDS, **CASES[case], **changes}
    sizes = replace(AUTOENCODER, latent_width=given.pop("latent_width", 8))
    tokenizer = Tokenizer(TokenizerConfig(sizes, **given)).eval()
    fill(tokenizer)
    return tokenizer


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_only_counts_leaves_the_fingerprint_of_a_tokenizer_as_it_is(case: str) -> None:
    tokenizer = make(case)
    before = tokenizer_hash(tokenizer)
    for name, buffer in tokenizer.quantiser.named_buffers():
        if name in ("usage_KV", "ones_KC", "seen_K"):
            buffer += 1
    assert tokenizer_hash(tokenizer) == before
    next(tokenizer.encoder.parameters()).add_(1)
    assert tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_tokens_give_back_the_canvas_the_picture_and_every_preview(case: str) -> None:
    tokenizer = make(case)
    found = tokenizer.encode(emoji(3))
    assert [t.shape[:2] for t in found.tokens] == [(3, step.rows) for step in tokenizer.plan]
    again = pyramid.replay(found.tokens, Canvas.empty(tokenizer.plan, tokenizer.quantiser, 3))
    assert torch.equal(again.canvas.value, found.canvas.value)
    assert torch.equal(tokenizer.decode_tokens(found.tokens), tokenizer.decode(found.canvas))
    for k in range(1, len(found.tokens) + 1):
        preview = tokenizer.decode_tokens(found.tokens[:k])
        assert preview.shape == (3, 3, 16, 16) and float(preview.abs().max()) <= 1
    # Different pictures are different codes, so that what is tested here isn't one constant.
    assert not torch.equal(found.canvas.value[0], found.canvas.value[1])


@pytest.mark.parametrize("case", CASES)
def test_the_training_pass_codes_as_encoding_does_and_reaches_the_encoder(case: str) -> None:
    tokenizer = make(case).train()
    output = tokenizer(emoji(3))
    with torch.no_grad():
        found = tokenizer.eval().encode(emoji(3))
        assert all(torch.equal(a, b) for a, b in zip(output.tokens, found.tokens, strict=True))
        shown = tokenizer.decode(found.canvas)
    torch.testing.assert_close(output.reconstruction.detach().clamp(-1, 1), shown, rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(output.reconstruction.square().mean(), tokenizer.encoder.input.weight,
                                      retain_graph=True)
    assert float(gradient.abs().max()) > 0
    for loss in (output.commitment_loss, output.codebook_loss, output.entropy_loss):
        assert loss.shape == () and bool(loss.isfinite())
    if tokenizer.config.kind in ("bsq", "lfq", "l2-vq"):
        assert output.entropy_loss.item() != 0
        assert tokenizer.train()(emoji(3), entropy=False).entropy_loss.item() == 0


@pytest.mark.parametrize("case", CASES)
def test_quantisation_is_float32_whatever_the_precision_around_it(case: str) -> None:
    quantiser = make(case).train().quantiser
    torch.manual_seed(0)
    latent = torch.randn(4, quantiser.latent_width, 4, 4)
    plan = quantiser.config.plan

    def both() -> tuple[Any, Tensor]:
        found = quantiser.train_pass(latent, Canvas.empty(plan, quantiser, 4))
        return found, quantiser.quantise(latent)

    plain, plain_tokens = both()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_tokens = both()
        assert mixed.latent_BCHW.dtype == torch.float32
    assert torch.equal(plain_tokens, mixed_tokens)
    assert torch.equal(plain.latent_BCHW, mixed.latent_BCHW)
    assert all(torch.equal(a, b) for a, b in zip(plain.tokens, mixed.tokens, strict=True))
    for name in ("commitment_loss", "codebook_loss", "entropy_loss"):
        assert torch.equal(getattr(plain, name), getattr(mixed, name))


@pytest.mark.parametrize("case", BITWISE)
@torch.no_grad()
def test_bits_and_indices_name_the_same_codes(case: str) -> None:
    quantiser = make(case).quantiser
    bits = torch.rand(3, 5, quantiser.latent_width) < 0.5
    codes = quantiser.embed(bits)
    assert torch.equal(codes > 0, bits)
    size = quantiser.latent_width**-0.5 if quantiser.config.kind == "bsq" else 1.0
    torch.testing.assert_close(codes.abs(), torch.full_like(codes, size))
    assert torch.equal(quantiser.embed(codes), codes)
    if quantiser.latent_width <= 62:
        index = quantiser.to_index(bits)
        assert torch.equal(quantiser.to_bits(index), bits) and torch.equal(quantiser.embed(index), codes)
        everything = torch.arange(2**quantiser.latent_width)
        assert torch.equal(quantiser.to_index(quantiser.to_bits(everything)), everything)
        assert quantiser.to_index(torch.tensor([True] + [False] * 7)) == 128
    # Coding a code gives it back.
    map_BCHW = codes[:, :4].transpose(1, 2).reshape(3, -1, 2, 2)
    assert torch.equal(quantiser.embed(quantiser.quantise(map_BCHW)), codes[:, :4])


def test_spherical_codes_ignore_length_and_lie_on_the_sphere() -> None:
    quantiser = make("bsq one map").quantiser
    z = torch.randn(2, 8, 4, 4)
    assert torch.equal(quantiser.quantise(z), quantiser.quantise(7 * z))
    torch.testing.assert_close(quantiser.codes_VC().norm(dim=1), torch.ones(256))


def test_the_spherical_entropy_of_a_vector_is_that_of_a_softmax_over_all_codes() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    u_NC = F.normalize(0.02 * torch.randn(6, 8) + torch.eye(8)[:6], dim=1)
    mine = SphericalBits(TokenizerConfig(replace(AUTOENCODER, latent_width=8), ONE, kind="bsq"))
    theirs = library.LFQ(dim=8, codebook_size=256, spherical=True, codebook_scale=1.0).train()
    _, parts = theirs(u_NC[None], return_loss_breakdown=True)
    p_NV = torch.softmax(200 * u_NC @ mine.codes_VC().T, 1)
    torch.testing.assert_close(parts.per_sample_entropy, -(p_NV * p_NV.clamp_min(1e-30).log()).sum(1).mean(),
                               rtol=0, atol=1e-2)
    p_NC = p_NV @ (mine.codes_VC() > 0).float()
    of_mean = -(p_NC.mean(0) * p_NC.mean(0).log() + (1 - p_NC.mean(0)) * (1 - p_NC.mean(0)).log()).sum()
    found = mine.straight_through(u_NC, True).entropy_loss
    torch.testing.assert_close(found, -(p_NV * p_NV.clamp_min(1e-30).log()).sum(1).mean() - of_mean,
                               rtol=0, atol=1e-3)


def test_lookup_free_losses_are_the_formula_s() -> None:
    quantiser = make("lfq one map").train().quantiser
    torch.manual_seed(0)
    z_NC = 0.02 * torch.randn(20, 8)
    found = quantiser.straight_through(z_NC, True)
    p_NV = torch.softmax(200 * z_NC @ quantiser.codes_VC().T, 1)

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    # The library bounds logarithms at 1e-5.
    torch.testing.assert_close(found.entropy_loss, entropy(p_NV).mean() - entropy(p_NV.mean(0)), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.commitment_loss, (z_NC - torch.where(z_NC > 0, 1.0, -1.0)).square().mean())


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made under it, forwards or backwards."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)), 0)
        return found


def trained_elements(case: str, **changes: Any) -> float:
    """Elements of the largest tensor of a training pass, its losses' gradients and its record of usage, a row and
    bit."""
    tokenizer, pictures = make(case, **changes).train(), 3
    quantiser, plan = tokenizer.quantiser, tokenizer.plan
    latent = torch.randn(pictures, quantiser.latent_width, *plan.grid, requires_grad=True)
    with Largest() as largest:
        found = quantiser.train_pass(latent, Canvas.empty(plan, quantiser, pictures))
        (found.latent_BCHW.sum() + found.commitment_loss + found.entropy_loss + found.latent_loss).backward()
        for k, tokens in enumerate(found.tokens):
            quantiser.record_usage(k, tokens, 0.9)
        usage_metrics(quantiser)
    assert latent.grad is not None and bool(found.entropy_loss != 0)
    return largest.elements / (pictures * plan.length * quantiser.latent_width)


def test_sixty_four_bits_train_in_memory_of_rows_times_bits() -> None:
    assert trained_elements("bsq 64 bits") <= 2
    # LFQ's entropy is over all codes, so as many bits are refused.
    assert trained_elements("lfq scales", latent_width=10) > 2**10 / 10 / 2
    with pytest.raises(InputError, match=r"'lfq' with 64 bits would sum over 2\^64 codes"):
        make("lfq scales", tokens="bits", latent_width=64)


@torch.no_grad()
def test_finite_scalar_indices_are_digits_of_the_levels() -> None:
    levels = (8, 8, 8, 5, 5, 5)  # of the published Cosmos tokenizer, 64,000 codes
    quantiser = make("fsq", levels=levels, latent_width=6).quantiser
    assert quantiser.config.vocabulary == 64000
    codes = quantiser.codes_VC()
    digits = (codes * torch.tensor([4, 4, 4, 2, 2, 2]) + torch.tensor([4, 4, 4, 2, 2, 2])).round().long()
    basis = torch.tensor([1, 8, 64, 512, 2560, 12800])
    assert torch.equal((digits * basis).sum(1), torch.arange(64000))
    assert len(codes.unique(dim=0)) == 64000
    # Far inside a level's range, a vector is rounded to its code.
    middle = torch.zeros(1, 6, 1, 1)
    assert torch.equal(quantiser.embed(quantiser.quantise(middle))[0, 0, 3:], torch.zeros(3))


@torch.no_grad()
def test_the_nearest_normalised_code_is_the_one_of_the_largest_product() -> None:
    quantiser = make("l2-vq").quantiser
    z = torch.randn(2, 8, 4, 4)
    rows = F.normalize(z.flatten(2).transpose(1, 2), dim=-1)
    codes = F.normalize(quantiser.codebook.weight, dim=-1)
    assert torch.equal(quantiser.quantise(z), torch.cdist(rows, codes[None].expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(quantiser.embed(torch.arange(32)[None])[0], codes)


@pytest.mark.parametrize("case", ["vq scales", "l2-vq", "fsq", "bsq scales", "bsq 64 bits"])
def test_usage_and_perplexity_count_what_every_scale_uses(case: str) -> None:
    tokenizer = make(case)
    quantiser, scales = tokenizer.quantiser, len(tokenizer.plan)
    assert quantiser.usage().tolist() == [0.0] * scales
    if case == "bsq 64 bits":
        bits = torch.zeros(4, 16, 64, dtype=torch.bool)
        bits[:2, :, :3] = True
        quantiser.record_usage(0, bits, 0.9)
        assert float(quantiser.usage()[0]) == 3 / 64
        assert math.isclose(float(quantiser.perplexity()[0]), 8, rel_tol=1e-3)
        assert float(quantiser.perplexity()[1]) == 0
        assert quantiser.balance().tolist() == pytest.approx([3 / 64] + [0] * (scales - 1), abs=1e-4)
        return
    quantiser.record_usage(0, torch.tensor([[3, 4, 5, 6]]), 0.9)
    logged = {f"{name}_{k}" for name in ("usage", "perplexity") for k in range(scales)}
    if case == "bsq scales":  # of 8 bits two are set in half of these, one in 3 of 4
        assert quantiser.balance().tolist() == pytest.approx([2.8113 / 8] + [0] * (scales - 1), abs=1e-4)
        logged |= {f"balance_{k}" for k in range(scales)}
    assert usage_metrics(quantiser).keys() == logged
    assert math.isclose(float(quantiser.usage()[0]), 4 / tokenizer.config.vocabulary, rel_tol=1e-4)
    assert math.isclose(float(quantiser.perplexity()[0]), 4, rel_tol=1e-4)
    quantiser.record_usage(0, torch.full((1, 4000), 7), 0.0)
    assert math.isclose(float(quantiser.perplexity()[0]), 1, rel_tol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_survives_being_written_and_knows_its_bits(case: str) -> None:
    config = make(case).config
    assert build(TokenizerConfig, asdict(config)) == config
    assert math.isclose(config.bits, config.plan.length * math.log2(config.vocabulary))
    if config.kind in ("bsq", "lfq"):
        assert config.bits == config.plan.length * config.autoencoder.latent_width


@pytest.mark.parametrize("case", ["l2-vq", "bsq scales", "lfq scales", "fsq"])
def test_a_generator_runs_on_the_codes_of_any_kind(case: str) -> None:
    config = make(case).config
    torch.manual_seed(0)
    system = VAR(VARConfig(config, VARGeneratorConfig.of_depth(1, width=32, heads=2), (5,)))
    fill(system)
    tokens = system.encode(emoji(2))
    loss, _, _ = system.loss(tokens, labels(2), label_dropout=0.0)
    loss.backward()
    smooth = case == "bsq scales"  # mixes codes, so that tokens alone don't give the picture back
    drawn = system.eval().generate(1, 2, output="torch", progress=False, smooth=smooth)
    assert drawn.images.shape == (2, 3, 16, 16)
    assert [step.shape for step in drawn.tokens] == [(2, step.rows) for step in system.plan]
    with torch.no_grad():
        again = system.decode(drawn.tokens)
    assert torch.allclose(again, drawn.images, rtol=0, atol=1e-5) != smooth


@pytest.mark.parametrize("changes, message", [
    ({"kind": "fsq", "levels": (8,) * 8}, "single map"),
    ({"kind": "fsq", "grids": ONE}, "needs levels"), ({"kind": "bsq", "levels": (8,) * 8}, "levels are for"),
    ({"kind": "fsq", "grids": ONE, "levels": (8, 5)}, "give 8 of them"),
    ({"kind": "fsq", "grids": ONE, "levels": (2,) * 8}, "at least 3"),
    ({"kind": "lfq", "vocabulary": 1024}, "has 256 codes"), ({"kind": "bsq", "codebook_update": "ema"}, "ema"),
    ({"tokens": "bits"}, "indices only"), ({"codebook_decay": 1.0}, "below 1"), ({"vocabulary": 1}, "at least 2"),
    ({"kind": "bsq", "autoencoder": replace(AUTOENCODER, latent_width=64)}, "don't fit an index")])
def test_settings_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**{"autoencoder": AUTOENCODER, "grids": GRIDS, **changes})


def test_sizes_that_do_not_fit_each_other_are_refused() -> None:
    for changes, message in (({"width": 20}, "groups"), ({"encoder_blocks": 0}, "encoder_blocks"),
                             ({"latent_kernel": 0, "feature_width": 16}, "latent_kernel"),
                             ({"multipliers": ()}, "multipliers")):
        with pytest.raises(InputError, match=message):
            replace(AUTOENCODER, **changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at most 18"):
        make("lfq one map", latent_width=19)
    with pytest.raises(InputError, match="single map"):
        make("fsq").encode(emoji(1), Plan.scales([1, 4]))
    with pytest.raises(InputError, match="too many"):
        make("bsq 64 bits").quantiser.codes_VC()
