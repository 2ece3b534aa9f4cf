"""What memory policies share: where in a step they act, on which layers, and beside what they can't.

A policy shrinks what a layer remembers, step by step, before attention reads it or after. Rows are chosen by the
queries of the step, for every row of the batch, so guidance's branches choose for themselves.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.layers.memory import Group
from nextscale.plan import Plan
from nextscale.run import Rows


class MemoryPolicy(Hook):
    """Base of the policies: override ``before`` or ``after`` and ``rows``, and ``check`` for what must fit.

    Policies act on the network's own layers; what a tower beside it remembers is left alone. Rows that don't stay in
    memory (noisy rounds) read all that is there and choose nothing.
    """

    name: ClassVar[str]

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        addresses = getattr(model.generator, "remembered", ())
        if not addresses:
            raise InputError(f"{self.name}: {type(model.generator).__name__} remembers no keys and values that could "
                             "be dropped; leave it out")
        others = [hook for hook in hooks if isinstance(hook, MemoryPolicy) and hook is not self]
        if others:
            raise InputError(f"{self.name} and {others[0].name} would each decide what the same layers remember; use "
                             "one")
        self.check(plan, len(addresses))

    def check(self, plan: Plan, layers: int) -> None:
        """Raises InputError where the settings don't fit a plan or a number of layers."""

    def before(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        """Shrink a layer's memory before the queries q (R, H, L, E) of one step read it; its rows are pending there."""

    def after(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        """Shrink it after they did."""

    @abstractmethod
    def rows(self, plan: Plan) -> int:
        """How many rows a layer holds, about, once the policy acts."""

    def shrinks(self, plan: Plan, layers: int, layer: int, step: int, rows: int) -> bool:
        """Whether a layer that was never shrunk and holds so many rows, those of the step among them, is shrunk at
        it."""
        return rows > self.rows(plan)

    def room(self, network: Any, plan: Plan, address: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Rows up to the step at which the layer is shrunk first: from there on it holds no more than it keeps, and
        room for the whole plan is what the policy is there to save."""
        addresses, total = network.remembered, 0
        if address in addresses:
            for step, count in enumerate(rows):
                total += count
                if self.shrinks(plan, len(addresses), addresses.index(address), step, total):
                    return (*rows[:step + 1], *(0,) * (len(rows) - step - 1))
        return rows

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Any) -> Tensor:
        memory = ctx.remembered(self.name)
        addresses = ctx.network.remembered
        if k is None or v is None or address not in addresses:
            out: Tensor = inner(q, k, v, rows)
            return out
        layer, outputs = addresses.index(address), []
        reads_shrunk = type(self).before is not MemoryPolicy.before
        for at, part in rows.by_step():
            if part.visible.previous is None:
                part = replace(part, masked=False)  # what is remembered is of this step and of earlier ones
            q_part, k_part, v_part = q[:, :, at], k[:, :, at], v[:, :, at]
            stays = part.keep == len(part)
            if stays and reads_shrunk:
                memory.append(address, k_part, v_part, part.tags, part.keep)
                self.before(ctx, address, layer, q_part, part)
                outputs.append(inner(q_part, None, None, part))
            else:
                outputs.append(inner(q_part, k_part, v_part, part))
            if stays:
                self.after(ctx, address, layer, q_part, part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def step_of(rows: Rows) -> int:
    """The step of the rows that a policy is given."""
    assert rows.spans is not None
    return rows.spans[0].step


def whole_plan(ctx: Context) -> Plan:
    """The plan of the run under way."""
    assert ctx.plan is not None
    return ctx.plan


def only_group(ctx: Context, address: str) -> Group:
    """What an address holds that was not split by heads."""
    assert ctx.memory is not None
    (group,) = ctx.memory.groups[address]
    return group
