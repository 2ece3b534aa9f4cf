"""What single doubles are for: a second system, two maps, a window of guesses, three branches, a second stream."""
from __future__ import annotations

import pytest
import torch
from cases import GUIDANCE, HOOKS, SEEDS, Case, finished, model
from doubles import jacobi

from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context, Hook
from nextscale.noise import Keyed
from nextscale.run import At, Run
from nextscale.sampling.guidance import Nested
from nextscale.sampling.steps import sample_steps

ONE_ROW_STEPS = ((1, 1),) * 10


def test_a_second_system_goes_on_from_a_prefill_of_what_the_first_drew() -> None:
    """CoDe (arXiv 2411.17787): after the hand-over only the second system's weights count."""
    case, second = Case(), model(seed=4)
    guidance, condition = GUIDANCE["two"], ClassCondition(second.labels, case.condition().labels_Bn)
    run = case.go(case.start(), until=2).hand_over(condition)
    for _ in sample_steps(second, run, guidance, check=True):
        pass
    alone = Run.start(second.plan, second.tokenizer.quantiser, condition, guidance.branches,
                      Keyed.from_seeds(SEEDS), len(SEEDS))
    for tokens in run.tokens[:2]:
        alone.force(tokens)
    for _ in sample_steps(second, alone, guidance, check=True):
        pass
    for step in (2, 3):
        assert torch.equal(run.tokens[step], alone.tokens[step])
        assert not torch.equal(run.tokens[step], finished(case).tokens[step])


def test_the_second_system_may_need_other_branches() -> None:
    case = Case()
    run = case.go(case.start(), until=2).hand_over(case.condition(), GUIDANCE["three"].branches)
    three = Case((), guidance="three")
    three.go(run)
    assert run.memory.groups["base.0.kv"][0].k.shape[0] == 9


def test_both_maps_of_a_step_are_drawn_and_see_each_other() -> None:
    """ControlVAR (arXiv 2406.09750): a control map that is forced stays as given and changes the picture map."""
    free, steered = finished(Case((), maps=2)), finished(Case(("forced",), maps=2))
    hook = Case(("forced",), maps=2).make_hooks()[0]
    for k, step in enumerate(free.plan):
        cells = step.grid[0] * step.grid[1]
        assert free.tokens[k].shape[1] == 2 * cells
        assert torch.equal(steered.tokens[k][:, :cells], hook.given[k][:, :cells])
    assert not torch.equal(steered.tokens[1][:, 4:], free.tokens[1][:, 4:])
    assert not torch.equal(steered.canvas.map(0), steered.canvas.map(1))


def test_a_nested_guidance_weighs_three_branches() -> None:
    """With no weights it is the conditional branch; each weight moves it."""
    branches = GUIDANCE["three"].branches
    at = At(step=3, steps=4, done=14, total=30)
    outputs = {name: torch.randn(2, 3, 5) for name in branches}
    torch.testing.assert_close(Nested(branches, (0.0, 0.0))(outputs, at), outputs["conditional"])
    both = Nested(branches, (1.0, 0.5))(outputs, at)
    c, s, u = (outputs[name] for name in branches)
    torch.testing.assert_close(both, u + 1.5 * (s - u) + 2 * (c - s))
    run = finished(Case((), guidance="three"))
    assert run.memory.groups["base.0.kv"][0].k.shape[0] == 9
    assert not torch.equal(run.tokens[3], finished(Case()).tokens[3])


def sequential(hooks: tuple[str, ...] = ()) -> tuple[torch.Tensor, Run]:
    """Tokens (B, K) of a plan of one-row steps, drawn one by one, and a fresh run of the same."""
    case, m = Case(hooks, guidance="none"), model(ONE_ROW_STEPS)

    def start() -> Run:
        return Run.start(m.plan, m.tokenizer.quantiser, ClassCondition(m.labels, case.condition().labels_Bn),
                         case.branches, Keyed.from_seeds(SEEDS), len(SEEDS))

    run = start()
    for _ in sample_steps(m, run, GUIDANCE["none"], (), towers(hooks), check=True):
        pass
    return torch.cat(run.tokens, 1), start()


def towers(hooks: tuple[str, ...]) -> list[Hook]:
    return [HOOKS[name](False, model(ONE_ROW_STEPS), range(len(SEEDS))) for name in hooks]


@pytest.mark.parametrize("hooks", [(), ("tower",)], ids=["nothing", "tower"])
@pytest.mark.parametrize("window", [1, 2, 4, 13])
def test_jacobi_decoding_equals_sequential_sampling_for_any_window(window: int, hooks: tuple[str, ...]) -> None:
    tokens, run = sequential(hooks)
    rounds = list(jacobi(model(ONE_ROW_STEPS), run, GUIDANCE["none"], window, towers(hooks)))
    assert torch.equal(rounds[-1], tokens)
    assert len(rounds) == len(ONE_ROW_STEPS) if window == 1 else len(rounds) <= len(ONE_ROW_STEPS)


def test_jacobi_decoding_commits_other_counts_to_other_pictures_and_gathers_in_between() -> None:
    tokens, run = sequential()
    m, order = model(ONE_ROW_STEPS), [2, 0, 1]
    counts = set()
    for i, _ in enumerate(jacobi(m, run, GUIDANCE["none"], 4)):
        counts.add(tuple(run.carried["jacobi.at"].tolist()))
        if i == 3:
            break
    gathered = run.gather(order)
    assert torch.equal(list(jacobi(m, gathered, GUIDANCE["none"], 4))[-1], tokens[order])
    assert torch.equal(list(jacobi(m, run, GUIDANCE["none"], 3))[-1], tokens)
    assert any(len(set(at)) > 1 for at in counts), "all pictures advanced alike: the test shows nothing"
    assert run.memory.ragged


def test_addresses_that_hold_other_rows_dont_share_a_mask() -> None:
    """Two layers may keep equally many rows, but of other steps."""
    case = Case(previous_only=True)
    run = case.go(case.start(), until=3)
    memory, rows = run.memory, run.rows(3, 4)
    memory.keep_rows("base.0.kv", torch.tensor([[0, 1, 2, 3]]).expand(6, -1))  # steps 0 and 1, hidden by now
    memory.keep_rows("base.1.kv", torch.tensor([[0, 6, 8, 10]]).expand(6, -1))  # step 0, and 2, which is seen
    q, k, v = torch.randn(3, 6, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    both = Context(memory, check=True)
    outputs = [both.attend(f"base.{i}.kv", q, k, v, rows) for i in (0, 1)]
    memory.begin()
    assert torch.equal(Context(memory).attend("base.1.kv", q, k, v, rows), outputs[1])
    assert not torch.equal(outputs[0], outputs[1])
