"""M-VAR: the scan and its carried state, what rows know of each other, initialisation, published names and sizes."""
from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.conditions.class_label import ClassCondition
from nextscale.configuration import build
from nextscale.context import Context
from nextscale.errors import InputError, WeightsError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers import mamba2
from nextscale.layers.mamba2 import Mamba2, scan, scan_products
from nextscale.layers.memory import Memory
from nextscale.noise import Keyed
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import ALL_PREVIOUS, OWN_STEP, Plan
from nextscale.run import Run, Sample
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import ClassifierFree, Unguided
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import folders
from nextscale.systems.m_var import MVAR, SIZES, MVARConfig, preset_config, training_recipe
from nextscale.systems.var import PLANS
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.generator_recipe import GeneratorTraining


def tiny(seed: int = 0, **changes: object) -> MVAR:
    network = VARGeneratorConfig(**{"depth": 3, "width": 64, "heads": 2, **changes})  # type: ignore[arg-type]
    system = MVAR(MVARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), network, (5,),
                             settings={"pictures": Settings(2.0, top_k=20)})).eval()
    fill(system, seed)
    return system


# The scan

def draws(rows: int, heads: int = 3, width: int = 4, state: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (torch.randn(2, rows, heads, width), F.softplus(torch.randn(2, rows, heads)), -torch.rand(heads) * 3,
            torch.randn(2, rows, state), torch.randn(2, rows, state))


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor,
               state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt a) S_(t-1) + dt x B^T; y_t = S_t C_t, row by row."""
    s = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[-1]) if state is None else state
    found = []
    for t in range(x.shape[1]):
        s = (dt[:, t] * a).exp()[..., None, None] * s + torch.einsum("rh,rhp,rn->rhpn", dt[:, t], x[:, t], b[:, t])
        found.append(torch.einsum("rhpn,rn->rhp", s, c[:, t]))
    return torch.stack(found, 1), s


@pytest.mark.parametrize("chunk", [1, 4, 7, 256])
def test_the_chunked_scan_is_the_recurrence_with_its_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba2, "CHUNK", chunk)
    given = [value.requires_grad_() for value in draws(14)]
    before = torch.randn(2, 3, 4, 5, requires_grad=True)
    for state in (None, before):
        ours, theirs = scan(*given, state), recurrence(*given, state)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        wanted = [*given] if state is None else [*given, state]
        gradients = [torch.autograd.grad((y * y).sum() + s.sin().sum(), wanted) for y, s in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_rows_that_forget_at_once_overflow_nothing() -> None:
    x, dt, a, b, c = draws(300)
    given = [x, 50 * dt, 20 * a, b, c]
    for value in given:
        value.requires_grad_()
    y, s = scan(*given)
    gradients = torch.autograd.grad(y.sum() + s.sum(), given)
    assert all(bool(value.isfinite().all()) for value in (y, s, *gradients))
    torch.testing.assert_close(y, recurrence(*given)[0], rtol=1e-4, atol=1e-3)


def test_a_layer_in_parts_is_the_layer_at_once() -> None:
    layer = Mamba2(32)
    fill(layer)
    x = torch.randn(2, 11, 32)
    whole, _ = layer(x)
    for cuts in ((5,), (1, 2, 3), (10,)):
        state, parts = None, []
        for part in x.tensor_split(cuts, 1):
            y, state = layer(part, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_fused_kernel_is_called_as_its_package_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package runs on CUDA alone: a double with its signature checks what it would get."""
    def combined(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
                 initial_states: Tensor | None = None, return_final_states: bool = False) -> tuple[Tensor, Tensor]:
        assert chunk_size == 256 and return_final_states and B.shape[2] == C.shape[2] == 1
        assert dt.dtype == A.dtype == torch.float32 and x.dtype == B.dtype == torch.bfloat16
        return scan(x.float(), dt, A, B[:, :, 0].float(), C[:, :, 0].float(), initial_states)

    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].mamba_chunk_scan_combined = combined  # type: ignore[attr-defined]
    mamba2._kernel.cache_clear()
    try:
        x, dt, a, b, c = draws(9)
        found = mamba2.fused_scan(x.bfloat16(), dt, a, b.bfloat16(), c.bfloat16(), torch.randn(2, 3, 4, 5))
        assert all(value.dtype == torch.float32 for value in found)
    finally:
        mamba2._kernel.cache_clear()


