"""FlexVAR: any schedule from one set of weights, whole drafts, the published sampler's rules, training."""
from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from published_shapes import on_meta, vq_16
from tiny import emoji, fill, labels, tiny_var

import nextscale
from nextscale.cli import main
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.reconstruction import after_each_scale
from nextscale.generators.flexvar import FlexVARGeneratorConfig
from nextscale.layers.resize import resize
from nextscale.run import At
from nextscale.sampling.guidance import Unguided
from nextscale.systems import folders
from nextscale.systems.flexvar import (
    LISTED,
    STEPS,
    STEPS_512,
    FlexVAR,
    FlexVARConfig,
    FlexVARGuidance,
    FlexVARSettings,
    GreedyUnlisted,
    draw_steps,
    preset_config,
)
from nextscale.systems.flexvar import published_config as flexvar_config
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.distributed import settle
from nextscale.training.generator import GeneratorTask
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask

SIDES = (1, 2, 3, 4)
SCHEDULES = [SIDES, (1, 2, 4), (1, 3, 4, 6), ((1, 1), (2, 3), (4, 6)), ((1, 1), (5, 2)), (4,), ((2, 3), (4, 4))]


def grids(sides: tuple) -> list[tuple[int, int]]:
    return [side if isinstance(side, tuple) else (side, side) for side in sides]


def tiny(sides: tuple[int, ...] = SIDES, **settings: object) -> FlexVAR:
    tokenizer = TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle", latent_kernel=1),
                                tuple(grids(sides)), 32, kind="l2-vq")
    network = FlexVARGeneratorConfig(2, 48, 3, table=8)
    system = FlexVAR(FlexVARConfig(tokenizer, network, (5,), settings={
        "pictures": FlexVARSettings(2.0, top_k=20, **settings)})).eval()  # type: ignore[arg-type]
    fill(system)
    return system


@pytest.mark.parametrize("sides", SCHEDULES, ids=str)
def test_one_set_of_weights_follows_any_schedule_and_one_call_equals_the_loop(sides: tuple) -> None:
    system, schedule = tiny(greedy_unlisted=False), grids(sides)
    drawn = system.generate([1, 4], seed=3, schedule=schedule, output="torch", guidance=Unguided(), top_k=None,
                            progress=False)
    h, w = schedule[-1]
    assert drawn.images.shape == (2, 3, 4 * h, 4 * w)
    assert [step.shape[1] for step in drawn.tokens] == [h * w for h, w in schedule]
    scored = system.log_prob(drawn.tokens, [1, 4], schedule=schedule)
    torch.testing.assert_close(scored.picture, drawn.log_prob, rtol=1e-4, atol=1e-3)


def test_a_model_whose_own_schedule_starts_larger_may_start_at_one_cell() -> None:
    drawn = tiny((2, 4)).generate([1], schedule=grids((1, 3)), output="torch", progress=False)
    assert drawn.images.shape == (1, 3, 12, 12)


def test_the_picture_hangs_on_the_last_scale_alone() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    others = [step.flip(1).add(1).remainder(32) for step in tokens[:-1]]
    assert torch.equal(system.decode([*others, tokens[-1]]), system.decode(tokens))
    small = system.decode(tokens[:2])
    assert small.shape == (2, 3, 8, 8), "every draft is a picture of its own size"
    var = tiny_var()
    tokens = var.encode(emoji(2))
    others = [step.flip(1).add(1).remainder(32) for step in tokens[:-1]]
    assert not torch.allclose(var.decode([*others, tokens[-1]]), var.decode(tokens), atol=0.01), "VAR's hangs on all"


def test_scales_are_coded_independently_from_the_resized_latent() -> None:
    system = tiny()
    latent = system.tokenizer.latent(emoji(2))
    for step, found in zip(system.plan, system.encode(emoji(2)), strict=True):
        small = torch.nn.functional.adaptive_avg_pool2d(latent, step.grid)
        assert torch.equal(found, system.tokenizer.quantiser.quantise(small))


def test_pooling_features_before_their_projection_or_after_gives_the_same_latent() -> None:
    tokenizer = tiny().tokenizer
    features, latent = tokenizer.encoder(emoji(2)), tokenizer.latent(emoji(2))
    for grid in [step.grid for step in tokenizer.plan][:-1]:
        found = tokenizer.to_latent(resize(features, grid, "area"))
        torch.testing.assert_close(found, resize(latent, grid, "area"), rtol=0, atol=1e-5)
        assert not torch.allclose(found, resize(latent, grid, "bicubic"), atol=1e-3)


