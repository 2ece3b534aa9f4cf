"""xAR: entities of one plan type, noisy context, clean memory behind a noisy step, both solvers, published names."""
from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flowar import Shuffled, kl, linear, stack_shapes
from tiny import emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.context import Context, Hook
from nextscale.errors import InputError, WeightsError
from nextscale.generators.xar import XARGeneratorConfig
from nextscale.layers.time_embedding import thousandths
from nextscale.noise import Keyed
from nextscale.objectives.noisy_context import noisy_context_call, noisy_context_loss
from nextscale.objectives.teacher_forcing import masked_context
from nextscale.plan import Step, entities
from nextscale.run import At
from nextscale.sampling.flow import stochastic_times, uniform_times
from nextscale.sampling.guidance import Unguided
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import folders
from nextscale.systems.xar import XAR, XARConfig, XARSettings, preset_config, published_config
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.gaussian import GaussianLatents

KINDS = (("token", 1), ("cell", 2), ("subsample", 2), ("scale", 1), ("image", 1))


def tiny(entity: str = "cell", size: int = 2, dropout: float = 0.0, **used: Any) -> XAR:
    network = XARGeneratorConfig((1, 1), 48, 2, dropout=dropout, entity=entity, size=size)  # type: ignore[arg-type]
    found = XARSettings(**{"guidance_scale": 3.0, "solver_steps": 5, **used})
    system = XAR(XARConfig(kl(), network, (5,), settings={"pictures": found})).eval()
    fill(system)
    return system


def model(system: XAR) -> Any:
    head = system.head.solved(system.solver(system.config.settings["pictures"]))
    return type("Model", (), {"generator": system.generator, "head": head})()


# Entities

@settings(max_examples=60)
@given(st.sampled_from(["token", "cell", "subsample", "image"]), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 3), st.integers(0, 99))
def test_cutting_a_map_into_entities_and_back_changes_nothing(kind: str, size: int, high: int, wide: int,
                                                              seed: int) -> None:
    grid = (size * high, size * wide)
    plan, codec = entities(kind, (grid,), size), kl((grid,))  # type: ignore[arg-type]
    latent = torch.randn(2, 8, *grid, generator=torch.Generator().manual_seed(seed))
    quantiser = GaussianLatents(codec)
    tokens = pyramid.encode(latent, Canvas.empty(plan, quantiser, 2), lambda k, z: quantiser.quantise(z)).tokens
    back = pyramid.replay(tokens, Canvas.empty(plan, quantiser, 2)).canvas
    assert torch.equal(back.value, latent) and plan.length == grid[0] * grid[1]
    count = {"token": plan.length, "cell": high * wide, "subsample": size * size, "image": 1}[kind]
    assert len(plan) == count and len({step.rows for step in plan}) == 1


def test_published_cells_are_8x8_blocks_in_raster_order() -> None:
    plan = entities("cell", ((16, 16),), 8)
    assert plan.pairs == 64 * (64 + 128 + 192 + 256) == 40_960
    corners = [tuple(plan.cells[plan.starts[n], 1:].tolist()) for n in range(4)]
    assert corners == [(0, 0), (0, 8), (8, 0), (8, 8)]
    latent = torch.arange(256).view(16, 16)
    found = latent[plan.cells[:, 1], plan.cells[:, 2]]
    assert torch.equal(found, latent.view(2, 8, 2, 8).transpose(1, 2).flatten())
    apart = entities("subsample", ((4, 4),), 2)
    assert [step.places for step in apart] == [(0, 2, 8, 10), (1, 3, 9, 11), (4, 6, 12, 14), (5, 7, 13, 15)]
    assert [step.grid for step in entities("scale", ((1, 1), (2, 2), (4, 4)))] == [(1, 1), (2, 2), (4, 4)]


def test_entities_that_do_not_fit_are_refused() -> None:
    for kind, size, message in (("cell", 3, "doesn't divide a grid of 4x4"), ("patch", 1, "entities 'patch'"),
                                ("subsample", 0, "doesn't divide")):
        with pytest.raises(InputError, match=message):
            entities(kind, ((4, 4),), size)  # type: ignore[arg-type]
    for places, message in (((0, 0), "must differ"), ((0, 4), r"lie in 0\.\.3")):
        with pytest.raises(InputError, match=message):
            Step((2, 2), places=places)
    with pytest.raises(InputError, match="2 places"):
        Step((2, 2), count=3, places=(0, 1))


