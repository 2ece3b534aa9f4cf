"""HMAR: a Markov view without memory, rounds of redrawing, the mask module's training, published names."""
from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context
from nextscale.errors import InputError, WeightsError
from nextscale.generators.hmar import HMARGeneratorConfig
from nextscale.heads.masked_rounds import InRounds, least
from nextscale.layers.attention import attention
from nextscale.noise import Keyed
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import ALL_PREVIOUS, OWN_STEP, Plan, Visibility
from nextscale.run import Sample
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.guidance import Unguided
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.hmar import (
    HMAR,
    ROUNDS,
    ROUNDS_TIMED,
    HMARConfig,
    HMARSettings,
    check_rounds,
    preset_config,
    scale_weights,
)
from nextscale.systems.var import PLANS
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.generator import GeneratorTask
from nextscale.training.task import TrainingStep

COUNTS = ((1,), (1, 3), (2, 3, 4), (16,))


def tiny(rounds: tuple = (), seed: int = 0) -> HMAR:
    network = HMARGeneratorConfig(3, 48, 3, mask_blocks=1)
    system = HMAR(HMARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), network, (5,),
                             settings={"pictures": HMARSettings(2.0, top_k=20, rounds=rounds)})).eval()
    fill(system, seed)
    return system


def test_one_call_equals_the_loop_though_nothing_is_remembered() -> None:
    system = tiny()
    run = system.start(labels(2), Unguided(), Keyed.from_seeds([3, 4]))
    with torch.no_grad():
        for _ in sample_steps(system, run, Unguided()):
            assert not run.memory.groups, "no key or value is held, not even room for one"
        scored = system.log_prob(run.tokens, labels(2).flatten().tolist())
    torch.testing.assert_close(scored.picture, torch.cat(run.log_probs, 1).sum(1), rtol=1e-4, atol=1e-3)


def test_a_scale_knows_of_others_only_what_it_reads() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, 2)
    reads = pyramid.replay(tokens, canvas).reads
    condition = ClassCondition(system.labels, labels(2))
    with torch.no_grad():
        before = hidden_states(system, system.plan, reads, condition, ("conditional",))
        others = [None if r is None else r + (k == 1) for k, r in enumerate(reads)]
        after = hidden_states(system, system.plan, others, condition, ("conditional",))
    span = system.plan.span(1, 2)
    same = torch.ones(system.plan.length, dtype=torch.bool)
    same[span] = False
    assert torch.equal(before[:, same], after[:, same]) and not torch.allclose(before[:, span], after[:, span])


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "own_step_speed.py"
    spec = importlib.util.spec_from_file_location("own_step_speed", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("visible", [OWN_STEP, ALL_PREVIOUS], ids=["own step", "all previous"])
def test_attention_step_by_step_is_masked_attention(visible: Visibility, benchmark: ModuleType) -> None:
    system = tiny()
    plan = replace(system.plan, visible=visible)
    rows = teacher_forcing_call(system.generator, plan, [None, *(torch.zeros(2, s.rows, 8) for s in plan.steps[1:])],
                                system.labels(labels(2))).rows
    q, k, v = torch.randn(3, 2, 3, plan.length, 16)
    mask = visible.sees(plan.step_of_row[:, None], plan.step_of_row[None])[None, None]
    slices = () if visible == OWN_STEP else (benchmark.PrefixSlices(),)
    found = Context(None, slices).attend("a.kv", q, k, v, rows, scale=0.3)
    torch.testing.assert_close(found, attention(q, k, v, mask, 0.3), rtol=1e-5, atol=1e-5)
    other = ALL_PREVIOUS if visible == OWN_STEP else OWN_STEP
    assert not torch.allclose(found, Context().attend("a.kv", q, k, v, replace(rows, visible=other), scale=0.3))


def test_single_rounds_are_the_next_scale_module_alone() -> None:
    one = tiny().generate([1, 2], output="torch", progress=False)
    single = tuple((h * w,) for h, w in GRIDS)
    other = tiny(single).generate([1, 2], output="torch", progress=False)
    assert torch.equal(one.images, other.images)


def test_rounds_redraw_the_least_confident_and_leave_the_rest() -> None:
    system = tiny(COUNTS)
    seen: dict[tuple[int, int], tuple[Tensor, Sample]] = {}
    head = InRounds(system.head, check_rounds(COUNTS, system.plan), lambda k, j, m, s: seen.update({(k, j): (m, s)}))
    guidance = system.guidance(system.config.settings["pictures"])
    run = system.start(labels(2), guidance, Keyed.from_seeds([0, 1]))
    model = type("Model", (), {"generator": system.generator, "head": head})()
    with torch.no_grad():
        list(sample_steps(model, run, guidance))
    assert sorted(seen) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)]
    first, (again, second), (last, third) = seen[2, 0][1], seen[2, 1], seen[2, 2]
    assert first.confidence is not None and second.confidence is not None
    assert again.sum(1).tolist() == [7, 7] and last.sum(1).tolist() == [4, 4] and bool((last <= again).all())
    assert torch.equal(again, least(first.confidence, 7))
    settled, redrawn = first.confidence.masked_fill(again, 2), first.confidence.masked_fill(~again, 0)
    assert bool((settled.amin(1) >= redrawn.amax(1)).all())
    assert torch.equal(second.tokens[~again], first.tokens[~again])
    assert torch.equal(third.tokens[~last], second.tokens[~last])
    assert torch.equal(run.tokens[2], third.tokens)


