"""The step loop: one network call, one choice, one canvas write a step (VAR, arXiv 2404.02905, algorithm 2)."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from nextscale.context import Context, Hook, overrides
from nextscale.heads.categorical import Filter, Guidance
from nextscale.plan import Plan
from nextscale.run import At, Call, Run, Sample


class Model(Protocol):
    """What the loop asks of a system: a body that makes calls from runs and hidden states from calls, and a head."""

    generator: Any
    head: Any


@dataclass(frozen=True)
class Choice:
    """What chooses the tokens of a step, hooks aside."""

    generator: Any
    head: Any
    guidance: Guidance
    filters: tuple[Filter, ...] = ()
    soft: Callable[[Tensor, At, Run], Tensor] | None = None

    def sample(self, evaluate: Callable[[Call], Tensor], call: Call, run: Run) -> Sample:
        """The tokens of a call that ``evaluate`` asks the network for."""
        options = {} if self.soft is None else {"soft": self.soft}
        found: Sample = self.head.sample(evaluate, call, run, self.guidance, self.filters, **options)
        return found


def sample_steps(model: Model, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
                 hooks: Sequence[Hook] = (), soft: Callable[[Tensor, At, Run], Tensor] | None = None,
                 until: int | None = None, check: bool = False) -> Iterator[Run]:
    """Advance a run step by step, yielding it after each; the caller stops by not going on.

    guidance combines the branches' outputs, filters narrow them, hooks are what the user adds (first is innermost);
    ``soft`` writes code vectors instead of sampled codes; ``until``: step before which to stop, up to which memory is
    given room; ``check``: test the visibility promises as it goes.
    """
    prepare(model, run.plan, hooks)
    guidance, filters = hooked(guidance, filters, hooks, run)
    choice = Choice(model.generator, model.head, guidance, tuple(filters), soft)
    last = walked(run.plan, hooks) if until is None else min(until, walked(run.plan, hooks))
    make_room(model.generator, run, hooks, last)
    knowing = [hook for hook in hooks if overrides(hook, "tokens")]

    def known(sample: Sample) -> Sample:
        for hook in knowing:
            sample = hook.tokens(run, sample)
        return sample

    def advance() -> None:
        call: Call = model.generator.call(run)
        if knowing:
            call = replace(call, known=known)
        for hook in hooks:
            call = hook.inputs(run, call)
        run.write(known(choice.sample(evaluator(model.generator, run, hooks, check), call, run)))

    step: Callable[[], None] = advance
    for hook in hooks:
        step = hook.advance(choice, run, hooks, step)
    while run.cursor < last:
        step()
        for hook in hooks:
            hook.end(run, run.cursor - 1)
        yield run


def prepare(model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
    """Raises InputError where a hook can't act on a model or plan, or beside the others."""
    for hook in hooks:
        hook.prepare(model, plan, hooks)


def walked(plan: Plan, hooks: Sequence[Hook]) -> int:
    """How many of a plan's steps a loop walks under some hooks."""
    return min((hook.steps(plan) for hook in hooks), default=len(plan))


def make_room(generator: nn.Module, run: Run, hooks: Sequence[Hook], last: int) -> None:
    """Tell a run's memory how many rows its addresses are to hold when the steps before ``last`` are walked."""
    rows, hooks = tuple(s.rows for s in run.plan.steps[:last]), [h for h in hooks if overrides(h, "room")]
    run.memory.capacity, run.memory.rooms = sum(rows), {}
    for address in getattr(generator, "remembered", ()) if hooks else ():
        held = (*rows, *(0,) * (len(run.plan) - last))
        for hook in hooks:
            held = hook.room(generator, run.plan, address, held)
        run.memory.rooms[address] = sum(held)


def evaluator(generator: nn.Module, run: Run, hooks: Sequence[Hook] = (),
              check: bool = False) -> Callable[[Call], Tensor]:
    """What a head evaluates calls with: the network under the run's memory and hooks; kept rows are settled after."""
    def evaluate(call: Call) -> Tensor:
        run.memory.begin()
        ctx = Context(run.memory, hooks, check, run.branches, run.plan, generator)
        hidden = ctx.leave(call.rows, generator(call, ctx))
        run.settle(call.rows)
        return hidden

    found: Callable[[Call], Tensor] = evaluate
    for hook in hooks:
        found = hook.evaluation(generator, run, found)
    return found


def hooked(guidance: Guidance, filters: Sequence[Filter], hooks: Sequence[Hook],
           run: Run | None = None) -> tuple[Guidance, Sequence[Filter]]:
    """Guidance and filters with the hooks that act before and behind the guidance, on a run or (None) in scoring."""
    before = [h for h in hooks if overrides(h, "output")]
    behind = [h.logits for h in hooks if overrides(h, "logits")]
    if not before:
        return guidance, (*behind, *filters)

    def guided(outputs: dict[str, Tensor], at: At) -> Tensor:
        # A head may guide as at another step (STAR in rounds); hooks are told where the run stands.
        here = at if run is None else replace(run.at, time=at.time, round=at.round)
        for hook in before:
            outputs = hook.output(outputs, here, run)
        return guidance(outputs, at)

    return guided, (*behind, *filters)
