"""Two networks on one run (CoDe) under every hook: the invariants of a run that changes networks by itself."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import GUIDANCE, OTHERS, PAIRS, SINGLE, TOGETHER, Case, finished, model, same_tokens

from nextscale.acceleration.code_decoding import sample_collaboratively
from nextscale.context import Hook
from nextscale.run import Run

CASES = [Case(), *SINGLE, TOGETHER, *(case for case in OTHERS if case.head == "plain" and case.maps == 1)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def together(case: Case, run: Run, draft_steps: int, refiner: Any, hooks: Sequence[Hook] | None = None,
             until: int | None = None) -> Run:
    drafter, refiner = (SimpleNamespace(generator=m.generator, head=m.head, labels=m.labels)
                        for m in (case.model, refiner))
    for _ in sample_collaboratively(drafter, refiner, run, draft_steps, lambda c: replace(c, table=refiner.labels),
                                    GUIDANCE[case.guidance], (), case.make_hooks() if hooks is None else hooks,
                                    until=until, check=True):
        pass
    return run


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_one_network_in_both_roles_is_the_plain_loop_under_pairs_of_hooks(case: Case) -> None:
    for steps in (1, 2, 3):
        same_tokens(together(case, case.start(), steps, case.model), finished(case))


@every_case
def test_one_network_in_both_roles_is_the_plain_loop_for_every_number_of_drafted_steps(case: Case) -> None:
    for steps in range(len(case.model.plan) + 1):
        same_tokens(together(case, case.start(), steps, case.model), finished(case))


@every_case
def test_gathering_before_at_and_behind_the_hand_over_equals_permuting_the_end(case: Case) -> None:
    order, refiner = [2, 0, 1], model(seed=1)
    whole = together(case, case.start(), 2, refiner)
    assert not torch.equal(whole.tokens[-1], finished(case).tokens[-1])
    for until in (1, 2, 3):
        hooks = case.make_hooks()
        run = together(case, case.start(), 2, refiner, hooks, until)
        same_tokens(together(case, run.gather(order), 2, refiner, hooks), whole.gather(order))


@every_case
def test_a_picture_alone_equals_the_picture_in_a_batch(case: Case) -> None:
    refiner = model(seed=1)
    whole = together(case, case.start(), 2, refiner)
    for item in (0, 2):
        alone = together(case, case.start([item]), 2, refiner, case.make_hooks([item]))
        same_tokens(alone, whole.gather([item]))