def test_the_position_table_is_resized_by_area() -> None:
    system = tiny()
    table = system.generator.position.detach()
    of = system.plan_of(grids((1, 4, 8)))
    whole = system.generator.positions(of, 2, 3).transpose(1, 2).reshape(1, -1, 8, 8)
    half = system.generator.positions(of, 1, 2).transpose(1, 2).reshape(1, -1, 4, 4)
    assert torch.equal(whole, table)
    torch.testing.assert_close(half, table.reshape(1, -1, 4, 2, 4, 2).mean((3, 5)))


def test_guidance_divides_by_nine_steps_at_most_and_grows_no_further_beyond_the_trained_grids() -> None:
    guidance = FlexVARGuidance(3.5)
    assert guidance.share(At(12, 13, 0, 1, grid=(16, 16))) == pytest.approx(4 / 3)
    assert guidance.share(At(5, 6, 0, 1, grid=(16, 16))) == 1.0
    assert guidance.share(At(0, 1, 0, 1, grid=(16, 16))) == 0.0
    assert guidance.share(At(14, 15, 0, 1, grid=(32, 32))) == 1.0
    one, other = torch.randn(2, 1, 4, 8)
    found = guidance({"conditional": one, "unconditional": other}, At(9, 10, 0, 1, grid=(16, 16)))
    torch.testing.assert_close(found, other + 3.5 * (one - other))


def test_grids_that_were_not_trained_much_are_drawn_greedily() -> None:
    logits = torch.randn(1, 3, 8)
    rule = GreedyUnlisted()
    for side in range(1, 17):
        found = rule(logits, At(1, 10, 0, 1, grid=(side, side)))
        assert torch.equal(found, logits) == (side in LISTED)
    left = rule(logits, At(1, 10, 0, 1, grid=(23, 23)))
    assert torch.equal(left.argmax(-1), logits.argmax(-1)) and int(left.isfinite().sum()) == 3
    system = tiny()
    # The first scale is given, so nothing but the draw at the unlisted grid could differ between seeds.
    small = torch.nn.functional.adaptive_avg_pool2d(emoji(1), (8, 8))
    one, other, free = (system.refine(small, [1], schedule=grids((1, 7)), seed=seed, output="torch", progress=False,
                                      greedy_unlisted=greedy) for seed, greedy in ((0, True), (1, True), (1, False)))
    assert torch.equal(one.tokens[1], other.tokens[1]) and not torch.equal(one.tokens[1], free.tokens[1])


def test_published_schedules_have_the_published_lengths() -> None:
    rows = {steps: sum(side * side for side in sides) for steps, sides in STEPS.items()}
    assert (rows[6], rows[8], rows[9], rows[10], rows[13]) == (413, 613, 629, 680, 981)
    assert sum(side * side for side in STEPS_512) == 2534
    assert all(len(sides) == steps for steps, sides in STEPS.items())


def test_training_schedules_follow_the_published_rule() -> None:
    sides, rng = grids(tuple(range(1, 17))), random.Random(0)
    found = [draw_steps(sides, rng) for _ in range(400)]
    assert all(sum(sides[k][0] ** 2 for k in chosen) <= 680 for chosen in found)
    assert all(chosen[:2] == [0, 1] and chosen == sorted(set(chosen)) for chosen in found)
    usual = [side - 1 for side in STEPS[10]]
    assert 8 <= sum(chosen == usual for chosen in found) <= 40, "about one in twenty"
    assert 0 < sum(chosen[-1] != 15 for chosen in found), "the last scale may go"
    with pytest.raises(InputError, match="at least three grids"):
        draw_steps(grids((1, 2)), rng)


def test_small_pictures_are_enlarged_and_large_ones_come_back() -> None:
    system = tiny()
    pictures = emoji(2)
    back = system.refine(pictures, [1, 2], output="torch", progress=False)
    torch.testing.assert_close(back.images, system.decode(system.encode(pictures)))
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, (8, 8))
    larger = system.refine(small, [1, 2], output="torch", progress=False)
    assert larger.images.shape == pictures.shape
    latent = system.tokenizer.latent(small)
    assert torch.equal(larger.tokens[1], system.tokenizer.quantiser.quantise(latent))
    with pytest.raises(InputError, match="multiple of the tokenizer's factor"):
        system.refine(pictures[..., :6], [1, 2])


def test_editing_keeps_the_tokens_of_cells_that_stay_at_every_scale() -> None:
    system, pictures = tiny(), emoji(2)
    redraw = torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    drawn = system.edit(pictures, redraw, [0, 1], output="torch", progress=False)
    known = system.encode(pictures)[-1].view(2, 4, 4)
    assert torch.equal(drawn.tokens[-1].view(2, 4, 4)[:, :, :2], known[:, :, :2])


