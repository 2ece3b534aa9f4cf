"""Infinity: bits that come back, one pass and the loop alike at every shape, repaired flips, guidance behind a block,
published names."""
from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import emoji, fill
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.conditions.text import TextCondition
from nextscale.conditions.text_features import TextFeatures
from nextscale.data.images import to_pil
from nextscale.errors import InputError, WeightsError
from nextscale.generators.infinity import RATIOS, InfinityGeneratorConfig, nearest_ratio
from nextscale.layers.resize import resize
from nextscale.objectives.self_correction import SelfCorrection, corrupted
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.plan import Plan
from nextscale.run import conditions
from nextscale.systems import folders
from nextscale.systems.infinity import (
    BUDGETS,
    SIZES,
    GuidedBlock,
    Infinity,
    InfinityConfig,
    InfinitySettings,
    preset_config,
)
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.generator import GeneratorTask

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE = ((1, 1), (1, 2), (2, 3), (3, 5))
TEXT_WIDTH, LONGEST = 24, 9


class LettersEncoder:
    """A text encoder without weights: a word's features hang on its letters alone."""

    name, width, pooled_width = "letters", TEXT_WIDTH, 0

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        return TextFeatures.pack([torch.stack([self.word(w) for w in [*prompt.split(), "."][:LONGEST]])
                                  for prompt in prompts])

    @staticmethod
    def word(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def tiny(grids: tuple[tuple[int, int], ...] = GRIDS, patch: int = 1, bits: int = 6, depth: int = 3, seed: int = 0,
         strength: float = 0.3) -> Infinity:
    sizes = AutoencoderConfig(32, (1, 2) if patch == 2 else (1, 1, 2), 1, 1, bits, 32, "none", latent_kernel=0)
    config = InfinityConfig(
        TokenizerConfig(sizes, grids, kind="bsq", tokens="bits", patch=patch),
        InfinityGeneratorConfig(depth, 48, 3, text_width=TEXT_WIDTH, longest_text=LONGEST, pool_heads=2, frame=4,
                                drop_path=0.0),
        {"pictures": InfinitySettings(3.0), "fid": InfinitySettings(2.0)}, SelfCorrection(strength))
    system = Infinity(config).eval()
    fill(system, seed)
    system.encoder = LettersEncoder()
    return system


PROMPTS = ["a red apple", "sun"]


def picture_of(system: Infinity, count: int = 2, grids: tuple[tuple[int, int], ...] | None = None) -> Tensor:
    h, w = (grids or system.plan.grids)[-1]
    factor = system.config.tokenizer.factor
    return resize(emoji(count, 16), (h * factor, w * factor), "bilinear")


@pytest.mark.parametrize("patch", [1, 2])
def test_bits_come_back_from_codes_of_unit_length(patch: int) -> None:
    system = tiny(patch=patch)
    quantiser, cells = system.tokenizer.quantiser, patch**2
    bits = torch.rand(2, 16, 6 * cells) < 0.5
    codes = quantiser.embed(bits)
    assert torch.equal(quantiser.quantise(codes.transpose(1, 2).unflatten(2, (4, 4))), bits)
    torch.testing.assert_close(codes.unflatten(-1, (-1, cells)).norm(dim=-2), torch.ones(2, 16, cells))
    tokens = system.encode(picture_of(system))
    whole = system.tokenizer.encode(picture_of(system)).canvas.value
    again = pyramid.replay(tokens, Canvas.empty(system.plan, quantiser, 2)).canvas.value
    torch.testing.assert_close(again, whole, atol=1e-6, rtol=0)
    assert system.decode(tokens).shape == (2, 3, 16, 16)


def test_a_patch_of_a_folded_latent_holds_its_cells_in_the_published_order() -> None:
    quantiser = tiny(patch=2).tokenizer.quantiser
    latent = torch.arange(6 * 8 * 8.).view(1, 6, 8, 8)
    folded = quantiser.fold(latent)
    for channel, y, x in ((0, 0, 0), (3, 1, 0), (5, 1, 1)):
        assert torch.equal(folded[0, channel * 4 + y * 2 + x], latent[0, channel, y::2, x::2])
    torch.testing.assert_close(quantiser.resize(folded, (2, 2), "area"), quantiser.fold(resize(latent, (4, 4), "area")))


@pytest.mark.parametrize("grids, patch", [(GRIDS, 1), (WIDE, 1), (GRIDS, 2), (WIDE, 2)])
def test_the_loop_gives_bits_the_probability_that_one_pass_gives_them(grids: tuple[tuple[int, int], ...],
                                                                      patch: int) -> None:
    system = tiny(patch=patch)
    rows = system.prompts(PROMPTS, negative="blue")
    drawn = system.generate(rows, seed=3, output="torch", schedule=grids, top_p=None)
    assert [tuple(t.shape) for t in drawn.tokens] == [(2, h * w, 6 * patch**2) for h, w in grids]
    used = system.settings_for("pictures", {})
    scored = system.log_prob(drawn.tokens, rows, system.guidance(used), schedule=grids)
    torch.testing.assert_close(scored.picture, drawn.log_prob, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("patch", [1, 2])
def test_what_a_scale_is_given_reaches_no_earlier_scale(patch: int) -> None:
    system, plan = tiny(patch=patch), Plan.scales(WIDE)
    reads = pyramid.replay(system.encode(picture_of(system, grids=WIDE), WIDE),
                           Canvas.empty(plan, system.tokenizer.quantiser, 2)).reads
    cond = conditions(system.condition(system.label_rows(PROMPTS)), ("conditional",))
    with torch.no_grad():
        before = teacher_forced(system.generator, plan, reads, cond)
        reads[2] = reads[2] + 1  # type: ignore[operator]
        after = teacher_forced(system.generator, plan, reads, cond)
    start = plan.starts[2]
    assert torch.equal(before[:, :start], after[:, :start])
    assert bool((before[:, start:] != after[:, start:]).any(-1).all())


def test_places_are_those_of_the_largest_grid_whatever_size_is_drawn() -> None:
    system = tiny()
    published = Infinity(replace(system.config, generator=replace(system.config.generator, frame=0)))
    attention = published.generator.blocks[0].attention
    for ratio, scale in ((1.0, 6), (0.5, 5), (1.333, 4)):
        plan = Plan.scales(RATIOS[ratio][:scale + 1])
        run = system.start(system.label_rows("a"), system.guidance(system.settings_for("pictures", {})), None, plan)
        rows = run.rows(scale, scale + 1)
        (h, w), (tall, wide) = plan.grids[scale], RATIOS[ratio][-1]
        place = attention.places(plan, rows)[0].view(h, w, 2)
        assert place[h - 1, 0, 0] == round((h - 1) * tall / h) and place[0, w - 1, 1] == round((w - 1) * wide / w)


# Bitwise self-correction

def test_no_flips_are_teacher_forcing() -> None:
    system = tiny()
    latent = system.tokenizer.latent(picture_of(system))
    canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, 2)
    plain = system.tokenizer.encode(picture_of(system))
    found = corrupted(system.tokenizer.quantiser, latent, canvas, SelfCorrection(0.0))
    for ours, theirs in zip([*found.tokens, *found.reads[1:]], [*plain.tokens, *plain.reads[1:]], strict=True):
        assert torch.equal(ours, theirs)


def test_labels_say_what_repairs_the_flips() -> None:
    system, flipped = tiny(bits=16), []
    quantiser, latent = system.tokenizer.quantiser, system.tokenizer.latent(picture_of(system, 8))
    canvas, corrupt = Canvas.empty(system.plan, quantiser, 8), SelfCorrection(0.4)
    torch.manual_seed(1)

    def keep(step: int, bits: Tensor) -> Tensor:
        flipped.append(corrupt(step, bits))
        return flipped[-1]

    found = corrupted(quantiser, latent, canvas, keep)
    assert torch.equal(found.tokens[0], system.encode(picture_of(system, 8))[0])
    assert not torch.equal(flipped[-1], found.tokens[-1])
    # An independent loop from what was written: each scale's label is the sign of what is missing.
    total = torch.zeros_like(latent)
    for k, (h, w) in enumerate(system.plan.grids):
        missing = torch.nn.functional.adaptive_avg_pool2d(latent - total, (h, w))
        assert torch.equal(found.tokens[k], missing.flatten(2).transpose(1, 2) > 0)
        code = (flipped[k].float() * 2 - 1).transpose(1, 2).unflatten(2, (h, w)) / 16**0.5
        total = total + torch.nn.functional.interpolate(code, system.plan.grid, mode="bilinear")
    torch.testing.assert_close(found.canvas.value, total, atol=1e-6, rtol=0)


def test_bits_flip_as_often_as_was_drawn() -> None:
    torch.manual_seed(0)
    bits = torch.zeros(64, 100, 8, dtype=torch.bool)
    rates = [float(SelfCorrection(0.3)(0, bits).float().mean()) for _ in range(40)]
    allowed = torch.arange(31) / 100
    sigma = (0.3 * 0.7 / bits.numel()) ** 0.5
    assert all(float((allowed - rate).abs().min()) < 3 * sigma for rate in rates)
    assert len({round(rate, 2) for rate in rates}) > 10
    assert torch.equal(SelfCorrection(0.3, scales=2)(2, bits), bits)
    with pytest.raises(InputError, match=r"strength 1\.5"):
        SelfCorrection(1.5)


def test_training_learns_to_repair_and_needs_the_whole_latent() -> None:
    torch.manual_seed(0)
    system = tiny().train()
    system.initialise()
    tokens = system.encode(picture_of(system, 8))
    features = system.features(["apple", "sun", "sun", "leaf"] * 2)
    wanted = [p for m in (system.generator, system.head, system.text) for p in m.parameters()]
    optimiser, found = torch.optim.AdamW(wanted, lr=6e-3), []
    for _ in range(20):
        loss, by_step, right = system.loss(tokens, features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[0] == pytest.approx(0.693, abs=0.02)  # of a head that knows nothing: log 2 a bit
    assert sum(found[-3:]) < 0.97 * sum(found[:3])
    assert by_step.shape == right.shape == (4,)
    assert all(p.grad is not None for p in wanted)
    with pytest.raises(InputError, match="cache latents"):
        system.loss(tokens[:2], features)
    system.loss(tokens[:2], features, latent=system.tokenizer.latent(picture_of(system, 8)))


def test_self_correction_goes_on_behind_a_sample_sheet() -> None:
    system = tiny()
    tokens, features = system.encode(picture_of(system, 8)), system.features(["sun"] * 8)
    latent = system.tokenizer.latent(picture_of(system, 8))
    system.eval()  # as drawing a sheet leaves the system; the trainer wakes the trained parts alone
    found = []
    for part_trains in (False, True):
        system.generator.train(part_trains)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(system.loss(tokens, features, label_dropout=0.0, latent=latent)[1])
    assert found[0][0] == found[1][0] and not torch.equal(found[0][1:], found[1][1:])


def test_products_of_the_text_decay_and_vectors_do_not() -> None:
    system = tiny()
    task = GeneratorTask(system)
    decayed, plain = ({id(p) for p in group["params"]} for group in task.parameter_groups("main", 0.1))
    text = system.text
    body, block = system.generator, system.generator.blocks[0]
    assert {id(p) for p in (text.expand.weight, text.pool.kv.weight, block.text.query.weight)} <= decayed
    assert {id(p) for p in (text.null, text.pool.query, text.norm.weight, body.level.weight, body.start,
                            block.modulation_offset, block.text.v_bias)} <= plain


# Guidance

def test_guidance_of_one_draws_what_no_guidance_draws() -> None:
    system = tiny()
    alone = system.generate(PROMPTS, seed=5, output="torch", guidance_scale=1.0)
    doubled = system.generate(PROMPTS, seed=5, output="torch", guidance_scale=1.0, guidance_after=0,
                              hooks=[], guidance=_doubled())
    behind = system.generate(PROMPTS, seed=5, output="torch", guidance=_doubled(), hooks=[GuidedBlock(1, 1.0)])
    for other in (doubled, behind):
        assert all(torch.equal(a, b) for a, b in zip(alone.tokens, other.tokens, strict=True))
    guided = system.generate(PROMPTS, seed=5, output="torch", guidance_scale=4.0)
    assert not all(torch.equal(a, b) for a, b in zip(alone.tokens, guided.tokens, strict=True))


def _doubled() -> object:
    from nextscale.sampling.guidance import Unguided

    return Unguided(("conditional", "unconditional"))


def test_guidance_behind_the_last_block_is_guidance_of_the_hidden_states() -> None:
    system = tiny()
    seen: list[Tensor] = []
    handle = system.generator.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    system.generate(PROMPTS, seed=5, output="torch", guidance_after=1)
    handle.remove()
    after = system.generate(PROMPTS, seed=5, output="torch", guidance_after=1)
    plain = system.generate(PROMPTS, seed=5, output="torch")
    assert len(seen) == len(system.plan)
    assert not all(torch.equal(a, b) for a, b in zip(after.tokens, plain.tokens, strict=True))
    with pytest.raises(InputError, match="this model has 3 blocks"):
        system.generate(PROMPTS, guidance_after=4)


def test_without_a_prompt_there_are_as_many_learned_rows_as_the_prompt_has_tokens() -> None:
    system = tiny()
    features = system.features(PROMPTS)
    none = TextCondition(system.text, features).branch("unconditional")
    wanted = system.text(TextFeatures(system.text.null[:4].expand(2, -1, -1), features.valid))
    assert features.valid.sum(1).tolist() == [4, 2]
    assert torch.equal(none.vector, wanted.vector) and torch.equal(none.valid, features.valid)
    with pytest.raises(InputError, match="no branch 'other'"):
        TextCondition(system.text, features).branch("other")


# Prompts

def test_a_picture_hangs_on_its_own_prompt_alone() -> None:
    system = tiny()
    together = system.generate(["sun", "a red apple on a table", "leaf"], seed=7, output="torch")
    alone = system.generate("a red apple on a table", seed=8, output="torch")
    assert all(torch.equal(a[1:2], b) for a, b in zip(together.tokens, alone.tokens, strict=True))
    assert together.labels == ["sun", "a red apple on a table", "leaf"]
    other = system.generate("a green apple on a table", seed=8, output="torch")
    assert not all(torch.equal(a, b) for a, b in zip(alone.tokens, other.tokens, strict=True))


def test_negative_prompts_may_be_longer_than_prompts() -> None:
    system = tiny()
    plain = system.generate("sun", seed=1, output="torch")
    away = system.generate(system.prompts("sun", "a very long blurry thing"), seed=1, output="torch")
    assert not all(torch.equal(a, b) for a, b in zip(plain.tokens, away.tokens, strict=True))
    with pytest.raises(InputError, match="2 negative prompts were given for 1"):
        system.prompts("sun", ["a", "b"])


def test_prompts_that_are_none_are_refused_in_one_line() -> None:
    system = tiny()
    for prompts, message in (([], "no prompts"), ([3], "3 is no text"), (["a", "b"], "2 prompts were given for 3")):
        with pytest.raises(InputError, match=message):
            system.generate(prompts, 3 if len(prompts) == 2 else None)  # type: ignore[arg-type]
    system.encoder, system.config = None, replace(system.config, encoder="t5")
    with pytest.raises(InputError, match="'t5' needs its weights"):
        system.generate("sun")
    wide = TextFeatures.pack([torch.zeros(2, 7)])
    with pytest.raises(InputError, match="7 wide, this model takes 24"):
        system.generate(wide)
    with pytest.raises(InputError, match="12 tokens, this model takes 9"):
        system.generate(TextFeatures.pack([torch.zeros(12, TEXT_WIDTH)]))


def test_pictures_stream_and_are_edited_from_prompts() -> None:
    system = tiny()
    drawn = system.generate("sun", seed=2, output="torch")
    last = list(system.stream("sun", seed=2, output="torch"))[-1]
    assert torch.equal(last.images, drawn.images)
    picture = picture_of(system, 1)
    redraw = torch.zeros(1, 16, 16, dtype=torch.bool)
    kept = system.edit(picture, redraw, "sun", output="torch")
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, system.encode(picture), strict=True))