def test_rates_stay_in_float32_in_memory_and_in_files(tmp_path: Path) -> None:
    system = tiny()
    before = system.generator.blocks[1].mamba.rates.a_log.detach().clone()
    folders.save(system, tmp_path)
    system.to_precision("bf16")
    for found in (system, nextscale.load(str(tmp_path)), nextscale.load(str(tmp_path), precision="bf16")):
        rates = found.generator.blocks[1].mamba.rates
        assert {p.dtype for p in rates.parameters()} == {torch.float32} and torch.equal(rates.a_log, before)
    assert system.generator.blocks[1].mamba.input.weight.dtype == torch.bfloat16
    drawn = system.generate([1, 2], output="torch", progress=False)
    assert bool(drawn.images.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        layer = tiny().generator.blocks[0].mamba
        state = layer(torch.randn(1, 3, 64))[1]
    assert [value.dtype for value in state] == [torch.float32, torch.float32]


def test_a_width_that_does_not_split_into_heads_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 32"):
        Mamba2(48)


# Passes

def follow(system: MVAR, tokens: list[Tensor], again: bool = False) -> tuple[Tensor, Run]:
    """Logits of the step loop for given tokens; ``again``: every step from an empty memory, its prefix recomputed."""
    guidance = ClassifierFree(2.5)
    run, found = system.start(labels(2), guidance, Keyed.from_seeds([3, 4])), []
    with torch.no_grad():
        for given in tokens:
            at = run.hand_over(run.condition) if again else run
            call = system.generator.call(at)
            hidden = evaluator(system.generator, at, check=True)(call)[:, call.predicts]
            found.append(torch.cat(list(system.head.outputs(hidden, run.branches).values())))
            run.force(given)
    return torch.cat(found, 1), run


@pytest.mark.parametrize("changes", [{}, {"l2_attention": False}, {"shared_modulation": True}], ids=str)
def test_carried_state_equals_recomputed_prefix_equals_one_call(changes: dict) -> None:
    system = tiny(**changes)
    tokens = system.encode(emoji(2))
    carried, run = follow(system, tokens)
    recomputed, _ = follow(system, tokens, again=True)
    reads = pyramid.replay(tokens, Canvas.empty(system.plan, system.tokenizer.quantiser, 2)).reads
    condition = ClassCondition(system.labels, labels(2))
    with torch.no_grad():
        at_once = system.head(hidden_states(system, system.plan, reads, condition, ("conditional", "unconditional")))
    assert float(at_once.std()) > 0.3
    near = 1e-5 * float(at_once.abs().max())
    torch.testing.assert_close(carried, recomputed, rtol=0, atol=near)
    torch.testing.assert_close(carried, at_once, rtol=0, atol=near)
    assert run.filled == 4


def test_memory_holds_no_keys_and_does_not_grow() -> None:
    system = tiny()
    run = system.start(labels(2), Unguided(), Keyed.from_seeds([3, 4]))
    sizes = []
    with torch.no_grad():
        for _ in sample_steps(system, run, Unguided(), check=True):
            assert not run.memory.groups
            sizes.append(run.memory.bytes())
    assert len(set(sizes)) == 1 and len(run.memory.state) == 6
    assert sizes[0] == 4 * 2 * 3 * (3 * (128 + 128) + 2 * 64 * 64)  # of 2 pictures, 3 blocks: tail and state


def test_a_run_in_mid_plan_is_gathered_forked_and_handed_over_with_its_state() -> None:
    system, guidance = tiny(), ClassifierFree(2.0)

    def go(run: Run, until: int | None = None) -> Run:
        with torch.no_grad():
            for _ in sample_steps(system, run, guidance, until=until):
                pass
        return run

    def begin() -> Run:
        return system.start(labels(3), guidance, Keyed.from_seeds([3, 4, 5]))

    whole = go(begin())
    half = go(begin(), 2)
    before = {name: value.clone() for name, value in half.memory.state.items()}
    turned = go(half.gather([2, 0, 1]))
    for ours, theirs in zip(turned.tokens, whole.gather([2, 0, 1]).tokens, strict=True):
        assert torch.equal(ours, theirs)
    forked = go(half.fork(2))
    assert all(torch.equal(ours[::2], theirs) for ours, theirs in zip(forked.tokens, whole.tokens, strict=True))
    assert any(not torch.equal(t[::2], t[1::2]) for t in forked.tokens[2:])
    assert all(torch.equal(value, before[name]) for name, value in half.memory.state.items())
    for step in range(1, 4):
        handed = go(go(begin(), step).hand_over(half.condition))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(handed.tokens, whole.tokens, strict=True))
    empty = half.gather([0, 1, 2])
    empty.memory.state = {name: torch.zeros_like(value) for name, value in before.items()}
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(go(empty).tokens, whole.tokens, strict=True))


