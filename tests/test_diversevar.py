"""DiverseVAR: singular values follow their formulas, vectors stay, and other steps are left alone."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, fill, start, tiny_var
from torch import Tensor

import nextscale
from nextscale.cli.main import run as command
from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.hmar import HMARGeneratorConfig
from nextscale.generators.var import VARGeneratorConfig
from nextscale.run import Rows, Run
from nextscale.sampling.diversevar import DiverseVAR, reweigh
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import ClassifierFree, make_guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.hmar import HMAR, HMARConfig, HMARSettings
from nextscale.systems.m_var import MVAR, MVARConfig
from nextscale.systems.var import VAR
from nextscale.tokenizers.config import TokenizerConfig

NEUTRAL = {"suppression": 0.0, "amplification": 0.0}


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


def draw(system: VAR, *hooks: Hook) -> Run:
    guidance = ClassifierFree(2.0)
    run = start(system, system.plan, guidance, 3)
    with torch.no_grad():
        for _ in sample_steps(system, run, guidance, (), hooks, check=True):
            pass
    return run


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip([*a.tokens, *a.log_probs], [*b.tokens, *b.log_probs], strict=True))


@pytest.mark.parametrize("shape", [(2, 16, 48), (3, 36, 20), (1, 1, 8), (2, 9, 9)])
@pytest.mark.parametrize(("gain", "rate", "relative"), [(1.0, -0.5, True), (0.8, 0.3, True), (1.3, -0.02, False)])
def test_singular_values_follow_the_formula_and_vectors_stay(shape: tuple[int, ...], gain: float, rate: float,
                                                             relative: bool) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, size, vt = torch.linalg.svd(x, full_matrices=False)
    wanted = gain * torch.exp(rate * (size / size[:, :1] if relative else size)) * size
    torch.testing.assert_close(reweigh(x, gain, rate, relative), u @ torch.diag_embed(wanted) @ vt, atol=2e-5,
                               rtol=1e-4)


def test_directions_that_hold_nothing_stay_empty_and_huge_activations_stay_finite() -> None:
    x = torch.randn(2, 5, 1) @ torch.randn(2, 1, 30)  # rank 1
    torch.testing.assert_close(reweigh(x, 2.0, -0.5), 2 * 2.718281828 ** -0.5 * x, atol=1e-4, rtol=1e-4)
    assert torch.equal(reweigh(torch.zeros(1, 4, 6), 1.0, 0.5), torch.zeros(1, 4, 6))
    huge = torch.randn(1, 16, 64)
    huge[:, 3, 7] = 2e4
    for rate in (-1.0, 1.0):
        found = reweigh(huge.bfloat16(), 1.0, rate)
        assert found.dtype == torch.bfloat16 and found.isfinite().all() and found.abs().max() > 1e3


def test_neutral_settings_and_no_steps_are_the_base_sampler_bit_for_bit(system: VAR) -> None:
    plain = draw(system)
    assert not same(draw(system, DiverseVAR()), plain)
    for mode in ("block", "model"):
        assert same(draw(system, DiverseVAR(**NEUTRAL, mode=mode)), plain)
        assert same(draw(system, DiverseVAR(2.0, 2.0, at_steps=(), mode=mode)), plain)


@pytest.mark.parametrize("mode", ["block", "model"])
def test_only_the_steps_in_the_list_are_touched(system: VAR, mode: str) -> None:
    """Steps before the listed one are untouched to the bit; later ones differ by what they see of it alone."""
    plain, changed = draw(system), draw(system, DiverseVAR(2.0, 0.0, at_steps=(2,), mode=mode))
    assert all(torch.equal(plain.tokens[k], changed.tokens[k]) for k in (0, 1))
    for address in ("base.0.kv", "base.1.kv"):
        one, other = (run.memory.groups[address][0].v for run in (plain, changed))
        assert torch.equal(one[:, :, :5], other[:, :, :5])
        assert not torch.equal(one[:, :, 5:14], other[:, :, 5:14])

    # Given the same tokens, the first layer's values of the last step, which saw nothing yet, are the same.
    def values(hook: Hook) -> Tensor:
        guidance = ClassifierFree(2.0)
        run = start(system, system.plan, guidance, 3)
        for tokens in plain.tokens[:3]:
            run.force(tokens)
        for _ in sample_steps(system, run, guidance, (), [hook]):
            pass
        return run.memory.groups["base.0.kv"][0].v[:, :, 14:30]

    with torch.no_grad():
        assert torch.equal(values(DiverseVAR(2.0, 0.0, at_steps=(2,), mode=mode)), values(Hook()))


def test_every_block_is_damped_at_its_input_and_boosted_at_its_output(system: VAR) -> None:
    class Sizes(Hook):
        def __init__(self, into: dict[str, list[Tensor]]):
            self.into = into

        def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
            out = inner(x, rows)
            if rows.spans[0].step == 2:
                self.into[address] = [x, out]
            return out

    inside: dict[str, list[Tensor]] = {}
    outside: dict[str, list[Tensor]] = {}
    draw(system, Sizes(inside), DiverseVAR(0.7, 0.4, input_gain=0.9, output_gain=1.1), Sizes(outside))
    assert set(inside) == {"base.0", "base.1"}
    for address in inside:
        torch.testing.assert_close(inside[address][0], reweigh(outside[address][0], 0.9, -0.7))
        torch.testing.assert_close(outside[address][1], reweigh(inside[address][1], 1.1, 0.4))


def test_pictures_and_branches_dont_mix() -> None:
    x = torch.randn(4, 9, 32)
    torch.testing.assert_close(reweigh(x, 1.0, -1.0)[2:3], reweigh(x[2:3], 1.0, -1.0))


@pytest.mark.parametrize("mode", ["block", "model"])
def test_one_call_scores_what_the_loop_drew(system: VAR, mode: str) -> None:
    hook = DiverseVAR(0.5, 0.25, mode=mode)
    made = system.generate([0, 1, 2], seed=4, hooks=[hook], top_k=None, top_p=None)
    scored = system.log_prob(made.tokens, [0, 1, 2], make_guidance(2.0), hooks=[hook])
    torch.testing.assert_close(scored.picture, made.log_prob, atol=2e-3, rtol=0)


def test_a_control_tower_s_blocks_are_left_alone(system: VAR) -> None:
    hook, x = DiverseVAR(at_steps=(0,)), torch.randn(2, 1, 48)
    rows = start(system, system.plan, ClassifierFree(2.0), 1).rows(0, 1)
    assert torch.equal(hook.block(Context(), "control.0", x, rows, lambda x, rows: x), x)
    twice = DiverseVAR(at_steps=(0,), input_gain=2.0, suppression=0.0, amplification=0.0)
    torch.testing.assert_close(twice.block(Context(), "base.0", x, rows, lambda x, rows: x), 2 * x)


def test_it_adds_no_evaluation_of_the_network(system: VAR) -> None:
    plain, diverse = (cost_of(system, [0, 1], hooks=hooks) for hooks in ([], [DiverseVAR()]))
    assert (diverse.evaluations, diverse.rows) == (plain.evaluations, plain.rows)


@pytest.mark.parametrize(("settings", "message"), [
    ({"suppression": -1.0}, "suppression is -1"), ({"mode": "scale"}, "mode is"), ({"beta": 1.0}, "unknown key"),
    ({"output_gain": float("inf")}, "output_gain")])
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nextscale.hook("diversevar", **settings)


def test_steps_that_the_plan_hasnt_and_parts_of_maps_are_refused(system: VAR) -> None:
    with pytest.raises(InputError, match="plan has the steps 0 to 3"):
        system.generate([0], hooks=[DiverseVAR(at_steps=(2, 4))])
    plan = replace(system.plan, steps=(*system.plan.steps[:3], replace(system.plan.steps[3], count=4)))
    with pytest.raises(InputError, match="whole maps"):
        DiverseVAR(at_steps=(3,)).prepare(system, plan, [])


def test_generate_takes_it_by_name(system: VAR, tmp_path: Any) -> None:
    from nextscale.systems import folders

    folders.save(system, tmp_path / "model")
    assert command(["generate", "--model", str(tmp_path / "model"), "--label", "1", "--count", "2", "--hook",
                    "diversevar suppression=0.5 at_steps=[1,2] mode=model", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").is_file()


def test_other_scale_wise_systems_carry_it() -> None:
    """Attention inside a scale and a scan over all of them; a head that draws in rounds."""
    tokenizer, settings = TokenizerConfig(AUTOENCODER, GRIDS, 32), {"pictures": Settings(2.0, top_k=20)}
    rounds = {"pictures": HMARSettings(2.0, top_k=20, rounds=((1,), (1, 3), (2, 3, 4), (16,)))}
    for other in (MVAR(MVARConfig(tokenizer, VARGeneratorConfig(2, 64, 2), (5,), settings=settings)),
                  HMAR(HMARConfig(tokenizer, HMARGeneratorConfig(2, 48, 3, mask_blocks=1), (5,), settings=rounds))):
        fill(other.eval())
        plain, neutral, diverse = (other.generate([0, 1], seed=1, hooks=[hook], output="torch", progress=False).images
                                   for hook in (Hook(), DiverseVAR(**NEUTRAL), DiverseVAR(2.0, 1.0, at_steps=(1, 2))))
        assert torch.equal(plain, neutral) and not torch.equal(plain, diverse), type(other).__name__