@pytest.mark.parametrize("patch", [1, 2])
def test_other_shapes_stream_and_are_edited_and_enlarged(patch: int) -> None:
    system, asked = tiny(patch=patch), {"seed": 2, "output": "torch"}
    given = {**asked, "ratio": 2.0, "negative_prompt": "blue"}
    drawn, last = system.generate("sun", **given), list(system.stream("sun", **given))[-1]
    assert drawn.images.shape == (1, 3, 12, 24) and torch.equal(last.images, drawn.images)
    picture, redraw = picture_of(system, 1, WIDE), torch.zeros(1, 12, 20, dtype=torch.bool)
    own = system.encode(picture, WIDE)
    kept = system.edit(picture, redraw, "sun", schedule=WIDE, **asked)
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, own, strict=True))
    redraw[:, :, :8] = True
    known = torch.arange(15).view(3, 5)[:, 2:].flatten()
    found = [system.edit(picture, redraw, "sun", schedule=WIDE, **asked, **more).tokens[-1]
             for more in ({}, {"negative_prompt": "blue"})]
    assert all(torch.equal(tokens[:, known], own[-1][:, known]) for tokens in found)
    assert not torch.equal(found[0], own[-1]) and not torch.equal(*found)
    latent = system.edit(picture, redraw, "sun", schedule=WIDE, rule="latent", **asked)
    assert latent.images.shape == picture.shape
    large = system.enlarge(picture[..., ::2, ::2], "sun", scales=2, **given)
    whole = resize(picture[..., ::2, ::2], (12, 24), "bicubic").clamp(-1, 1)
    for k, coarse in enumerate(system.encode(whole, system.schedule_of_ratio(0.5))):
        assert torch.equal(large.tokens[k], coarse) == (k < 2)
    for more, message in (({}, "edits 16x16 pixels, got"), ({"ratio": 2.0}, "edits 12x24 pixels by this schedule, got"),
                          ({"ratio": 2.0, "schedule": WIDE}, "give one")):
        with pytest.raises(InputError, match=message):
            system.edit(picture, redraw, "sun", **more)


