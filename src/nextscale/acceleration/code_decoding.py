"""CoDe: a large model draws the first scales, a small one refines the others (Chen et al., arXiv 2411.17787).

With N drafted scales of K the picture's probability is

    p(r_1, ..., r_K) = prod_(k <= N) p_drafter(r_k | r_<k) prod_(k > N) p_refiner(r_k | r_<k)

The two networks share a tokenizer and a schedule, and no weights. What crosses the border is the run: its canvas, its
tokens, the un-embedded inputs of its steps and its noise. The drafter's keys and values are given up there; the
refiner's first call prefills all scales so far under the training mask.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from nextscale.context import Hook
from nextscale.errors import InputError
from nextscale.heads.categorical import Filter, Guidance
from nextscale.plan import Plan
from nextscale.run import At, Condition, Run
from nextscale.sampling.score import LogProb, score
from nextscale.sampling.steps import Model, prepare, sample_steps
from nextscale.tokenizers.tokenizer import same_codes

Role = Literal["drafter", "refiner"]


def sample_collaboratively(drafter: Model, refiner: Model, run: Run, draft_steps: int,
                           condition: Callable[[Condition], Condition], guidance: Guidance,
                           filters: Sequence[Filter] = (), hooks: Sequence[Hook] = (),
                           soft: Callable[[Tensor, At, Run], Tensor] | None = None, until: int | None = None,
                           check: bool = False) -> Iterator[Run]:
    """Advance a run step by step as ``sample_steps`` does: the drafter's first ``draft_steps``, the refiner's others.

    The run starts under the drafter's condition; ``condition`` turns it into the refiner's at the hand-over. hooks act
    on both networks; those wrapped by ``Only`` on one of them. 0 drafted steps is the refiner alone, all is the
    drafter alone. A run that was gathered in mid-plan goes on where it stood.

    Raises InputError for a number of steps that the plan hasn't.
    """
    check_draft_steps(draft_steps, run.plan)
    last = len(run.plan) if until is None else min(until, len(run.plan))
    first_hooks, later_hooks = hooks_of("drafter", hooks), hooks_of("refiner", hooks)
    prepare(refiner, run.plan, later_hooks)  # what it refuses is refused before anything is drawn
    if run.cursor < draft_steps:
        yield from sample_steps(drafter, run, guidance, filters, first_hooks, soft, min(draft_steps, last), check)
    # A run whose first steps were given, not drawn, comes here with nothing in memory.
    if draft_steps <= run.cursor < last and (run.cursor == draft_steps or not run.filled):
        run.change_network(condition(run.condition))
    if run.cursor >= draft_steps:
        yield from sample_steps(refiner, run, guidance, filters, later_hooks, soft, last, check)


def score_collaboratively(drafter: Model, refiner: Model, plan: Plan, tokens: Sequence[Tensor],
                          reads: Sequence[Tensor | None], conditions: tuple[Condition, Condition], draft_steps: int,
                          guidance: Guidance, branches: Sequence[str], filters: Sequence[Filter] = (),
                          hooks: Sequence[Hook] = ()) -> LogProb:
    """Log-probability of every token: of the drafted steps under the drafter, of the others under the refiner.

    conditions: the drafter's and the refiner's; the rest as ``score`` has it. Raises InputError for a number of steps
    that the plan hasn't.
    """
    check_draft_steps(draft_steps, plan)
    parts = []
    if draft_steps:
        parts.append(score(drafter, plan, tokens, reads, conditions[0], guidance, branches, filters,
                           hooks_of("drafter", hooks), last=draft_steps))
    if draft_steps < len(plan):
        parts.append(score(refiner, plan, tokens, reads, conditions[1], guidance, branches, filters,
                           hooks_of("refiner", hooks), first=draft_steps))
    token, step = torch.cat([p.token for p in parts], 1), torch.cat([p.step for p in parts], 1)
    return LogProb(token, step, step.sum(1))


def check_draft_steps(draft_steps: int, plan: Plan) -> None:
    if not 0 <= draft_steps <= len(plan):
        raise InputError(f"draft_steps is {draft_steps}; of this schedule's {len(plan)} scales 0 to {len(plan)} can be "
                         "drafted")


def check_pair(drafter: Any, refiner: Any) -> None:
    """Raises InputError where one system can't go on with what another has drawn: other grids or visibility, other
    codes, or labels of another kind."""
    ours, theirs = ([step.grid for step in system.plan] for system in (drafter, refiner))
    if drafter.plan.steps != refiner.plan.steps:
        raise InputError(f"CoDe: the drafter's scales are {_sides(ours)}, the refiner's {_sides(theirs)}; pair models "
                         "of one schedule")
    if drafter.plan.visible != refiner.plan.visible:
        raise InputError(f"CoDe: the drafter's rows see {_seen(drafter.plan)}, the refiner's {_seen(refiner.plan)}; "
                         "pair models that look back alike")
    if drafter.tokenizer is not refiner.tokenizer and not same_codes(drafter.tokenizer, refiner.tokenizer):
        raise InputError("CoDe: the drafter and the refiner have different tokenizers, so neither can read what the "
                         "other draws; pair models that were trained on one tokenizer's codes")
    if drafter.labels.sizes != refiner.labels.sizes:
        raise InputError(f"CoDe: the drafter has {list(drafter.labels.sizes)} classes, the refiner "
                         f"{list(refiner.labels.sizes)}; pair models of the same classes")


def _sides(grids: Sequence[tuple[int, int]]) -> str:
    return ",".join(str(h) if h == w else f"{h}x{w}" for h, w in grids)


def _seen(plan: Plan) -> str:
    previous = plan.visible.previous
    return "all earlier scales" if previous is None else f"{previous} earlier scales"


class Only(Hook):
    """A hook that acts on one of the two networks alone, such as a memory policy made for the refiner."""

    def __init__(self, role: Role, hook: Hook):
        if role not in ("drafter", "refiner"):
            raise InputError(f"a hook for {role!r}: CoDe has a drafter and a refiner")
        self.role, self.hook = role, hook

    def part(self, pictures: slice) -> Only:
        return Only(self.role, self.hook.part(pictures))

    def steps(self, plan: Plan) -> int:
        return self.hook.steps(plan) if self.role == "refiner" else len(plan)

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> NoReturn:
        raise InputError(f"this run has no {self.role}: a hook for one of two networks is for pairs (code_decoding)")


def hooks_of(role: Role, hooks: Sequence[Hook]) -> list[Hook]:
    """The hooks that act on one of the two networks, in their order."""
    return [hook.hook if isinstance(hook, Only) else hook for hook in hooks
            if not isinstance(hook, Only) or hook.role == role]


class RelativeCost(NamedTuple):
    """What a pair costs, as shares of the drafter drawing everything: arithmetic of the blocks' linear layers, and the
    most elements of keys and values that are held at a time."""

    flops: float
    memory: float


def relative_cost(plan: Plan, drafter: tuple[int, int], refiner: tuple[int, int], draft_steps: int) -> RelativeCost:
    """The cost of drafting N of a plan's steps, by (depth, width) of both networks.

    A row takes 12 depth width^2 multiplications and leaves 2 depth width elements. The drafter has the rows of N steps;
    the refiner has all rows, those of drafted steps in its first call.
    """
    drafted, everything = plan.starts[draft_steps], plan.length
    refined = everything if draft_steps < len(plan) else 0
    work, room = (depth * width**2 for depth, width in (drafter, refiner)), (d * w for d, w in (drafter, refiner))
    (large, small), (wide, narrow) = work, room
    return RelativeCost((drafted * large + refined * small) / (everything * large),
                        max(drafted * wide, refined * narrow) / (everything * wide))
