"""SRDD: the Markov views, the bound, drawing again, guidance by schedules, enlarging, the signal-to-noise ratio."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels
from torch import Tensor, nn

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.generators.hmar import HMARGeneratorConfig
from nextscale.generators.srdd import SRDDGeneratorConfig
from nextscale.generators.var import VARGenerator, VARGeneratorConfig
from nextscale.heads.resampling import Resampling
from nextscale.layers.resize import resize
from nextscale.noise import Keyed
from nextscale.objectives.elbo import certain, elbo, joint_log_prob
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import OWN_STEP, PREVIOUS_ONLY
from nextscale.run import At, Run, Sample
from nextscale.sampling.editing import keep_first
from nextscale.sampling.filters import TopK
from nextscale.sampling.guidance import ClassifierFree, Unguided, make_guidance
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems.hmar import HMAR, HMARConfig, HMARSettings
from nextscale.systems.m_var import MVAR, MVARConfig
from nextscale.systems.srdd import SRDD, SRDDConfig, SRDDSettings
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.pyramid import signal_to_noise
from nextscale.training.generator import GeneratorTask

TOKENIZER = TokenizerConfig(AUTOENCODER, GRIDS, 32)


def tiny(window: int = 0, tokenizer: TokenizerConfig = TOKENIZER, **settings: object) -> SRDD:
    network = SRDDGeneratorConfig(3, 64, 2, window=window)
    system = SRDD(SRDDConfig(tokenizer, network, (5,), settings={
        "pictures": SRDDSettings(**{"guidance_scale": 2.0, "top_k": 20, **settings})})).eval()  # type: ignore[arg-type]
    fill(system)
    return system


def one_call(system: nn.Module, reads: list[Tensor | None], pictures: int = 2) -> Tensor:
    condition = ClassCondition(system.labels, labels(pictures))
    with torch.no_grad():
        found: Tensor = system.head(hidden_states(system, system.plan, reads, condition, ("conditional",)))
    return found


def reads_of(system: SRDD, tokens: list[Tensor]) -> list[Tensor | None]:
    return pyramid.replay(tokens, Canvas.empty(system.plan, system.tokenizer.quantiser, len(tokens[0]))).reads


# Markov views

@pytest.mark.parametrize("window", [0, 1, 2])
def test_one_call_equals_scale_by_scale_without_memory(window: int) -> None:
    system = tiny(window)
    tokens = system.encode(emoji(2))
    run, found = system.start(labels(2), Unguided(), Keyed.from_seeds([3, 4])), []
    with torch.no_grad():
        for given in tokens:
            call = system.generator.call(run)
            assert len(call.rows.spans) == min(window, run.cursor) + 1
            hidden = evaluator(system.generator, run, check=True)(call)
            found.append(system.head(hidden[:, call.predicts]))
            assert not run.memory.groups and not run.memory.state
            run.force(given)
    torch.testing.assert_close(one_call(system, reads_of(system, tokens)), torch.cat(found, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_scale_hangs_on_the_states_of_its_window_alone(window: int) -> None:
    """With the state that each scale reads held fixed but one, only scales whose window reaches it change."""
    system = tiny(window)
    reads = reads_of(system, system.encode(emoji(2)))
    before = one_call(system, reads)
    for changed in range(1, 4):
        after = one_call(system, [r if k != changed or r is None else r + 1 for k, r in enumerate(reads)])
        for k, span in enumerate(system.plan.spans(0, 4)):
            same = torch.equal(before[:, span.lo:span.hi], after[:, span.lo:span.hi])
            assert same == (not changed <= k <= changed + window), (changed, k)


def test_stacked_layers_would_leak_what_is_before_the_window() -> None:
    """The same weights in one pass under a mask: scale 3 comes to know of scale 1 through scale 2's rows."""
    system = tiny(window=1)
    reads = reads_of(system, system.encode(emoji(2)))
    naive = SimpleNamespace(generator=VARGenerator(VARGeneratorConfig(3, 64, 2), system.plan, 8), head=system.head,
                            labels=system.labels, plan=replace(system.plan, visible=PREVIOUS_ONLY))
    naive.generator.load_state_dict(system.generator.state_dict())
    other = [r if k != 1 or r is None else r + 1 for k, r in enumerate(reads)]
    span = system.plan.span(3, 4)
    assert not torch.allclose(one_call(naive, reads)[:, span], one_call(naive, other)[:, span])
    assert torch.equal(one_call(system, reads)[:, span], one_call(system, other)[:, span])


