"""DiverseVAR (arXiv 2511.17074): at early scales, less of the strongest direction goes into a block, more comes out.

What a picture looks like is settled at the first scales, by the leading singular direction of their rows. Damping it
where the rows enter lets seeds differ; boosting it where they leave keeps them to what was asked for.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.context import Context, Function, Hook
from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.run import Call, Rows


@dataclass(frozen=True)
class DiverseVAR(Hook):
    """More diverse samples without training: singular values are damped at the input, boosted at the output.

    The rows of one step, one picture and one branch are a matrix X = U diag(s) V^T, (L, C). With s' = s / max(s), so
    that the settings mean the same at every width (``relative``; else s' = s as printed, which needs tiny settings),

        suppression at the input:     s -> input_gain  exp(-suppression s') s
        amplification at the output:  s -> output_gain exp(amplification s') s

    and U and V stay. mode: ``block`` does so around every block; ``model`` once, on the embedded rows and on what
    leaves the network. at_steps: the steps, by index from 0. The paper gives neither its settings nor where exactly
    they act, see the docs. Raises InputError for steps that the plan hasn't, or that predict a part of a map.
    """

    suppression: float = 0.1
    amplification: float = 0.1
    at_steps: tuple[int, ...] = (2, 3)
    mode: Literal["block", "model"] = "block"
    input_gain: float = 1.0
    output_gain: float = 1.0
    relative: bool = True

    def __post_init__(self) -> None:
        for name in ("suppression", "amplification", "input_gain", "output_gain"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"diversevar: {name} is {getattr(self, name)}; it must be at least 0 and finite")
        if self.mode not in ("block", "model"):
            raise InputError(f"diversevar: mode is {self.mode!r}; use block or model")

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        if any(not 0 <= k < len(plan) for k in self.at_steps):
            raise InputError(f"diversevar: at_steps is {list(self.at_steps)}, but the plan has the steps 0 to "
                             f"{len(plan) - 1}")
        if any(plan.steps[k].count is not None for k in self.at_steps):
            raise InputError("diversevar: it acts on whole maps, but steps of this plan predict a part of theirs; "
                             "leave it out")

    def enter(self, ctx: Context, call: Call) -> Call:
        if self.mode == "block":
            return call
        return replace(call, x=self._at_input(call.x, call.rows))

    def leave(self, ctx: Context, rows: Rows, hidden: Tensor) -> Tensor:
        return hidden if self.mode == "block" else self._at_output(hidden, rows)

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        if self.mode == "model" or address.partition(".")[0] == "control":  # a tower that walks along has its own rows
            return inner(x, rows)
        return self._at_output(inner(self._at_input(x, rows), rows), rows)

    def _at_input(self, x: Tensor, rows: Rows) -> Tensor:
        return self._changed(x, rows, self.input_gain, -self.suppression)

    def _at_output(self, x: Tensor, rows: Rows) -> Tensor:
        return self._changed(x, rows, self.output_gain, self.amplification)

    def _changed(self, x: Tensor, rows: Rows, gain: float, rate: float) -> Tensor:
        if not self.at_steps or (gain, rate) == (1.0, 0.0):
            return x
        parts = [reweigh(x[:, at], gain, rate, self.relative)
                 if part.spans and part.spans[0].step in self.at_steps else x[:, at] for at, part in rows.by_step()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def reweigh(x_RLC: Tensor, gain: float, rate: float, relative: bool = True) -> Tensor:
    """Matrices (R, L, C) with singular values gain exp(rate s) s in the place of s, their singular vectors kept.

    relative: s / max(s) in the exponent. Eigenvectors of the smaller Gram matrix do it without a division: X X^T =
    U diag(s^2) U^T, so the result is U diag(gain exp(rate s)) U^T X, in float32 whatever x is.
    """
    x = x_RLC.float()
    rows_lead = x.shape[1] <= x.shape[2]
    values, vectors = torch.linalg.eigh(x @ x.mT if rows_lead else x.mT @ x)
    size = values.clamp_min(0).sqrt()
    if relative:
        size = size / size.amax(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    turned = (vectors * (gain * torch.exp(rate * size))[:, None]) @ vectors.mT
    return (turned @ x if rows_lead else x @ turned).to(x_RLC.dtype)
