"""STAR's transformer (arXiv 2406.10797, section 3): VAR's blocks with cross-attention to text in the place of modulated
norms, and rotary positions whose corners are the same at every scale."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nextscale.conditions.text import TextRows
from nextscale.context import Context
from nextscale.devices import made_once
from nextscale.errors import InputError
from nextscale.generators.infinity import InfinityGenerator, RotarySelfAttention, TextAttention
from nextscale.generators.var import Block, Product, VARGenerator, VARGeneratorConfig
from nextscale.layers.attention import Marks, Rule
from nextscale.layers.memory import Tags
from nextscale.layers.mlp import drop_path
from nextscale.layers.norms import layer_norm
from nextscale.plan import Plan
from nextscale.run import Rows


@dataclass(frozen=True)
class STARGeneratorConfig(VARGeneratorConfig):
    """Sizes of the transformer.

    text_width: of the encoder's tokens, pooled_width: of its vector of the whole prompt, 0 for text_width, as where
    that is the tokens' mean; longest_text: tokens a prompt is planned with. rope_side: the side that every scale's
    cells are spread over, corner to corner, rope_theta: of the slowest rate (32 and 100 in the paper's early ablation).
    sampler_blocks: of the network that draws fine scales in rounds, 0 for none; sampled_from: the first scale, by its
    index, that it is trained for. broadcast_first: as the published code samples: what the text attention gives the
    first branch is given to all, so that guidance is left with the first row alone.

    Raises InputError on sizes that don't fit each other.
    """

    text_width: int = 1024
    pooled_width: int = 0
    longest_text: int = 77
    rope_side: float = 64.0
    rope_theta: float = 10000.0
    sampler_blocks: int = 0
    sampled_from: int = 9
    broadcast_first: bool = False

    def __post_init__(self) -> None:
        # Recipes are made for VAR; here there is no modulation that could be shared.
        object.__setattr__(self, "shared_modulation", False)
        if self.width % self.heads or self.width // self.heads % 4:
            raise InputError(f"STAR: {self.heads} heads of width {self.width} don't have a multiple of 4 channels "
                             "each, which rotary positions need")
        if not 0 <= self.sampler_blocks <= self.depth or self.sampled_from < 1:
            raise InputError(f"STAR: sampler_blocks is {self.sampler_blocks} and sampled_from {self.sampled_from}; "
                             f"they must be 0 to the depth, {self.depth}, and at least 1")

    def for_text(self, width: int, pooled_width: int, longest: int) -> STARGeneratorConfig:
        """The same transformer for another text encoder's features."""
        return replace(self, text_width=width, pooled_width=0 if pooled_width == width else pooled_width,
                       longest_text=longest)

    @property
    def vector_width(self) -> int:
        return self.pooled_width or self.text_width


class CornerSelfAttention(RotarySelfAttention):
    """Self-attention whose places run from corner to corner of one square, whatever the grid."""

    config: STARGeneratorConfig  # type: ignore[assignment]

    def __init__(self, config: VARGeneratorConfig):
        super().__init__(config)
        self.theta = self.config.rope_theta

    def places(self, plan: Plan, rows: Rows) -> Tensor:
        """(1|R, L, 2): R j / (w - 1), R i / (h - 1) of row i and column j, 0 on a side of one cell. The column comes
        first: the first half of a head's channels turns by it."""
        last_K2 = made_once(rows.cell.device, _last, plan)[rows.step.long()]
        return rows.cell[..., 1:].flip(-1).float() / last_K2 * self.config.rope_side


def _last(plan: Plan) -> Tensor:
    """The last column and row of each of a plan's grids, (K, 2), at least 1."""
    return torch.tensor([[width - 1, height - 1] for height, width in plan.grids], dtype=torch.float32).clamp_min(1)


class STARBlock(Block):
    """x += drop(attention(norm x)); x += text attention(norm x); x += drop(MLP(norm x)), norms without weights. text:
    whether there is a text attention."""

    modulations = 0
    attention_type = CornerSelfAttention

    def __init__(self, config: VARGeneratorConfig, drop: float, text: bool = True):
        super().__init__(config, drop)
        assert isinstance(config, STARGeneratorConfig)
        self.broadcast_first = config.broadcast_first
        self.text = TextAttention(config.width, config.heads, config.text_width, config.l2_attention) if text else None

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Tensor | None) -> Tensor:
        def attention(x: Tensor, rows: Rows) -> Tensor:
            return drop_path(self.attention(layer_norm(x), rows, ctx, address), self.drop, self.training)

        def mlp(x: Tensor, rows: Rows) -> Tensor:
            return drop_path(self.mlp(layer_norm(x)), self.drop, self.training)

        x = self.between(ctx.residual(address, "attention", x, attention, rows), rows, ctx, address)
        return ctx.residual(address, "mlp", x, mlp, rows)

    def between(self, x: Tensor, rows: Rows, ctx: Context, address: str) -> Tensor:
        if self.text is None:
            return x

        def text(x: Tensor, rows: Rows) -> Tensor:
            assert self.text is not None
            copies = len(ctx.branches) if self.broadcast_first else 1
            found: Tensor = self.text(layer_norm(x[:len(x) // copies]), rows, ctx, address)
            return found.repeat(copies, 1, 1)

        return ctx.residual(address, "text", x, text, rows)


class STARGenerator(InfinityGenerator):
    """STAR's transformer. Hidden states leave it as the last block gives them: the head has the last norm.

    The first row is W pooled + start, other rows W read + b; all plus a row a level, once, before the blocks. pooled:
    the encoder's vector of the whole prompt.
    """

    config: STARGeneratorConfig  # type: ignore[assignment]
    block = STARBlock  # type: ignore[assignment]

    def __init__(self, config: STARGeneratorConfig, plan: Plan, latent_width: int, name: str = "base"):
        VARGenerator.__init__(self, config, plan, latent_width, name)
        self.pooled = nn.Linear(config.vector_width, config.width)

    def add_positions(self) -> None:
        self.level = nn.Embedding(len(self.plan), self.config.width)

    def vector(self, cond: TextRows) -> Tensor:
        found: Tensor = self.pooled(cond.vector)
        return found

    def products(self, plan: Plan, pictures: int) -> list[Product]:
        return [*super().products(plan, pictures), (pictures, self.config.vector_width, self.config.width, 1, 1, 1.0)]


@dataclass(frozen=True)
class OwnStepAndText(Rule):
    """A rule that shows rows those of their own step and those of step 0, which see everything."""

    def marks(self, tags: Tags) -> Marks:
        return (tags.step,)

    def shown(self, device: torch.device) -> Callable[[Marks, Marks], Tensor]:
        return lambda query, key: (query[0] == key[0]) | (query[0] == 0) | (key[0] == 0)


class StableSampler(nn.Module):
    """The network of causal-driven stable sampling: what a scale's tokens are, given some of them.

    Two sequences of rows, a row of the prompt in front of both: embedded codes of the tokens that are known, and the
    transformer's hidden states of all. Joined, y = W_m [a; b], they pass some blocks without text attention, in which
    rows see those of their scale and the prompt's row (arXiv 2406.10797, section 3.3; published code).
    """

    checkpointing = False

    def __init__(self, config: STARGeneratorConfig, plan: Plan, latent_width: int):
        super().__init__()
        c = config.width
        self.word = nn.Linear(latent_width, c)
        self.level = nn.Embedding(len(plan), c)
        self.pooled = nn.Linear(config.vector_width, c)
        self.start = nn.Parameter(torch.zeros(1, 1, c))
        self.join = nn.Linear(2 * c, c)
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()[:config.sampler_blocks]
        self.blocks = nn.ModuleList(STARBlock(config, drop, text=False) for drop in drops)

    def forward(self, plan: Plan, codes_BLD: Tensor, hidden_RLC: Tensor, cond: TextRows, cell: Tensor,
                step: Tensor, apart: bool = False) -> Tensor:
        """Hidden states (R, L, C) of the rows at cells (1|R, L, 3) of steps (1|R, L), none of them the first. codes
        (B, L, D): of known tokens, 0 at the others. apart: rows are of several steps, which don't see each other."""
        dtype, copies = self.word.weight.dtype, len(hidden_RLC) // len(codes_BLD)
        text = self.pooled(cond.vector.to(dtype))[:, None] + self.start
        known = self.word(codes_BLD.to(dtype)).repeat(copies, 1, 1) + self.level(step.long())
        x = self.join(torch.cat([torch.cat([text, known], 1), torch.cat([text, hidden_RLC.to(dtype)], 1)], -1))
        first = torch.zeros_like(step[:, :1])
        # The prompt's row lies where the first scale's only cell does.
        rows = Rows(torch.cat([torch.zeros_like(cell[:, :1]), cell], 1), torch.cat([first, step], 1), None, 0,
                    plan.visible, masked=False)
        if apart:
            rows = rows.narrow(OwnStepAndText())
        ctx = Context(None, plan=plan)
        for i, block in enumerate(self.blocks):
            x = ctx.through(f"sampler.{i}", block, x, rows, None, self.checkpointing)
        return x[:, 1:]


@torch.no_grad()
def initialise(parts: Sequence[nn.Module], generator: STARGenerator, head: nn.Linear) -> None:
    """STAR's initialisation (published code): truncated normal of std sqrt(1 / 3C) in all parts, no biases, what the
    transformer's blocks add divided by sqrt(2 depth), a small output layer."""
    width, depth = generator.config.width, generator.config.depth
    std = math.sqrt(1 / width / 3)
    for root in parts:
        for name, parameter in root.named_parameters():
            if name.endswith(("start", "weight")):
                nn.init.trunc_normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    head.weight.mul_(0.02)
    for block in generator.blocks:
        assert isinstance(block, STARBlock)
        block.attention.projection.weight.div_(math.sqrt(2 * depth))
        block.mlp.contract.weight.div_(math.sqrt(2 * depth))
