"""Random numbers by address through gathers, and the network as a captured graph."""
from __future__ import annotations

from typing import Any

import torch
from cases import GUIDANCE, LABELS, SEEDS, Case, finished, model, same_tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context
from nextscale.noise import Keyed
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.run import Call, Run
from nextscale.tokenizers import pyramid


def test_keys_stay_distinct_over_generations_of_gathers() -> None:
    """Populations that are thinned out and doubled again and again never draw the same numbers twice."""
    generator = torch.Generator().manual_seed(0)
    noise = Keyed.from_seeds(range(8))
    for _ in range(12):
        noise = noise.gather(torch.randint(8, (8,), generator=generator))
        assert len({tuple(key) for key in noise.key_B2.tolist()}) == 8


def test_a_first_copy_keeps_its_key_and_a_permutation_keeps_all() -> None:
    noise = Keyed.from_seeds(SEEDS)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(noise.gather(order).key_B2, noise.key_B2[order])
    twice = noise.gather(torch.tensor([1, 1]))
    assert torch.equal(twice.key_B2[0], noise.key_B2[1]) and not torch.equal(twice.key_B2[1], noise.key_B2[1])


def test_one_draw_for_the_whole_plan_equals_the_step_by_step_draws() -> None:
    plan, noise = model().plan, Keyed.from_seeds(SEEDS)
    step, cells = plan.step_of_row[None], plan.cells[None]
    for draw, width in ((noise.uniform, 1), (noise.uniform, 7), (noise.normal, 6)):
        whole = draw("token", step, 0, cells, width)
        for span in plan.spans(0, len(plan)):
            part = slice(span.lo, span.hi)
            assert torch.equal(draw("token", step[:, part], 0, cells[:, part], width), whole[:, part])
    compiled = torch.compile(lambda s, c: noise.uniform("token", s, 0, c), fullgraph=True, backend="eager")
    assert torch.equal(compiled(step, cells), noise.uniform("token", step, 0, cells))


def sample_with(body: Any, run: Run, m: Any, guidance: Any) -> Run:
    """The step loop around another network function."""
    while not run.done:
        def evaluate(call: Call) -> Tensor:
            run.memory.begin()
            hidden: Tensor = body(call, Context(run.memory))
            run.settle(call.rows)
            return hidden

        run.write(m.head.sample(evaluate, m.generator.call(run), run, guidance))
    return run


def test_the_network_is_one_graph_with_and_without_memory() -> None:
    """A step of the loop, a prefill of several steps and the training call, each without a graph break."""
    torch._dynamo.reset()
    case, m = Case(), model()
    body = torch.compile(m.generator, fullgraph=True, backend="eager")
    call, first, second = m.generator.call(case.start()), case.start(), case.start()
    torch.testing.assert_close(body(call, Context(first.memory)), m.generator(call, Context(second.memory)))
    prefill = case.go(case.start(), until=2).hand_over(case.condition())
    call = m.generator.call(prefill)
    torch.testing.assert_close(body(call, Context(prefill.memory)), m.generator(call, Context(case.start().memory)))
    reads = pyramid.replay(finished(case).tokens, case.start().canvas).reads
    call = teacher_forcing_call(m.generator, m.plan, reads, case.condition().branch("conditional"))
    torch.testing.assert_close(body(call, Context()), m.generator(call, Context()))


def test_twenty_four_one_token_steps_need_at_most_two_graphs() -> None:
    """One for the first step, which allocates memory, one for all others: the number of remembered rows is the only
    integer that grows, and is declared dynamic (else its value at the second step costs a third graph)."""
    torch._dynamo.reset()
    m, counter, guidance = model(((1, 1),) * 24), CompileCounter(), GUIDANCE["two"]

    def start() -> Run:
        return Run.start(m.plan, m.tokenizer.quantiser, ClassCondition(m.labels, torch.tensor(LABELS)),
                         guidance.branches, Keyed.from_seeds(SEEDS), len(SEEDS))

    with torch.compiler.config.patch(dynamic_sources=r".*memory\.groups.*\.length"):
        compiled = sample_with(torch.compile(m.generator, fullgraph=True, backend=counter), start(), m, guidance)
    assert counter.frame_count <= 2
    assert all(group.tags is None for groups in compiled.memory.groups.values() for group in groups)
    same_tokens(compiled, sample_with(m.generator, start(), m, guidance))
