"""VAR's complexity limits: the polynomial construction against matrices, its error and cost, the report, the hook."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import test_flexvar
import test_m_var
import torch
from tiny import AUTOENCODER, GRIDS, emoji, fill, tiny_var
from torch import Tensor

from nextscale.acceleration.fastvar import FastVAR
from nextscale.acceleration.var_limits import (
    LowRankAttention,
    crossover,
    degree_for,
    error_bound,
    features,
    limits,
    one_pass,
    rank,
    relative_error,
    streamed,
    table,
)
from nextscale.cli import main
from nextscale.context import Attend, Context, Hook
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Rows, Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.var import PLANS, VAR, VARConfig
from nextscale.tokenizers.config import TokenizerConfig


def narrow(s: float) -> VAR:
    """Heads of width 8 whose logits are at most s, filled."""
    system = VAR(VARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), VARGeneratorConfig(2, 48, 6), (5,),
                           settings={"pictures": Settings(2.0)})).eval()
    fill(system)
    with torch.no_grad():
        for block in system.generator.blocks:
            block.attention.scale_1H11.fill_(math.log(s))
    return system


def draws(plan: Plan, s: float, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of length s, keys of length 1, values, (2, 3, L, width)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, plan.length, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return s * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, degree: int | None) -> Tensor:
    """Attention with weights T_g(q . k), or exp where no degree is given, by the whole matrix."""
    x = q @ k.transpose(-1, -2)
    weight = x.exp() if degree is None else sum(x**j / math.factorial(j) for j in range(degree + 1))
    weight = weight * mask
    return weight / weight.sum(-1, keepdim=True) @ v


# The construction

@pytest.mark.parametrize("grids", [(1, 2, 3), ((1, 1), (2, 3), (4, 2), (3, 3))], ids=str)
@pytest.mark.parametrize("degree", [2, 4, 6])
def test_features_give_what_the_whole_matrix_gives_streamed_and_in_one_pass(grids: tuple[Any, ...], degree: int
                                                                          ) -> None:
    plan = Plan.scales(grids)
    q, k, v = draws(plan, 2.0)
    whole = explicit(q, k, v, plan.mask(), degree)
    torch.testing.assert_close(one_pass(q, k, v, degree, plan.spans(0, len(plan))), whole)
    state, parts = None, []
    for s in plan.spans(0, len(plan)):
        out, state = streamed(*(t[:, :, s.lo:s.hi] for t in (q, k, v)), degree, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    assert features(q, degree).shape[-1] == state[1].shape[-1] == rank(5, degree)


# Error and cost

@pytest.mark.parametrize("s", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("degree", [2, 4, 8, 16])
def test_errors_of_weights_stay_below_the_told_error_and_that_below_the_bound(s: float, degree: int) -> None:
    x = torch.linspace(-s, s, 2001, dtype=torch.float64)
    measured = float((sum(x**j / math.factorial(j) for j in range(degree + 1)) / x.exp() - 1).abs().max())
    assert measured == pytest.approx(relative_error(s, degree), rel=1e-6, abs=1e-13)
    assert relative_error(s, degree) <= error_bound(s, degree)
    plan = Plan.scales((1, 2, 3))
    q, k, v = draws(plan, s, seed=1)
    error = relative_error(s, degree)
    if error < 0.5:
        found = one_pass(q, k, v, degree, plan.spans(0, 3)) - explicit(q, k, v, plan.mask(), None)
        assert float(found.abs().max()) <= 2 * error / (1 - error) * float(v.abs().max()) + 1e-12


def test_the_degree_grows_with_the_logits_as_the_criterion_says() -> None:
    wanted = {0.25: [2, 2, 4], 0.5: [2, 4, 4], 1.0: [4, 6, 6], 2.0: [8, 8, 10], 4.0: [14, 16, 18]}
    assert {s: [degree_for(s, e) for e in (1e-1, 1e-2, 1e-3)] for s in wanted} == wanted
    far = [degree_for(s, 0.01) / s for s in (20.0, 50.0, 100.0)]
    assert max(far) < 1.4 * min(far)


def test_ranks_and_crossovers_are_those_of_the_plans() -> None:
    assert [rank(64, g) for g in (2, 4)] == [2145, 814385]
    assert [rank(8, g) for g in (2, 4, 6, 8)] == [45, 495, 3003, 12870]
    assert [round(crossover(Plan.scales(PLANS[size]))) for size in (256, 512, 1024)] == [421, 1460, 6026]


# The report

def test_bounds_come_from_the_weights_and_measured_logits_stay_below_them() -> None:
    system = narrow(3.0)
    with torch.no_grad():
        system.generator.blocks[1].attention.scale_1H11[0, 4] = 9.0
        system.generator.blocks[0].attention.scale_1H11[0, 2] = math.log(0.2)
    told = limits(system)
    assert len(told) == 2 * 6 * len(GRIDS)
    bounds = {(one.address, one.head): one.bound for one in told}
    assert bounds["base.1.kv", 4] == 100 and bounds["base.0.kv", 0] == pytest.approx(3)
    measured = limits(system, emoji(4), [0, 1, 2, 3], error=0.05, batch_size=3)
    assert all(one.logit <= one.bound * (1 + 1e-5) for one in measured)
    assert any(one.logit > 0.5 * one.bound for one in measured)
    cool = [one for one in measured if (one.address, one.head) == ("base.0.kv", 2)]
    assert [one.degree for one in cool] == [2] * 4 and [one.keys for one in cool] == [1, 5, 14, 30]
    assert [one.approximate for one in cool] == [False] * 4  # 45 features
    for one in measured:
        assert one.error == pytest.approx(relative_error(one.logit, one.degree)) and one.error <= 0.05
        assert one.rank == rank(8, one.degree) and one.lost == 0
    assert "base.0.kv head 2: at most 0.20" in table(measured, system.plan)


def test_heads_with_fewer_features_than_keys_are_told() -> None:
    system = VAR(VARConfig(TokenizerConfig(AUTOENCODER, ((1, 1), (4, 4), (6, 6)), 32), VARGeneratorConfig(1, 32, 8),
                           (5,))).eval()
    fill(system)
    with torch.no_grad():
        system.generator.blocks[0].attention.scale_1H11.fill_(math.log(0.2))
    found = limits(system)  # heads of width 4: 15 features at degree 2
    assert {one.rank for one in found} == {15}
    assert [one.approximate for one in found[:3]] == [False, True, True]
    assert "4x4, 6x6" in table(found, system.plan)


def test_logits_without_unit_lengths_are_measured_alone_and_hidden_steps_are_not_looked_at() -> None:
    system = tiny_var(l2_attention=False)
    with pytest.raises(InputError, match="measured on pictures"):
        limits(system)
    found = limits(system, emoji(2), [0, 1])
    assert all(one.bound == math.inf and 0 < one.logit < math.inf for one in found)
    own = limits(test_m_var.tiny(), emoji(2), [0, 1])
    assert [one.keys for one in own[:4]] == [1, 4, 9, 16]


def test_projected_heads_lose_what_is_told_and_all_directions_lose_nothing() -> None:
    system, pictures = narrow(0.5), emoji(4)
    whole, all_of_it, few = (limits(system, pictures, [0, 1, 2, 3], directions=m) for m in (None, 8, 3))
    for one, same, projected in zip(whole, all_of_it, few, strict=True):
        assert same.logit == pytest.approx(one.logit, rel=1e-4) and same.lost < 1e-5 and same.rank == one.rank
        assert projected.rank == rank(3, projected.degree) < one.rank
        assert projected.logit + projected.lost >= one.logit * (1 - 1e-4)
        assert projected.error >= math.exp(projected.lost) - 1
        assert not (projected.approximate and projected.error > 0.011)
    assert max(one.lost for one in few) > 0.01
    with pytest.raises(InputError, match="measured on pictures"):
        limits(system, directions=3)


# As a hook

@dataclass
class Compare(Hook):
    """Low-rank attention in place of the exact one, and how far they are apart, layer by layer."""

    hook: LowRankAttention
    errors: dict[str, float] = field(default_factory=dict)

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        exact, low = inner(q, k, v, rows), self.hook.attend(ctx, address, q, k, v, rows, inner)
        self.errors[address] = float((low - exact).norm() / exact.norm())
        return exact


def agreement(system: VAR, hook: LowRankAttention) -> float:
    base, found = (torch.cat(system.generate([0, 1, 2, 3], hooks=hooks, top_k=1, output="torch",
                                             progress=False).tokens, 1) for hooks in ([], [hook]))
    return float((base == found).float().mean())


@pytest.mark.parametrize(("s", "degree", "far"), [(1.0, 6, 8.0), (0.5, 4, 4.0)])
def test_small_logits_give_the_same_tokens_and_large_ones_do_not(s: float, degree: int, far: float) -> None:
    hook, errors = LowRankAttention(degree), {}
    for size in (s, far):
        compare, system = Compare(hook), narrow(size)
        system.log_prob(emoji(4), [0, 1, 2, 3], hooks=[compare])
        errors[size] = compare.errors
        assert (agreement(system, hook) >= 0.95) == (size == s)
    assert max(errors[s].values()) <= 0.01 and min(errors[far].values()) >= 0.1


def started(system: VAR) -> Run:
    return system.start(torch.arange(3)[:, None], ClassifierFree(2.0), Keyed.from_seeds(range(3)))


@torch.no_grad()
def go(system: VAR, run: Run, until: int | None = None) -> Run:
    for _ in sample_steps(system, run, ClassifierFree(2.0), (), [LowRankAttention(4)], until=until, check=True):
        pass
    return run


@torch.no_grad()
def test_sums_follow_gathering_and_hand_over_and_equal_the_pass_without_memory() -> None:
    system = narrow(1.0)
    whole = go(system, started(system))
    assert not whole.memory.groups
    assert whole.memory.state["var_limits.base.0.kv.s"].shape == (6, 6, rank(8, 4), 8)
    middle = go(system, started(system), until=2)
    for other, order in ((middle.gather([2, 0, 1]), [2, 0, 1]),
                         (middle.hand_over(middle.condition), [0, 1, 2])):
        for a, b in zip(go(system, other).tokens, whole.tokens, strict=True):
            assert torch.equal(a, b[order])
    scored = system.log_prob(whole.tokens, [0, 1, 2], guidance=ClassifierFree(2.0), hooks=[LowRankAttention(4)])
    torch.testing.assert_close(scored.token, torch.cat(whole.log_probs, 1), atol=1e-4, rtol=0)


def test_pruned_rows_and_low_rank_attention_go_together() -> None:
    system, hooks = narrow(0.5), [FastVAR(0.5), LowRankAttention(6)]
    found = system.generate([0, 1], hooks=hooks, top_k=1, output="torch", progress=False).tokens
    pruned = system.generate([0, 1], hooks=hooks[:1], top_k=1, output="torch", progress=False).tokens
    assert float(torch.cat([a == b for a, b in zip(found, pruned, strict=True)], 1).float().mean()) >= 0.95


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(InputError, match="even and at least 2"):
        LowRankAttention(3)
    with pytest.raises(InputError, match="between 0 and 1"):
        degree_for(1.0, 0.0)
    with pytest.raises(InputError, match="hides earlier"):
        test_m_var.tiny().generate([1], hooks=[LowRankAttention()], progress=False)
    with pytest.raises(InputError, match="no keys are kept that Compare"):
        narrow(1.0).generate([1], hooks=[LowRankAttention(), Compare(LowRankAttention())], progress=False)
    with pytest.raises(InputError, match=r"need 4,845 features for degree 4|heads of width 16 would need"):
        test_flexvar.tiny().generate([1], hooks=[LowRankAttention(8)], progress=False)


def test_the_command_line_reports_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.save(narrow(0.5), tmp_path / "model")
    out = tmp_path / "limits.json"
    assert main.run(["limits", "--model", str(tmp_path / "model"), "--error", "0.1", "--json", str(out)]) == 0
    assert "base.0.kv head 0: at most 0.50; degree 2, 45 features" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["heads"]) == 2 * 6 * len(GRIDS)