def test_no_gradient_reaches_a_scale_from_another_scale_s_tokens() -> None:
    system = tiny()
    reads = reads_of(system, system.encode(emoji(1)))
    call = teacher_forcing_call(system.generator, system.plan, reads, system.labels(labels(1)))
    x = call.x.detach().requires_grad_()
    logits = system.head(system.generator(replace(call, x=x), Context()))
    for span in system.plan.spans(0, 4):
        (found,) = torch.autograd.grad(logits[:, span.lo:span.hi].square().sum(), x, retain_graph=True)
        reached = found[0].abs().amax(1) > 0
        assert bool(reached[span.lo:span.hi].all()) and int(reached.sum()) == span.hi - span.lo


def test_the_backbone_is_hmar_s_next_scale_module_and_m_var_without_its_scan() -> None:
    srdd = tiny()
    hmar = HMAR(HMARConfig(TOKENIZER, HMARGeneratorConfig(3, 64, 2, mask_blocks=1), (5,),
                           settings={"pictures": HMARSettings(2.0)})).eval()
    m_var = MVAR(MVARConfig(TOKENIZER, VARGeneratorConfig(3, 64, 2), (5,))).eval()
    fill(hmar, 1), fill(m_var, 2)
    weights = srdd.generator.state_dict()
    hmar.generator.load_state_dict(weights, strict=False)
    hmar.head.next.load_state_dict(srdd.head.state_dict())
    m_var.head.load_state_dict(srdd.head.state_dict())
    m_var.generator.load_state_dict({n: t for n, t in weights.items() if "blocks" not in n or "modulation" not in n},
                                    strict=False)
    with torch.no_grad():
        for ours, theirs in zip(srdd.generator.blocks, m_var.generator.blocks, strict=True):
            for name in ("weight", "bias"):
                parts = getattr(ours.modulation, name).unflatten(0, (6, 64))
                none = torch.zeros_like(parts[0])
                nine = torch.stack([parts[0], none, parts[1], parts[2], none, parts[3], parts[4], none, parts[5]])
                getattr(theirs.modulation, name).copy_(nine.flatten(0, 1))
    for other in (hmar, m_var):
        other.labels.load_state_dict(srdd.labels.state_dict())
        other.tokenizer.load_state_dict(srdd.tokenizer.state_dict())
    reads = reads_of(srdd, srdd.encode(emoji(2)))
    found = [one_call(system, reads) for system in (srdd, hmar, m_var)]
    assert float(found[0].std()) > 0.3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    drawn = [system.generate([1, 2], seed=5, guidance_scale=2.0, guidance_schedule="ramp", top_k=20, top_p=None,
                             output="torch", progress=False) for system in (srdd, hmar, m_var)]
    assert all(torch.equal(drawn[0].images, other.images) for other in drawn[1:])


# The bound

def test_the_bound_by_enumeration_is_the_summed_cross_entropy() -> None:
    tokenizer = TokenizerConfig(AUTOENCODER, ((1, 1), (1, 2), (2, 2)), 3)
    system = tiny(tokenizer=tokenizer).double()
    tokens = [torch.tensor([[2], [0]]), torch.tensor([[1, 0], [2, 2]]), torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])]
    reads = [None if r is None else r.double() for r in reads_of(system, tokens)]
    logits = one_call(system, reads)
    parts = [logits[:, s.lo:s.hi].double() for s in system.plan.spans(0, 3)]
    model = [joint_log_prob(part) for part in parts]
    assert [found.shape[1] for found in model] == [3, 9, 81]
    for found in model:
        torch.testing.assert_close(found.exp().sum(1), torch.ones(2, dtype=torch.float64))
    posterior = [certain(step, 3).double() for step in tokens]
    entropy = F.cross_entropy(logits.double().flatten(0, 1), torch.cat(tokens, 1).flatten(), reduction="none")
    bound = elbo(posterior, model)
    assert (bound + entropy.view(2, -1).sum(1)).abs().max() < 1e-6
    _, by_step, _ = system.loss(tokens, labels(2), 0.0)
    summed = sum(float(mean) * step.rows for mean, step in zip(by_step, system.plan, strict=True))
    assert float(-bound.mean()) == pytest.approx(summed, abs=1e-4)  # the loss leaves its head in float32