def test_a_head_that_evaluates_twice_advances_the_state_once() -> None:
    system = tiny()

    class Twice:
        def sample(self, evaluate: object, call: object, run: Run, *rest: object) -> Sample:
            evaluate(replace(call, rows=replace(call.rows, keep=call.predicts.start)))
            return system.head.sample(evaluate, call, run, *rest)

    found = []
    for head in (system.head, Twice()):
        run = system.start(labels(2), Unguided(), Keyed.from_seeds([3, 4]))
        with torch.no_grad():
            list(sample_steps(SimpleNamespace(generator=system.generator, head=head), run, Unguided()))
        found.append(run)
    assert all(torch.equal(a, b) for a, b in zip(found[0].tokens, found[1].tokens, strict=True))
    rows = replace(system.generator.call(system.start(labels(2), Unguided(), Keyed.from_seeds([3, 4]))).rows, keep=None)
    with pytest.raises(InputError, match="provisional"):
        Context(Memory(4)).recur("a.scan", torch.zeros(2, 1, 64), rows, system.generator.blocks[0].mamba)


# What rows know of each other

def gates(system: MVAR, which: int, value: float) -> None:
    """Set one of the three gates of every block: 0 attention, 1 scan, 2 MLP."""
    width = system.config.generator.width
    with torch.no_grad():
        for block in system.generator.blocks:
            block.modulation.weight[which * width:(which + 1) * width] = 0
            block.modulation.bias[which * width:(which + 1) * width] = value


def jacobian(system: MVAR) -> Tensor:
    """How far each row's hidden state (first index) hangs on each row's input: (L, L)."""
    plan = system.plan
    reads = [None, *(torch.zeros(1, step.rows, 8) for step in plan.steps[1:])]
    call = teacher_forcing_call(system.generator, plan, reads, system.labels(labels(1)))

    x = call.x.detach().requires_grad_()
    hidden = (system.generator(replace(call, x=x), Context())[0] * torch.randn(64)).sum(1)
    return torch.stack([torch.autograd.grad(row, x, retain_graph=True)[0][0].abs().amax(1) for row in hidden])


def test_attention_joins_a_scale_and_the_scan_goes_forwards_only() -> None:
    system = tiny(depth=2)
    step = system.plan.step_of_row
    own, later = step[:, None] == step[None], torch.arange(len(step))[:, None] < torch.arange(len(step))[None]
    found = jacobian(system) > 0
    assert not found[later & ~own].any(), "a row knows nothing of scales to come"
    assert found[own].all() and found[~later].all(), "but all of its own, and all before"
    gates(system, 0, 0.0)
    alone = jacobian(system) > 0
    assert not alone[later].any() and alone[~later].all(), "without attention rows know those before them only"
    gates(system, 0, 1.0)
    gates(system, 1, 0.0)
    assert torch.equal(jacobian(system) > 0, own), "without the scan they know their own scale only"


@pytest.mark.parametrize(("side", "all_rows", "own", "shares"), [
    (256, 286_434, 110_468, (2.59, 4.19)), (512, 3_269_850, 1_522_100, (2.15, 3.30)),
    (1024, 56_954_392, 24_587_383, (2.32, 3.63))])
