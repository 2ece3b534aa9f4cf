"""What holds for every double, alone and in pairs, whatever it does to rows, memory and tokens."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    GUIDANCE,
    HOOKS,
    ONE_IDLE,
    PAIRS,
    SINGLE,
    TEXT,
    WITH_HEADS,
    Case,
    bits,
    finished,
    same_bits,
    same_tokens,
)

from nextscale.run import At
from nextscale.sampling.steps import evaluator

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("case", [c for c in CASES if c.hooks or c.head != "plain"], ids=str)
def test_the_double_changes_what_is_drawn(case: Case) -> None:
    """Else the invariants below would say nothing about it."""
    without = finished(replace(case, hooks=(), head="plain"))
    assert any(not torch.equal(a, b) for a, b in zip(finished(case).tokens, without.tokens, strict=True))


@every_case
def test_gathering_in_mid_plan_equals_permuting_the_end(case: Case) -> None:
    order, whole, hooks = [2, 0, 1], finished(case), case.make_hooks()
    run = case.go(case.start(), until=2, hooks=hooks)
    run = case.go(run.gather(order), hooks=hooks)
    same_tokens(run, whole.gather(order))
    torch.testing.assert_close(run.canvas.value, whole.canvas.value[order])


@every_case
def test_a_picture_alone_equals_the_picture_in_a_batch(case: Case) -> None:
    whole = finished(case)
    for item in (0, 2):
        alone = case.go(case.start([item]), hooks=case.make_hooks([item]))
        same_tokens(alone, whole.gather([item]))


@pytest.mark.parametrize("case", [*SINGLE, *TEXT[1:], *PAIRS, Case((), "rounds"), Case(("pruned", "tower"), "rounds"),
                                  Case(("layers",), maps=2), Case(("heads",), guidance="three"),
                                  Case(("pruned",), previous_only=True)], ids=str)
def test_a_double_at_its_neutral_setting_equals_none_bit_for_bit(case: Case) -> None:
    with_it, without = finished(replace(case, neutral=True)), finished(replace(case, hooks=(), head="plain"))
    same_tokens(with_it, without)
    assert torch.equal(with_it.canvas.value, without.canvas.value)
    for one, other in zip(with_it.log_probs, without.log_probs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ONE_IDLE, ids=str)
def test_one_of_a_pair_at_its_neutral_setting_equals_the_other_alone_bit_for_bit(case: Case) -> None:
    (active,) = set(case.hooks) - set(case.idle)
    with_it, alone = finished(case), finished(replace(case, hooks=(active,), idle=()))
    same_tokens(with_it, alone)
    assert torch.equal(with_it.canvas.value, alone.canvas.value)
    for one, other in zip(with_it.log_probs, alone.log_probs, strict=True):
        assert torch.equal(one, other)


def test_commit_after_clean_without_noise_equals_the_plain_loop() -> None:
    """Not to the bit: every entity's keys come from a second evaluation, beside the next entity's rows."""
    same_tokens(finished(Case((), "clean", neutral=True)), finished(Case()))


@every_case
def test_going_on_with_a_child_leaves_the_parent_bit_equal(case: Case) -> None:
    hooks = case.make_hooks()
    parent = case.go(case.start(), until=2, hooks=hooks)
    before = bits(parent)
    for child in (parent.gather([0, 1, 2]), parent.fork(2), parent.hand_over(case.condition())):
        case.go(child, hooks=hooks)
        same_bits(before, bits(parent))
    same_tokens(case.go(parent, hooks=hooks), finished(case))


@every_case
def test_hand_over_to_the_same_system_is_the_identity_at_every_step(case: Case) -> None:
    whole, hooks = finished(case), case.make_hooks()
    run = case.start()
    for step in range(1, len(run.plan)):
        run = case.go(run, until=step, hooks=hooks)
        same_tokens(case.go(run.hand_over(case.condition()), hooks=hooks), whole)


@pytest.mark.parametrize("case", [c for c in CASES if c.head == "plain"], ids=str)
def test_the_loop_equals_one_call(case: Case) -> None:
    """All steps prefilled in one call give the loop's log-probabilities: pruning and shrinking go step by step."""
    loop = finished(case)
    run, hooks = replace(case.start(), carried=dict(loop.carried)), case.make_hooks()
    for tokens in loop.tokens[:-1]:
        run.force(tokens)
    call = case.model.generator.call(run)
    for hook in hooks:
        call = hook.inputs(run, call)
    hidden = evaluator(case.model.generator, run, hooks, check=True)(call)
    outputs = case.model.head.outputs(hidden, run.branches)
    given = torch.cat(case_keep(case, run), 1)
    for span in run.plan.spans(0, len(run.plan)):
        at_step = {name: logits[:, span.lo:span.hi] for name, logits in outputs.items()}
        logits = case.model.head.distribution(at_step, At.of(run.plan, span.step), GUIDANCE[case.guidance])
        found = case.model.head.log_prob(logits, loop.tokens[span.step]).masked_fill(given[:, span.lo:span.hi], 0.0)
        torch.testing.assert_close(found, loop.log_probs[span.step], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [*SINGLE, *TEXT, *PAIRS, *WITH_HEADS], ids=str)
def test_a_duplicate_diverges_while_the_other_copy_goes_on_as_it_would_have(case: Case) -> None:
    """A population of pictures gathered to two copies of one of them (TTS-VAR, beam search)."""
    whole, hooks = finished(case), case.make_hooks()
    run = case.go(case.start(), until=2, hooks=hooks).gather([1, 1])
    for step, tokens in enumerate(run.tokens):
        assert torch.equal(tokens[0], tokens[1]), f"copies differ at step {step}, before they were made"
    case.go(run, hooks=hooks)
    same_tokens(run.gather([0]), whole.gather([1]))
    assert any(not torch.equal(tokens[0], tokens[1]) for tokens in run.tokens[2:])


def case_keep(case: Case, run: object) -> list[torch.Tensor]:
    """Which tokens of the plan a case's hooks give instead of drawing them."""
    if "forced" not in case.hooks:
        return [torch.zeros(3, case.model.plan.length, dtype=torch.bool)]
    return list(HOOKS["forced"](case.neutral, case.model, range(3)).keep)