def test_the_bound_of_a_chain_with_chance_is_a_divergence() -> None:
    q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    p = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    assert elbo([q.log()], [p.log()]).tolist() == pytest.approx([-math.log(2), 0.0], abs=1e-6)


def test_scales_weigh_alike_where_the_recipe_says_so() -> None:
    system = tiny()
    tokens = system.encode(emoji(4))
    task = GeneratorTask(system, 0.0, step_weights="equal", compile="off")
    found, by_step, _ = system.loss(tokens, labels(4), 0.0, 0.0, task._weights(system.plan))
    assert float(found.detach()) == pytest.approx(float(by_step.mean()), rel=1e-6)


# Drawing again

def redrawn(rounds: int, below: float, seed: int = 0) -> tuple[list[Sample], list[Tensor], Run]:
    """The samples after every round and the places drawn, of the third scale."""
    system = tiny()
    guidance, seen, where = ClassifierFree(2.0), [], []

    def each(step: int, round: int, places: Tensor, sample: Sample) -> None:
        if step == 2:
            seen.append(sample)
            where.append(places)

    run = system.start(labels(2), guidance, Keyed.from_seeds([seed, seed + 1]))
    model = SimpleNamespace(generator=system.generator, head=Resampling(system.head, rounds, below, each))
    with torch.no_grad():
        list(sample_steps(model, run, guidance, (TopK(20),)))
    return seen, where, run


def test_rounds_keep_the_likelier_token() -> None:
    for below in (1.0, 0.3):
        samples, where, run = redrawn(3, below)
        assert len(samples) == 4 and torch.equal(run.tokens[2], samples[-1].tokens)
        for before, after, drawn in zip(samples[:-1], samples[1:], where[1:], strict=True):
            assert torch.equal(drawn, before.confidence < below)
            assert bool((after.confidence >= before.confidence).all())
            assert torch.equal(after.tokens[~drawn], before.tokens[~drawn])
        assert float(samples[-1].confidence.mean()) > float(samples[0].confidence.mean())
        torch.testing.assert_close(samples[-1].log_prob.exp(), samples[-1].confidence)


def test_a_threshold_spares_the_likely_tokens_and_zero_rounds_change_nothing() -> None:
    plain, all_again, none_again = redrawn(0, 1.0), redrawn(2, 1.0), redrawn(2, 0.0)
    assert torch.equal(plain[2].tokens[2], none_again[2].tokens[2])
    assert not torch.equal(plain[2].tokens[2], all_again[2].tokens[2])
    one = tiny().generate([1, 2], seed=3, output="torch", progress=False)
    other = tiny(resample=0, resample_below=0.5).generate([1, 2], seed=3, output="torch", progress=False)
    assert torch.equal(one.images, other.images)


def test_redrawn_tokens_come_from_the_guided_filtered_distribution() -> None:
    system = tiny(resample=4)
    drawn = system.generate([1, 2], seed=3, top_k=2, output="torch", progress=False)
    reads, condition = reads_of(system, drawn.tokens), ClassCondition(system.labels, torch.tensor([[1], [2]]))
    guidance = make_guidance(2.0)
    with torch.no_grad():
        outputs = system.head.outputs(hidden_states(system, system.plan, reads, condition, guidance.branches),
                                      guidance.branches)
    for span, tokens in zip(system.plan.spans(0, 4), drawn.tokens, strict=True):
        part = {name: logits[:, span.lo:span.hi] for name, logits in outputs.items()}
        allowed = TopK(2)(guidance(part, At.of(system.plan, span.step)), At.of(system.plan, span.step))
        assert bool(allowed.gather(-1, tokens[..., None]).isfinite().all())
    scored = system.log_prob(drawn.tokens, [1, 2], guidance, (TopK(2),))
    torch.testing.assert_close(scored.picture, drawn.log_prob, rtol=1e-4, atol=1e-4)


def test_impossible_resampling_is_refused() -> None:
    for rounds, below in ((-1, 1.0), (1, 1.5), (1, float("nan"))):
        with pytest.raises(InputError, match="resampling"):
            tiny(resample=rounds, resample_below=below).generate([1], progress=False)
    with pytest.raises(InputError, match="window"):
        SRDDGeneratorConfig(window=-1)


# Guidance by schedules

@pytest.mark.parametrize(("schedule", "shares"), [
    ("constant", [1, 1, 1, 1]), ("ramp", [0, 1 / 3, 2 / 3, 1]), ("cosine", [0, 0.25, 0.75, 1]),
    ((0.5, 0.0, 2.0, 1.0), [0.5, 0, 2, 1])])
