"""MAR: unmasking, orders, the denoising chain and head, training masks, editing, published names and sizes."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import AUTOENCODER, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.cli import main
from nextscale.context import Context, Hook
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.mar import MARGeneratorConfig
from nextscale.layers.diffusion import (
    STEPS,
    cosine_chain,
    denoised,
    diffuse,
    large_log_variance,
    learned_log_variance,
    spread,
    variational_bits,
)
from nextscale.noise import Keyed
from nextscale.plan import Plan, Step
from nextscale.run import Run
from nextscale.sampling.diffusion import ancestral
from nextscale.sampling.guidance import ClassifierFree, Unguided
from nextscale.sampling.orders import masked_after, random_order, unmasked_counts
from nextscale.sampling.steps import evaluator
from nextscale.systems import folders
from nextscale.systems.mar import MAR, MARConfig, MARSettings, masked_share, preset_config, published_config
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.generator import GeneratorTask

KL = replace(AUTOENCODER, attention="encoder", latent_kernel=1)


def tiny(seed: int = 0, **changes: object) -> MAR:
    network = MARGeneratorConfig(48, 2, 2, 3, buffer=3, head_width=32, head_depth=2, head_draws=2,
                                 **{"dropout": 0.0, **changes})
    system = MAR(MARConfig(TokenizerConfig(KL, ((4, 4),), kind="kl", latent_scale=0.5), network, (5,),
                           settings={"pictures": MARSettings(2.0, iterations=4, solver_steps=5, clip=4.0)})).eval()
    fill(system, seed)
    # A filled network predicts noise at random: small outputs keep the chain where a trained one would be.
    with torch.no_grad():
        system.head.network.output.weight.mul_(0.1)
    return system


# Unmasking

def test_published_iterations_draw_the_published_numbers_of_tokens() -> None:
    assert unmasked_counts(256, 256) == [1] * 256
    counts = unmasked_counts(256, 64)
    assert counts[:13] == [1] * 13 and counts[13:18] == [2, 3, 2, 2, 3] and counts[-5:] == [6, 7, 6, 6, 6]
    assert unmasked_counts(256, 8) == [5, 15, 24, 31, 39, 45, 48, 49]
    assert unmasked_counts(256, 1) == [256] and sum(counts) == 256


@settings(max_examples=60)
@given(cells=st.integers(1, 300), share=st.floats(0, 1))
def test_every_iteration_draws_at_least_one_and_all_draw_everything(cells: int, share: float) -> None:
    iterations = max(1, round(share * cells))
    counts = unmasked_counts(cells, iterations)
    assert len(counts) == iterations and min(counts) >= 1 and sum(counts) == cells
    assert masked_after(cells, iterations)[-1] == 0


def test_iterations_that_cannot_be_are_refused_and_too_many_draw_one_token_each() -> None:
    system = tiny()
    with pytest.raises(InputError, match="iterations is 0; it must be at least 1"):
        system.generate([1], iterations=0)
    with pytest.raises(InputError, match="at most 4"):
        unmasked_counts(4, 5)
    assert [step.rows for step in system.plan_for(MARSettings(iterations=99))] == [1] * 16


def test_each_cell_is_drawn_once_in_an_order_of_the_picture_s_own() -> None:
    system = tiny()
    runs: list[Run] = []
    system.generate([1, 2], iterations=16, callback=lambda k, run: runs.append(run), progress=False, output="torch")
    order = runs[-1].order
    places = system.generator.raster(order)
    assert torch.equal(places.sort(1)[0], torch.arange(16).expand(2, -1)) and not torch.equal(places[0], places[1])
    step = Step((8, 8))
    many = random_order(Keyed.from_seeds(range(400)), step)
    assert abs(float((many[:, 0, 1] * 8 + many[:, 0, 2]).float().mean()) - 31.5) < 3  # the first cell is anywhere
    assert torch.equal(many[7:8], random_order(Keyed.from_seeds([7]), step))


def test_a_linear_schedule_draws_as_many_every_time_and_raster_order_line_by_line() -> None:
    assert unmasked_counts(256, 8, "linear") == [32] * 8 and unmasked_counts(5, 5, "linear") == [1] * 5
    assert unmasked_counts(10, 4, "linear") == [3, 2, 3, 2]
    system, runs = tiny(), []
    options = {"iterations": 4, "unmasking": "linear", "order": "raster", "output": "torch"}
    both = system.generate([1, 2], callback=lambda k, run: runs.append(run), progress=False, **options)
    assert [step.places for step in runs[-1].plan] == [tuple(range(k, k + 4)) for k in (0, 4, 8, 12)]
    assert torch.equal(system.generator.raster(runs[-1].order), torch.arange(16)[None])
    alone = system.generate([2], seeds=both.seeds[1:], **options)
    torch.testing.assert_close(alone.images, both.images[1:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(both.images, system.generate([1, 2], seeds=both.seeds, iterations=4, output="torch").images)
    redraw = torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[0, :, 8:] = True
    redraw[1, 4:, :4] = True
    before = system.encode(both.images)[0].unflatten(1, (4, 4))
    after = system.edit(both.images, redraw, [1, 2], **options, progress=False).tokens[0].unflatten(1, (4, 4))
    assert torch.equal((before == after).all(-1), ~redraw[:, ::4, ::4])
    for wrong in ({"order": "spiral"}, {"unmasking": "square"}):
        with pytest.raises(InputError, match="is unknown; use"):
            system.generate([1], **wrong)


# The network

@torch.no_grad()
def test_hidden_states_do_not_hang_on_what_masked_cells_hold() -> None:
    system, guidance = tiny(), Unguided()
    plan = system.plan_for(MARSettings(iterations=4))
    run = system.start(labels(2), guidance, Keyed.from_seeds([3, 4]), plan)
    steps = system.sampled(run, guidance, MARSettings(iterations=4, solver_steps=3))
    next(steps), next(steps)
    call = system.generator.call(run)
    before = evaluator(system.generator, run, check=True)(call)
    masked = system.generator.raster(run.order[:, plan.starts[run.cursor]:])
    written = run.reads[run.cursor]
    assert written is not None
    run.reads[run.cursor] = written.scatter(1, masked[..., None].expand(-1, -1, 8), 77.0)
    assert torch.equal(before, evaluator(system.generator, run)(system.generator.call(run)))
    known = system.generator.raster(run.order[:, :1])
    run.reads[run.cursor] = written.scatter(1, known[..., None].expand(-1, -1, 8), 77.0)
    assert not torch.allclose(before, evaluator(system.generator, run)(system.generator.call(run)))
    assert not run.memory.groups, "nothing is remembered: every step evaluates all anew"


@torch.no_grad()
def test_the_loop_evaluates_what_training_does() -> None:
    system, guidance = tiny(), Unguided()
    run = system.start(labels(2), guidance, Keyed.from_seeds([3, 4]))
    next(system.sampled(run, guidance, MARSettings(iterations=4, solver_steps=3)))
    hidden = evaluator(system.generator, run)(system.generator.call(run))
    places = system.generator.raster(run.order)
    tokens = run.tokens[0]
    torch.testing.assert_close(system.hidden(tokens, places, system.labels(labels(2))), hidden)
    shuffled = torch.cat([places[:, :2], places[:, 2:].flip(1)], 1)  # in which order the masked stand says nothing
    again = system.hidden(tokens, shuffled, system.labels(labels(2)))
    torch.testing.assert_close(again[:, 2:].flip(1), hidden[:, 2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_class_fills_every_row_of_the_buffer_each_at_a_place_of_its_own() -> None:
    system = tiny()
    generator = system.generator
    call = generator.call_of(torch.zeros(1, 0, 8), Plan.scales([4]).cells[None], system.labels(labels(2)), 0,
                             slice(0, 16))
    assert call.x.shape == (2, 3, 48) and not torch.allclose(call.x[:, 0], call.x[:, 1])
    generator.encoder_position[:, 1] = generator.encoder_position[:, 0]
    call = generator.call_of(torch.zeros(1, 0, 8), Plan.scales([4]).cells[None], system.labels(labels(2)), 0,
                             slice(0, 16))
    assert torch.equal(call.x[:, 0], call.x[:, 1])


def test_dropout_acts_in_training_alone() -> None:
    system = tiny(dropout=0.3)
    target, order = torch.randn(2, 16, 8), torch.arange(16).expand(2, -1)
    cond = system.labels(labels(2)).detach()
    with torch.no_grad():
        still = [system.hidden(target[:, :4], order, cond) for _ in range(2)]
        system.train()
        moving = [system.hidden(target[:, :4], order, cond) for _ in range(2)]
    assert torch.equal(*still) and not torch.allclose(*moving)


# The chain and the head

def test_the_chain_is_the_cosine_schedule_and_its_parts_are_evenly_spread() -> None:
    chain = cosine_chain()
    assert len(chain) == STEPS and bool((chain.kept_S.diff() < 0).all()) and float(chain.beta_S.max()) < 0.9991
    wanted = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(chain.kept_S[499]) == pytest.approx(wanted, rel=1e-6)
    hundred = cosine_chain(100)
    assert hundred.times.tolist()[:3] == [0, 10, 20] and hundred.times.tolist()[-1] == 999
    assert torch.equal(hundred.kept_S, chain.kept_S[hundred.times])
    assert spread(1000, (2, 0)) == [0, 499] and spread(10, (1,)) == [0]
    with pytest.raises(InputError, match="5 steps can't be kept of 4"):
        spread(4, (5,))


@settings(max_examples=20)
@given(kept=st.integers(1, 60), seed=st.integers(0, 99))
def test_who_knows_the_noise_gets_the_clean_token_back_in_any_number_of_steps(kept: int, seed: int) -> None:
    chain, generator = cosine_chain(kept), torch.Generator().manual_seed(seed)
    clean, x = torch.randn(3, 4, 2, generator=generator), torch.randn(3, 4, 2, generator=generator)

    def oracle(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        index = torch.full((3,), i)
        keep = float(chain.kept_S[i])
        return (x - keep ** 0.5 * clean) / (1 - keep) ** 0.5, large_log_variance(chain, x, index)

    found = ancestral(chain, x, oracle, lambda i: torch.randn(3, 4, 2, generator=generator))
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)
    index = torch.full((3,), kept // 2)
    noise = torch.randn(3, 4, 2, generator=generator)
    back = denoised(chain, diffuse(chain, clean, noise, index), noise, index)
    if float(chain.kept_S[kept // 2]) > 0.01:
        torch.testing.assert_close(back, clean, rtol=1e-3, atol=1e-3)


def test_temperature_narrows_what_is_drawn_but_not_where_it_starts() -> None:
    chain, generator, deviation = cosine_chain(100), torch.Generator().manual_seed(0), 0.7

    def best(x: Tensor, i: int) -> tuple[Tensor, Tensor]:  # the noise expected in x where clean values are N(0, 0.7^2)
        keep = float(chain.kept_S[i])
        epsilon = x * (1 - keep) ** 0.5 / (keep * deviation**2 + 1 - keep)
        return epsilon, learned_log_variance(chain, torch.full_like(x, -1.0), torch.full(x.shape[:1], i))

    seen: list[Tensor] = []
    ancestral(chain, torch.ones(1, 1), lambda x, i: (seen.append(x), best(x, i))[1], lambda i: torch.zeros(1, 1))  # type: ignore
    assert float(seen[0]) == 1, "the first noise is not scaled"
    start = torch.randn(4000, 1, generator=generator)
    spreads = [float(ancestral(chain, start, best, lambda i: torch.randn(4000, 1, generator=generator), t).std())
               for t in (0.0, 0.8, 0.9, 1.0)]
    assert spreads == sorted(spreads) and spreads[0] < 0.1 * spreads[1]
    assert spreads[-1] == pytest.approx(deviation, rel=0.06)


def test_a_clip_bounds_what_an_unlearned_head_draws() -> None:
    system = tiny()
    wild, bounded = (float(system.generate([1, 2], output="torch", progress=False, solver_steps=50, clip=clip)
                           .tokens[0].abs().max()) for clip in (0.0, 2.0))
    assert wild > 20 and bounded < 3


def test_a_fresh_head_predicts_no_noise_and_its_loss_is_the_noise_s_square() -> None:
    torch.manual_seed(0)
    head = tiny().initialise().head
    target, hidden = torch.randn(6, 5, 8), torch.randn(6, 5, 48)
    time, noise = torch.randint(STEPS, (6, 5)), torch.randn(6, 5, 8)
    squared, bits = head.terms(hidden, target, time, noise)
    torch.testing.assert_close(squared, noise.square().mean(-1))
    assert bits.shape == (6, 5) and float(head.loss(hidden, target).mean().detach()) > 1


def test_the_variational_term_teaches_the_variance_alone() -> None:
    chain, x = cosine_chain(), torch.randn(5, 8)
    epsilon, share = torch.randn(5, 8, requires_grad=True), torch.zeros(5, 8, requires_grad=True)
    index = torch.tensor([0, 1, 200, 700, 999])
    variational_bits(chain, torch.randn(5, 8), x, epsilon, share, index).sum().backward()
    assert epsilon.grad is None and share.grad is not None and bool((share.grad != 0).any(1)[1:].all())
    # Predicting the true noise and the posterior's variance leaves nothing to say.
    clean, noise = torch.randn(4, 8), torch.randn(4, 8)
    x = diffuse(chain, clean, noise, index[1:])
    assert float(variational_bits(chain, clean, x, noise, -torch.ones(4, 8), index[1:]).abs().max()) < 1e-3


def test_a_guidance_of_one_is_the_conditional_branch_alone() -> None:
    system = tiny()
    alone = system.generate([1, 2], guidance=Unguided(), output="torch", progress=False)
    both = system.generate([1, 2], guidance=ClassifierFree(1.0, "linear"), output="torch", progress=False)
    torch.testing.assert_close(alone.images, both.images, rtol=1e-4, atol=1e-4)
    other = system.generate([1, 2], guidance_scale=4.0, output="torch", progress=False)
    assert not torch.allclose(alone.images, other.images, atol=1e-3)


def test_linear_guidance_follows_the_share_that_is_drawn() -> None:
    guidance, seen = ClassifierFree(3.0, "linear"), []
    system = tiny()

    def spy(outputs: dict[str, Tensor], at: object) -> Tensor:
        seen.append(guidance.share(at))  # type: ignore[arg-type]
        return guidance(outputs, at)  # type: ignore[arg-type]

    spy.branches = guidance.branches  # type: ignore[attr-defined]
    system.generate([1], guidance=spy, iterations=4, solver_steps=1, progress=False, output="torch")  # type: ignore
    assert seen == [(16 - left) / 16 for left in (14, 11, 6, 1)]


# Runs

def test_a_picture_does_not_hang_on_its_batch_and_a_run_can_be_gathered() -> None:
    system = tiny()
    both = system.generate([1, 2], seeds=[7, 8], output="torch", progress=False)
    alone = system.generate([2], seeds=[8], output="torch", progress=False)
    torch.testing.assert_close(both.tokens[0][1:], alone.tokens[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(system.decode(both.tokens), both.images)
    used, guidance = system.config.settings["pictures"], ClassifierFree(2.0, "linear")
    with torch.no_grad():
        run = system.start(torch.tensor([[1], [2]]), guidance, Keyed.from_seeds([7, 8]))
        next(system.sampled(run, guidance, used))
        turned = run.gather([1, 0])
        ends = [list(system.sampled(one, guidance, used))[-1].canvas.value for one in (turned, run)]
    torch.testing.assert_close(ends[0].flip(0), ends[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(system.tokens_of(run)[0], both.tokens[0], rtol=1e-4, atol=1e-4)


def test_handing_over_to_the_same_system_and_idle_hooks_change_nothing() -> None:
    system, used, guidance = tiny(), tiny().config.settings["pictures"], ClassifierFree(2.0, "linear")
    run = system.start(labels(2), guidance, Keyed.from_seeds([7, 8]))
    with torch.no_grad():
        next(system.sampled(run, guidance, used))
        same = run.hand_over(run.condition)
        ends = [list(system.sampled(one, guidance, used))[-1].canvas.value for one in (same, run)]
    assert torch.equal(*ends)

    class Idle(Hook):
        def attend(self, ctx, address, q, k, v, rows, inner):  # type: ignore[no-untyped-def]
            return inner(q, k, v, rows)

        def residual(self, ctx, address, kind, x, rows, inner):  # type: ignore[no-untyped-def]
            return inner(x, rows)

        def logits(self, logits: Tensor, at: object) -> Tensor:
            return logits

    plain, idle = (system.generate([1, 2], hooks=hooks, output="torch", progress=False) for hooks in ([], [Idle()]))
    torch.testing.assert_close(plain.images, idle.images, rtol=1e-4, atol=1e-4)


def test_bfloat16_draws_much_the_same() -> None:
    system = tiny()
    wanted = system.generate([1, 2], output="torch", progress=False).images
    found = system.to_precision("bf16").generate([1, 2], output="torch", progress=False).images
    assert found.dtype == torch.float32 and float((found - wanted).abs().mean()) < 0.1


def test_editing_keeps_known_cells_and_draws_the_others() -> None:
    system, pictures = tiny(), emoji(3)
    redraw = torch.zeros(3, 16, 16, dtype=torch.bool)
    redraw[0, 4:12, 4:12] = True  # four cells
    redraw[1, :, :8] = True  # eight
    before = system.encode(pictures)[0].unflatten(1, (4, 4))
    drawn = system.edit(pictures, redraw, [1, 2, 3], output="torch", iterations=3, progress=False)
    after, hole = drawn.tokens[0].unflatten(1, (4, 4)), redraw[:, ::4, ::4]
    assert torch.equal(before[~hole], after[~hole])
    assert not torch.isclose(before[hole], after[hole]).all(-1).any()
    again = system.edit(pictures[1:2], redraw[1:2], [2], seeds=[1], output="torch", iterations=3, progress=False)
    torch.testing.assert_close(again.images, drawn.images[1:2], rtol=1e-4, atol=1e-4)
    everything = system.edit(pictures, torch.ones_like(redraw), [1, 2, 3], output="torch", progress=False)
    fresh = system.generate([1, 2, 3], output="torch", progress=False)
    torch.testing.assert_close(everything.images, fresh.images, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="its shape"):
        system.edit(pictures, redraw[:, :8], [1, 2, 3])


def test_previews_grow_to_the_picture_and_a_likelihood_is_refused() -> None:
    system = tiny()
    seen = [(p.step, p.steps, int(p.run.canvas.value.ne(0).any(1).sum()))
            for p in system.stream([1], output="torch", iterations=3)]
    assert seen == [(0, 3, 3), (1, 3, 8), (2, 3, 16)]
    with pytest.raises(InputError, match="no likelihood"):
        system.log_prob(emoji(1))
    of_scales = replace(system.config.tokenizer, grids=((2, 2), (4, 4)))
    assert MAR(replace(system.config, tokenizer=of_scales)).plan == system.plan, "the last scale is the map"


# Training

def test_masked_shares_are_a_truncated_normal() -> None:
    assert masked_share(0.7, 0.0) == pytest.approx(0.7) and masked_share(0.7, 1.0) == pytest.approx(1.0)

    def normal(x: float) -> float:
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    low = normal(-1.2)
    for u in (0.1, 0.5, 0.9):
        assert (normal((masked_share(0.7, u) - 1) / 0.25) - low) / (0.5 - low) == pytest.approx(u)
    torch.manual_seed(0)
    drawn = torch.tensor([masked_share(0.7) for _ in range(2000)])
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (-1.2, 0.0)]
    wanted = 1 + 0.25 * (density[0] - density[1]) / (0.5 - low)
    assert float(drawn.mean()) == pytest.approx(wanted, abs=0.006)


def test_the_head_is_spared_weight_decay() -> None:
    system = tiny()
    decayed, plain = GeneratorTask(system).parameter_groups("main", 0.02)
    head = {id(p) for p in system.head.parameters()}
    assert not head & {id(p) for p in decayed["params"]} and head <= {id(p) for p in plain["params"]}
    assert id(system.generator.encoder[0].mlp.expand.weight) in {id(p) for p in decayed["params"]}


def test_only_masked_tokens_count_and_every_picture_has_places_of_its_own() -> None:
    system = tiny()
    target, cond = torch.randn(3, 16, 8), system.labels(labels(3)).detach()
    order = torch.rand(3, 16).argsort(1)
    seen: list[Tensor] = []

    def loss(hidden: Tensor, wanted: Tensor) -> Tensor:
        seen.append(wanted)
        return wanted.mean(-1)

    system.head.loss = loss
    found = system.masked_loss(target, order, 5, cond)
    hidden_places = order[:, 11:]
    wanted = torch.stack([target[b, hidden_places[b]] for b in range(3)])
    assert torch.equal(seen[0], wanted) and float(found) == pytest.approx(float(wanted.mean()))


def test_the_loss_falls_on_a_few_pictures() -> None:
    torch.manual_seed(0)
    system = tiny().initialise().train()
    tokens = [torch.randn(4, 16, 8)]
    optimiser, found = torch.optim.AdamW([p for n, p in system.named_parameters() if "tokenizer" not in n], lr=3e-3), []
    for _ in range(40):
        loss, by_step, guessed = system.loss(tokens, labels(4), 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
        assert guessed is None and by_step.shape == (1,)
    with pytest.raises(InputError, match="label_smoothing is for codes"):
        system.loss(tokens, labels(4), label_smoothing=0.1)
    assert sum(found[-10:]) < 0.75 * sum(found[:10])


# Published weights

SIZES = {"mar-base": (207_924_768, 35_749_920), "mar-large": (478_326_304, 72_230_432),
         "mar-huge": (942_403_104, 151_206_944)}


def published_shapes(config: MARGeneratorConfig, tokens: int = 256, c: int = 16) -> dict[str, tuple[int, ...]]:
    d, w = config.width, config.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "class_emb.weight": (1000, d), "fake_latent": (1, d), "z_proj.weight": (d, c), "mask_token": (1, 1, d),
        "encoder_pos_embed_learned": (1, 64 + tokens, d), "decoder_pos_embed_learned": (1, 64 + tokens, d),
        "diffusion_pos_embed_learned": (1, tokens, d), "decoder_embed.weight": (d, d)}
    shapes |= {f"{name}.bias": (d,) for name in ("z_proj", "z_proj_ln", "encoder_norm", "decoder_norm",
                                                 "decoder_embed")}
    shapes |= {f"{name}.weight": (d,) for name in ("z_proj_ln", "encoder_norm", "decoder_norm")}
    block = {"norm1": (d,), "norm2": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
             "mlp.fc2": (d, 4 * d)}
    for side, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for i in range(depth):
            for name, shape in block.items():
                shapes |= {f"{side}_blocks.{i}.{name}.weight": shape, f"{side}_blocks.{i}.{name}.bias": shape[:1]}
    return shapes | head_shapes("diffloss", d, w, config.head_depth, c)


def head_shapes(name: str, d: int, w: int, depth: int, c: int) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {
        "time_embed.mlp.0": (w, 256), "time_embed.mlp.2": (w, w), "cond_embed": (w, d), "input_proj": (w, c),
        "final_layer.linear": (2 * c, w), "final_layer.adaLN_modulation.1": (2 * w, w)}
    for i in range(depth):
        parts |= {f"res_blocks.{i}.in_ln": (w,), f"res_blocks.{i}.mlp.0": (w, w), f"res_blocks.{i}.mlp.2": (w, w),
                  f"res_blocks.{i}.adaLN_modulation.1": (3 * w, w)}
    return {f"{name}.net.{part}.{end}": shape if end == "weight" else shape[:1]
            for part, shape in parts.items() for end in ("weight", "bias")}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_parameters_and_names(name: str) -> None:
    config = preset_config(name)
    with torch.device("meta"):
        system = MAR(config)
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    assert sum(p.numel() for p in parts) == SIZES[name][0]
    assert sum(p.numel() for p in system.head.parameters()) == SIZES[name][1]
    assert sum(p.numel() for p in system.tokenizer.parameters()) == 66_456_019
    shapes = published_shapes(config.generator)
    assert sum(math.prod(shape) for shape in shapes.values()) == SIZES[name][0]
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    for wrong in ("fake_latent", "mask_token"):
        with pytest.raises(WeightsError):
            folders.load_published(system, generator={k: v for k, v in published.items() if k != wrong})


def test_averaged_weights_are_taken_from_a_training_checkpoint(tmp_path: Path) -> None:
    system = tiny()
    config = system.config.generator
    shapes = published_shapes(config, 16, 8)
    shapes |= {"class_emb.weight": (5, 48), "encoder_pos_embed_learned": (1, 19, 48),
               "decoder_pos_embed_learned": (1, 19, 48)}
    plain, averaged = ({key: torch.full(shape, value) for key, shape in shapes.items()} for value in (1.0, 2.0))
    torch.save({"model": plain, "model_ema": averaged}, tmp_path / "checkpoint-last.pth")
    folders.load_published(system, generator=tmp_path / "checkpoint-last.pth")
    assert bool((system.generator.masked == 2).all()) and bool((system.labels.tables[0].weight == 2).all())
    folders.load_published(system, generator=plain)
    assert bool((system.generator.masked == 1).all())


def test_constructors_that_no_published_model_has_are_refused() -> None:
    with pytest.raises(InputError, match="patch_size=2 is not built here"):
        published_config({}, {"patch_size": 2})
    with pytest.raises(InputError, match="did you mean 'mar-base'"):
        preset_config("mar-bse")
    with pytest.raises(InputError, match="can't be split into 5 heads"):
        MARGeneratorConfig(48, heads=5)


def test_the_command_line_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.width=32", "generator.encoder_depth=1", "generator.decoder_depth=1", "generator.heads=2",
            "generator.buffer=2", "generator.head_width=16", "generator.head_depth=1", "data.held_out=2",
            "train.minutes=5", "settings.iterations=3", "settings.solver_steps=3"]
    command = ["train", "generator", "--system", "mar", "--data", "pictures", "--tokenizer", "tokenizer"]
    assert main.run([*command, *(part for one in sets for part in ("--set", one)), "--out", "mar"]) == 0
    trained = nextscale.load("mar/model")
    assert trained.config.settings["pictures"].iterations == 3
    assert main.run(["generate", "--model", "mar/model", "--count", "2", "--out", "a.png"]) == 0
    assert main.run(["generate", "--model", "mar/model", "--count", "2", "--out", "a.gif"]) == 0
    draw = ["generate", "--model", "mar/model", "--count", "1", "--out", "b.png"]
    assert main.run([*draw, "--guidance-schedule", "constant", "--temperature", "0.9", "--set", "iterations=5"]) == 0
    assert main.run([*draw, "--set", "iterations=many"]) == 2 and main.run([*draw, "--set", "iteration=5"]) == 2
    edit = ["edit", "--picture", "b.png", "--model", "mar/model", "--resize", "--out", "c.png"]
    assert main.run([*edit, "--box", "0,0,8,16", "--set", "solver_steps=2"]) == 0


def test_a_context_with_its_checks_on_finds_nothing_amiss() -> None:
    system = tiny()
    cells = Plan.scales([4]).cells[None]
    call = system.generator.call_of(torch.randn(2, 5, 8), cells, system.labels(labels(2)), 0, slice(5, 16))
    with torch.no_grad():
        assert system.generator(call, Context(check=True)).shape == (2, 16, 48)


def test_what_a_generation_costs_is_counted() -> None:
    found = cost_of(tiny(), [1, 2], guidance_scale=2.0, iterations=4, solver_steps=5)
    assert (found.steps, found.evaluations, found.head_evaluations, found.memory_bytes) == (4, 4, 20, 0)
    assert found.rows == 4 * 2 * 2 * (3 + 16), "every step evaluates all anew"


def test_settings_that_make_no_sense_and_enlarging_are_refused() -> None:
    for changes, message in (({"clip": -1.0}, "clip is -1"), ({"clip": float("nan")}, "clip is nan"),
                             ({"temperature": -0.5}, "temperature is -0.5")):
        with pytest.raises(InputError, match=message):
            tiny().generate([1], progress=False, **changes)
    with pytest.raises(InputError, match="MAR can't enlarge"):
        tiny().enlarge(emoji(1), 1)
