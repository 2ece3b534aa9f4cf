"""FlowAR's head (arXiv 2412.15205, section 3.3): a transformer that moves a whole scale's vectors from noise to latent.

x_t = (1 - t) s + t e, target velocity v = e - s: t = 1 is noise, t = 0 the latent. The positions of a scale attend to
each other; the hidden state z of every position modulates it (spatial adaLN), or is attended to.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.heads.categorical import Evaluate, Filter, Guidance
from nextscale.heads.solver import Solve, integrate
from nextscale.layers.attention import attention
from nextscale.layers.linear import Linear, initialise_products
from nextscale.layers.mlp import GEGLU
from nextscale.layers.norms import RMSNorm, rms_norm
from nextscale.layers.rope import rotate, rotation
from nextscale.layers.time_embedding import TimeEmbedding, thousandths
from nextscale.parallel import rand_pictures, randn_pictures
from nextscale.plan import Plan
from nextscale.run import At, Call, Run, Sample

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FlowHeadConfig:
    """Sizes of the flow network. cross: large models' blocks, which attend to z besides being modulated by it; pooled:
    the mean of z over a scale modulates all of its positions, which the paper compares with and finds worse.

    Raises InputError on sizes that don't fit each other.
    """

    depth: int = 2
    width: int = 1024
    heads: int = 16
    mlp_ratio: float = 4.0
    cross: bool = False
    pooled: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"flow head: width {self.width} in {self.heads} heads leaves "
                             f"{self.width / self.heads:g} channels a head; they must be a multiple of 4")


class FlowCondition(NamedTuple):
    """What a scale's flow is conditioned on, the same at all times: z embedded (R, L, W), the keys and values of z for
    every cross-attention, and the places' turn."""

    embedded: Tensor
    keys: list[tuple[Tensor, Tensor]]
    turn: Turn

    def of(self, rows: Tensor) -> FlowCondition:
        """That of some rows of the batch (N,)."""
        return FlowCondition(self.embedded[rows], [(k[rows], v[rows]) for k, v in self.keys], self.turn)


def _heads(x_RLC: Tensor, parts: int, heads: int) -> Tensor:
    """(R, L, parts * H * E) to (parts, R, H, L, E)."""
    return x_RLC.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _joined(x_RHLE: Tensor) -> Tensor:
    return x_RHLE.transpose(1, 2).flatten(2)


class FlowSelfAttention(nn.Module):
    """Self-attention over the positions of a scale, turned by their place."""

    def __init__(self, config: FlowHeadConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.projection = Linear(config.width, config.width)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        q, k, v = _heads(self.qkv(x), 3, self.heads)
        return self.projection(_joined(attention(rotate(q, turn), rotate(k, turn), v)))


class FlowCrossAttention(nn.Module):
    """Attention of a scale's positions to its hidden states, whose keys and values are made once."""

    def __init__(self, config: FlowHeadConfig, condition_width: int):
        super().__init__()
        self.heads = config.heads
        self.norm = RMSNorm(config.width)
        self.condition_norm = RMSNorm(condition_width)
        self.q = Linear(config.width, config.width, bias=False)
        self.kv = Linear(condition_width, 2 * config.width, bias=False)
        self.projection = Linear(config.width, config.width)

    def keys(self, z: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        k, v = _heads(self.kv(self.condition_norm(z)), 2, self.heads)
        return rotate(k, turn), v

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], turn: Turn) -> Tensor:
        (q,) = _heads(self.q(self.norm(x)), 1, self.heads)
        return self.projection(_joined(attention(rotate(q, turn), *keys)))


