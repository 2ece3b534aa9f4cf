"""Ancestral sampling of a diffusion chain, and heads that draw tokens by it."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.devices import made_once, resident
from nextscale.heads.categorical import Evaluate, Filter, Guidance
from nextscale.heads.diffusion_mlp import DiffusionMLPHead
from nextscale.heads.joint_diffusion import JointDiffusionHead
from nextscale.layers.diffusion import Chain, diffuse, large_log_variance, learned_log_variance, reverse_step
from nextscale.plan import Step, grid_cells
from nextscale.run import Call, Run, Sample


def ancestral(chain: Chain, x: Tensor, predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
              noise: Callable[[int], Tensor], temperature: float = 1.0,
              before: Callable[[Tensor, int], Tensor] | None = None, clip: float = 0.0) -> Tensor:
    """Noise to a sample, step by step (DDPM, arXiv 2006.11239, algorithm 2).

    predict(x, i): the noise in x and its log variance at step i of the chain; noise(i): what is added behind it, times
    temperature; before(x, i): what x is changed to before a step; clip: bound of the denoised values, 0 for none.
    """
    for i in reversed(range(len(chain))):
        if before is not None:
            x = before(x, i)
        epsilon, log_variance = predict(x, i)
        index = torch.full(x.shape[:1], i, device=x.device)
        x = reverse_step(chain, x, epsilon, log_variance, noise(i) if i else torch.zeros_like(x), index, temperature,
                         clip)
    return x


class DiffusionSampling:
    """A ``DiffusionMLPHead`` under a chain: every predicted token of a step is denoised by itself.

    Guidance, and filters behind it, act on the predicted noises of the branches, which share one noisy token; the
    variance is the first branch's. temperature multiplies the noise that is added step by step, not the first one.
    """

    def __init__(self, head: DiffusionMLPHead, chain: Chain, temperature: float = 1.0, clip: float = 0.0):
        self.head, self.chain, self.temperature, self.clip = head, chain, temperature, clip

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Any = None) -> Sample:
        """Draw every predicted position of a call, (B, L, C)."""
        head, branches = self.head, len(run.branches)
        condition_RLD = head.condition(evaluate(call)[:, call.predicts].to(head.condition.weight.dtype))
        time_SD = head.time(resident(self.chain.times, run.device))
        step, cells = torch.full((1, 1), run.cursor, device=run.device), run.order[:, run.plan.span(*_this(run))]

        def draw(what: str, round: int) -> Tensor:
            return run.noise.normal(what, step, round, cells, head.token_width)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            epsilon, share = head.network(x.repeat(branches, 1, 1), condition_RLD + time_SD[i])
            outputs = dict(zip(run.branches, epsilon.chunk(branches), strict=True))
            at = replace(run.at, time=float(self.chain.times[i]), round=len(self.chain) - 1 - i)
            guided = guidance(outputs, at)
            for narrow in filters:
                guided = narrow(guided, at)
            return guided, learned_log_variance(self.chain, share[:len(x)], torch.full(x.shape[:1], i, device=x.device))

        x = ancestral(self.chain, draw("start", 0), predict, lambda i: draw("solver", len(self.chain) - 1 - i),
                      self.temperature, clip=self.clip)
        return Sample(x, None)


class JointDiffusionSampling:
    """A ``JointDiffusionHead`` under a chain: the whole map is denoised, and the cells that a step predicts are taken.

    Known cells are put in their place before every step of the chain, noisy as the rest: q(x_i | known) with the map's
    first noise (replacement, as in RePaint, arXiv 2201.09865). Guidance and temperature as for single tokens; the
    variance is the fixed one.
    """

    def __init__(self, head: JointDiffusionHead, chain: Chain, temperature: float = 1.0, clip: float = 0.0):
        self.head, self.chain, self.temperature, self.clip = head, chain, temperature, clip

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Any = None) -> Sample:
        """Draw every predicted position of a step, (B, L, C), from a call all cells of whose map predict."""
        hidden = evaluate(call)
        cells = call.rows.cell[:, len(call.rows) - hidden.shape[1]:][:, call.predicts]
        wide = run.plan.steps[run.cursor].grid[1]
        places = (cells[..., 1] * wide + cells[..., 2]).expand(len(hidden), -1)[..., None]
        hidden = hidden[:, call.predicts]
        hidden = torch.zeros_like(hidden).scatter(1, places.expand_as(hidden), hidden)
        map_BLC = self.draw(hidden, run, guidance, filters)
        taken = run.order[:, run.plan.span(*_this(run))]
        taken = (taken[..., 1] * wide + taken[..., 2]).expand(run.pictures, -1)[..., None]
        return Sample(map_BLC.gather(1, taken.expand(-1, -1, map_BLC.shape[-1])), None)

    def draw(self, hidden_RLD: Tensor, run: Run, guidance: Guidance, filters: Sequence[Filter] = ()) -> Tensor:
        """A denoised map (B, L, C) in raster order, given hidden states of all cells in that order."""
        head, chain, branches = self.head, self.chain, len(run.branches)
        condition = head.condition(hidden_RLD.to(head.condition.weight.dtype))
        time_SD = head.time(resident(chain.times, run.device))
        grid = run.plan.steps[run.cursor].grid
        step = torch.full((1, 1), run.cursor, device=run.device)
        cells = made_once(run.device, grid_cells, Step(grid))[None]
        known, masked = run.reads[run.cursor], self.masked_cells(run)

        def draw(what: str, round: int) -> Tensor:
            return run.noise.normal(what, step, round, cells, head.token_width)

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            epsilon = head.network(x.repeat(branches, 1, 1), condition + time_SD[i])
            outputs = dict(zip(run.branches, epsilon.chunk(branches), strict=True))
            at = replace(run.at, time=float(chain.times[i]), round=len(chain) - 1 - i)
            guided = guidance(outputs, at)
            for narrow in filters:
                guided = narrow(guided, at)
            return guided, large_log_variance(chain, x, torch.full(x.shape[:1], i, device=x.device))

        def put_known(x: Tensor, i: int) -> Tensor:
            if known is None:
                return x
            index = torch.full(x.shape[:1], i, device=x.device)
            return torch.where(masked[..., None], x, diffuse(chain, known, start, index))

        start = draw("start", 0)
        return ancestral(chain, start, predict, lambda i: draw("solver", len(chain) - 1 - i), self.temperature,
                         put_known, self.clip)

    @staticmethod
    def masked_cells(run: Run) -> Tensor:
        """Which cells of the map the run's step predicts, (B, L) bool."""
        grid = run.plan.steps[run.cursor].grid
        cells = run.order[:, run.plan.span(*_this(run))]
        places = (cells[..., 1] * grid[1] + cells[..., 2]).expand(run.pictures, -1)
        none = torch.zeros(run.pictures, grid[0] * grid[1], dtype=torch.bool, device=run.device)
        return none.scatter(1, places, True)


def _this(run: Run) -> tuple[int, int]:
    return run.cursor, run.cursor + 1
