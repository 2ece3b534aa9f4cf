"""FlowAR: a flow a scale under next-scale prediction; solvers, guidance in time, loss, sizes, published names."""
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import AUTOENCODER, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.context import Context, Hook
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.flowar import FlowARGeneratorConfig
from nextscale.heads.flow_transformer import FlowHeadConfig, FlowTransformerHead
from nextscale.layers.time_embedding import thousandths
from nextscale.noise import Keyed
from nextscale.objectives.teacher_forcing import teacher_forced, teacher_forcing_call
from nextscale.plan import Plan
from nextscale.run import At, Rows
from nextscale.sampling.flow import euler, euler_maruyama, fine_end_times, score, stochastic_times, uniform_times
from nextscale.sampling.guidance import Unguided, WithinTimes
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import folders
from nextscale.systems.flowar import FlowAR, FlowARConfig, FlowARSettings, preset_config
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig

GRIDS = ((1, 1), (2, 2), (4, 4))


def kl(grids: tuple[tuple[int, int], ...] = GRIDS, width: int = 32) -> TokenizerConfig:
    sizes = replace(AUTOENCODER, width=width, multipliers=(1, 1, 1), attention="encoder", latent_kernel=1)
    return TokenizerConfig(sizes, grids, kind="kl", latent_scale=0.5)


def tiny(cross: bool = False, grids: tuple[tuple[int, int], ...] = GRIDS, width: int = 32, dropout: float = 0.0,
         **used: Any) -> FlowAR:
    network = FlowARGeneratorConfig((1, 1), 48, 2, dropout=dropout, flow=FlowHeadConfig(2, 32, 2, cross=cross))
    found = FlowARSettings(**{"guidance_scale": 3.0, "solver_steps": 6, **used})
    system = FlowAR(FlowARConfig(kl(grids, width), network, (5,), settings={"pictures": found})).eval()
    fill(system)
    return system


@torch.no_grad()
def reads_of(system: FlowAR, tokens: list[Tensor]) -> list[Tensor | None]:
    canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, len(tokens[0]))
    return pyramid.replay(tokens, canvas).reads


# The transformer

def test_rows_see_all_coarser_scales_and_their_own() -> None:
    plan = preset_config("flowar-small").tokenizer.plan
    assert (plan.pairs, plan.length**2) == (93_093, 116_281)


@torch.no_grad()
def test_one_call_equals_the_loop_with_its_memory() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    whole = teacher_forced(system.generator, system.plan, reads_of(system, tokens), system.labels(labels(2)))
    run, parts = system.start(labels(2), Unguided(), Keyed.from_seeds([0, 1])), []
    for given_tokens in tokens:
        call = system.generator.call(run)
        parts.append(evaluator(system.generator, run, check=True)(call)[:, call.predicts])
        run.force(given_tokens)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_transformer_runs_once_a_scale_however_many_steps_the_solver_takes() -> None:
    for steps, evaluations in ((2, 2), (6, 6), (7, 6), (50, 50)):
        system = tiny(solver_steps=steps, guidance_scale=1.0)
        counts = {"generator": 0, "head": 0}
        for name in counts:
            def count(*_: Any, name: str = name, counts: dict[str, int] = counts) -> None:
                counts[name] += 1
            getattr(system, name).register_forward_hook(count)
        system.generate([1], output="torch", progress=False)
        assert counts == {"generator": len(GRIDS), "head": len(GRIDS) * evaluations}
    cost = cost_of(tiny(solver_steps=4, guidance_scale=1.0), [1, 2])
    assert (cost.evaluations, cost.head_evaluations, cost.rows) == (3, 12, 2 * 21)


@torch.no_grad()
def test_scales_share_one_frame_of_places() -> None:
    system = tiny()
    rows = teacher_forcing_call(system.generator, system.plan, reads_of(system, system.encode(emoji(1))),
                                system.labels(labels(1))).rows
    cos, _ = system.generator.turn(rows, Context())
    coarse, fine = cos[0, 0, 1:5].view(2, 2, -1), cos[0, 0, 5:].view(4, 4, -1)
    torch.testing.assert_close(coarse, fine[::2, ::2])
    torch.testing.assert_close(system.head.turn(1, torch.device("cpu"))[0][:, :2], coarse.flatten(0, 1)[:, :2])
    assert torch.equal(system.generator.index(rows)[0], torch.arange(21))