def test_an_empty_prompt_is_said_and_none_is_not(caplog: pytest.LogCaptureFixture) -> None:
    system = tiny()
    with caplog.at_level(logging.WARNING, "nextscale"):
        said = system.generate(["sun", " "], seed=1, output="torch")
    assert "1 of 2 prompts is empty" in caplog.text
    caplog.clear()
    none = system.generate(["sun", None], seed=1, output="torch")
    assert not caplog.text and torch.equal(said.images[0], none.images[0])


# Sizes and schedules

def test_sizes_and_ratios_give_published_schedules(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        system = Infinity(preset_config("infinity-125m-0.25M"))
    assert system.schedule_for((512, 512)) is None
    assert system.schedule_for((1024, 1024)) == RATIOS[1.0]
    assert system.schedule_for((36 * 16, 18 * 16 + 16 * 9)) is not None
    assert tuple(system.schedule_of_ratio(0.5)) == RATIOS[0.5][:10]
    with caplog.at_level(logging.WARNING, "nextscale"):
        assert tuple(system.schedule_of_ratio(0.72)) == RATIOS[0.75][:10]
    assert "the nearest that there is is 0.75" in caplog.text
    with pytest.raises(InputError, match="multiples of 16"):
        system.schedule_for((100, 128))
    with pytest.raises(InputError, match="longer than the 15 levels"):
        system.plan_of([(1, 1)] * 16)
    with pytest.raises(InputError, match="starts with one cell"):
        system.plan_of([(2, 2), (4, 4)])


def test_published_schedules_are_complete() -> None:
    lengths = [sum(h * w for h, w in RATIOS[1.0][:scales]) for scales in BUDGETS.values()]
    assert lengths == [521, 2521, 6425, 10521]
    assert len(RATIOS) == 15 and all(len(grids) == 13 for grids in RATIOS.values())
    for ratio, grids in RATIOS.items():
        h, w = grids[-1]
        assert nearest_ratio(h / w) == ratio
        assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(grids))