def test_guidance_follows_its_schedule(schedule: str, shares: list[float]) -> None:
    outputs = {"conditional": torch.ones(1), "unconditional": torch.zeros(1)}
    found = [float(make_guidance(3.0, schedule)(outputs, At(k, 4, 0, 1))) for k in range(4)]
    assert found == pytest.approx([1 + 2 * share for share in shares])


def test_schedules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="2 numbers are given for 4 steps"):
        tiny(guidance_schedule=(0.0, 1.0)).generate([1], progress=False)
    for wrong in ("rampp", (), (math.nan, 1.0)):
        with pytest.raises(InputError, match="guidance_schedule"):
            make_guidance(2.0, wrong)


# Known content

def test_editing_keeps_what_is_known_and_enlarging_keeps_its_coarse_scales() -> None:
    system = tiny(resample=1)
    pictures = emoji(2)
    everything = torch.zeros(2, 16, 16, dtype=torch.bool)
    kept = system.edit(pictures, everything, None, output="torch", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, system.encode(pictures), strict=True))
    small = resize(pictures, (8, 8), "area")
    given = system.encode(resize(small, (16, 16), "bicubic").clamp(-1, 1))
    for scales, count in ((None, 2), (3, 3)):
        drawn = system.enlarge(small, [1, 2], scales=scales, seed=4, output="torch", progress=False)
        same = [torch.equal(a, b) for a, b in zip(drawn.tokens, given, strict=True)]
        assert same == [k < count for k in range(4)]
    assert [bool(m.all()) for m in keep_first(system.plan, 2, 1, torch.device("cpu"))] == [True, True, False, False]
    with pytest.raises(InputError, match="1 to 4 can be given"):
        system.enlarge(small, [1, 2], scales=5)


def test_an_enlarged_picture_keeps_the_low_pass_of_the_small_one() -> None:
    """With the model that ships: trained fine scales add detail to known coarse ones."""
    system = nextscale.load("emoji-text-64")
    small = resize(emoji(8, 64, True), (32, 32), "area")
    large = system.enlarge(small, output="torch", progress=False, guidance_scale=1.0)
    free = system.generate(None, 8, output="torch", progress=False, guidance_scale=1.0)
    known = sum(step.grid[0] <= 4 for step in system.plan)
    assert large.images.shape == (8, 3, 64, 64) and known < len(system.plan)
    off, other = (float((resize(d.images, (4, 4), "area") - resize(small, (4, 4), "area")).square().mean())
                  for d in (large, free))
    assert off < 0.2 * other


def test_the_signal_to_noise_ratio_of_real_pictures_rises_with_every_scale() -> None:
    tokenizer = nextscale.load("emoji-text-64").tokenizer
    pictures = emoji(16, 64, True)
    with torch.no_grad():
        found = signal_to_noise(tokenizer.latent(pictures), tokenizer.encode(pictures).tokens,
                                Canvas.empty(tokenizer.plan, tokenizer.quantiser, 16))
    assert found.shape == (16, len(tokenizer.plan))
    mean_K = found.log().mean(0)
    assert bool((mean_K[1:] > mean_K[:-1]).all()) and bool((found[:, -1] > found[:, 0]).all())


# Training

def test_the_command_line_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "generator.depth=2", "generator.width=32", "generator.heads=2", "generator.window=1", "data.held_out=0",
            "train.precision=fp32", "train.minutes=5", "step_weights=equal", "settings.resample=2",
            "settings.resample_below=0.5", "settings.guidance_scale=2.0",
            "settings.guidance_schedule=[0.0, 0.5, 1.0, 1.0]"]
    command = ["train", "generator", "--system", "srdd", "--data", "pictures", "--tokenizer", "tokenizer"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "run"]) == 0
    trained = nextscale.load("run/model")
    assert isinstance(trained, SRDD) and trained.plan.visible == PREVIOUS_ONLY and trained.plan.visible != OWN_STEP
    used = trained.config.settings["pictures"]
    assert (used.resample, used.guidance_schedule) == (2, (0.0, 0.5, 1.0, 1.0))
    draw = ["generate", "--model", "run/model", "--count", "2", "--out", "a.png"]
    assert main.run(draw) == 0 and main.run([*draw, "--guidance-schedule", "0,0.5,1,1"]) == 0
    assert main.run([*draw, "--guidance-schedule", "slow"]) == 2