# The flow

rising = st.lists(st.floats(0.01, 0.99), min_size=0, max_size=6, unique=True)


@settings(max_examples=40)
@given(rising, st.integers(0, 99))
def test_the_true_velocity_leads_to_the_target_on_any_grid_of_times(inner: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise, target = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    times = [1.0, *sorted(inner, reverse=True), 0.0]
    torch.testing.assert_close(euler(lambda x, t: noise - target, noise, times), target)
    state = 0.7 * noise + 0.3 * target
    torch.testing.assert_close(score(noise - target, state, 0.7), -noise / 0.7)


def test_the_stochastic_solver_s_last_interval_leaves_a_share_of_the_noise() -> None:
    """x(0.04) - 0.04 drift = s - 0.04 e, with e what of the state is noise."""
    target, noise = torch.randn(2, 64, 8, dtype=torch.float64)

    def field(x: Tensor, t: float) -> Tensor:  # every state's own line to the target
        return (x - target) / t

    found = euler_maruyama(field, noise, stochastic_times(40), lambda i: torch.randn_like(noise))
    apart = (found - target) / 0.04
    assert 0.3 < float(apart.square().mean()) < 5 and float(apart.abs().max()) < 10


def test_without_diffusion_the_stochastic_solver_is_euler_s() -> None:
    x, times = torch.randn(2, 3, dtype=torch.float64), stochastic_times(6)

    def field(x: Tensor, t: float) -> Tensor:
        return x.sin() + t

    found = euler_maruyama(field, x, times, lambda i: pytest.fail("no noise is asked for"), lambda t: 0.0)
    assert torch.equal(found, euler(field, x, times))
    drawn: list[int] = []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return torch.zeros_like(x)

    euler_maruyama(field, x, times, noise)
    assert drawn == [0, 1, 2, 3, 4], "the last interval has drift alone"


def test_times_are_the_published_ones() -> None:
    fine = fine_end_times(25)
    assert len(fine) == 25 and fine[11] == pytest.approx(0.3) and fine[12] == 0.25 and (fine[0], fine[-1]) == (1, 0)
    assert len(uniform_times(50)) == 51 and uniform_times(4) == [1, 0.75, 0.5, 0.25, 0]
    assert stochastic_times(40)[-2:] == [pytest.approx(0.04), 0.0] and len(stochastic_times(40)) == 41
    assert thousandths(torch.tensor([1.0, 0.9999, 0.3, 0.0], dtype=torch.float64)).tolist() == [1000, 999, 300, 0]
    for times in (fine_end_times, stochastic_times):
        with pytest.raises(InputError, match="at least 2"):
            times(1)


@torch.no_grad()
def test_pooled_modulation_does_not_know_which_position_said_what() -> None:
    changed = {}
    for pooled in (False, True):
        torch.manual_seed(0)
        head = FlowTransformerHead(FlowHeadConfig(2, 32, 2, pooled=pooled), Plan.scales(GRIDS), 4, 48)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        step = len(GRIDS) - 1
        rows = head.plan.steps[step].rows
        z, x, time = torch.randn(2, rows, 48), torch.randn(2, rows, 4), torch.full((2,), 0.5)
        ours, other = (head(x, time, head.condition(step, given)) for given in (z, z.flip(1)))
        changed[pooled] = float((ours - other).abs().max())
    assert changed[True] < 1e-4 < 1e-2 < changed[False]


@torch.no_grad()
def test_spatial_modulation_by_one_vector_everywhere_is_ordinary_modulation() -> None:
    head = tiny().head
    x, z = torch.randn(2, 16, 8), torch.randn(2, 1, 48)
    time = torch.tensor([0.3, 0.8])
    everywhere = head(x, time, head.condition(2, z.expand(-1, 16, -1)))
    ordinary = head.condition(2, z.expand(-1, 16, -1))._replace(embedded=head.condition_embedding(z))
    torch.testing.assert_close(everywhere, head(x, time, ordinary))
    other = head(x, time, head.condition(2, z + torch.randn(2, 16, 48)))
    assert not torch.allclose(everywhere, other, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
def test_positions_of_a_scale_move_together(cross: bool) -> None:
    head = tiny(cross).head
    x, z, time = torch.randn(1, 4, 8), torch.randn(1, 4, 48), torch.tensor([0.5])
    condition = head.condition(1, z)
    before = head(x, time, condition)
    x[:, 0] += 1
    assert bool(((head(x, time, condition) - before).abs().amax(-1) > 1e-4).all())
    z[:, 0] += 1
    apart = (head(x, time, head.condition(1, z)) - head(x, time, condition)).abs().amax(-1)
    assert bool((apart > 1e-5).all())


# Sampling

@torch.no_grad()
def test_guidance_waits_for_its_time_and_the_other_half_s_noise_reaches_nothing() -> None:
    """The published loop keeps two states with noise of their own until guidance begins; here there is one."""
    system = tiny(guidance_until=0.6, solver_steps=8, times="uniform")
    used = system.config.settings["pictures"]
    guidance, noise = system.guidance(used), Keyed.from_seeds([3, 4])
    run = system.start(labels(2), guidance, noise)
    for _ in system.loop(run, guidance, used, (), None):
        pass
    again = system.start(labels(2), guidance, noise)
    for k in range(len(GRIDS)):
        call = system.generator.call(again)
        condition = system.head.condition(k, evaluator(system.generator, again)(call)[:, call.predicts])
        own = noise.normal("start", call.rows.step[:1, call.predicts], 0, again.order[:, system.plan.span(k, k + 1)], 8)
        x = torch.cat([own, torch.randn_like(own)]).double()
        scale = 1 + 2.0 * k / (len(GRIDS) - 1)
        for t, following in pairwise(uniform_times(8)):
            guided = scale > 1 and t <= 0.6
            given = torch.cat([x[:2], x[:2]]) if guided else x
            velocity = system.head(given.float(), torch.full((4,), t, dtype=torch.float64), condition).double()
            if guided:
                c, u = velocity.chunk(2)
                velocity = (u + scale * (c - u)).repeat(2, 1, 1)
            x = x + (following - t) * velocity
        torch.testing.assert_close(run.tokens[k], x[:2].float(), atol=1e-4, rtol=1e-4)
        again.force(x[:2].float())


def test_branches_are_evaluated_only_where_guidance_acts() -> None:
    guidance = WithinTimes(3.0, high=0.9)
    assert guidance.needed(At(1, 3, 0, 1, time=0.9)) == ("conditional", "unconditional")
    assert guidance.needed(At(1, 3, 0, 1, time=0.91)) == ("conditional",)
    assert guidance.needed(At(0, 3, 0, 1, time=0.5)) == ("conditional",), "the first scale is not guided"
    c, u = torch.randn(2, 1, 2, 4)
    found = guidance({"conditional": c, "unconditional": u}, At(1, 3, 0, 1, time=0.5))
    torch.testing.assert_close(found, u + 2.0 * (c - u))
    system = tiny(solver_steps=4, times="uniform", guidance_until=0.5)
    seen: list[int] = []
    system.head.register_forward_hook(lambda module, given, found: seen.append(len(found)))
    system.generate([1, 2], output="torch", progress=False)
    assert seen == [2, 2, 2, 2, 2, 2, 4, 4, 2, 2, 4, 4]
    with pytest.raises(InputError, match="guidance_times"):
        WithinTimes(2.0, low=0.9, high=0.1)


@pytest.mark.parametrize("cross", [False, True])
def test_a_picture_does_not_hang_on_its_batch_nor_on_unguided_scale_1(cross: bool) -> None:
    system = tiny(cross)
    both = system.generate([1, 2], seeds=[7, 8], output="torch", progress=False)
    alone = system.generate([2], seeds=[8], output="torch", progress=False)
    assert both.log_prob is None and both.images.shape == (2, 3, 16, 16)
    for a, b in zip(both.tokens, alone.tokens, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-4, rtol=1e-4)
    plain = system.generate([2], seeds=[8], output="torch", progress=False, guidance_scale=1.0)
    nearly = system.generate([2], seeds=[8], output="torch", progress=False, guidance_scale=1.0 + 1e-7)
    torch.testing.assert_close(plain.tokens[-1], nearly.tokens[-1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain.tokens[-1], alone.tokens[-1], atol=1e-2)


@torch.no_grad()
def test_a_run_can_be_gathered_in_the_middle() -> None:
    system = tiny()
    guidance, used = system.guidance(system.config.settings["pictures"]), system.config.settings["pictures"]
    head = system.head.solved(system.solver(used))
    model = type("Model", (), {"generator": system.generator, "head": head})()

    def finish(run: Any) -> Tensor:
        list(sample_steps(model, run, guidance))
        return run.canvas.value

    run = system.start(labels(3), guidance, Keyed.from_seeds([0, 1, 2]))
    next(iter(sample_steps(model, run, guidance)))
    turned = finish(run.gather([2, 0, 1]))
    torch.testing.assert_close(turned, finish(run)[[2, 0, 1]], atol=1e-4, rtol=1e-4)


def test_settings_that_do_not_fit_are_refused() -> None:
    system = tiny()
    for changes, message in (({"temperature": 0.5}, "adds no noise"), ({"times": "finest"}, "times 'finest'"),
                             ({"solver_steps": 1}, "at least 2"), ({"top_k": 3}, "unknown sampling setting"),
                             ({"guidance_until": 2.0}, "lie in 0..1")):
        with pytest.raises(InputError, match=message):
            system.generate([1], progress=False, **changes)
    with pytest.raises(InputError, match="label_smoothing"):
        system.loss(system.encode(emoji(2)), labels(2), label_smoothing=0.1)
    with pytest.raises(InputError, match="no likelihood"):
        system.log_prob(emoji(2), [0, 1])
    with pytest.raises(InputError, match="kind 'kl'"):
        FlowAR(FlowARConfig(TokenizerConfig()))
    with pytest.raises(InputError, match="multiple of 4"):
        FlowARGeneratorConfig((1, 1), 40, 4)
    with pytest.raises(InputError, match="multiple of 4"):
        FlowHeadConfig(1, 40, 4)


# Training

def test_scales_weigh_by_their_share_of_the_last_one_s_cells() -> None:
    system = tiny()
    tokens = system.encode(emoji(4))
    torch.manual_seed(5)
    loss, by_step, _ = system.loss(tokens, labels(4), 0.0)
    torch.testing.assert_close(loss, (by_step * torch.tensor([1 / 16, 4 / 16, 1.0])).sum())
    torch.manual_seed(5)
    only, _, _ = system.loss(tokens, labels(4), 0.0, step_weights=(0, 2, 0))
    torch.testing.assert_close(only, 2 * by_step[1] * 4 / 16)
    torch.manual_seed(5)
    _, first, _ = system.loss(tokens[:2], labels(4), 0.0)
    assert first.shape == (2,)


def test_the_loss_is_that_of_the_drawn_times_and_noise() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    with torch.no_grad():
        z = teacher_forced(system.generator, system.plan, reads_of(system, tokens), system.labels(labels(2)))
        torch.manual_seed(1)
        found = system.head.loss(z, torch.cat(tokens, 1))
        torch.manual_seed(1)
        time_BK, noise = torch.rand(2, 3), torch.randn(2, 21, 8)
        t, e, s = time_BK[:, 2], noise[:, 5:], tokens[2]
        noisy = (1 - t[:, None, None]) * s + t[:, None, None] * e
        velocity = system.head(noisy, t, system.head.condition(2, z[:, 5:]))
    torch.testing.assert_close(found[:, 5:], (velocity - (e - s)).square().mean(-1))


def test_training_learns_and_its_samples_come_near_the_picture() -> None:
    torch.manual_seed(0)
    system = tiny(solver_steps=12, times="uniform", guidance_scale=1.0).initialise()
    tokens, wanted = system.encode(emoji(1)), [p for m in (system.generator, system.head, system.labels)
                                               for p in m.parameters()]
    many = [t.expand(8, -1, -1) for t in tokens]
    rows = torch.zeros(8, 1, dtype=torch.int64)
    optimiser = torch.optim.AdamW(wanted, lr=4e-3)
    for step in range(70):
        torch.manual_seed(step)
        loss, _, _ = system.loss(many, rows, 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == 0:
            first = float(loss.detach())
    assert float(loss.detach()) < 0.25 * first
    drawn = system.generate([0] * 4, output="torch", progress=False)
    apart = [(a - b).square().mean() / b.square().mean() for a, b in zip(drawn.tokens, tokens, strict=True)]
    assert float(apart[-1]) < 0.3 and float(apart[0]) < 0.3


def test_dropout_acts_in_training_alone() -> None:
    system = tiny(dropout=0.3)
    tokens = system.encode(emoji(2))
    reads, cond = reads_of(system, tokens), system.labels(labels(2))
    hidden = [teacher_forced(part, system.plan, reads, cond) for part in (system.generator, system.generator)]
    assert torch.equal(*hidden)
    system.generator.train()
    trained = [teacher_forced(system.generator, system.plan, reads, cond) for _ in range(2)]
    assert not torch.equal(*trained)
    trained[0].sum().backward()
    mean = torch.stack([teacher_forced(system.generator, system.plan, reads, cond).detach() for _ in range(20)]).mean(0)
    apart = [float((found.detach() - hidden[0].detach()).square().mean()) for found in (mean, trained[1])]
    assert apart[0] < apart[1]


class Shuffled(Hook):
    """Every residual branch sees the rows in another order, picture by picture, and gives them back in theirs."""

    def residual(self, ctx: Any, address: str, kind: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        index_RL = torch.stack([torch.randperm(x.shape[1]) for _ in range(len(x))])
        places = index_RL[..., None].expand(x.shape)
        found = inner(x.gather(1, places), rows.select(index_RL))
        return torch.empty_like(x).scatter(1, places, found)


@torch.no_grad()
def test_rows_carry_their_place_into_every_branch() -> None:
    system = tiny()
    reads, cond = reads_of(system, system.encode(emoji(2))), system.labels(labels(2))
    call = teacher_forcing_call(system.generator, system.plan, reads, cond)
    plain, shuffled = (system.generator(call, Context(None, hooks)) for hooks in ([], [Shuffled()]))
    torch.testing.assert_close(plain, shuffled, atol=1e-4, rtol=1e-4)


def test_training_under_bfloat16_comes_near_float32() -> None:
    system = tiny()
    tokens, found = system.encode(emoji(2)), []
    for low in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _, _ = system.loss(tokens, labels(2), 0.0)
        system.zero_grad()
        loss.backward()
        found.append((loss.detach().float(), system.generator.first[0].attention.qkv.weight.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=3e-2, atol=0)
    assert float(torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0)) > 0.98


def test_recomputed_blocks_give_the_same_gradients() -> None:
    system = tiny(dropout=0.2)
    system.train()
    tokens, found = system.encode(emoji(2)), []
    for checkpointing in (False, True):
        system.generator.checkpointing = checkpointing
        system.zero_grad()
        torch.manual_seed(0)
        system.loss(tokens, labels(2), 0.0)[0].backward()
        found.append(system.generator.first[0].attention.qkv.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_any_autoencoder_goes_with_the_same_network() -> None:
    one, other = tiny(), tiny(width=64)
    for part in ("generator", "head", "labels"):
        getattr(other, part).load_state_dict(getattr(one, part).state_dict())
    tokens = [system.generate([1], output="torch", progress=False).tokens[-1] for system in (one, other)]
    assert torch.equal(*tokens)


def test_a_network_compiled_as_one_graph_gives_the_same() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    torch.manual_seed(3)
    plain = system.loss(tokens, labels(2), 0.0)[0]
    system.generator.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.manual_seed(3)
    torch.testing.assert_close(system.loss(tokens, labels(2), 0.0)[0], plain)


# Published sizes

@pytest.mark.parametrize(("name", "millions"),
                         [("flowar-small", 171.7), ("flowar-large", 586.9), ("flowar-huge", 1913.3)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: float) -> None:
    config = preset_config(name)
    with torch.device("meta"):
        system = FlowAR(config)
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    assert round(sum(p.numel() for p in parts) / 1e6, 1) == millions
    published = {key: torch.empty(shape, device="meta") for key, shape in published_shapes(config).items()}
    folders.load_published(system, generator=published)
    for gone in ("flownet.cond_embed.weight", "decoder_pos_embed_learned"):
        with pytest.raises(WeightsError, match=r"condition_embedding|second_position"):
            folders.load_published(system, generator={k: v for k, v in published.items() if k != gone})
    with pytest.raises(WeightsError, match="stranger"):
        folders.load_published(system, generator={**published, "stranger": torch.empty(3, device="meta")})


def linear(rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {"weight": (rows, columns), **({"bias": (rows,)} if bias else {})}


def gated(width: int) -> dict[str, dict[str, tuple[int, ...]]]:
    inner = int(width * 8 / 3)
    return {"mlp.fc1_g": linear(inner, width), "mlp.fc1_x": linear(inner, width), "mlp.fc2": linear(width, inner)}


def stack_shapes(width: int, depth: tuple[int, int], heads: int, length: int,
                 buffers: dict[str, tuple[int, ...]] | None = None) -> dict[str, tuple[int, ...]]:
    """The published list of the transformer that FlowAR and xAR share."""
    block = {"attn.qkv": linear(3 * width, width), "attn.proj": linear(width, width), **gated(width),
             "ada_lin.1": linear(6 * width, width),
             "attn.rope": {"freqs": (width // heads // 4,), **(buffers or {})}}
    parts = {f"{kind}_blocks.{i}.{name}": shapes for kind, count in zip(("encoder", "decoder"), depth, strict=True)
             for i in range(count) for name, shapes in block.items()}
    parts |= {"z_proj": linear(width, 16), "decoder_embed": linear(width, width),
              "class_emb": {"weight": (1001, width)}}
    parts |= {f"{name}": {"weight": (width,)} for name in ("z_proj_ln", "encoder_norm", "decoder_norm")}
    found = {f"{name}.{kind}": shape for name, shapes in parts.items() for kind, shape in shapes.items()}
    return found | {f"{kind}_pos_embed_learned": (1, length, width) for kind in ("encoder", "decoder")} \
        | {"mask": (1, 1, length, length)}


def published_shapes(config: FlowARConfig) -> dict[str, tuple[int, ...]]:
    sizes, flow = config.generator, config.generator.flow
    w, c = flow.width, sizes.width
    block = {"attn.qkv": linear(3 * w, w, False), "attn.proj": linear(w, w), **gated(w),
             "attn.rope": {"freqs": (w // flow.heads // 4,)}}
    if flow.cross:
        block |= {"crossattn.q": linear(w, w, False), "crossattn.kv": linear(2 * w, c, False),
                  "crossattn.proj": linear(w, w), "crossattn.rope": {"freqs": (w // flow.heads // 4,)},
                  "norm2_1": {"weight": (w,)}, "norm2_2": {"weight": (c,)},
                  "ada_lin_attn": linear(3 * w, w), "ada_lin_mlp": linear(3 * w, w)}
    else:
        block["ada_lin"] = linear(6 * w, w)
    parts = {f"flownet.res_blocks.{i}.{name}": shapes for i in range(flow.depth) for name, shapes in block.items()}
    parts |= {"flownet.time_embed.mlp.0": linear(w, 256), "flownet.time_embed.mlp.2": linear(w, w),
              "flownet.cond_embed": linear(w, c), "flownet.input_proj": linear(w, 16),
              "flownet.final_layer.linear": linear(16, w), "flownet.final_layer.adaLN_modulation.1": linear(2 * w, w)}
    found = {f"{name}.{kind}": shape for name, shapes in parts.items() for kind, shape in shapes.items()}
    return {**stack_shapes(c, sizes.depth, sizes.heads, 341), **found, "diffusion_pos_embed_learned": (1, 341, c)}


def test_published_settings_are_the_published_ones() -> None:
    small, large, huge = (preset_config(f"flowar-{size}").settings["fid"] for size in ("small", "large", "huge"))
    assert (small.guidance_scale, large.guidance_scale, huge.guidance_scale) == (4.3, 2.4, 2.4)
    assert (small.guidance_until, large.guidance_until, huge.guidance_until) == (0.9, 0.9, 0.7)
    assert huge.times == "uniform" and huge.solver_steps == 50 and small.solver_steps == large.solver_steps == 25


def test_a_folder_gives_back_the_system_and_its_settings(tmp_path: Path) -> None:
    system = tiny(cross=True, guidance_until=0.4)
    folders.save(system, tmp_path / "model", torch.float32)
    again = folders.load(tmp_path / "model")
    assert isinstance(again, FlowAR) and again.config == system.config
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(name), value) for name, value in system.state_dict().items()) and not weights
    one, other = (s.generate([1], output="torch", progress=False).images for s in (system, again))
    # Weights of a file lie elsewhere in memory, and products of floats may be added up in another order there.
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    low = folders.load(tmp_path / "model", "bf16").generate([1], output="torch", progress=False)
    assert bool(low.images.isfinite().all())


def test_the_small_preset_is_a_few_million_parameters_on_an_8x8_latent() -> None:
    config = preset_config("flowar-64px")
    with torch.device("meta"):
        system = FlowAR(config)
    count = sum(p.numel() for part in (system.generator, system.head, system.labels) for p in part.parameters())
    assert 3e6 < count < 9e6 and [step.grid[0] for step in system.plan] == [1, 2, 4, 8]
    assert system.tokenizer.picture_size == (64, 64)


def test_the_command_line_trains_it_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.recipes import read_recipe, recipe_of
    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    assert read_recipe(recipe_of("flowar"))["system"] == "flowar" and recipe_of("hmar") == "own-64-generator"
    sets = ["train.steps=4", "train.batch_size=8", "train.sample_every=2", "train.checkpoint_every=4", "data.size=16",
            "generator.depth=[1,1]", "generator.width=32", "generator.heads=2", "generator.flow.width=32",
            "generator.flow.heads=2", "generator.flow.depth=1", "generator.dropout=0.1", "data.held_out=4",
            "settings.solver_steps=4", "settings.guidance_scale=2.0", "train.minutes=5"]
    command = ["train", "generator", "--system", "flowar", "--data", "pictures", "--tokenizer", "tokenizer",
               "--out", "run"]
    assert main.run([*command, *(part for one in sets for part in ("--set", one))]) == 0
    system = nextscale.load("run/model")
    assert isinstance(system, FlowAR) and system.config.settings["pictures"].solver_steps == 4
    assert main.run(["generate", "--model", "run/model", "--count", "2", "--out", "a.png"]) == 0
    assert (tmp_path / "a.png").exists()


def test_recipes_are_of_the_small_preset_s_sizes() -> None:
    from nextscale.configuration import build
    from nextscale.training.recipes import read_recipe

    config, recipe = preset_config("flowar-64px"), read_recipe("own-64-flowar")
    assert build(FlowARGeneratorConfig, recipe["generator"]) == config.generator
    of_tokenizer = read_recipe("own-64-kl-tokenizer")["tokenizer"]["model"]
    assert build(TokenizerConfig, of_tokenizer) == config.tokenizer


def test_a_head_alone_takes_any_plan_of_grids() -> None:
    head = FlowTransformerHead(FlowHeadConfig(1, 32, 2), Plan.scales([(1, 2), (3, 4)]), 8, 16)
    found = head.loss(torch.randn(2, 14, 16), torch.randn(2, 14, 8))
    assert found.shape == (2, 14) and bool(found.isfinite().all())