def test_positions_go_by_the_cell_whatever_the_order_of_entities() -> None:
    for kind, size in KINDS[:3]:
        system = tiny(kind, size)
        plan = system.plan
        rows = noisy_context_call(system.generator, plan, torch.zeros(1, 16, 8), torch.zeros(1, len(plan)),
                                  system.labels(labels(1))).rows
        assert torch.equal(system.generator.index(rows)[0], torch.arange(16)), "tables are in the plan's order"
        cos, _ = system.generator.turn(rows, Context())
        row = cos[0, 0, :, 0]  # channel 0 turns by the row of the map
        torch.testing.assert_close(row, plan.cells[:, 1].float().cos())


# One pass and the loop

@torch.no_grad()
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_one_pass_over_clean_context_equals_every_round_of_the_loop(kind: str, size: int) -> None:
    system = tiny(kind, size)
    plan, cond = system.plan, system.labels(labels(2))
    tokens = system.encode(emoji(2))
    run, guidance = system.start(labels(2), Unguided(), Keyed.from_seeds([0, 1])), Unguided()
    evaluate = evaluator(system.generator, run, check=True)
    for n in range(len(plan)):
        call = system.generator.call(run)
        assert call.again is not None
        state = torch.randn(2, plan.steps[n].rows, 8)
        for first, time in ((True, 0.9), (False, 0.6), (False, 0.0401)):
            here = call.again(state, time, first)
            assert len(here.rows) == plan.steps[n].rows + (plan.steps[n - 1].rows if first and n else 0)
            found = system.head(evaluate(here)[:, here.predicts])
            vectors = torch.cat([*tokens[:n], state, *tokens[n + 1:]], 1)
            times = torch.zeros(2, len(plan), dtype=torch.float64)
            times[:, n] = time
            whole = noisy_context_call(system.generator, plan, vectors, times, cond)
            wanted = system.head(system.generator(whole, masked_context(plan, cond)))
            torch.testing.assert_close(found, wanted[:, plan.span(n, n + 1)], atol=1e-4, rtol=0)
        held = 0 if run.memory.log is None else len(run.memory.log)
        assert held == plan.starts[n] and run.filled == n, "entities before this one, clean; never this one"
        run.force(tokens[n])
    assert guidance.branches == ("conditional",)


@torch.no_grad()
def test_given_entities_are_taken_into_memory_in_one_call() -> None:
    system = tiny("token")
    tokens, guidance = system.encode(emoji(2)), Unguided()
    slow, fast = (system.start(labels(2), guidance, Keyed.from_seeds([3, 4])) for _ in range(2))
    for k in range(9):
        call = system.generator.call(slow)
        evaluator(system.generator, slow)(call)
        slow.force(tokens[k])
        fast.force(tokens[k])
    parts = [next(iter(sample_steps(model(system), run, guidance))) for run in (slow, fast)]
    torch.testing.assert_close(parts[0].tokens[-1], parts[1].tokens[-1], atol=1e-4, rtol=1e-4)
    assert len(slow.memory.log) == len(fast.memory.log) == 9


@torch.no_grad()
def test_memory_of_the_noisy_step_would_be_wrong() -> None:
    """The previous entity is run again clean: what is kept depends on its result, not on its last noisy state."""
    system = tiny()
    run = system.start(labels(1), Unguided(), Keyed.from_seeds([0]))
    steps = sample_steps(model(system), run, Unguided())
    next(steps), next(steps)
    kept = run.memory.groups["base.0.kv"][0].k[:, :, :4]
    cond, plan = system.labels(labels(1)), system.plan
    call = noisy_context_call(system.generator, plan, torch.cat([run.tokens[0], torch.zeros(1, 12, 8)], 1),
                              torch.zeros(1, 4), cond)
    seen: list[Tensor] = []

    class Keep(Hook):
        def attend(self, ctx: Any, address: str, q: Tensor, k: Any, v: Any, rows: Any, inner: Any) -> Tensor:
            seen.append(k)
            return inner(q, k, v, rows)

    system.generator(call, Context(None, [Keep()]))
    torch.testing.assert_close(kept, seen[0][:, :, :4], atol=1e-5, rtol=1e-4)


