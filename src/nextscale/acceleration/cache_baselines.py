"""What ScaleKV and HACK are measured beside: policies made for language models, under the same hook.

All act after attention and give every step the same budget: a share of the rows that are remembered before the last.
"""
from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nextscale.acceleration.budgets import uniform_rows
from nextscale.acceleration.memory_policy import MemoryPolicy, only_group, whole_plan
from nextscale.acceleration.observation import Pooling, best, check_share, hidden_keys, window_scores
from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.run import Rows


class SharePolicy(MemoryPolicy):
    """A budget of rows a layer, and positions (R, M) or (R, H, M) of those that stay."""

    share: float

    def budget(self, plan: Plan, layers: int, layer: int) -> int:
        """Rows that a layer keeps behind every step."""
        return uniform_rows(plan, self.share)

    def rows(self, plan: Plan) -> int:
        return uniform_rows(plan, self.share)

    def shrinks(self, plan: Plan, layers: int, layer: int, step: int, rows: int) -> bool:
        return rows > self.budget(plan, layers, layer)

    @property
    @abstractmethod
    def kept(self) -> int:
        """Rows that stay whatever their score."""

    @abstractmethod
    def choose(self, ctx: Context, address: str, q: Tensor, rows: Rows, budget: int) -> Tensor:
        """Positions of the rows that stay."""

    def check(self, plan: Plan, layers: int) -> None:
        least = min(self.budget(plan, layers, layer) for layer in (0, layers - 1))
        if least <= self.kept:
            raise InputError(f"{self.name}: a budget of {least} rows has no room beside the {self.kept} that always "
                             "stay; raise the share, or have fewer stay")

    def after(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        budget = self.budget(whole_plan(ctx), len(ctx.network.remembered), layer)
        if only_group(ctx, address).rows > budget:
            assert ctx.memory is not None
            ctx.memory.keep_rows(address, self.choose(ctx, address, q, rows, budget))


@dataclass(frozen=True)
class SnapKV(SharePolicy):
    """SnapKV: the last rows of a step judge and stay, with what they attend to most (arXiv 2404.14469).

    share: of the rows that are remembered before the last step; window: how many rows judge; kernel, pooling: how
    attention's probabilities are pooled along the keys, head by head.
    """

    name: ClassVar[str] = "snapkv"

    share: float = 0.1
    window: int = 16
    kernel: int = 5
    pooling: Pooling = "average"

    def __post_init__(self) -> None:
        check_share(self.share, self.kernel, self.name)

    @property
    def kept(self) -> int:
        return self.window

    def choose(self, ctx: Context, address: str, q: Tensor, rows: Rows, budget: int) -> Tensor:
        group, own = only_group(ctx, address), len(rows)
        last = range(max(0, own - self.window), own)
        assert ctx.memory is not None
        tags = ctx.memory.tags_of(group)
        assert tags is not None
        scores = window_scores(q[:, :, last.start:], group.k[:, :, :group.rows], last, own, self.kernel, self.pooling,
                               "paper", ctx.scale(address), hidden_keys(rows, tags.step))
        return best(scores, budget)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV: SnapKV with budgets that fall linearly from the first layer to the last (arXiv 2406.02069).

    beta: of what is not the window, the last layer gets 1 / beta of the mean (published: 20), the first the rest of
    twice the mean. Other settings as SnapKV's.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise InputError(f"pyramidkv: beta is {self.beta}; it must be at least 1 (1 is the same for all layers)")

    def budget(self, plan: Plan, layers: int, layer: int) -> int:
        mean = uniform_rows(plan, self.share)
        beside = mean - self.window
        # Computed in whole rows so that those of a layer and of its mirror image sum to twice the mean.
        place = (layers - 1 - 2 * min(layer, layers - 1 - layer)) / max(layers - 1, 1)
        less = round((beside - beside / self.beta) * place)
        return mean + less if 2 * layer < layers - 1 else mean - less

    def check(self, plan: Plan, layers: int) -> None:
        if uniform_rows(plan, self.share) <= self.window or self.budget(plan, layers, layers - 1) < self.window:
            raise InputError(f"pyramidkv: a mean budget of {uniform_rows(plan, self.share)} rows has no room beside "
                             f"the window of {self.window}; raise the share, or set a smaller window")


@dataclass(frozen=True)
class SlidingWindow(SharePolicy):
    """A sliding window: the first rows ("sinks") and the most recent ones stay (StreamingLLM, arXiv 2309.17453).

    share: of the rows that are remembered before the last step; sinks: how many of the first rows stay.
    """

    name: ClassVar[str] = "sliding-window"

    share: float = 0.1
    sinks: int = 4

    def __post_init__(self) -> None:
        check_share(self.share, 1, self.name)
        if self.sinks < 0:
            raise InputError(f"sliding-window: sinks is {self.sinks}; it must not be negative")

    @property
    def kept(self) -> int:
        return self.sinks

    def choose(self, ctx: Context, address: str, q: Tensor, rows: Rows, budget: int) -> Tensor:
        held = only_group(ctx, address).rows
        recent = torch.arange(held - budget + self.sinks, held, device=q.device)
        return torch.cat([torch.arange(self.sinks, device=q.device), recent]).expand(len(q), -1)