class FlowBlock(nn.Module):
    """x += gate1 attention(norm(x)); [x += cross-attention(norm(x), z);] x += gate2 GEGLU(norm(x)).

    Without cross-attention all six modulations come from t + c, a set for every position (spatial adaLN); with it the
    first three come from t alone and are those of the whole scale.
    """

    def __init__(self, config: FlowHeadConfig, condition_width: int):
        super().__init__()
        self.attention = FlowSelfAttention(config)
        self.mlp = GEGLU(config.width, config.mlp_ratio)
        self.cross = FlowCrossAttention(config, condition_width) if config.cross else None
        if self.cross is None:
            self.modulation = Linear(config.width, 6 * config.width)
        else:
            self.attention_modulation = Linear(config.width, 3 * config.width)
            self.mlp_modulation = Linear(config.width, 3 * config.width)

    def modulate(self, t_R1W: Tensor, c_RLW: Tensor) -> tuple[Tensor, ...]:
        """gate1, gate2, scale1, scale2, shift1, shift2, each (R, L, W) or (R, 1, W)."""
        both = F.silu(t_R1W + c_RLW)
        if self.cross is None:
            return tuple(self.modulation(both).chunk(6, -1))
        first, second = self.attention_modulation(F.silu(t_R1W)).chunk(3, -1), self.mlp_modulation(both).chunk(3, -1)
        return tuple(part for pair in zip(first, second, strict=True) for part in pair)

    def forward(self, x: Tensor, t_R1W: Tensor, condition: FlowCondition, block: int) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulate(t_R1W, condition.embedded)
        x = x + gate1 * self.attention(rms_norm(x) * (1 + scale1) + shift1, condition.turn)
        if self.cross is not None:
            x = x + self.cross(x, condition.keys[block], condition.turn)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class FlowTransformerHead(nn.Module):
    """One network for all scales of a plan, run on one of them at a time.

    latent_width: channels of the vectors; condition_width: of the hidden states. Places are in the frame of the plan's
    last grid, as the generator's.
    """

    def __init__(self, config: FlowHeadConfig, plan: Plan, latent_width: int, condition_width: int):
        super().__init__()
        self.config, self.plan = config, plan
        self.input = nn.Linear(latent_width, config.width)
        self.time = TimeEmbedding(config.width)
        self.condition_embedding = Linear(condition_width, config.width)
        self.blocks = nn.ModuleList(FlowBlock(config, condition_width) for _ in range(config.depth))
        self.output_modulation = Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, latent_width)

    @property
    def network(self) -> nn.Module:
        """The flow network, whose evaluations are counted apart from the transformer's: the head itself."""
        return self

    def turn(self, step: int, device: torch.device) -> Turn:
        """Cosines and sines of a step's places, (L, E)."""
        (height, width), (h, w) = self.plan.grid, self.plan.steps[step].grid
        place = torch.cartesian_prod(torch.arange(h, device=device) * height / h,
                                     torch.arange(w, device=device) * width / w)
        return rotation(place, self.config.width // self.config.heads)

    def condition(self, step: int, z_RLC: Tensor) -> FlowCondition:
        """What a step's hidden states say to its flow."""
        turn = self.turn(step, z_RLC.device)
        keys = [block.cross.keys(z_RLC, turn) for block in self.blocks if block.cross is not None]  # type: ignore
        embedded = self.condition_embedding(z_RLC)
        return FlowCondition(embedded.mean(1, keepdim=True) if self.config.pooled else embedded, keys, turn)

    def forward(self, x_RLC: Tensor, time_R: Tensor, condition: FlowCondition) -> Tensor:
        """Velocity (R, L, C) in float32 of vectors at times in [0, 1]."""
        x = self.input(x_RLC.to(self.input.weight.dtype))
        t_R1W = self.time(thousandths(time_R))[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x, t_R1W, condition, i)
        shift, scale = self.output_modulation(F.silu(t_R1W + condition.embedded)).chunk(2, -1)
        velocity: Tensor = self.output(rms_norm(x) * (1 + scale) + shift)
        return velocity.float()

    # Training

    def loss(self, hidden_BLC: Tensor, target_BLC: Tensor) -> Tensor:
        """Squared error of the velocity, the mean over channels, of every position (B, L).

        Every picture has a time of its own at every scale, evenly from [0, 1), and noise, both drawn with torch's
        generator. Hidden states and targets are those of the plan's first steps or all.
        """
        time_BK = rand_pictures(len(target_BLC), len(self.plan), device=target_BLC.device)
        noise_BLC = randn_pictures(*target_BLC.shape, device=target_BLC.device)
        parts = [self.step_loss(s.step, hidden_BLC[:, s.lo:s.hi], target_BLC[:, s.lo:s.hi], time_BK[:, s.step],
                                noise_BLC[:, s.lo:s.hi])
                 for s in self.plan.spans(0, len(self.plan)) if s.hi <= target_BLC.shape[1]]
        return torch.cat(parts, 1)

    def step_loss(self, step: int, z_BLC: Tensor, target_BLC: Tensor, time_B: Tensor, noise_BLC: Tensor) -> Tensor:
        """The same of one step (B, L) at given times and noise."""
        t = time_B[:, None, None]
        velocity = self((1 - t) * target_BLC + t * noise_BLC, time_B, self.condition(step, z_BLC))
        return (velocity - (noise_BLC - target_BLC)).square().mean(-1)

    # Sampling

    def solved(self, solve: Solve) -> SolvedFlow:
        """This head under a solver, as the loop takes it."""
        return SolvedFlow(self, solve)

    @torch.no_grad()
    def initialise(self) -> None:
        """The published initialisation: Xavier-uniform products, zero biases, and an output of zero."""
        initialise_products(self)
        self.time.initialise()
        nn.init.zeros_(self.output.weight)


class SolvedFlow:
    """A flow head that samples by a solver; each of a step's evaluations is a pass of the head alone.

    Hidden states are computed once a step. Where a guidance says by ``needed(at)`` which branches it asks for at a
    time, the others are not evaluated.
    """

    def __init__(self, head: FlowTransformerHead, solve: Solve):
        self.head, self.solve = head, solve

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = ()
               ) -> Sample:
        """Vectors (B, L, C) of a step: noise moved along the guided velocity from t = 1 to t = 0."""
        whole = self.head.condition(run.cursor, evaluate(call)[:, call.predicts])
        parts: dict[tuple[str, ...], FlowCondition] = {}  # of fewer branches than all

        def velocity(x: Tensor, at: At) -> Tensor:
            needed = getattr(guidance, "needed", None)
            names = run.branches if needed is None else needed(at)
            if names != run.branches and names not in parts:
                places = [run.branches.index(name) * run.pictures + torch.arange(run.pictures, device=x.device)
                          for name in names]
                parts[names] = whole.of(torch.cat(places))
            time_R = torch.full((len(names) * run.pictures,), at.time, device=x.device)
            found = self.head(x.float().repeat(len(names), 1, 1), time_R, parts.get(names, whole)).to(x.dtype)
            return guidance(dict(zip(names, found.chunk(len(names)), strict=True)), at)

        return integrate(self.solve, velocity, call, run, self.head.output.out_features)