def test_pictures_of_another_shape_are_edited_and_enlarged_by_its_schedule() -> None:
    system, schedule = tiny(), [(1, 1), (2, 3), (4, 6)]
    pictures, redraw = torch.nn.functional.pad(emoji(2), (4, 4, 0, 0)), torch.zeros(2, 16, 24, dtype=torch.bool)
    redraw[:, :, 12:] = True
    given = {"schedule": schedule, "output": "torch", "progress": False}
    own = system.encode(pictures, schedule)
    drawn = system.edit(pictures, redraw, [0, 1], **given)
    assert torch.equal(drawn.tokens[-1].view(2, 4, 6)[..., :3], own[-1].view(2, 4, 6)[..., :3])
    assert not torch.equal(drawn.tokens[-1], own[-1])
    large = system.enlarge(pictures, [0, 1], scales=2, **given)
    assert [torch.equal(a, b) for a, b in zip(large.tokens, own, strict=True)] == [True, True, False]
    assert drawn.images.shape == large.images.shape == pictures.shape


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    system = tiny()
    with pytest.raises(InputError, match="beyond the position table's 8"):
        system.generate([1], schedule=grids((1, 9)))
    for schedule in ((1, 2, 4), (4,)):
        with pytest.raises(InputError, match="by the schedule it was trained with"):
            nextscale.load("var-d2-16px").generate([1], schedule=grids(schedule))
    with pytest.raises(InputError, match="kind 'l2-vq', not 'vq'"):
        FlexVAR(FlexVARConfig(TokenizerConfig()))


@pytest.mark.parametrize(("name", "millions"),
                         [("flexvar-d16", 315.6), ("flexvar-d20", 607.5), ("flexvar-d24", 1041.3)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: float) -> None:
    config = preset_config(name)
    depth, width = config.generator.depth, config.generator.width
    with torch.device("meta"):
        system = FlexVAR(config)
    of_tokenizer = {id(p) for p in system.tokenizer.parameters()}
    count = sum(p.numel() for p in system.parameters() if id(p) not in of_tokenizer)
    assert round(count / 1e6, 1) == millions
    block = {"attn.scale_mul_1H11": (1, depth, 1, 1), "attn.q_bias": (width,), "attn.v_bias": (width,),
             "attn.zero_k_bias": (width,), "attn.mat_qkv.weight": (3 * width, width),
             "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
             "ffn.fc1.weight": (4 * width, width), "ffn.fc1.bias": (4 * width,),
             "ffn.fc2.weight": (width, 4 * width), "ffn.fc2.bias": (width,), "ada_lin.1.weight": (6 * width, width),
             "ada_lin.1.bias": (6 * width,)}
    shapes = {f"blocks.{i}.{key}": shape for i in range(depth) for key, shape in block.items()}
    shapes |= {"pos_start": (1, 1, width), "pos_1LC": (1, width, 32, 32), "attn_bias_for_masking": (1, 1, 680, 680),
               "word_embed.weight": (width, 32), "word_embed.bias": (width,), "class_emb.weight": (1001, width),
               "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
               "head.weight": (8912, width), "head.bias": (8912,)}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    with pytest.raises(WeightsError, match="pos_1LC"):
        folders.load_published(system, generator={**published, "pos_1LC": torch.empty(1, 680, width, device="meta")})


def test_the_published_tensor_list_of_flexvae_loads_strictly() -> None:
    with torch.device("meta"):
        system = FlexVAR(preset_config("flexvar-d16"))
    shapes = vq_16(32, 8912)
    folders.load_published(system, on_meta(shapes))
    listed = sum(math.prod(shape) for name, shape in shapes.items() if name != "quantize.codebook_used")
    assert listed == sum(p.numel() for p in system.tokenizer.parameters()) == 72_049_827
    for gone in ("encoder.conv_blocks.4.attn.1.k.weight", "decoder.conv_blocks.0.attn.2.q.bias", "quant_conv.weight"):
        with pytest.raises(WeightsError, match="missing"):
            folders.load_published(system, on_meta({name: s for name, s in shapes.items() if name != gone}))
    with pytest.raises(WeightsError, match=r"quantize\.embedding\.weight \(8192, 32\)"):
        folders.load_published(system, on_meta({**shapes, "quantize.embedding.weight": (8192, 32)}))


def test_constructors_of_other_sizes_are_read() -> None:
    config = flexvar_config({"ch": 64, "codebook_size": 100}, {"depth": 4, "embed_dim": 256, "num_heads": 4})
    assert (config.tokenizer.autoencoder.width, config.tokenizer.vocabulary, config.generator.depth) == (64, 100, 4)


def test_a_folder_gives_back_the_system_and_its_settings(tmp_path: Path) -> None:
    system = tiny(greedy_unlisted=False)
    folders.save(system, tmp_path / "model", torch.float32)
    again = folders.load(tmp_path / "model")
    assert isinstance(again, FlexVAR) and again.config == system.config
    tokens = system.encode(emoji(2))
    assert torch.equal(system.log_prob(tokens, [0, 1]).token, again.log_prob(tokens, [0, 1]).token)


def test_every_draft_is_trained_against_the_picture_at_its_size() -> None:
    torch.manual_seed(0)
    task = TokenizerTask(TokenizerRecipe(tiny().config.tokenizer, drafts=2))
    optimiser = torch.optim.AdamW(task.parameter_groups("main", 0.01), lr=3e-3)
    pictures, found = emoji(32), []
    task.tokenizer.train()
    for step in range(16):
        torch.manual_seed(step)
        at = TrainingStep(step, 16, step / 16, 0, 0)
        loss, metrics = task.loss("main", {"picture": pictures[step % 2 * 16:][:16]}, at)
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(metrics["drafts"]))
    assert found[-1] < 0.8 * found[0]
    assert bool((task.tokenizer.quantiser.usage_KV.sum(1) > 0).all()), "every scale was coded"


