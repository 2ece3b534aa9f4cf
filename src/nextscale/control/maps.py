"""What every control shares: maps of the pictures of a run, their features once a run, and which rows they act on."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.run import Call, Run

UNCONTROLLED = "/uncontrolled"
"""Ends the names of branches that the control does not act on, as in ``unconditional/uncontrolled``."""


@dataclass(frozen=True)
class ControlConfig:
    """kinds: of control maps that it is trained with; drop: share of the pictures that training shows without theirs,
    for guidance by the control (``control_scale``) of a backbone that is trained along."""

    kinds: tuple[str, ...] = ("canny",)
    drop: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise InputError(f"control drop is {self.drop}; it must lie in [0, 1)")

    @property
    def cached(self) -> tuple[str, ...]:
        """Kinds of maps that training wants beside the tokens."""
        return self.kinds


class Features(NamedTuple):
    """What a control makes of its maps: by step, (R, L_k, width) each, and where it acts, (R, 1, 1) bool."""

    steps: tuple[Tensor, ...]
    acts: Tensor


class ControlHook(Hook):
    """A control bound to maps of the pictures of a run (B, ...); a gathered run carries its own.

    name: what the run's memory keeps its features under; encode: from maps to features by step, (B, L_k, width).
    shown, set in training: (B,) bool, False for pictures that the control does not act on; None: it does on all.
    """

    shown: Tensor | None = None

    def __init__(self, name: str, maps: Tensor, encode: Callable[[Tensor], Sequence[Tensor]]):
        self.name, self.maps, self.encode = name, maps, encode

    def inputs(self, run: Run, call: Call) -> Call:
        maps = run.carry(f"{self.name}.maps", self.maps.to(run.device))
        run.memory.constant(f"{self.name}.features", lambda: self._rows(maps, run.branches))
        return call

    def enter(self, ctx: Context, call: Call) -> Call:
        made = ctx.once(f"{self.name}.features", lambda: self._rows(self.maps.to(call.x.device), ctx.branches))
        features = Features(*made)
        if len(features.acts) != len(call.x):
            raise InputError(f"{self.name}: given for {len(self.maps)} pictures, but the call has "
                             f"{len(call.x) // len(ctx.branches)}")
        ctx.scratch[self.name] = features
        return call

    @torch.compiler.disable
    def _rows(self, maps: Tensor, branches: Sequence[str]) -> Features:
        """Features of all rows of the batch: the maps are encoded once, whatever the branches. Resizing to every scale
        is nothing that a compiler can improve."""
        found = tuple(one.repeat(len(branches), 1, 1) for one in self.encode(maps))
        acts = torch.tensor([not name.endswith(UNCONTROLLED) for name in branches], device=maps.device)
        acts = acts.repeat_interleave(len(maps))
        if self.shown is not None:
            acts &= self.shown.repeat(len(branches))
        return Features(found, acts[:, None, None])

    def bound(self, ctx: Context) -> Features:
        """The features of the call under way."""
        features: Features = ctx.scratch[self.name]
        return features

    def where_acts(self, ctx: Context, changed: Tensor, x: Tensor) -> Tensor:
        """``changed`` in the rows that the control acts on, x in the others."""
        if self.shown is None and not any(name.endswith(UNCONTROLLED) for name in ctx.branches):
            return changed
        return torch.where(self.bound(ctx).acts, changed, x)


def layer_of(address: str, name: str) -> int | None:
    """The number of a block by its address, ``name.i``; None for blocks of something else."""
    root, _, number = address.rpartition(".")
    return int(number) if root == name and number.isdigit() else None