# Published weights

PARAMETERS = {"125m": 125_185_696, "361m": 361_633_792, "940m": 940_944_832, "2.2b": 2_256_694_912,
              "4.7b": 4_716_421_888, "8.7b": 8_767_198_528, "2b": 2_204_564_032, "8b": 8_375_791_824,
              "20b": 19_952_199_784}


def published(depth: int, width: int, heads: int, inner: int, bits: int, chunks: int) -> dict[str, Tensor]:
    block = {"ada_gss": (1, 1, 6, width), "sa.scale_mul_1H11": (1, heads, 1, 1), "sa.q_bias": (width,),
             "sa.v_bias": (width,), "sa.zero_k_bias": (width,), "sa.mat_qkv.weight": (3 * width, width),
             "sa.proj.weight": (width, width), "sa.proj.bias": (width,), "ca.mat_q.weight": (width, width),
             "ca.mat_q.bias": (width,), "ca.mat_kv.weight": (2 * width, width), "ca.v_bias": (width,),
             "ca.zero_k_bias": (width,), "ca.proj.weight": (width, width), "ca.proj.bias": (width,),
             "ca_norm.weight": (width,), "ca_norm.bias": (width,), "ffn.fc1.weight": (inner, width),
             "ffn.fc1.bias": (inner,), "ffn.fc2.weight": (width, inner), "ffn.fc2.bias": (width,)}
    each = depth // chunks
    names = [f"block_chunks.{i // each}.module.{i % each}" if chunks > 1 else f"blocks.{i}" for i in range(depth)]
    pool = 2048 // (64 if width > 4096 else 128)
    shapes = {f"{name}.{key}": shape for name in names for key, shape in block.items()}
    shapes |= {"cfg_uncond": (512, 2048), "text_norm.weight": (2048,), "pos_start": (1, 1, width),
               "text_proj_for_sos.ca.mat_q": (1, pool, width // pool),
               "text_proj_for_sos.ca.mat_kv.weight": (2 * width, 2048), "text_proj_for_sos.ca.v_bias": (width,),
               "text_proj_for_sos.ca.zero_k_bias": (width,), "text_proj_for_sos.ca.proj.weight": (width, width),
               "text_proj_for_sos.ca.proj.bias": (width,), "text_proj_for_ca.0.weight": (width, 2048),
               "text_proj_for_ca.0.bias": (width,), "text_proj_for_ca.2.weight": (width, width),
               "text_proj_for_ca.2.bias": (width,), "lvl_embed.weight": (15, width),
               "word_embed.weight": (width, bits), "word_embed.bias": (width,),
               "shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,),
               "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
               "head.weight": (2 * bits, width), "head.bias": (2 * bits,), "lvl_1L": (1, 10521),
               "attn_bias_for_masking": (1, 1, 8, 8)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_parameters_and_names(size: str) -> None:
    config = preset_config(f"infinity-{size}")
    with torch.device("meta"):
        system = Infinity(config)
    parts = [p for part in (system.generator, system.head, system.text) for p in part.parameters()]
    assert sum(p.numel() for p in parts) == PARAMETERS[size]
    sizes, bits = config.generator, system.head.bits
    assert sum(p.numel() for p in system.head.parameters()) == 2 * bits * (sizes.width + 1)
    inner = round(sizes.width * sizes.mlp_ratio)
    chunks = {"2b": 8, "8b": 8}.get(size, 1)
    tensors = published(sizes.depth, sizes.width, sizes.heads, inner, bits, chunks)
    folders.load_published(system, generator=tensors)
    for missing in ("cfg_uncond", "head.weight"):
        with pytest.raises(WeightsError, match="missing"):
            folders.load_published(system, generator={k: v for k, v in tensors.items() if k != missing})
    with pytest.raises(WeightsError, match="unknown: extra"):
        folders.load_published(system, generator={**tensors, "extra": tensors["head.bias"]})


def test_files_of_other_kernels_and_other_text_lengths_load() -> None:
    system = tiny()
    sizes = system.config.generator
    names = published(3, 48, 3, round(48 * sizes.mlp_ratio), 6, 3)
    tensors = {k: torch.randn(v.shape) for k, v in names.items()}
    for key, shape in {"cfg_uncond": (6, TEXT_WIDTH), "text_norm.weight": (TEXT_WIDTH,),
                       "text_proj_for_sos.ca.mat_q": (1, 2, 24), "text_proj_for_sos.ca.mat_kv.weight": (96, TEXT_WIDTH),
                       "text_proj_for_ca.0.weight": (48, TEXT_WIDTH)}.items():
        tensors[key] = torch.randn(shape)
    tensors["block_chunks.1.module.0.sa.scale_mul_1H11"] = torch.randn(1, 1, 3, 1)  # the custom kernel's shape
    kept = system.text.null[6:].clone()
    folders.load_published(system, generator=tensors)
    assert torch.equal(system.text.null[:6], tensors["cfg_uncond"]) and torch.equal(system.text.null[6:], kept)
    assert torch.equal(system.generator.blocks[1].attention.scale_1H11.flatten(),
                       tensors["block_chunks.1.module.0.sa.scale_mul_1H11"].flatten())


def test_models_are_saved_and_found_again(tmp_path: Path) -> None:
    system, folder = tiny(patch=2), tmp_path / "model"
    folders.save(system, folder, torch.float32)
    again = folders.load(folder)
    assert isinstance(again, Infinity) and again.config == system.config
    again.encoder = LettersEncoder()
    one, other = (each.generate("sun", seed=4, output="torch") for each in (system, again))
    assert torch.equal(one.images, other.images)


def test_only_bits_make_an_infinity() -> None:
    with pytest.raises(InputError, match="Infinity predicts bits"):
        InfinityConfig(TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "none"), GRIDS))
    with pytest.raises(InputError, match="unknown Infinity size 'infinity-3b'"):
        preset_config("infinity-3b")
    with pytest.raises(InputError, match="bits are booleans"):
        tiny().decode([torch.zeros(1, 1, 6)])