def test_a_picture_of_many_rounds_does_not_hang_on_its_batch() -> None:
    system = tiny(COUNTS)
    both = system.generate([1, 2], seeds=[7, 8], output="torch", progress=False)
    alone = system.generate([2], seeds=[8], output="torch", progress=False)
    assert all(torch.equal(a[1:], b) for a, b in zip(both.tokens, alone.tokens, strict=True))


def test_editing_redraws_all_that_is_not_known_in_sight_of_what_is_and_never_what_is() -> None:
    system, seen = tiny(COUNTS), {}
    head = InRounds(system.head, check_rounds(COUNTS, system.plan), lambda k, j, m, s: seen.update({(k, j): (m, s)}))
    guidance = system.guidance(system.config.settings["pictures"])
    tokens = system.encode(emoji(2))
    # Of the first picture half of every scale is known, of the second nothing.
    keep = [torch.arange(step.rows).expand(2, -1) * torch.tensor([[2], [0]]) >= step.rows for step in system.plan]
    run = system.start(labels(2), guidance, Keyed.from_seeds([0, 1]))
    model = type("Model", (), {"generator": system.generator, "head": head})()
    with torch.no_grad():
        list(sample_steps(model, run, guidance, (), [ForcedTokens(tokens, keep)]))
    for step in range(1, 4):
        again = seen[step, 1][0]
        assert torch.equal(again[0], ~keep[step][0]), "all that isn't known"
        assert int(again[1].sum()) == sum(COUNTS[step][1:]), "as without editing"
        assert torch.equal(run.tokens[step][keep[step]], tokens[step][keep[step]])
        assert torch.equal(run.tokens[step][~again], seen[step, 0][1].tokens[~again])


def test_what_is_known_steers_its_own_scale_only_in_sight() -> None:
    system = tiny(COUNTS)
    tokens = system.encode(emoji(1))
    keep = [torch.zeros(1, step.rows, dtype=torch.bool) for step in system.plan]
    keep[3][:, ::2] = True
    other = [*tokens[:3], (tokens[3] + 7) % 32]
    drawn = {}
    for sighted in (True, False):
        for name, given in (("one", tokens), ("other", other)):
            used = system.settings_for("pictures", {"sighted": sighted})
            run = system.start(labels(1), system.guidance(used), Keyed.from_seeds([5]))
            with torch.no_grad():
                list(system.loop(run, system.guidance(used), used, [ForcedTokens(given, keep)], None))
            drawn[sighted, name] = run.log_probs[3][~keep[3]]
    assert not torch.equal(drawn[True, "one"], drawn[True, "other"])
    assert torch.equal(drawn[False, "one"], drawn[False, "other"])


