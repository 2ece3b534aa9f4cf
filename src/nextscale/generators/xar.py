"""xAR's transformer (arXiv 2502.20388): FlowAR's two stacks over noisy entities, each at a flow time of its own."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.generators.flowar import Block, TwoStacks, TwoStacksConfig
from nextscale.layers.time_embedding import TimeEmbedding, thousandths
from nextscale.plan import EntityKind, Plan
from nextscale.run import Call, Rows, Run


@dataclass(frozen=True)
class XARGeneratorConfig(TwoStacksConfig):
    """The transformer's sizes, and what it predicts at a time. entity, size: see ``nextscale.plan.entities``; the
    published models draw cells of 8x8 positions of a 16x16 latent. context: in training, of every entity; ``clean`` is
    what the paper compares with."""

    entity: EntityKind = "cell"
    size: int = 8
    context: Literal["noisy", "clean"] = "noisy"


@dataclass(frozen=True)
class StepConditions:
    """A condition for every step of a call, (R, S, C), from step ``first`` on."""

    value: Tensor
    first: int


class TimedBlock(Block):
    """FlowAR's block whose rows are modulated by their own step's condition."""

    def modulate(self, rows: Rows, ctx: Context, address: str) -> Tensor:
        value = rows.cond.value
        return self.modulation(value.flatten(0, 1))[:, 0].unflatten(0, value.shape[:2])

    def parts(self, found_RS6C: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        if found_RS6C.shape[1] == 1:
            return found_RS6C.unbind(2)
        step = rows.step - rows.cond.first
        if len(step) == 1:
            return found_RS6C[:, step[0]].unbind(2)
        return found_RS6C[torch.arange(len(step), device=step.device)[:, None], step].unbind(2)


class XARGenerator(TwoStacks):
    """Rows are vectors somewhere between noise and latent, those of entity n at its time t_n; a row sees earlier
    entities and its own. Hidden states give the velocity: the transformer is the flow network.

    A step's first call runs all entities that memory lacks, which are clean now (t = 0), together with the state at the
    solver's time, and keeps the clean ones; later calls run the state alone and keep nothing.
    """

    config: XARGeneratorConfig

    def __init__(self, config: XARGeneratorConfig, plan: Plan, latent_width: int, name: str = "base"):
        super().__init__(config, plan, latent_width, name, TimedBlock)
        self.time = TimeEmbedding(config.width)

    def rows_at_once(self, plan: Plan) -> int:
        """Those of a step's first call: its entity's, and the one's before."""
        return max(plan.starts[k + 1] - plan.starts[max(0, k - 1)] for k in range(len(plan)))

    def condition(self, cond_RC: Tensor, time_RS: Tensor, first: int) -> StepConditions:
        """What the steps from ``first`` on are conditioned on: the picture's condition plus their time's embedding."""
        embedded = self.time(thousandths(time_RS).flatten()).unflatten(0, time_RS.shape)
        return StepConditions(cond_RC[:, None] + embedded, first)

    def embed(self, vectors_RLC: Tensor, rows: Rows) -> Tensor:
        """Rows x (R, L, C) of vectors (R, L, latent_width) that stand between noise and latent."""
        dtype = self.word.weight.dtype
        return self.word(vectors_RLC.to(dtype)) + self.first_position[0, self.index(rows)].to(dtype)

    def call(self, run: Run) -> Call:
        """The call for the first round of the run's next step, of a state of zeros; its ``again(state, time, first)``
        makes those of the state (B, L, latent_width) at a time, ``first`` where memory has yet to take up entities."""
        self.check_plan(run.plan)
        step = run.plan.steps[run.cursor]
        state = torch.zeros(run.pictures, step.rows, self.word.in_features, device=run.device)
        return self._round(run, state, 1.0, True)

    def _round(self, run: Run, state_BLC: Tensor, time: float, first_round: bool) -> Call:
        first, last = run.filled if first_round else run.cursor, run.cursor + 1
        copies, clean = len(run.branches), run.plan.starts[run.cursor] - run.plan.starts[first]
        cond_RC = run.memory.constant("condition", lambda: run.conditions().to(self.word.weight.dtype))
        time_RS = torch.zeros(len(cond_RC), last - first, device=run.device)
        time_RS[:, -1] = time
        rows = run.rows(first, last, clean, self.condition(cond_RC, time_RS, first))
        vectors: Sequence[Tensor] = [*run.tokens[first:run.cursor], state_BLC]
        x = self.embed(torch.cat(list(vectors), 1), rows).repeat(copies, 1, 1)
        return Call(x, rows, slice(clean, len(rows)), again=partial(self._round, run), round=0 if first_round else 1)

    def forward(self, call: Call, ctx: Context) -> Tensor:
        """Hidden states (R, L, C) of all rows."""
        call = ctx.enter(call)
        return self.through(call.x, call.rows, ctx)
