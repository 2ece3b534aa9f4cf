"""What can't compose is refused with a reason, before a token is wrong."""
from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import GUIDANCE, HOOKS, REFUSED, SEEDS, Case, model
from doubles import jacobi
from test_doubles import ONE_ROW_STEPS, sequential
from torch import Tensor

from nextscale.acceleration.fastvar import FastVAR
from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.run import Call, Rows, Run
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import evaluator
from nextscale.tokenizers import pyramid


@pytest.mark.parametrize("name", ["pruned", "layers", "heads", "diverse"])
def test_what_acts_on_whole_steps_refuses_pictures_at_different_steps(name: str) -> None:
    _, run = sequential()
    m = model(ONE_ROW_STEPS)
    with pytest.raises(InputError, match="different steps"):
        next(jacobi(m, run, GUIDANCE["none"], 3, [HOOKS[name](False, m, range(len(SEEDS)))]))


@pytest.mark.parametrize("name", ["pruned", "layers", "heads", "tower", "softcfg"])
def test_what_needs_memory_refuses_a_pass_without(name: str) -> None:
    case, m = Case(), model()
    run = case.go(case.start())
    reads = pyramid.replay(run.tokens, case.start().canvas).reads
    with pytest.raises(InputError, match="needs a run's memory"):
        hidden_states(m, m.plan, reads, case.condition(), ("conditional",), [HOOKS[name](False, m, range(3))])


def test_two_prunings_are_refused() -> None:
    class Half(Hook):
        def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
            half = -(-len(rows) // 2)
            return torch.cat([inner(x[:, :half], rows.part(0, half, half)), x[:, half:]], 1)

    case = Case()
    with pytest.raises(InputError, match="carries it twice"):
        case.go(case.start(), hooks=[FastVAR(0.5), FastVAR(0.4)])
    with pytest.raises(InputError, match="selected already"):
        case.go(case.start(), hooks=[FastVAR(0.5), Half()])


@pytest.mark.parametrize("pair", list(itertools.permutations(HOOKS, 2)), ids="+".join)
def test_pairs_that_cant_compose_are_refused_with_a_reason_in_both_orders_and_no_others(pair: tuple[str, str]) -> None:
    case, run = Case(pair), Case(pair).start()
    reason = REFUSED.get(pair, REFUSED.get(pair[::-1]))
    if reason is None:
        case.go(run, until=1)
    else:
        with pytest.raises(InputError, match=reason):
            case.go(run, until=1)
        assert not run.tokens, "refused after a step was drawn"


def test_rows_that_stay_must_lead_a_selection_and_provisional_ones_cant_be_selected() -> None:
    rows = Case().start().rows(1, 3)  # 4 rows and 9
    first = torch.tensor([[0, 2, 5], [1, 3, 12]])
    assert rows.select(first).keep == 3 and rows.part(0, 13, keep=0).select(first).keep == 0
    half = rows.part(0, 13, keep=4)
    assert half.select(first).keep == 2
    with pytest.raises(InputError, match="must lead"):
        half.select(first.flip(1))
    with pytest.raises(InputError, match="as many in every picture"):
        half.select(torch.tensor([[0, 1, 5], [1, 6, 7]]))
    with pytest.raises(InputError, match="provisional"):
        rows.part(0, 13, keep=None).select(first)


def test_shrinking_a_call_whose_rows_dont_stay_is_refused() -> None:
    class Careless(Hook):
        def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
                   inner: Any) -> Tensor:
            out = inner(q, k, v, rows)
            ctx.remembered("careless").keep_rows(address, torch.tensor([[0]]).expand(len(q), -1))
            return out

    case = Case((), "clean")
    with pytest.raises(InputError, match="don't stay"):
        case.go(case.start(), hooks=[Careless()])


def test_parts_of_a_call_out_of_order_are_refused() -> None:
    """Rows that stay, behind rows that don't, would be counted as the wrong ones."""
    class Backwards(Hook):
        def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
                   inner: Any) -> Tensor:
            parts = {at.start: inner(q[:, :, at], k[:, :, at], v[:, :, at], part)
                     for at, part in reversed(rows.by_step())}
            return torch.cat([parts[start] for start in sorted(parts)], 2)

    case = Case((), "clean")  # keeps the previous step of every call, and not its own
    with pytest.raises(InputError, match="in their order"):
        case.go(case.start(), hooks=[Backwards()])


def test_a_row_that_would_see_nothing_is_found() -> None:
    """Shrinking before attention, not step by step: on a prefill the coarse steps' rows lose all their keys."""
    class BeforeAttention(Hook):
        def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
                   inner: Any) -> Tensor:
            last = rows.part(len(rows) - 4, len(rows), keep=4)
            return ctx._attend(address, q, k[:, :, -4:], v[:, :, -4:], rows, last, 1.0, 0.0)

    case = Case()
    run = case.go(case.start(), until=2).hand_over(case.condition())
    with pytest.raises(InputError, match="see nothing"):
        case.go(run, hooks=[BeforeAttention()])


def test_check_finds_a_broken_promise_that_every_row_sees_everything() -> None:
    class Promise(Hook):
        def inputs(self, run: Run, call: Call) -> Call:
            return replace(call, rows=replace(call.rows, masked=False))

    case = Case(previous_only=True)
    with pytest.raises(InputError, match="promised to see everything"):
        case.go(case.start(), hooks=[Promise()])
    case.go(replace_plan(case), hooks=[Promise()])  # kept, where every step sees all earlier ones

    prefill = Case().go(Case().start(), until=2).hand_over(Case().condition())
    with pytest.raises(InputError, match="promised to see everything"):
        Case().go(prefill, hooks=[Promise()])


def replace_plan(case: Case) -> Run:
    return replace(case, previous_only=False).start()


def test_given_tokens_for_other_pictures_are_refused() -> None:
    case = Case(("forced",))
    with pytest.raises(InputError, match="given for 3 pictures, but the run has 2"):
        case.go(case.start([0, 1]), hooks=case.make_hooks())


def test_a_commit_without_provisional_rows_is_refused_and_uncommitted_rows_are_forgotten() -> None:
    case = Case()
    run = case.start()
    with pytest.raises(InputError, match="no provisional rows"):
        run.commit(torch.ones(3, dtype=torch.int64))
    call = case.model.generator.call(run)
    evaluator(case.model.generator, run)(replace(call, rows=replace(call.rows, keep=None)))
    case.go(run)
    assert [len(g) for g in run.memory.groups.values()] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(run.tokens, case.go(case.start()).tokens, strict=True))


def test_reading_back_an_address_that_holds_nothing_is_refused() -> None:
    run = Case().start()
    with pytest.raises(InputError, match="nothing was written"):
        Context(run.memory).attend("elsewhere", torch.zeros(1, 1, 1, 4), None, None, run.rows(0, 1))


def test_a_skipped_block_leaves_its_address_behind_the_log_and_the_rest_goes_on() -> None:
    """FastVAR skips whole steps, SkipVAR whole blocks: the address then holds fewer steps than the others."""
    class Skip(Hook):
        def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
            step = rows.spans[0].step if rows.spans else -1
            return x if address == "base.1" and step in (0, 2) else inner(x, rows)

    case = Case(previous_only=True)
    run = case.go(case.start(), hooks=[Skip()])
    groups = run.memory.groups
    assert groups["base.0.kv"][0].tags is None and groups["base.0.kv"][0].length == 30
    late = groups["base.1.kv"][0]
    assert late.tags.step[0].tolist() == [1] * 4 + [3] * 16 and late.length == 20