def test_attention_pairs_are_as_published(side: int, all_rows: int, own: int, shares: tuple[float, float]) -> None:
    var, m_var = Plan.scales(PLANS[side], ALL_PREVIOUS), Plan.scales(PLANS[side], OWN_STEP)
    assert (var.pairs, m_var.pairs) == (all_rows, own)
    assert (round(all_rows / own, 2), round(var.length**2 / own, 2)) == pytest.approx(shares, abs=0.011)


def test_the_scan_costs_as_many_products_as_its_rows_ask_for() -> None:
    """Its arithmetic grows with the rows, and the system counts it beside attention's own-step pairs."""
    def flops(products: list) -> float:
        return sum(2.0 * n * k * m * times * batch * share for n, k, m, times, batch, share in products)

    short, long = (flops(scan_products(1024, rows, 1)) for rows in (2560, 10240))
    assert long / short == pytest.approx(4.0, rel=0.01)
    recurrent = 2 * 2560 * 1024 * (4 * 1024 + 128 + 32 + 2 * 1024)  # both projections
    assert 1.05 < short / recurrent < 1.25
    system = tiny()
    attention = [p for p in system.products(2) if p[0] == p[2] and p[1] == 32]
    assert sum(n * m * batch for n, _, m, _, batch, _ in attention) == 2 * 2 * system.plan.pairs
    assert flops(system.products(2)) == pytest.approx(2 * flops(system.products(1)))


# Training and weights

def test_initialisation_gates_the_first_two_branches_only() -> None:
    torch.manual_seed(0)
    system = tiny().initialise(gate=1e-4)
    width, std = 64, math.sqrt(1 / 64 / 3)
    block = system.generator.blocks[0]
    size = block.modulation.weight.detach().view(9, width, width).std((1, 2)) / std
    assert size.tolist() == pytest.approx([1e-4, 1e-4] + [0.5] * 7, rel=0.1)
    for weight in (block.mamba.input.weight, block.mamba.output.weight):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)
    kernel = block.mamba.convolution
    assert float(kernel.weight.detach().std()) == pytest.approx(0.02, rel=0.1) and not bool(kernel.bias.any())
    fresh = Mamba2(512)
    step, a = F.softplus(fresh.rates.dt_bias.detach()), fresh.rates.a_log.detach().exp()
    assert 1e-3 * 0.99 <= float(step.min()) and float(step.max()) <= 0.1 * 1.01
    assert 1 <= float(a.min()) < float(a.max()) <= 16
    assert bool((fresh.rates.skip == 1).all()) and bool((fresh.norm_weight == 1).all())


def test_it_learns_to_predict_a_scale_better_than_its_frequencies_do() -> None:
    torch.manual_seed(0)
    system = tiny(depth=2, width=32, heads=1).initialise(0.1)
    tokens = system.encode(emoji(8))
    wanted = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    optimiser = torch.optim.AdamW(wanted, lr=1e-2)
    for _ in range(25):
        loss, by_step, _ = system.loss(tokens, labels(8), 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    counts = torch.bincount(tokens[-1].flatten(), minlength=32) / tokens[-1].numel()
    entropy = float(-(counts * counts.clamp_min(1e-9).log()).sum())
    assert float(by_step[-1]) < 0.9 * entropy
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in system.generator.parameters())


