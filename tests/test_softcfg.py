"""SoftCFG: how much of which values the unconditional branch reads, and that nothing else changes."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, fill, start, tiny_var
from torch import Tensor

import nextscale
from nextscale.cli.main import run as command
from nextscale.context import Attend, Context, Hook
from nextscale.errors import InputError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.flexvar import FlexVARGeneratorConfig
from nextscale.generators.var import VARGeneratorConfig
from nextscale.heads.velocity import VelocityHead
from nextscale.layers.attention import attention
from nextscale.layers.memory import Tags
from nextscale.plan import OWN_STEP, PREVIOUS_ONLY, Plan
from nextscale.run import At, Rows, Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import ClassifierFree, Unguided
from nextscale.sampling.softcfg import CONFIDENCE, SoftCFG
from nextscale.sampling.steps import sample_steps
from nextscale.systems.flexvar import FlexVAR, FlexVARConfig, FlexVARSettings
from nextscale.systems.nfig import NFIG, NFIGConfig
from nextscale.systems.var import VAR
from nextscale.tokenizers.config import TokenizerConfig

PICTURES = 3


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


class Weights(SoftCFG):
    """Keeps what it multiplied values with: (step, address) -> weights (R, N) and the steps of the rows (N,)."""

    def read(self, ctx: Context, address: str, k: Tensor, v: Tensor, keys: Tags,
             rows: Rows) -> tuple[Tensor, Tensor]:
        seen[rows.spans[0].step, address] = self.weights(ctx, keys, rows), keys.step[0]
        return super().read(ctx, address, k, v, keys, rows)


seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}


class Confidence(Hook):
    """The same confidence for every token, whatever the model says."""

    def __init__(self, value: float):
        self.value = value

    def inputs(self, run: Run, call: Any) -> Any:
        run.carried[CONFIDENCE] = torch.full((run.pictures, run.plan.length), self.value)
        return call


def draw(system: VAR, hooks: list[Hook], plan: Plan | None = None, scale: float = 3.0, guidance: Any = None) -> Run:
    guidance = guidance or ClassifierFree(scale)
    run = start(system, plan or system.plan, guidance, PICTURES)
    with torch.no_grad():
        for _ in sample_steps(system, run, guidance, (), hooks, check=True):
            pass
    return run


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip([*a.tokens, *a.log_probs], [*b.tokens, *b.log_probs], strict=True))


def test_one_token_s_worth_of_values_is_taken_away_at_every_step(system: VAR) -> None:
    seen.clear()
    run = draw(system, [Weights()])
    assert len(seen) == 4 * 2, "every step and layer"
    for (step, _), (weight_RN, steps_N) in seen.items():
        conditional, unconditional = weight_RN.chunk(2)
        assert torch.equal(conditional, torch.ones_like(conditional))
        earlier = (steps_N > 0) & (steps_N < step)
        assert torch.equal(unconditional[:, ~earlier], torch.ones(PICTURES, int((~earlier).sum()))), \
            "the condition's row and the step's own are read as they are"
        taken = (1 - unconditional).sum(1)
        torch.testing.assert_close(taken, torch.full((PICTURES,), float(step > 1)), atol=1e-6, rtol=0)
        if step > 1:  # shared out by confidence
            p = run.carried[CONFIDENCE][:, 1:int(earlier.sum()) + 1]
            torch.testing.assert_close(1 - unconditional[:, earlier], p / p.sum(1, keepdim=True))


def test_equal_confidence_takes_the_same_from_every_token(system: VAR) -> None:
    seen.clear()
    draw(system, [Confidence(0.7), Weights()])
    weight, _ = seen[3, "base.1.kv"]
    torch.testing.assert_close(weight[PICTURES:, 1:14], torch.full((PICTURES, 13), 1 - 1 / 13))


def test_without_normalisation_the_weight_is_one_minus_the_confidence(system: VAR) -> None:
    seen.clear()
    run = draw(system, [Weights(normalised=False, budget=0.5)])
    weight, _ = seen[3, "base.0.kv"]
    torch.testing.assert_close(weight[PICTURES:, 1:14], 1 - 0.5 * run.carried[CONFIDENCE][:, 1:14])


def test_no_confidence_and_no_budget_are_plain_guidance_bit_for_bit(system: VAR) -> None:
    plain = draw(system, [])
    assert not same(draw(system, [SoftCFG()]), plain)
    for hooks in ([SoftCFG(budget=0.0)], [Confidence(0.0), SoftCFG()],
                  [Confidence(0.0), SoftCFG(normalised=False, reads="both")]):
        assert same(draw(system, hooks), plain)


def test_without_guidance_s_strength_it_is_conditional_sampling(system: VAR) -> None:
    """The conditional branch itself is never touched."""
    assert same(draw(system, [SoftCFG()], scale=1.0), draw(system, [], scale=1.0))
    conditional, guided = draw(system, [], guidance=Unguided()), draw(system, [SoftCFG()], scale=1.0)
    assert all(torch.equal(a, b) for a, b in zip(conditional.tokens, guided.tokens, strict=True))


def test_confidence_is_the_conditional_branch_s_before_guidance_and_filters(system: VAR) -> None:
    class Outputs(Hook):
        def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
            found.append(outputs["conditional"].softmax(-1).amax(-1))
            return outputs

    found: list[Tensor] = []
    run = draw(system, [SoftCFG(), Outputs()])
    torch.testing.assert_close(run.carried[CONFIDENCE], torch.cat(found, 1))


def test_scaled_values_are_scaled_columns_of_the_attention_and_memory_keeps_its_own(system: VAR) -> None:
    class Columns(Hook):
        """Attention written out, with its columns scaled, beside what the hook made of it."""

        def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
                   inner: Attend) -> Tensor:
            assert v is not None and ctx.memory is not None
            given.append(v)
            out = inner(q, k, v, rows)
            group = ctx.memory.groups[address][0]
            keys, values = group.k[:, :, :group.rows], group.v[:, :, :group.rows]
            weight, _ = seen[rows.spans[0].step, address]
            probability = (q @ keys.mT).softmax(-1) * weight[:, None, None]
            torch.testing.assert_close(out, probability @ values, atol=1e-5, rtol=1e-4)
            return out

    given: list[Tensor] = []
    seen.clear()
    run = draw(system, [Weights(), Columns()])
    # Values in memory are those that the network wrote, not ones that shrank again at every step.
    for layer in (0, 1):
        held = run.memory.groups[f"base.{layer}.kv"][0].v[:, :, :30]
        assert torch.equal(held, torch.cat(given[layer::2], 2))


def test_keys_are_scaled_where_asked(system: VAR) -> None:
    runs = [draw(system, [SoftCFG(reads=reads)]) for reads in ("values", "keys", "both")]
    assert not same(runs[0], runs[1]) and not same(runs[0], runs[2]) and not same(runs[1], runs[2])


def test_only_steps_that_a_row_sees_count_as_context(system: VAR) -> None:
    seen.clear()
    draw(system, [Weights()], replace(system.plan, visible=PREVIOUS_ONLY))
    weight, steps = seen[3, "base.0.kv"]
    assert torch.equal(weight[:, steps != 2], torch.ones(2 * PICTURES, int((steps != 2).sum())))
    torch.testing.assert_close((1 - weight[PICTURES:]).sum(1), torch.ones(PICTURES))


def test_a_control_tower_s_values_are_read_as_they_are(system: VAR) -> None:
    run = start(system, system.plan, ClassifierFree(2.0), PICTURES)
    rows, v = run.rows(3, 4), torch.randn(2 * PICTURES, 3, 30, 16)
    assert SoftCFG().read(Context(run.memory), "control.0.kv", v, v, rows.tags, rows)[1] is v


def test_rectangles_and_one_token_a_step(system: VAR) -> None:
    for grids in (((1, 1), (1, 2), (2, 3), (3, 4)), ((1, 1),) * 5):
        seen.clear()
        run = draw(tiny_var(grids), [Weights()])
        assert len(run.tokens) == len(grids)
        for (step, _), (weight, _) in seen.items():
            assert float((1 - weight[PICTURES:]).sum(1).min()) == pytest.approx(float(step > 1), abs=1e-6)


def test_it_adds_no_evaluation_of_the_network(system: VAR) -> None:
    plain, soft = (cost_of(system, [0, 1], hooks=hooks) for hooks in ([], [SoftCFG()]))
    assert (soft.evaluations, soft.rows) == (plain.evaluations, plain.rows)


def test_attention_reads_other_values_in_a_pass_without_memory_too() -> None:
    class Nothing(Hook):
        def read(self, ctx: Context, address: str, k: Tensor, v: Tensor, keys: Tags,
                 rows: Rows) -> tuple[Tensor, Tensor]:
            return k, torch.zeros_like(v)

    class Twice(Hook):
        def read(self, ctx: Context, address: str, k: Tensor, v: Tensor, keys: Tags,
                 rows: Rows) -> tuple[Tensor, Tensor]:
            assert len(keys) == v.shape[2]
            return k, 2 * v + 1

    run = start(tiny_var(), tiny_var().plan, Unguided())
    q, k, v = torch.randn(3, 2, 3, 14, 16)
    rows = replace(run.rows(0, 3), masked=False)
    for hooks, wanted in (([Twice()], 2 * v + 1), ([Nothing(), Twice()], 0 * v), ([Twice(), Nothing()], 0 * v + 1)):
        found = Context(hooks=hooks).attend("base.0.kv", q, k, v, rows)
        torch.testing.assert_close(found, attention(q, k, wanted))


@pytest.mark.parametrize(("settings", "message"), [
    ({"budget": 1.5}, "budget is 1.5"), ({"reads": "queries"}, "reads is"), ({"budgets": 1}, "unknown key")])
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nextscale.hook("softcfg", **settings)


def test_what_it_cant_act_on_is_refused_before_a_token_is_drawn(system: VAR) -> None:
    with pytest.raises(InputError, match="set guidance_scale"):
        system.generate([0], hooks=[SoftCFG()], guidance_scale=1.0)
    with pytest.raises(InputError, match="given twice"):
        system.generate([0], hooks=[SoftCFG(), SoftCFG()])
    with pytest.raises(InputError, match="needs a run's memory"):
        system.log_prob(system.generate([0]).tokens, [0], ClassifierFree(2.0), hooks=[SoftCFG()])
    with pytest.raises(InputError, match="their own step alone"):  # HMAR, M-VAR
        SoftCFG().prepare(system, replace(system.plan, visible=OWN_STEP), [])
    with pytest.raises(InputError, match="which a VelocityHead does not give"):  # FlowAR, xAR, MAR
        SoftCFG().prepare(SimpleNamespace(head=VelocityHead(8, 4)), system.plan, [])


def test_generate_takes_it_by_name(system: VAR, tmp_path: Any) -> None:
    from nextscale.systems import folders

    folders.save(system, tmp_path / "model")
    assert command(["generate", "--model", str(tmp_path / "model"), "--label", "1", "--count", "2", "--hook",
                    "softcfg budget=0.5", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").is_file()


def test_other_scale_wise_systems_carry_it() -> None:
    """Resizable positions and the last map alone as what a scale reads; frequency bands."""
    settings = {"pictures": FlexVARSettings(4.0, top_k=20)}
    flat = TokenizerConfig(replace(AUTOENCODER, latent_kernel=1), GRIDS, 32, kind="l2-vq")
    bands = NFIGConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32, bands="nyquist"), VARGeneratorConfig(2, 48, 3), (5,),
                       settings={"pictures": Settings(4.0, top_k=20)})
    for other in (FlexVAR(FlexVARConfig(flat, FlexVARGeneratorConfig(2, 48, 3, table=8), (5,), settings=settings)),
                  NFIG(bands)):
        fill(other.eval())
        plain, without, soft = (other.generate([0, 1], seed=1, hooks=[hook], output="torch", progress=False).images
                                for hook in (Hook(), SoftCFG(budget=0.0), SoftCFG()))
        assert torch.equal(plain, without) and not torch.equal(plain, soft), type(other).__name__