@pytest.mark.parametrize(("rounds", "message"), [
    (((1,), (4,)), "2 scales are given, the schedule has 4"), (((1,), (1, 2), (9,), (16,)), "add up to its 4 tokens"),
    (((1,), (0, 4), (9,), (16,)), "must be positive")])
def test_rounds_that_do_not_fit_are_refused(rounds: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(rounds).generate([1])


def test_scales_weigh_as_published() -> None:
    plan = preset_config("hmar-d16").tokenizer.plan
    published = [.0247, .0642, .1150, .1379, .1402, .1329, .1208, .1054, .0882, .0709]
    assert scale_weights(plan) == pytest.approx(published, abs=6e-5)


@pytest.mark.parametrize(("pixels", "rounds", "evaluations"), [
    (256, ROUNDS[256], 14), (256, ROUNDS_TIMED, 13), (512, ROUNDS[512], 15), (1024, ROUNDS[1024], 20)])
def test_published_rounds_settle_every_token_of_their_schedule(pixels: int, rounds: tuple, evaluations: int) -> None:
    assert sum(len(counts) for counts in check_rounds(rounds, Plan.scales(PLANS[pixels]))) == evaluations


@pytest.mark.parametrize("part", ["next", "mask"])
def test_step_weights_take_the_place_of_the_published_ones(part: str) -> None:
    system = tiny()
    system.train_part(part)
    batch = {"tokens": torch.cat(system.encode(emoji(4)), 1), "labels": labels(4)}
    torch.manual_seed(3)
    share = float(torch.rand(())) if part == "mask" else 1.0
    rows = [step.rows for step in system.plan]
    counted = [math.ceil(share * n) if part == "next" or k else 0 for k, n in enumerate(rows)]
    own = scale_weights(system.plan) if part == "next" else counted
    for given, expected in ((None, own), ("equal", [c / n for c, n in zip(counted, rows, strict=True)]),
                            ((0.0, 2.0, 0.0, 1.0), [0, 2 * counted[1], 0, counted[3]])):
        torch.manual_seed(3)
        task = GeneratorTask(system, 0.0, step_weights=given, compile="off")
        loss, found = task.loss("main", batch, TrainingStep(0, 1, 0.0, 0, 0))
        weighed = sum(w * float(found[f"nats_{k}"]) for k, w in enumerate(expected) if w)
        assert float(loss.detach()) == pytest.approx(weighed / sum(expected), rel=1e-5)


def test_a_mask_module_that_would_train_on_nothing_is_refused() -> None:
    system = tiny()
    system.train_part("mask")
    with pytest.raises(InputError, match="trains on scales after the first"):
        system.loss(system.encode(emoji(2)), labels(2), step_weights=(1.0, 0.0, 0.0, 0.0))


def test_the_mask_module_alone_trains_from_the_next_scale_module_s_weights() -> None:
    torch.manual_seed(0)
    system = tiny()
    system.train_part("mask")
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"mask_embed", "mask_blocks", "mask_head_modulation", "mask"}
    same = zip(system.generator.mask_blocks.parameters(), system.generator.blocks[2:].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    tokens, wanted = system.encode(emoji(8)), [p for p in system.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in system.named_parameters() if not p.requires_grad}
    optimiser, found = torch.optim.AdamW(wanted, lr=3e-3), []
    for step in range(30):
        torch.manual_seed(step)
        loss, by_step, _ = system.loss(tokens, labels(8), 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
        assert bool(by_step[0].isnan())
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert all(torch.equal(p, before[name]) for name, p in system.named_parameters() if name in before)
    with pytest.raises(InputError, match="has the parts next, mask"):
        system.train_part("head")


def test_the_mask_module_sees_a_scale_s_own_part_where_it_is_not_masked() -> None:
    system, tokens = tiny(), tiny().encode(emoji(2))
    canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, 2)
    read, cond = pyramid.replay(tokens, canvas).reads[2], system.labels(labels(2))
    own = torch.randn(2, 2, 9, read.shape[-1])  # two of them, for the same scale
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[:, 4:] = True
    with torch.no_grad():
        one, other = (system.generator.embed_round(system.plan, read, part, hidden, cond, 2, 3) for part in own)
    assert torch.equal(one[:, 4:], other[:, 4:]) and not torch.isclose(one[:, :4], other[:, :4]).all(-1).any()
    alike = [float(system.mask_loss(tokens, labels(2), 0.0, share=1.0)[0].detach()) for _ in range(2)]
    assert alike[0] == pytest.approx(alike[1]), "with everything masked no draw is left"


@pytest.mark.parametrize(("name", "millions", "of_next"), [
    ("hmar-d16", 467.7, 310.3), ("hmar-d20", 845.5, 600.9), ("hmar-d24", 1384.3, 1033.4), ("hmar-d30", 2556.3, 2010.0)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: float, of_next: float) -> None:
    config = preset_config(name)
    depth, width = config.generator.depth, config.generator.width
    with torch.device("meta"):
        system = HMAR(config)
    parts = [p for part in (system.generator, system.head, system.labels) for p in part.parameters()]
    assert round(sum(p.numel() for p in parts) / 1e6, 1) == millions
    own = [system.generator.mask_blocks, system.generator.mask_head_modulation, system.head.mask]
    mask = sum(p.numel() for module in own for p in module.parameters()) + width
    assert round((sum(p.numel() for p in parts) - mask) / 1e6, 1) == of_next
    block = {"attn.scale_mul_1H11": (1, depth, 1, 1), "attn.q_bias": (width,), "attn.v_bias": (width,),
             "attn.zero_k_bias": (width,), "attn.mat_qkv.weight": (3 * width, width),
             "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ffn.fc1.weight": (4 * width, width),
             "ffn.fc1.bias": (4 * width,), "ffn.fc2.weight": (width, 4 * width), "ffn.fc2.bias": (width,),
             "ada_lin.1.weight": (6 * width, width), "ada_lin.1.bias": (6 * width,)}
    shapes = {f"{kind}_blocks.{i}.{key}": shape for key, shape in block.items()
              for kind, count in (("base", depth - 8), ("ns", 8), ("mask", 8)) for i in range(count)}
    shapes |= {f"{kind}_head{key}": shape for kind in ("ns", "mask") for key, shape in (
        (".weight", (4096, width)), (".bias", (4096,)), ("_nm.ada_lin.1.weight", (2 * width, width)),
        ("_nm.ada_lin.1.bias", (2 * width,)))}
    shapes |= {"pos_start": (1, 1, width), "pos_1LC": (1, 680, width), "lvl_embed.weight": (10, width),
               "lvl_1L": (1, 680), "attn_bias_for_masking": (1, 1, 680, 680), "word_embed.weight": (width, 32),
               "word_embed_bias": (width,), "mask_embed.weight": (1, width), "class_emb.weight": (1001, width)}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    with pytest.raises(WeightsError, match="mask_embed"):
        folders.load_published(system, generator={k: v for k, v in published.items() if k != "mask_embed.weight"})


def test_the_command_line_trains_both_parts_and_draws_in_rounds(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.depth=2", "generator.width=32", "generator.heads=2", "generator.mask_blocks=1",
            "data.held_out=0", "train.precision=fp32", "train.minutes=5"]
    command = ["train", "generator", "--system", "hmar", "--data", "pictures", "--tokenizer", "tokenizer"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "next"]) == 0
    assert main.run([*command, "--out", "both", "--set", "part=mask", "--set", "start=next/model",
                     "--set", f"settings.rounds={[list(counts) for counts in COUNTS]}"]) == 0
    first, both = nextscale.load("next/model"), nextscale.load("both/model")
    assert both.config.settings["pictures"].rounds == COUNTS
    assert torch.equal(first.generator.blocks[0].mlp.expand.weight, both.generator.blocks[0].mlp.expand.weight)
    assert not torch.equal(both.generator.mask_embed, first.generator.mask_embed)
    assert main.run(["generate", "--model", "both/model", "--count", "2", "--out", "a.png"]) == 0
    assert main.run([*command, "--out", "wrong", "--set", "start=next/model", "--set", "generator.depth=3"]) == 2