def published(name: str) -> dict[str, Tensor]:
    """The published tensor list of a size, on the meta device; with scales of attention where that size has them."""
    depth, width = SIZES[name], 64 * SIZES[name]
    block = {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.zero_k_bias": (width,), "attn.patch_nums": (10,),
             "attn.mat_qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
             "mamba.dt_bias": (2 * depth,), "mamba.A_log": (2 * depth,), "mamba.D": (2 * depth,),
             "mamba.in_proj.weight": (4 * width + 128 + 2 * depth, width),
             "mamba.conv1d.weight": (2 * width + 128, 1, 4), "mamba.conv1d.bias": (2 * width + 128,),
             "mamba.norm.weight": (2 * width,), "mamba.out_proj.weight": (width, 2 * width),
             "ffn.fc1.weight": (4 * width, width), "ffn.fc1.bias": (4 * width,), "ffn.fc2.weight": (width, 4 * width),
             "ffn.fc2.bias": (width,), "ada_lin.1.weight": (9 * width, width), "ada_lin.1.bias": (9 * width,)}
    if name not in ("m-var-d16", "m-var-d20"):
        block["attn.scale_mul_1H11"] = (1, depth, 1, 1)
    shapes: dict[str, tuple[int, ...]] = {f"blocks.{i}.{key}": shape for i in range(depth)
                                          for key, shape in block.items()}
    shapes |= {"pos_start": (1, 1, width), "pos_1LC": (1, 680, width), "lvl_1L": (1, 680),
               "attn_bias_for_masking": (1, 1, 680, 680), "word_embed.weight": (width, 32), "word_embed.bias": (width,),
               "class_emb.weight": (1001, width), "lvl_embed.weight": (10, width), "head.weight": (4096, width),
               "head.bias": (4096,), "head_nm.ada_lin.1.weight": (2 * width, width),
               "head_nm.ada_lin.1.bias": (2 * width,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "parameters", "of_scan"), [
    ("m-var-d12", 198_435_568, 3_665_608), ("m-var-d16", 464_157_184, 6_468_320),
    ("m-var-d20", 900_528_736, 10_061_560), ("m-var-d24", 1_550_067_136, 14_445_328),
    ("m-var-d30", 3_017_065_756, 22_503_220), ("m-var-d32", 3_658_707_968, 25_584_448)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, parameters: int, of_scan: int) -> None:
    with torch.device("meta"):
        system = MVAR(preset_config(name))
    folders.load_published(system, generator=published(name))
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    assert sum(p.numel() for p in parts) == parameters
    assert sum(p.numel() for p in system.generator.blocks[0].mamba.parameters()) == of_scan
    assert (system.generator.blocks[0].attention.scale_1H11 is None) == (name in ("m-var-d16", "m-var-d20"))
    assert [step.rows for step in system.plan][-1] == 256 and system.plan.visible == OWN_STEP


def test_a_file_says_by_its_tensors_whether_attention_takes_unit_lengths() -> None:
    with torch.device("meta"):
        system = MVAR(preset_config("m-var-d16"))
    other = published("m-var-d16")
    other |= {f"blocks.{i}.attn.scale_mul_1H11": torch.empty(1, 16, 1, 1, device="meta") for i in range(16)}
    folders.load_published(system, generator=other)
    assert system.config.generator.l2_attention and system.generator.blocks[3].attention.scale_1H11.shape[1] == 16
    with pytest.raises(WeightsError, match="holds 12 blocks, the model has 16; load it as m-var-d12"):
        folders.load_published(system, generator=published("m-var-d12"))
    other["blocks.0.attn.patch_nums"] = torch.tensor([s * s for s in PLANS[512]])
    with pytest.raises(WeightsError, match="the file is for scales of"):
        folders.load_published(system, generator=other)
    with pytest.raises(InputError, match="did you mean 'm-var-d16'"):
        preset_config("m-var-16")


def test_published_training_is_a_recipe() -> None:
    found = {name: build(GeneratorTraining, training_recipe(name), name) for name in SIZES}
    d16, d30 = found["m-var-d16"], found["m-var-d30"]
    assert (d16.train.learning_rate, d16.gate, d16.train.steps) == (pytest.approx(3e-4), 1e-3, 333_637)
    assert (d30.train.learning_rate, d30.gate) == (pytest.approx(3.2e-4), 1e-5)
    assert all(recipe.generator == vars(preset_config(name).generator) for name, recipe in found.items())


def test_the_command_line_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.depth=2", "generator.width=32", "generator.heads=2", "data.held_out=0", "train.minutes=5"]
    command = ["train", "generator", "--system", "m_var", "--data", "pictures", "--tokenizer", "tokenizer"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "run"]) == 0
    trained = nextscale.load("run/model")
    assert isinstance(trained, MVAR)
    assert {p.dtype for p in trained.generator.blocks[0].mamba.rates.parameters()} == {torch.float32}
    assert main.run(["generate", "--model", "run/model", "--count", "2", "--out", "a.png"]) == 0
    assert main.run([*command, "--out", "wrong", "--set", "generator.width=48"]) == 2