# From pictures and captions to drawn prompts, by commands

TOKENIZER = """
perceptual = "none"
[data]
spec = "pictures"
size = 16
held_out = 0
[tokenizer.model]
kind = "bsq"
tokens = "bits"
grids = [[1, 1], [2, 2], [4, 4]]
[tokenizer.model.autoencoder]
width = 32
multipliers = [1, 1, 2]
encoder_blocks = 1
decoder_blocks = 1
latent_width = 6
attention = "none"
[train]
steps = 2
batch_size = 4
sample_every = 0
checkpoint_every = 2
"""
GENERATOR = """
system = "infinity"
tokenizer = "tokenizer/tokenizer"
step_weights = "root"
[data]
spec = "pictures"
size = 16
held_out = 4
[generator]
depth = 2
width = 48
heads = 3
frame = 4
[text.words]
width = 32
depth = 1
heads = 2
buckets = 64
bucket_width = 16
max_tokens = 12
[train]
steps = 3
batch_size = 4
sample_every = 3
checkpoint_every = 3
"""


def test_a_text_model_is_trained_on_captions_and_draws_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i, picture in enumerate(emoji(40, 16)):
        to_pil(picture).save(f"pictures/{i}.png")
        Path(f"pictures/{i}.txt").write_text(f"drawing number {i}")
    Path("tokenizer.toml").write_text(TOKENIZER)
    Path("generator.toml").write_text(GENERATOR)
    assert main.run(["train", "tokenizer", "--recipe", "tokenizer.toml", "--out", "tokenizer"]) == 0
    assert main.run(["train", "generator", "--recipe", "generator.toml", "--out", "run"]) == 0
    assert list(Path("run").glob("samples*/*.png")) or list(Path("run").rglob("samples-*.png"))
    draw = ["generate", "--model", "run/model", "--out"]
    assert main.run([*draw, "two.png", "a red apple", "a sleeping cat", "--negative", "blue", "--seed", "3"]) == 0
    Path("prompts.jsonl").write_text('{"prompt": "a red apple", "ratio": "2:1", "seed": 5}\n{"prompt": "sun"}\n')
    assert main.run([*draw, "folder", "--prompts", "prompts.jsonl"]) == 0
    sizes = {Image.open(file).size for file in Path("folder").glob("0*.png")}
    assert len(list(Path("folder").glob("0*.png"))) == 2 and (16, 16) in sizes and len(sizes) == 2
    assert next(w / h for w, h in sizes if w != h) > 1.4
    capsys.readouterr()
    for arguments, message in ((["x.png"], "what to draw is missing"), (["x.png", "sun", "--label", "3"], "--label"),
                               (["x.png", "--prompts", "prompts.jsonl"], "2 aspect ratios"),
                               (["x.png", "sun", "--ratio", "wide"], "ratio is 'wide'")):
        assert main.run([*draw, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main.run(["generate", "a red apple", "--model", "var-d2-16px", "--out", "x.png"]) == 2
    assert "takes no prompts" in capsys.readouterr().err
    again = nextscale.load("run/model")
    drawn = again.generate("a red apple", seed=3, guidance_scale=2.0, ratio=2.0)
    assert len(drawn.images) == 1 and drawn.images[0].width > drawn.images[0].height


def published_tokenizer(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A bitwise tokenizer's weights under their published names, each convolution and norm wrapped once more."""
    ends = {"norm_in": "norm1.norm", "conv_in": "conv1.conv", "norm_out": "norm2.norm", "conv_out": "conv2.conv",
            "shortcut": "nin_shortcut.conv", "input": "conv_in.conv", "norm": "norm_out.norm",
            "output": "conv_out.conv"}
    found = {}
    for name, tensor in tokenizer.state_dict().items():
        if not name.startswith(("encoder.", "decoder.")):
            continue
        side, *path, layer, kind = name.split(".")
        way = "down" if side == "encoder" else "up"
        if path[:1] == ["middle"]:
            middle = f"mid.block_{1 if path[1] == 'block_in' else 2}.{ends[layer]}"
        elif path[:1] == ["levels"]:
            middle = f"{way}.{path[1]}." + (f"block.{path[3]}.{ends[layer]}" if path[2] == "blocks"
                                            else f"{way}sample.conv.conv")
        else:
            middle = ends[layer]
        found[f"{side}.{middle}.{kind}"] = tensor
    return {**found, "quantizer.lfq.mask": torch.ones(tokenizer.config.latent_width)}


def published_network(system: Infinity, chunks: int) -> dict[str, Tensor]:
    """An Infinity's weights under their published names, by the name map read backwards."""
    from nextscale.hub import rename
    from nextscale.systems.infinity import GENERATOR_NAMES

    sizes = system.config.generator
    inner = round(sizes.width * sizes.mlp_ratio)
    own = {name: tensor for part in system.transformer_parts
           for name, tensor in getattr(system, part).state_dict(prefix=f"{part}.").items()}
    found = {}
    for theirs in published(sizes.depth, sizes.width, sizes.heads, inner, system.head.bits, chunks):
        match = re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.(.*)", theirs)
        in_line = f"blocks.{int(match[1]) * (sizes.depth // chunks) + int(match[2])}.{match[3]}" if match else theirs
        ours = next(iter(rename({in_line: torch.zeros(1)}, GENERATOR_NAMES)[0]), None)
        found[theirs] = torch.zeros(3) if ours is None else own[ours]
    return found


@pytest.mark.parametrize("name, patch", [("infinity-2b", 1), ("infinity-8b", 2)])
def test_released_models_load_by_name_from_files_and_folders_of_shards(
        name: str, patch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both released layouts, at tiny size: 2b in one file, 8b in a folder of shards, as they are on the hub."""
    system, settings = tiny(patch=patch, depth=4), preset_config(name).settings
    config = replace(system.config, settings=settings)
    monkeypatch.setattr("nextscale.systems.infinity.preset_config", lambda asked: {name: config}[asked])
    tokenizer, network = {"vae": published_tokenizer(system.tokenizer)}, published_network(system, 2)
    assert sum(key.startswith("block_chunks.1.module.1.") for key in network) == 21
    torch.save(tokenizer, tmp_path / "vae.pth")
    if name == "infinity-2b":
        weights = tmp_path / "infinity_2b_reg.pth"
        torch.save(network, weights)
    else:
        weights, half = tmp_path / "infinity_8b_weights", len(network) // 2
        weights.mkdir()
        files = {}
        for i, keys in enumerate((list(network)[:half], list(network)[half:])):
            torch.save({key: network[key].clone() for key in keys}, weights / f"pytorch_model-0000{i}.bin")
            files |= dict.fromkeys(keys, f"pytorch_model-0000{i}.bin")
        (weights / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    drawn = torch.get_rng_state()
    loaded = nextscale.load(name, tokenizer=str(tmp_path / "vae.pth"), generator=str(weights), device="cpu")
    assert torch.equal(torch.get_rng_state(), drawn)  # of 8 billion weights, to be thrown away
    for key, value in system.state_dict().items():
        if not key.startswith("tokenizer.quantiser."):
            assert torch.equal(value, loaded.state_dict()[key]), key
    convert = ["convert", name, "--tokenizer", str(tmp_path / "vae.pth"), "--weights", str(weights), "--out"]
    assert main.run([*convert, str(tmp_path / "model")]) == 0
    again = nextscale.load(str(tmp_path / "model"), device="cpu")
    again.encoder = loaded.encoder = LettersEncoder()
    one, other = (each.generate("sun", seed=4, output="torch") for each in (loaded, again))
    assert torch.equal(one.images, other.images) and one.settings == settings["pictures"]