# The flow

def counted(system: XAR) -> list[int]:
    rows: list[int] = []
    system.generator.register_forward_hook(lambda module, given, found: rows.append(found.shape[1]))
    return rows


def test_network_evaluations_are_entities_times_steps_and_the_first_also_runs_the_entity_before() -> None:
    system = tiny()
    rows = counted(system)
    system.generate([1], output="torch", progress=False)
    assert rows == [4, 4, 4, 4, 4] + 3 * [8, 4, 4, 4, 4]
    whole = tiny("image", solver="euler", solver_steps=7)
    rows = counted(whole)
    whole.generate([1], output="torch", progress=False)
    assert rows == [16] * 7


@torch.no_grad()
def test_one_entity_is_an_ordinary_flow_model() -> None:
    system = tiny("image", solver="euler", solver_steps=6)
    noise, used = Keyed.from_seeds([5, 6]), system.config.settings["pictures"]
    drawn = system.generate([1, 2], seeds=[5, 6], output="torch", progress=False)
    plan, rows = system.plan, torch.tensor([[1], [2]])
    x = noise.normal("start", torch.zeros(1, 1, dtype=torch.int64), 0, plan.cells[None], 8).double()
    cond = torch.cat([system.labels(rows), system.labels(torch.full_like(rows, 5))])
    for t, following in pairwise(uniform_times(6)):
        time = torch.full((4, 1), t, dtype=torch.float64)
        call = noisy_context_call(system.generator, plan, x.float().repeat(2, 1, 1), time, cond)
        c, u = system.head(system.generator(call, Context())).double().chunk(2)
        x = x + (following - t) * (u + used.guidance_scale * (c - u))
    torch.testing.assert_close(drawn.tokens[0], x.float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_guiding_the_velocity_guides_the_drift_as_published() -> None:
    """The published loop guides d = v - w s / 2 with both branches' scores; d is affine in v, so it is the same."""
    system = tiny(temperature=0.7)
    used = system.config.settings["pictures"]
    guidance, noise = system.guidance(used), Keyed.from_seeds([1])
    run = system.start(labels(1), guidance, noise)
    list(system.loop(run, guidance, used, (), None))
    again, times = system.start(labels(1), guidance, noise), stochastic_times(used.solver_steps)
    for n in range(4):
        call, evaluate = system.generator.call(again), evaluator(system.generator, again)
        step_1L, cells = call.rows.step[:1, call.predicts], again.order[:, system.plan.span(n, n + 1)]
        x = noise.normal("start", step_1L, 0, cells, 8).double()
        scale = 1 + 2.0 * n / 3
        assert call.again is not None
        for i, (t, following) in enumerate(pairwise(times)):
            here = call.again(x.float(), t, i == 0)
            v = system.head(evaluate(here)[:, here.predicts]).double()
            w, both = 2 * t, x.repeat(2, 1, 1)
            d = v - 0.5 * w * ((t - 1) * v - both) / t
            c, u = d.chunk(2)
            x = x + (u + scale * (c - u)) * (following - t)
            if i < len(times) - 2:
                x = x + (w * abs(following - t))**0.5 * 0.7 * noise.normal("solver", step_1L, i, cells, 8).double()
        torch.testing.assert_close(run.tokens[n], x.float(), atol=1e-4, rtol=1e-4)
        again.force(x.float())


@pytest.mark.parametrize("solver", ["euler", "euler-maruyama"])
def test_a_picture_does_not_hang_on_its_batch(solver: str) -> None:
    system = tiny(solver=solver)
    both = system.generate([1, 2], seeds=[7, 8], output="torch", progress=False)
    alone = system.generate([2], seeds=[8], output="torch", progress=False)
    for a, b in zip(both.tokens, alone.tokens, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-4, rtol=1e-4)
    other = system.generate([2], seeds=[9], output="torch", progress=False)
    assert not torch.allclose(other.tokens[0], alone.tokens[0], atol=1e-2)
    assert both.images.shape == (2, 3, 16, 16) and both.log_prob is None


@torch.no_grad()
def test_a_run_can_be_gathered_in_the_middle() -> None:
    system = tiny("subsample")
    guidance = system.guidance(system.config.settings["pictures"])
    run = system.start(labels(3), guidance, Keyed.from_seeds([0, 1, 2]))
    steps = sample_steps(model(system), run, guidance)
    next(steps), next(steps)
    turned = run.gather([2, 0, 1])
    for part in (run, turned):
        list(sample_steps(model(system), part, guidance))
    torch.testing.assert_close(turned.canvas.value, run.canvas.value[[2, 0, 1]], atol=1e-4, rtol=1e-4)


def test_editing_keeps_the_cells_that_stay() -> None:
    system, pictures = tiny(), emoji(2)
    redraw = torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    drawn = system.edit(pictures, redraw, [0, 1], output="torch", progress=False)
    known = system.encode(pictures)
    assert torch.equal(drawn.tokens[0], known[0]) and torch.equal(drawn.tokens[2], known[2])
    assert not torch.allclose(drawn.tokens[1], known[1], atol=1e-2)


def test_settings_that_do_not_fit_are_refused() -> None:
    for used, message in (({"solver": "heun"}, "solver 'heun'"), ({"solver_steps": 1}, "at least 2"),
                          ({"solver": "euler", "temperature": 0.5}, "adds no noise")):
        with pytest.raises(InputError, match=message):
            tiny().generate([1], progress=False, **used)
    with pytest.raises(InputError, match="clusters=16"):
        published_config({}, {"clusters": 16})
    assert tiny().guidance(XARSettings(3.0))({"conditional": torch.ones(1), "unconditional": torch.zeros(1)},
                                             At(0, 4, 0, 16, time=0.5)) == 1


# Training

def test_every_entity_has_a_time_and_the_loss_is_of_all_positions() -> None:
    system = tiny()
    tokens, plan = system.encode(emoji(3)), system.plan
    torch.manual_seed(2)
    loss, by_step, _ = system.loss(tokens, labels(3), 0.0)
    torch.manual_seed(2)
    torch.rand(3, 1)  # the labels' draw
    time, noise = torch.randn(3, 4).sigmoid(), torch.randn(3, 16, 8)
    with torch.no_grad():
        t, target = time.repeat_interleave(4, 1)[..., None], torch.cat(tokens, 1)
        call = noisy_context_call(system.generator, plan, (1 - t) * target + t * noise, time, system.labels(labels(3)))
        velocity = system.head(system.generator(call, masked_context(plan, time)))
    torch.testing.assert_close(loss, (velocity - (noise - target)).square().mean())
    torch.testing.assert_close(loss, by_step.mean())
    torch.manual_seed(2)
    only, _, _ = system.loss(tokens, labels(3), 0.0, step_weights=(0, 1, 0, 0))
    torch.testing.assert_close(only, by_step[1])
    given, _ = noisy_context_loss(system.generator, system.head, plan, tokens, system.labels(labels(3)),
                                  draws=(time, noise))
    torch.testing.assert_close(given, loss)
    torch.manual_seed(2)
    assert system.loss(tokens[:2], labels(3), 0.0)[1].shape == (2,)


def test_clean_context_learns_one_entity_a_picture_from_what_the_sampler_has() -> None:
    system = tiny()
    tokens, cond = system.encode(emoji(8)), system.labels(labels(8))

    def loss(given: list[Tensor], noise: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return noisy_context_loss(system.generator, system.head, system.plan, given, cond, clean=True,
                                  draws=(torch.full((8, 4), 0.6), noise))

    noise = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(1))
    one, by_step = loss(tokens, noise)
    torch.manual_seed(3)
    drawn = (torch.rand(8) * 4).long()  # entities of four rows each
    with torch.no_grad():
        found = []
        for picture, entity in enumerate(drawn.tolist()):
            time = torch.zeros(1, 4)
            time[0, entity] = 0.6
            x = torch.cat(tokens, 1)[picture:picture + 1].clone()
            here = slice(4 * entity, 4 * entity + 4)
            wanted = noise[picture:picture + 1, here] - x[:, here]
            x[:, here] = 0.4 * x[:, here] + 0.6 * noise[picture:picture + 1, here]
            call = noisy_context_call(system.generator, system.plan, x, time, cond[picture:picture + 1])
            velocity = system.head(system.generator(call, masked_context(system.plan, cond)))
            found.append((velocity[:, here] - wanted).square().mean())
    torch.testing.assert_close(one, torch.stack(found).mean(), rtol=1e-4, atol=1e-5)
    for entity in drawn.unique().tolist():
        torch.testing.assert_close(by_step[entity], torch.stack(found)[drawn == entity].mean(), rtol=1e-4, atol=1e-5)


def test_times_reach_the_network_in_thousandths_a_time_an_entity() -> None:
    system = tiny()
    cond = system.labels(labels(1))

    def velocity(times: list[float]) -> Tensor:
        call = noisy_context_call(system.generator, system.plan, torch.ones(1, 16, 8), torch.tensor([times]), cond)
        return system.head(system.generator(call, masked_context(system.plan, cond)))

    one, same, other = velocity([0.3001, 0.5, 0, 0]), velocity([0.3009, 0.5, 0, 0]), velocity([0.3001, 0.52, 0, 0])
    assert thousandths(torch.tensor([0.3001, 0.3009])).tolist() == [300, 300]
    assert torch.equal(one, same) and torch.equal(one[:, :4], other[:, :4])
    assert bool(((one - other).abs().amax(-1)[0, 4:] > 1e-6).all()), "later entities see the changed one"


def learns(system: XAR, many: Callable[[Tensor], Tensor], steps: int) -> tuple[float, float]:
    tokens = [many(t) for t in system.encode(emoji(1))]
    rows = torch.zeros(len(tokens[0]), 1, dtype=torch.int64)
    wanted = [p for m in (system.generator, system.head, system.labels) for p in m.parameters()]
    optimiser, losses = torch.optim.AdamW(wanted, lr=4e-3), []
    for step in range(steps):
        torch.manual_seed(step)
        loss, _, _ = system.loss(tokens, rows, 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses[:5]) / 5, sum(losses[-10:]) / 10


def test_training_learns_and_its_samples_come_near_the_picture() -> None:
    torch.manual_seed(0)
    system = tiny(solver_steps=12, solver="euler", guidance_scale=1.0).initialise()
    first, last = learns(system, lambda t: t.expand(8, -1, -1), 120)
    assert last < 0.4 * first
    drawn, known = system.generate([0] * 4, output="torch", progress=False), system.encode(emoji(1))
    apart = [float((a - b).square().mean() / b.square().mean()) for a, b in zip(drawn.tokens, known, strict=True)]
    assert sum(apart) / 4 < 0.5


@torch.no_grad()
@pytest.mark.parametrize(("kind", "size"), [("cell", 2), ("scale", 1)])
def test_rows_carry_their_place_and_time_into_every_branch(kind: str, size: int) -> None:
    system = tiny(kind, size)
    plan, cond = system.plan, system.labels(labels(2))
    call = noisy_context_call(system.generator, plan, torch.randn(2, plan.length, 8), torch.rand(2, len(plan)), cond)
    plain, shuffled = (system.generator(call, Context(None, hooks)) for hooks in ([], [Shuffled()]))
    torch.testing.assert_close(plain, shuffled, atol=1e-4, rtol=1e-4)


def test_a_network_compiled_as_one_graph_gives_the_same() -> None:
    system = tiny()
    tokens, found = system.encode(emoji(2)), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(system.loss(tokens, labels(2), 0.0)[0])
        system.generator.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(*found)


# Published sizes

@pytest.mark.parametrize(("name", "millions"), [("xar-base", 172.6), ("xar-large", 608.4), ("xar-huge", 1186.0)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: float) -> None:
    config = preset_config(name)
    sizes = config.generator
    with torch.device("meta"):
        system = XAR(config)
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    assert round(sum(p.numel() for p in parts) / 1e6, 1) == millions
    turns = {"freqs_cos": (256, sizes.width // sizes.heads), "freqs_sin": (256, sizes.width // sizes.heads)}
    shapes = stack_shapes(sizes.width, sizes.depth, sizes.heads, 256, turns)
    for layer, rows, columns in (("time_embed.mlp.0", sizes.width, 256), ("time_embed.mlp.2", sizes.width, sizes.width),
                                 ("pred", 16, sizes.width)):
        shapes |= {f"{layer}.{kind}": shape for kind, shape in linear(rows, columns).items()}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    with pytest.raises(WeightsError, match=r"head\.weight"):
        folders.load_published(system, generator={k: v for k, v in published.items() if k != "pred.weight"})
    used = config.settings["fid"]
    assert (used.guidance_scale, used.solver_steps) == {"xar-base": (2.7, 40), "xar-large": (2.3, 50),
                                                        "xar-huge": (2.2, 50)}[name]
    assert used.solver == "euler-maruyama" and len(system.plan) == 4


def test_a_folder_gives_back_the_system_and_its_settings(tmp_path: Path) -> None:
    system = tiny("subsample", solver="euler")
    folders.save(system, tmp_path / "model", torch.float32)
    again = folders.load(tmp_path / "model")
    assert isinstance(again, XAR) and again.config == system.config and again.plan == system.plan
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(name), value) for name, value in system.state_dict().items()) and not weights
    one, other = (s.generate([1], output="torch", progress=False).images for s in (system, again))
    # Weights of a file lie elsewhere in memory, and products of floats may be added up in another order there.
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    low = folders.load(tmp_path / "model", "bf16").generate([1], output="torch", progress=False)
    assert bool(low.images.isfinite().all())


def test_the_small_preset_is_a_few_million_parameters_on_an_8x8_latent() -> None:
    with torch.device("meta"):
        system = XAR(preset_config("xar-64px"))
    count = sum(p.numel() for part in (system.generator, system.head, system.labels) for p in part.parameters())
    assert 3e6 < count < 9e6 and [step.rows for step in system.plan] == [16] * 4
    assert system.tokenizer.picture_size == (64, 64)


def test_recipes_are_of_the_small_preset_s_sizes() -> None:
    from nextscale.configuration import build
    from nextscale.training.recipes import read_recipe

    config, recipe = preset_config("xar-64px"), read_recipe("own-64-xar")
    assert build(XARGeneratorConfig, recipe["generator"]) == config.generator
    assert config.tokenizer.grids[-1] == (8, 8) and recipe["system"] == "xar"


def test_the_command_line_trains_it_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=4", "train.batch_size=8", "train.sample_every=2", "train.checkpoint_every=4", "data.size=16",
            "generator.depth=[1,1]", "generator.width=32", "generator.heads=2", "generator.size=2", "data.held_out=4",
            "settings.solver_steps=4", "train.minutes=5"]
    command = ["train", "generator", "--system", "xar", "--data", "pictures", "--tokenizer", "tokenizer", "--out",
               "run"]
    assert main.run([*command, *(part for one in sets for part in ("--set", one))]) == 0
    system = nextscale.load("run/model")
    assert isinstance(system, XAR) and system.config.settings["pictures"].solver_steps == 4 and len(system.plan) == 4
    assert main.run(["generate", "--model", "run/model", "--count", "2", "--out", "a.gif"]) == 0
    assert (tmp_path / "a.gif").exists()


def test_only_entities_that_are_scales_can_be_given_to_enlarge() -> None:
    with pytest.raises(InputError, match="entities 'cell' can't enlarge"):
        tiny().enlarge(emoji(1), 1)
    system, small = tiny("scale", solver_steps=2), emoji(1)[..., ::2, ::2]
    drawn = system.enlarge(small, 1, scales=1, output="torch", progress=False)
    whole = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(drawn.tokens[0], system.encode(whole)[0], atol=1e-4, rtol=1e-4)
