"""Hi-MAR: two phases over two maps, pivots, replacement, the phases' losses, published names and sizes."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_mar import head_shapes, published_shapes
from tiny import AUTOENCODER, emoji, fill, labels

import nextscale
from nextscale.cli import main
from nextscale.context import Context
from nextscale.errors import InputError, WeightsError
from nextscale.generators.himar import PIVOTS, HiMARGeneratorConfig, PhaseBlock
from nextscale.generators.mar import Block, MARGenerator, MARGeneratorConfig
from nextscale.layers.diffusion import cosine_chain, diffuse
from nextscale.layers.resize import resize
from nextscale.noise import Keyed
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import At, Rows, Run
from nextscale.sampling.guidance import Guidance, Stepwise, Unguided
from nextscale.sampling.steps import evaluator
from nextscale.systems import folders
from nextscale.systems.himar import HiMAR, HiMARConfig, HiMARSettings, preset_config, two_maps
from nextscale.tokenizers.config import TokenizerConfig

KL = TokenizerConfig(replace(AUTOENCODER, attention="encoder", latent_kernel=1), ((4, 4),), kind="kl", latent_scale=0.5)
USED = HiMARSettings(2.0, coarse_guidance_scale=3.0, coarse_iterations=3, iterations=3, coarse_solver_steps=4,
                     solver_steps=4, clip=4.0)


def tiny(seed: int = 0, **changes: object) -> HiMAR:
    network = HiMARGeneratorConfig(48, 2, 2, 3, buffer=3, head_width=32, head_depth=2, head_draws=2,
                                   **{"dropout": 0.0, "joint_width": 32, "joint_depth": 2, "joint_heads": 2, **changes})
    system = HiMAR(HiMARConfig(two_maps(KL), network, (5,), settings={"pictures": USED})).eval()
    fill(system, seed)
    with torch.no_grad():  # small predicted noises keep the chains where trained ones would be
        system.head.coarse.network.output.weight.mul_(0.1)
        system.head.joint.network.output.weight.mul_(0.1)
        for block in (*system.generator.encoder, *system.generator.decoder):
            block.initialise()
            block.scale.normal_(std=0.3)
    return system


def begun(system: HiMAR, steps: int) -> tuple[Run, Guidance]:
    """A run of two pictures after some steps, and its guidance."""
    guidance = system.guidance(USED)
    run = system.start(labels(2), guidance, Keyed.from_seeds([3, 4]), system.plan_for(USED))
    for _ in zip(range(steps), system.sampled(run, guidance, USED), strict=False):
        pass
    return run, guidance


# Plans

def test_the_phases_settle_every_cell_of_their_maps() -> None:
    config = preset_config("himar-base")
    with torch.device("meta"):
        system = HiMAR(config)
    plan = system.plan_for(config.settings["fid"])
    coarse = [step.rows for step in plan if step.grid == (8, 8)]
    fine = [step.rows for step in plan if step.grid == (16, 16)]
    assert len(coarse) == 32 and sum(coarse) == 64
    assert fine == [256, 236, 181, 97] and sum(a - b for a, b in zip(fine, [*fine[1:], 0], strict=True)) == 256
    guidance = system.guidance(config.settings["fid"])
    assert isinstance(guidance, Stepwise)
    assert guidance.scales[31] == pytest.approx(1 + 1.7 * 63 / 64) and guidance.scales[32] == pytest.approx(
        1 + 1.5 * 20 / 256) and guidance.scales[-1] == pytest.approx(1 + 1.5 * 255 / 256)
    constant = system.guidance(replace(config.settings["fid"], guidance_schedule="constant"))
    assert constant.scales == (2.7,) * 32 + (2.5,) * 4  # type: ignore[union-attr]
    assert isinstance(system.guidance(HiMARSettings()), Unguided)
    with pytest.raises(InputError, match="use linear or constant"):
        system.guidance(HiMARSettings(2.0, guidance_schedule="ramp"))


def test_known_cells_stay_and_all_masked_ones_are_drawn_at_every_step_of_the_fine_phase() -> None:
    system = tiny()
    run, guidance = begun(system, 4)
    assert run.canvas.value.shape[-2:] == (4, 4)
    before, seen = run.canvas.value.flatten(2).transpose(1, 2), 0
    for _ in system.sampled(run, guidance, USED):
        after = run.canvas.value.flatten(2).transpose(1, 2)
        masked = run.order[:, run.plan.span(run.cursor - 1, run.cursor)]
        places = system.generator.raster(masked)
        still = torch.ones(2, 16, dtype=torch.bool).scatter(1, places, False)
        assert torch.equal(before[still], after[still])
        assert not torch.isclose(before[~still], after[~still]).any(-1).all()
        assert int(still[0].sum()) == 16 - run.plan.steps[run.cursor - 1].rows
        before, seen = after, seen + 1
    assert seen == 2 and len(run.tokens) == 6


def test_known_cells_are_replaced_by_their_noisy_selves_before_every_step_of_the_chain(
        monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny()
    run, guidance = begun(system, 5)
    known, seen, denoise = run.reads[run.cursor], [], system.head.joint.network.forward
    assert known is not None
    monkeypatch.setattr(system.head.joint.network, "forward", lambda x, c: (seen.append(x[:2]), denoise(x, c))[1])
    noise = run.noise.normal("start", torch.full((1, 1), run.cursor), 0, grid_cells(Step((4, 4)))[None], 8)
    places = system.generator.raster(run.order[:, run.plan.span(run.cursor, run.cursor + 1)])
    list(system.sampled(run, guidance, USED))
    still = torch.ones(2, 16, dtype=torch.bool).scatter(1, places, False)
    chain = cosine_chain(4)
    assert len(seen) == 4
    for i, x in zip(reversed(range(4)), seen, strict=True):
        wanted = diffuse(chain, known, noise, torch.full((2,), i))
        assert (torch.equal(x[still], wanted[still]) and not torch.isclose(x[~still], wanted[~still]).all()) or i == 3


# Pivots

@torch.no_grad()
def test_the_fine_phase_hangs_on_pivots_and_not_on_coarse_tokens() -> None:
    system = tiny()
    run, _ = begun(system, 3)
    call = system.generator.call(run)
    hidden = evaluator(system.generator, run, check=True)(call)
    buffer, coarse = 3, 4
    half = len(call.x) // 2
    assert run.carried[PIVOTS].shape == (2, 4, 48)
    rows = call.x[:, buffer:buffer + coarse]
    assert torch.equal(rows[:half], rows[half:]), "both branches have the conditional one's pivots"
    run.tokens = [tokens + 9 for tokens in run.tokens]
    run.canvas = replace(run.canvas, value=run.canvas.value + 9)
    run.reads[-1] = run.canvas.read(run.cursor)
    assert torch.equal(hidden, evaluator(system.generator, run)(system.generator.call(run)))
    run.carried[PIVOTS] = run.carried[PIVOTS].flip(2)
    assert not torch.allclose(hidden, evaluator(system.generator, run)(system.generator.call(run)), atol=1e-3)


@torch.no_grad()
def test_pivots_are_the_hidden_states_at_the_time_of_drawing() -> None:
    system = tiny()
    run, guidance = begun(system, 0)
    wanted = torch.zeros(2, 4, 48)
    for step in range(3):
        call = system.generator.call(run)
        hidden = evaluator(system.generator, run)(call)[:2, call.predicts]
        cells = run.order[:, run.plan.span(step, step + 1)]
        places = (cells[..., 1] * 2 + cells[..., 2])[..., None].expand_as(hidden)
        wanted = wanted.scatter(1, places, system.generator.pivot(hidden))
        next(system.sampled(run, guidance, USED))
    torch.testing.assert_close(run.carried[PIVOTS], wanted)


# The network

@torch.no_grad()
def test_a_neutral_block_is_a_plain_one() -> None:
    config = HiMARGeneratorConfig(48, 1, 1, 3, dropout=0.0)
    phased, plain = PhaseBlock(config), Block(config)
    fill(plain)
    phased.load_state_dict(plain.state_dict(), strict=False)
    phased.initialise()
    x = torch.randn(2, 7, 48)
    rows = Rows(torch.zeros(1, 7, 3, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long), None, 0,
                Plan.scales([1]).visible, masked=False)
    shared = torch.randn(1, 1, 192)
    for phase in (0, 1):
        assert torch.equal(phased(x, rows, Context(), "a", (shared, phase)), plain(x, rows, Context(), "a"))
    phased.scale[1].normal_()
    assert torch.equal(phased(x, rows, Context(), "a", (shared, 0)), plain(x, rows, Context(), "a"))
    assert not torch.allclose(phased(x, rows, Context(), "a", (shared, 1)), plain(x, rows, Context(), "a"))


@torch.no_grad()
def test_the_fine_phase_with_learned_tokens_alone_is_mar_with_a_prefix() -> None:
    system = tiny()
    ours = system.generator
    for block in (*ours.encoder, *ours.decoder):
        block.initialise()
    ours.masked.copy_(ours.masked[:, :1].expand_as(ours.masked))
    ours.coarse_word.load_state_dict(ours.word.state_dict())
    mar = MARGenerator(MARGeneratorConfig(48, 2, 2, 3, buffer=3, dropout=0.0), (1, 20), 8).eval()
    rows = 3 + 20
    state = {name: tensor for name, tensor in ours.state_dict().items() if name in mar.state_dict()}
    state |= {name: ours.state_dict()[name][:, rows:] for name in ("encoder_position", "decoder_position")}
    mar.load_state_dict({**state, "masked": ours.masked[:, :1]})
    cond, fine = system.labels(labels(2)), torch.randn(2, 6, 8)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    call = ours.fine_call(ours.learned_pivots(2), fine, grid_cells(Step((4, 4)))[order], cond, 5)
    places = torch.cat([torch.arange(4).expand(2, -1), 4 + order], 1)
    known = torch.cat([ours.coarse_tokens.expand(2, -1, -1), fine], 1)
    other = mar.call_of(known, torch.stack([torch.zeros_like(places), torch.zeros_like(places), places], -1), cond, 5,
                        slice(10, 20))
    torch.testing.assert_close(ours(call, Context(check=True)), mar(other, Context(check=True)), rtol=1e-4, atol=1e-4)


# Runs

def test_a_picture_does_not_hang_on_its_batch_and_a_run_can_be_gathered_in_either_phase() -> None:
    system = tiny()
    both = system.generate([1, 2], seeds=[7, 8], output="torch", progress=False)
    alone = system.generate([2], seeds=[8], output="torch", progress=False)
    assert [tuple(t.shape) for t in both.tokens] == [(2, 4, 8), (2, 16, 8)]
    for a, b in zip(both.tokens, alone.tokens, strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(system.decode(both.tokens), both.images)
    for steps in (2, 4):
        run, guidance = begun(system, steps)
        turned = run.gather([1, 0])
        with torch.no_grad():
            ends = [list(system.sampled(one, guidance, USED))[-1].canvas.value for one in (turned, run)]
        torch.testing.assert_close(ends[0].flip(0), ends[1], rtol=1e-4, atol=1e-4)


def test_bfloat16_draws_much_the_same_and_a_run_can_be_handed_over() -> None:
    system = tiny()
    wanted = system.generate([1, 2], output="torch", progress=False).images
    run, guidance = begun(system, 4)
    with torch.no_grad():
        same = run.hand_over(run.condition)
        ends = [list(system.sampled(one, guidance, USED))[-1].canvas.value for one in (same, run)]
    assert torch.equal(*ends)
    found = system.to_precision("bf16").generate([1, 2], output="torch", progress=False).images
    assert found.dtype == torch.float32 and float((found - wanted).abs().mean()) < 0.1


def test_editing_keeps_known_cells_of_both_maps_and_draws_the_others() -> None:
    system, pictures = tiny(), emoji(3)
    redraw = torch.zeros(3, 16, 16, dtype=torch.bool)
    redraw[0, 8:, 8:] = True
    redraw[1, :, 2:6] = True
    before = [t.unflatten(1, (s, s)) for t, s in zip(system.encode(pictures), (2, 4), strict=True)]
    drawn = system.edit(pictures, redraw, [1, 2, 3], output="torch", progress=False)
    for old, new, size in zip(before, drawn.tokens, (8, 4), strict=True):
        hole = torch.nn.functional.max_pool2d(redraw[:, None].float(), size)[:, 0].bool()
        new = new.unflatten(1, hole.shape[1:])
        assert torch.equal(old[~hole], new[~hole]) and not torch.isclose(old[hole], new[hole]).all(-1).any()
    everything = system.edit(pictures[:1], torch.ones_like(redraw[:1]), [1], output="torch", progress=False)
    fresh = system.generate([1], output="torch", progress=False)
    torch.testing.assert_close(everything.images, fresh.images, rtol=1e-4, atol=1e-4)


def test_previews_show_both_phases() -> None:
    sizes = [tuple(p.images.shape[-2:]) for p in tiny().stream([1], output="torch")]
    assert sizes == [(8, 8)] * 3 + [(16, 16)] * 3


# Tokens and training

@torch.no_grad()
def test_coarse_tokens_are_of_the_reduced_picture_and_not_of_the_reduced_latent() -> None:
    system, pictures = tiny(), emoji(3)
    coarse, fine = system.encode(pictures)
    torch.testing.assert_close(fine, system.tokenizer.latent(pictures).flatten(2).transpose(1, 2))
    small = system.tokenizer.latent(torch.nn.functional.interpolate(pictures, (8, 8), mode="bicubic"))
    torch.testing.assert_close(coarse, small.flatten(2).transpose(1, 2))
    pooled = resize(system.tokenizer.latent(pictures), (2, 2), "area").flatten(2).transpose(1, 2)
    assert not torch.allclose(coarse, pooled, atol=0.05)
    cached = system.tokenizer.cached_moments(pictures)
    assert cached.shape == (3, 20, 16)
    means = torch.cat([cached[..., :8], torch.full_like(cached[..., 8:], -30.0)], -1)
    for drawn, wanted in zip(system.training_tokens(means), (coarse, fine), strict=True):
        torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="coarse 'picture' is for kind 'kl'"):
        TokenizerConfig(coarse="picture")
    with pytest.raises(InputError, match="a map of even sides"):
        two_maps(replace(KL, grids=((3, 3),)))
    with pytest.raises(InputError, match="needs a tokenizer of two grids"):
        HiMAR(replace(system.config, tokenizer=KL))


def test_the_loss_falls_on_a_few_pictures_and_weighs_the_phases_as_published() -> None:
    torch.manual_seed(0)
    system = tiny().initialise().train()
    tokens = [torch.randn(4, 4, 8), torch.randn(4, 16, 8)]
    loss, by_step, guessed = system.loss(tokens, labels(4), 0.0)
    assert guessed is None and float(loss.detach()) == pytest.approx(
        float(0.2 * 2 * by_step[0] + 0.8 * 0.75 * by_step[1]), rel=1e-5)
    optimiser, found = torch.optim.AdamW([p for n, p in system.named_parameters() if "tokenizer" not in n], lr=3e-3), []
    for _ in range(30):
        loss, by_step, _ = system.loss(tokens, labels(4), 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(by_step[0]))
    assert sum(found[-8:]) < 0.8 * sum(found[:8])
    assert all(p.grad is not None for n, p in system.named_parameters() if "tokenizer" not in n)
    with pytest.raises(InputError, match="both maps together"):
        system.loss(tokens[:1], labels(4))


@torch.no_grad()
def test_pivots_stand_where_phase_0_predicted_and_more_often_as_training_goes_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny(pivot_share=1.0, pivot_warmup=0.5)
    hidden, predicted = torch.randn(2, 4, 48), torch.tensor([[1, 3], [0, 2]])
    found = system.pivots(hidden, predicted, torch.tensor([False, True]))
    learned = system.generator.learned_pivots(2)
    stands = ~torch.isclose(found, learned).all(-1)
    assert stands.tolist() == [[False, True, False, True], [False] * 4]
    torch.testing.assert_close(found[0, [1, 3]], system.generator.pivot(hidden[0, [1, 3]]))
    shares, seen = [], []

    def watched(hidden: torch.Tensor, predicted: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
        seen.append(without)
        return learned[:1].expand(64, -1, -1)

    monkeypatch.setattr(system, "pivots", watched)
    tokens = [torch.randn(64, 4, 8), torch.randn(64, 16, 8)]
    for system.progress in (0.0, 0.25, 1.0):
        system.loss(tokens, labels(64))
        shares.append(1 - float(seen[-1].float().mean()))
    assert shares[0] == 0.0 and 0.25 < shares[1] < 0.75 and shares[2] == 1.0


def test_the_fine_loss_counts_masked_cells_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny()
    monkeypatch.setattr(system.head.joint, "loss", lambda hidden, target: torch.ones(target.shape[:2]))
    monkeypatch.setattr(torch, "rand", lambda *shape, **k: torch.full(() if shape == ((),) else shape, 0.5))
    _, by_step, _ = system.loss([torch.randn(2, 4, 8), torch.randn(2, 16, 8)], labels(2))
    assert float(by_step[1]) == pytest.approx(math.ceil(16 * math.cos(math.pi / 4)) / 16)


# Published weights

@pytest.mark.parametrize(("name", "millions"), [("himar-base", 244), ("himar-large", 529), ("himar-huge", 1090)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: int) -> None:
    config = preset_config(name)
    network = config.generator
    with torch.device("meta"):
        system = HiMAR(config)
    d, w, cells = network.width, network.joint_width, 320
    shapes = published_shapes(network)
    shapes |= {"mask_token": (1, 2 * cells, d), "encoder_pos_embed_learned": (1, 768, d),
               "decoder_pos_embed_learned": (1, 768, d), "diffusion_pos_embed_learned": (1, cells, d),
               "cond_tokens": (1, 64, 16), "cond_z_proj.weight": (d, d), "cond_z_proj.bias": (d,),
               "cond_proj.weight": (d, 16), "cond_proj.bias": (d,)}
    for side, depth in (("encoder", network.encoder_depth), ("decoder", network.decoder_depth)):
        shapes |= {f"{side}_task_emb.weight": (2, d), f"{side}_blocks_ada.1.weight": (4 * d, d),
                   f"{side}_blocks_ada.1.bias": (4 * d,)}
        shapes |= {f"{side}_blocks.{i}.adaLN_{part}": (2, 1, 1, 4 * d) for i in range(depth) for part in
                   ("scale", "shift")}
    net = "cond_diffloss.net."
    joint: dict[str, tuple[int, ...]] = {
        "t_embedder.mlp.0": (w, 256), "t_embedder.mlp.2": (w, w), "x_embedder.proj": (w, 16, 1, 1),
        "c_embedder.proj": (w, d, 1, 1), "final_layer.linear": (16, w), "final_layer.adaLN_modulation.1": (2 * w, w)}
    for i in range(network.joint_depth):
        joint |= {f"blocks.{i}.attn.qkv": (3 * w, w), f"blocks.{i}.attn.proj": (w, w),
                  f"blocks.{i}.mlp.fc1": (4 * w, w), f"blocks.{i}.mlp.fc2": (w, 4 * w),
                  f"blocks.{i}.adaLN_modulation.1": (6 * w, w)}
    shapes |= {f"{net}{part}.{end}": shape if end == "weight" else shape[:1] for part, shape in joint.items()
               for end in ("weight", "bias")}
    assert set(head_shapes("diffloss", d, network.head_width, network.head_depth, 16)) <= set(shapes)
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    count = sum(p.numel() for p in parts)
    assert count == sum(math.prod(shape) for shape in shapes.values()) and abs(count / 1e6 - millions) < 1
    shapes |= {f"{net}{table}": (1, 256, w) for table in ("pos_embed", "c_pos_embed")}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    with pytest.raises(WeightsError, match="coarse_tokens"):
        folders.load_published(system, generator={k: v for k, v in published.items() if k != "cond_tokens"})


def test_the_command_line_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures
    from test_mar import tiny as tiny_mar

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny_mar().tokenizer, tmp_path / "tokenizer")  # of a single map: it is fitted for two
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.width=32", "generator.encoder_depth=1", "generator.decoder_depth=1", "generator.heads=2",
            "generator.buffer=2", "generator.head_width=16", "generator.head_depth=1", "data.held_out=2",
            "generator.joint_width=16", "generator.joint_depth=1", "generator.joint_heads=2", "train.minutes=5",
            "settings.coarse_solver_steps=2", "settings.solver_steps=2"]
    command = ["train", "generator", "--system", "himar", "--data", "pictures", "--tokenizer", "tokenizer"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "himar"]) == 0
    trained = nextscale.load("himar/model")
    assert isinstance(trained, HiMAR) and trained.config.tokenizer.grids == ((2, 2), (4, 4))
    assert main.run(["generate", "--model", "himar/model", "--count", "2", "--out", "a.png"]) == 0
    assert main.run(["generate", "--model", "himar/model", "--count", "1", "--out", "a.gif"]) == 0
    tokens = ["tokenize", "--data", "pictures", "--tokenizer", "tokenizer", "--flips"]
    assert main.run([*tokens, "--system", "himar", "--out", "tokens"]) == 0
    assert main.run([*command, "--tokens", "tokens", "--out", "again"]) == 0
    assert main.run([*tokens, "--out", "others"]) == 0
    assert main.run([*command, "--tokens", "others", "--out", "wrong"]) == 2


def test_the_guided_sum_uses_the_step_s_own_scale() -> None:
    guidance = Stepwise((1.0, 3.0))
    outputs = {"conditional": torch.ones(1), "unconditional": torch.zeros(1)}
    at = [At.of(Plan.scales([1, 2]), k) for k in range(2)]
    assert [float(guidance(outputs, one)) for one in at] == [1.0, 3.0]
    with pytest.raises(InputError, match="at least 0"):
        Stepwise((-1.0,))


def test_both_phases_may_go_by_other_schedules_and_in_raster_order() -> None:
    system, runs = tiny(), []
    found = system.generate([1, 2], unmasking="linear", order="raster", coarse_iterations=2, iterations=2,
                            callback=lambda k, run: runs.append(run), progress=False, output="torch")
    plan, small = runs[-1].plan, system.generator.coarse
    assert [step.rows for step in plan] == [small // 2, small // 2, 4 * small, 2 * small]
    places = runs[-1].order[0, :, 1] * torch.cat([torch.full((step.rows,), step.grid[1]) for step in plan]) \
        + runs[-1].order[0, :, 2]
    assert places.tolist() == [*range(small), *range(4 * small), *range(2 * small, 4 * small)]
    assert bool(found.images.isfinite().all())


def test_a_negative_bound_and_enlarging_are_refused() -> None:
    with pytest.raises(InputError, match="clip is -1"):
        tiny().generate([1], progress=False, clip=-1.0)
    with pytest.raises(InputError, match="HiMAR can't enlarge"):
        tiny().enlarge(emoji(1), 1)
