"""SRDD's transformer (arXiv 2509.22636): VAR's under a Markov view, of the state alone or of a window of scales."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.generators.var import Product, VARGenerator, VARGeneratorConfig
from nextscale.plan import Plan
from nextscale.run import Call, Run


@dataclass(frozen=True)
class SRDDGeneratorConfig(VARGeneratorConfig):
    """VAR's sizes; window: how many earlier scales' rows a scale looks at, 0 for the state alone."""

    window: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise InputError(f"window is {self.window}; it must be at least 0, for the state alone")


class SRDDGenerator(VARGenerator):
    """Rows of scale k see their own scale, and ``window`` scales before; nothing stays in memory.

    The state comes in as the input that a scale reads. With a window, earlier scales' rows are computed anew for every
    scale, in the company of the window's scales only: taken from a pass over all scales, they would bring along what
    they saw themselves, one window more a layer.
    """

    config: SRDDGeneratorConfig

    @property
    def remembered(self) -> tuple[str, ...]:
        """Nowhere: no key or value stays in memory."""
        return ()

    def memory_bytes(self, plan: Plan, branches: int) -> int:
        return 0

    def rows_at_once(self, plan: Plan) -> int:
        return max(plan.starts[k + 1] - plan.starts[max(0, k - self.config.window)] for k in range(len(plan)))

    def call(self, run: Run) -> Call:
        return self.call_from(run, max(0, run.cursor - self.config.window), keep=0)

    def forward(self, call: Call, ctx: Context) -> Tensor:
        """Hidden states (R, L, C) of all rows; a pass over more scales than a window holds goes scale by scale."""
        spans, window = call.rows.spans, self.config.window
        if window == 0 or spans is None or len(spans) <= window + 1:
            return super().forward(call, ctx)
        found = []
        for k, span in enumerate(spans):
            lo = spans[max(0, k - window)].lo
            rows = replace(call.rows.part(lo, span.hi, keep=0), masked=k > 0)
            found.append(super().forward(Call(call.x[:, lo:span.hi], rows, slice(span.lo - lo, span.hi - lo)), ctx)
                         [:, span.lo - lo:])
        return torch.cat(found, 1)

    def products(self, plan: Plan, pictures: int) -> list[Product]:
        window = self.config.window
        if window == 0:
            return super().products(plan, pictures)
        seen = [replace(plan, steps=plan.steps[max(0, k - window):k + 1]) for k in range(len(plan))]
        return [product for part in seen for product in super(SRDDGenerator, self).products(part, pictures)]
