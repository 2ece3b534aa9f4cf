"""Likelihood: what probability a model gives tokens, in one call for the whole plan (flow 5 of the design)."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.heads.categorical import Filter, Guidance
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import Plan
from nextscale.run import At, Condition, conditions
from nextscale.sampling.steps import Model, hooked, prepare


class LogProb(NamedTuple):
    """Log-probabilities in nats: of every token (B, L), of every step (B, K), of every picture (B,)."""

    token: Tensor
    step: Tensor
    picture: Tensor

    def bits_per_dimension(self, dimensions: int) -> Tensor:
        """Bits a colour value of a picture with ``dimensions`` values, for the coded picture (B,)."""
        return -self.picture / (math.log(2) * dimensions)


def score(model: Model, plan: Plan, tokens: Sequence[Tensor], reads: Sequence[Tensor | None], condition: Condition,
          guidance: Guidance, branches: Sequence[str], filters: Sequence[Filter] = (),
          hooks: Sequence[Hook] = (), first: int = 0, last: int | None = None) -> LogProb:
    """Log-probability of every token under teacher forcing; equals what the step loop gives the same tokens.

    tokens: (B, L_k) a step; reads: the steps' inputs, as ``pyramid.replay`` gives them; first, last: score the steps
    from ``first`` up to but not including ``last`` alone. Raises InputError where a hook can't act in this pass.
    """
    prepare(model, plan, hooks)
    last = len(plan) if last is None else last
    seen = plan if last == len(plan) else replace(plan, steps=plan.steps[:last])
    hidden = hidden_states(model, seen, reads[:last], condition, branches, hooks)[:, plan.starts[first]:]
    outputs = model.head.outputs(hidden, branches)
    guidance, filters = hooked(guidance, filters, hooks)
    parts = []
    for span in plan.spans(first, last):
        at_step = {name: logits[:, span.lo:span.hi] for name, logits in outputs.items()}
        logits = model.head.distribution(at_step, At.of(plan, span.step), guidance, filters)
        parts.append(model.head.log_prob(logits, tokens[span.step]))
    steps = torch.stack([p.sum(1) for p in parts], 1)
    return LogProb(torch.cat(parts, 1), steps, steps.sum(1))


def hidden_states(model: Model, plan: Plan, reads: Sequence[Tensor | None], condition: Condition,
                  branches: Sequence[str], hooks: Sequence[Hook] = ()) -> Tensor:
    """The one-call pass over all rows of a plan, (R, L, C)."""
    call = teacher_forcing_call(model.generator, plan, reads, conditions(condition, branches))
    ctx = Context(None, hooks, branches=branches, plan=plan, network=model.generator)
    return ctx.leave(call.rows, model.generator(call, ctx))