def test_the_command_line_trains_it_and_draws_by_another_schedule(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.depth=1", "generator.width=32", "generator.heads=2", "generator.table=8", "data.held_out=0",
            "train.precision=fp32", "settings.greedy_unlisted=false", "train.minutes=5"]
    command = ["train", "generator", "--system", "flexvar", "--data", "pictures", "--tokenizer", "tokenizer",
               "--out", "run"]
    assert main.run([*command, *(part for one in sets for part in ("--set", one))]) == 0
    system = nextscale.load("run/model")
    assert isinstance(system, FlexVAR) and not system.config.settings["pictures"].greedy_unlisted
    draw = ["generate", "--model", "run/model", "--count", "2"]
    assert main.run([*draw, "--schedule", "1,2,3x4", "--out", "a.gif"]) == 0
    assert main.run([*draw, "--schedule", "1,99", "--out", "b.png"]) == 2
    assert not (tmp_path / "b.png").exists()


def test_only_the_scales_of_a_step_s_schedule_are_told() -> None:
    system = tiny((1, 2, 3, 4, 5, 6))
    system.generator.train()
    task = GeneratorTask(system)
    batch = {"tokens": torch.cat(system.encode(emoji(4, 24)), 1), "labels": labels(4)}
    told = []
    for step in range(12):
        torch.manual_seed(step)
        loss, metrics = task.loss("main", batch, TrainingStep(step, 12, 0.0, 0, 0))
        read, = settle([dict(metrics)])
        told.append({name for name in read if name.startswith("nats_")})
        assert loss is not None and {f"accuracy_{name[5:]}" for name in told[-1]} < read.keys()
        assert all(map(math.isfinite, read.values())) and ("bits_per_dimension" in read) == (len(told[-1]) == 6)
    assert len(set(map(frozenset, told))) > 2 and all({"nats_0", "nats_1"} <= names for names in told)


def test_previews_of_every_size_are_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextscale.data.sheets import save_image, sheet

    system, pictures = tiny(), emoji(4)
    errors = after_each_scale(system, pictures, system.encode(pictures))
    assert errors.shape == (4, 4)
    whole = system.decode(system.encode(pictures))
    torch.testing.assert_close(errors[:, -1], (whole - pictures).square().mean((1, 2, 3)))
    monkeypatch.chdir(tmp_path)
    folders.save(system, tmp_path / "model", torch.float32)
    save_image(sheet(pictures[:1], 1, gap=0), tmp_path / "a.png")
    assert main.run(["reconstruct", "a.png", "--model", "model", "--out", "b.png"]) == 0


def test_the_first_scale_is_never_left_out_whatever_the_grids() -> None:
    rng = random.Random(1)
    for grids in ([(1, 1), (4, 8), (8, 8), (8, 8)], [(1, 1), (2, 2), (3, 3)], [(1, 1), (7, 7), (7, 8), (8, 7), (8, 8)]):
        assert all(draw_steps(grids, rng)[0] == 0 for _ in range(200))
