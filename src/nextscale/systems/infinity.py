"""Infinity: text to picture by next-scale prediction of bits (Han et al., arXiv 2412.04431).

A bitwise tokenizer turns a picture into K maps of d bits a cell, coarse to fine; a transformer that attends to a text
encoder's features predicts every bit of a map at once, each by itself:

    p(R_1, ..., R_K | text) = prod_k prod_(cells, j) p(bit_j | R_1, ..., R_(k-1), text)

In training some bits of the input are flipped and later scales learn to repair it (bitwise self-correction).
"""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.conditions.text import PooledText
from nextscale.conditions.text_words import WordConfig
from nextscale.context import Context, Function, Hook
from nextscale.data.buckets import Bucket
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.infinity import (
    RATIOS,
    InfinityGenerator,
    InfinityGeneratorConfig,
    initialise,
    nearest_ratio,
)
from nextscale.heads.bitwise import BitwiseHead
from nextscale.hub import NameMap
from nextscale.objectives.self_correction import SelfCorrection, corrupted
from nextscale.objectives.teacher_forcing import teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import At, Rows, Run
from nextscale.sampling.filters import Filter, make_filters
from nextscale.sampling.generation import GuidedSettings
from nextscale.sampling.guidance import Guidance, Unguided, share_of
from nextscale.systems.system import Config, Schedule
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import INFINITY_NAMES, infinity_config
from nextscale.tokenizers.tokenizer import Tokenizer

BUDGETS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""How many of the published scales a pixel budget takes: pictures of about 256, 512, 768 and 1024 pixels a side."""
LONGEST = 13


@dataclass(frozen=True)
class InfinitySettings(GuidedSettings):
    """How bits are drawn: guidance, the same at every scale by default, and temperature, and

    guidance_after: 0 guides the logits; n > 0 the hidden states behind the n-th block from the end instead, which costs
    as much and follows the text more softly; top_p: of a bit's two values, 0.97 rules out those of probability below
    0.03; greedy: take the likelier value; temperatures: for every scale a factor of the temperature.
    """

    guidance_schedule: str | tuple[float, ...] = "constant"
    guidance_after: int = 0
    top_p: float | None = None
    greedy: bool = False
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True)
class InfinityConfig(Config):
    """Infinity's configuration; the defaults are those of the 2B model at 1024 pixels.

    correction: of the training, how bits are flipped; bit_loss: whether a position's loss is the mean or the sum over
    its bits; encoder: what ``open_text_encoder`` opens for its prompts; words: instead, the text encoder that is
    trained and saved with the model.
    """

    slug: ClassVar[str] = "infinity"

    tokenizer: TokenizerConfig = field(default_factory=lambda: infinity_config(grids=RATIOS[1.0]))
    generator: InfinityGeneratorConfig = field(default_factory=InfinityGeneratorConfig)
    settings: dict[str, InfinitySettings] = field(default_factory=lambda: {
        "pictures": InfinitySettings(4.0, temperature=0.5, top_p=0.97),
        "fid": InfinitySettings(4.0, top_p=0.97)})
    correction: SelfCorrection = field(default_factory=SelfCorrection)
    bit_loss: Literal["mean", "sum"] = "mean"
    encoder: str = "t5:google/flan-t5-xl"
    words: WordConfig | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.kind not in ("bsq", "lfq") or self.tokenizer.tokens != "bits":
            raise InputError("Infinity predicts bits: its tokenizer must be of kind 'bsq' or 'lfq' with tokens 'bits', "
                             f"not {self.tokenizer.kind!r} with {self.tokenizer.tokens!r}")
        if self.words is not None and (self.generator.text_width, self.generator.longest_text) != (
                self.words.width, self.words.max_tokens + 1):
            raise InputError(f"Infinity: its word encoder gives {self.words.max_tokens + 1} tokens of width "
                             f"{self.words.width}; set text_width and longest_text to these, not to "
                             f"{self.generator.text_width} and {self.generator.longest_text}")


@dataclass(frozen=True)
class GuidedBlock(Hook):
    """Guidance behind a block: hidden states become u + s (c - u) in both branches, of which the conditional one is
    then the output (Infinity's ``cfg_insertion_layer``). number: the block's; scale, schedule: as ``ClassifierFree``
    has them."""

    number: int
    scale: float
    schedule: str | tuple[float, ...] = "constant"

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        x = inner(x, rows)
        if ctx.network is None or address != f"{ctx.network.name}.{self.number}":
            return x
        if ctx.branches != ("conditional", "unconditional") or ctx.plan is None:
            raise InputError("guidance_after: it mixes a conditional and an unconditional branch, but the run has "
                             f"{', '.join(ctx.branches)}")
        parts = []
        for at, part in rows.by_step():
            t = (self.scale - 1) * share_of(self.schedule, At.of(ctx.plan, int(part.spans[0].step)))  # type: ignore[index]
            given, none = x[:, at].chunk(2)
            parts.append(((1 + t) * given - t * none).repeat(2, 1, 1))
        return torch.cat(parts, 1)


class Infinity(TextConditionalSystem):
    """The system, see ``TextConditionalSystem``."""

    config_type = InfinityConfig

    def __init__(self, config: InfinityConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        bits, network = self.tokenizer.quantiser.latent_width, config.generator
        self.generator = InfinityGenerator(network, config.tokenizer.plan, bits)
        self.head = BitwiseHead(network.width, bits, config.bit_loss)
        self.text = PooledText(network.text_width, network.width, network.longest_text, network.pooling_heads)

    @property
    def nats_of_loss(self) -> float:  # type: ignore[override]
        return self.head.bits if self.config.bit_loss == "mean" else 1.0

    @classmethod
    def fitted(cls, tokenizer: Tokenizer) -> Tokenizer:
        """A bitwise tokenizer that emits indices emits bits here."""
        if tokenizer.config.kind in ("bsq", "lfq") and tokenizer.config.tokens == "index":
            bits = Tokenizer(replace(tokenizer.config, tokens="bits"))
            bits.load_state_dict(tokenizer.state_dict())
            return bits.eval()
        return tokenizer

    def initialise(self, gate: float = 5e-6) -> Infinity:
        initialise(self.generator, self.head, self.text, gate)
        return self

    # Tokens are bits (B, L_k, d)

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.head.bits,)

    def check_values(self, step: int, tokens: Tensor) -> None:
        if tokens.dtype != torch.bool:
            raise InputError(f"tokens: scale {step} holds {tokens.dtype}; bits are booleans")

    def training_tokens(self, cached: Tensor, plan: Plan | None = None) -> list[Tensor]:
        bits = cached if cached.dtype == torch.bool else self.tokenizer.quantiser.to_bits(cached.long())
        return list(bits.split([step.rows for step in plan or self.plan], 1))

    # Sampling

    def plan_of(self, schedule: Schedule | None) -> Plan:
        plan = self.plan if schedule is None else Plan.scales(schedule, self.plan.visible)
        self.generator.check_plan(plan)
        return plan

    def schedule_for(self, size: tuple[int, int]) -> Schedule | None:
        """The published scales of the nearest aspect ratio whose last grid is that of a size; else the model's own,
        stretched to it. Raises InputError where the tokenizer's factor doesn't divide a size."""
        grid = self.grid_of(size)
        if grid == self.plan.grid:
            return None
        known = RATIOS[nearest_ratio(size[0] / size[1])]
        if grid in known:
            return known[:known.index(grid) + 1]
        return list(self.plan.scales_to(grid))

    def schedule_of_ratio(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio (height / width) with about as many pixels as the model's own has: the
        nearest published one, as the log tells where it is another, or, of a model of other scales, its own
        stretched."""
        nearest = nearest_ratio(ratio)
        if abs(nearest - ratio) > 0.01:
            logging.getLogger("nextscale").warning("ratio %.3f (height / width): the nearest that there is is %s",
                                                   ratio, nearest)
        return scales_of(self.plan, nearest)

    @classmethod
    def schedules(cls, tokenizer: TokenizerConfig, largest_ratio: float, multiple: int) -> dict[Bucket, Schedule]:
        """One a published aspect ratio: what ``schedule_of_ratio`` draws it by."""
        found: dict[Bucket, Schedule] = {}
        for ratio, published in RATIOS.items():
            if max(published[-1]) <= 1.01 * largest_ratio * min(published[-1]):  # 1.333 stands for four thirds
                grids = scales_of(tokenizer.plan, ratio)
                h, w = grids[-1]
                found.setdefault((h * tokenizer.factor, w * tokenizer.factor), grids)
        return dict(sorted(found.items(), key=lambda one: one[0][1] / one[0][0]))

    def filters(self, used: InfinitySettings) -> tuple[Filter, ...]:
        return make_filters(used.temperature, 1 if used.greedy else None, used.top_p, used.temperatures)

    def soft(self, used: InfinitySettings) -> None:
        return None

    def guidance(self, used: InfinitySettings) -> Guidance:
        return super().guidance(used) if not used.guidance_after else Unguided(("conditional", "unconditional"))

    def loop(self, run: Run, guidance: Guidance, used: InfinitySettings, hooks: Sequence[Hook], soft: Any) -> Any:
        after = used.guidance_after
        if after and len(run.branches) > 1:
            depth = len(self.generator.blocks)
            if not 0 < after <= depth:
                raise InputError(f"guidance_after is {after}; this model has {depth} blocks")
            hooks = [*hooks, GuidedBlock(depth - after, used.guidance_scale, used.guidance_schedule)]
        return super().loop(run, guidance, used, hooks, soft)

    # Training

    @classmethod
    def takes(cls, config: InfinityConfig) -> dict[str, bool]:
        return {"captions": True, "latents": config.correction.strength > 0}

    def training_options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = super().training_options(batch)
        if "latent" in batch:
            grid = self.training_plan(batch).grid
            found["latent"] = batch["latent"].float().transpose(1, 2).unflatten(2, grid)
        return found

    def loss(self, tokens: Sequence[Tensor], rows: Any, label_dropout: float = 0.1, part_dropout: float = 0.0,
             step_weights: Sequence[float] | None = None, label_smoothing: float = 0.0,
             latent: Tensor | None = None, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forcing cross-entropy of the bits; in training with bitwise self-correction (``config.correction``).

        tokens: bits of every step, (B, L_k, d); of the first steps only, to train these. rows: text features, or
        captions. latent: (B, C, H, W), what the tokens code; None: what they decode to. plan: of all steps, where
        pictures have another shape than the model's own.
        """
        all_steps = plan or self.plan
        plan = replace(all_steps, steps=all_steps.steps[:len(tokens)])
        tokens, reads = self.forced(tokens, self.generator.training, latent, all_steps)
        cond = self.dropped(rows, label_dropout, part_dropout)
        return teacher_forcing_loss(self.generator, self.head, plan, tokens, reads, cond, step_weights, label_smoothing)

    def forced(self, tokens: Sequence[Tensor], correct: bool = False, latent: Tensor | None = None,
               plan: Plan | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        if not (correct and self.config.correction.strength > 0):
            return super().forced(tokens, plan=plan)
        plan = plan or self.plan
        if latent is None and len(tokens) < len(plan):
            raise InputError("self-correction: the first scales alone don't say what the whole latent is; cache "
                             "latents beside the tokens, or train all scales")
        quantiser, scales = self.tokenizer.quantiser, len(tokens)
        with torch.no_grad():
            canvas = Canvas.empty(plan, quantiser, len(tokens[0]), self.device)
            whole = pyramid.replay(list(tokens), canvas).canvas.value if latent is None else latent
            found = corrupted(quantiser, whole, canvas, self.config.correction)
        return found.tokens[:scales], found.reads[:scales]

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        plan = plan or self.plan
        head = (pictures * plan.length, self.config.generator.width, 2 * self.head.bits, 1, 1, 1.0)
        return [*self.generator.products(plan, pictures), head]

    # Published weights

    def published_names(self) -> tuple[NameMap, ...]:
        return INFINITY_NAMES, GENERATOR_NAMES

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors if part == "tokenizer" else self._blocks_in_line(tensors)

    def _blocks_in_line(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors with blocks counted through, whose files group them in chunks; scales a head as they are
        held here; and as many null rows as there are here."""
        chunked = [re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.", name) for name in tensors]
        size = 1 + max((int(match[2]) for match in chunked if match), default=0)
        found = {}
        for name, tensor in tensors.items():
            match = re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.(.*)", name)
            if match:
                name = f"blocks.{int(match[1]) * size + int(match[2])}.{match[3]}"
            if name.endswith("scale_mul_1H11") and tensor.ndim == 4:
                tensor = tensor.reshape(1, -1, 1, 1)
            if name == "cfg_uncond":
                kept = tensor[:len(self.text.null)]
                tensor = torch.cat([kept, self.text.null[len(kept):].detach().to(kept)])
            found[name] = tensor
        return found


def scales_of(plan: Plan, ratio: float) -> tuple[tuple[int, int], ...]:
    """The schedule of a published aspect ratio (height / width) with about as many cells as a plan has: the published
    one, or the plan's own scales stretched where they are others."""
    if plan.grids == RATIOS[1.0][:len(plan)]:
        return RATIOS[ratio][:len(plan)]
    side = (plan.grid[0] * plan.grid[1]) ** 0.5
    return plan.scales_to((max(1, round(side * ratio**0.5)), max(1, round(side / ratio**0.5))))


_BLOCK = r"blocks\.(\d+)\."
GENERATOR_NAMES: NameMap = (
    ("cfg_uncond", "text.null"),
    (r"text_norm\.weight", "text.norm.weight"),
    (r"text_proj_for_sos\.ca\.mat_q", "text.pool.query"),
    (r"text_proj_for_sos\.ca\.mat_kv\.weight", "text.pool.kv.weight"),
    (r"text_proj_for_sos\.ca\.v_bias", "text.pool.v_bias"),
    (r"text_proj_for_sos\.ca\.proj\.(weight|bias)", r"text.pool.projection.\1"),
    (r"text_proj_for_ca\.0\.(weight|bias)", r"text.expand.\1"),
    (r"text_proj_for_ca\.2\.(weight|bias)", r"text.project.\1"),
    ("pos_start", "generator.start"),
    (r"lvl_embed\.weight", "generator.level.weight"),
    (r"word_embed\.(weight|bias)", r"generator.word.\1"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"generator.shared_modulation.\1"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"generator.head_modulation.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
    (_BLOCK + "ada_gss", r"generator.blocks.\1.modulation_offset"),
    (_BLOCK + r"sa\.scale_mul_1H11", r"generator.blocks.\1.attention.scale_1H11"),
    (_BLOCK + r"sa\.mat_qkv\.weight", r"generator.blocks.\1.attention.qkv.weight"),
    (_BLOCK + r"sa\.(q_bias|v_bias)", r"generator.blocks.\1.attention.\2"),
    (_BLOCK + r"sa\.proj\.(weight|bias)", r"generator.blocks.\1.attention.projection.\2"),
    (_BLOCK + r"ca\.mat_q\.(weight|bias)", r"generator.blocks.\1.text.query.\2"),
    (_BLOCK + r"ca\.mat_kv\.weight", r"generator.blocks.\1.text.kv.weight"),
    (_BLOCK + r"ca\.v_bias", r"generator.blocks.\1.text.v_bias"),
    (_BLOCK + r"ca\.proj\.(weight|bias)", r"generator.blocks.\1.text.projection.\2"),
    (_BLOCK + r"ca_norm\.(weight|bias)", r"generator.blocks.\1.text_norm.\2"),
    (_BLOCK + r"ffn\.fc1\.(weight|bias)", r"generator.blocks.\1.mlp.expand.\2"),
    (_BLOCK + r"ffn\.fc2\.(weight|bias)", r"generator.blocks.\1.mlp.contract.\2"),
    # Zeros, masks and lists that follow from the rest.
    (r".*zero_k_bias|lvl_1L|attn_bias_for_masking|.*_visible_kvlen|.*_invisible_qlen", None),
)
"""Published tensor names, blocks counted through."""


# Published sizes: blocks, width, heads

SIZES = {"125m": (12, 768, 8), "361m": (16, 1152, 12), "940m": (24, 1536, 16), "2.2b": (32, 2080, 20),
         "4.7b": (40, 2688, 24), "8.7b": (48, 3360, 28), "2b": (32, 2048, 16), "8b": (40, 3584, 28),
         "20b": (58, 4608, 36)}
"""2b and 8b are released; the sizes from 125m to 8.7b are the paper's scaling series, layer12 to layer48."""


def preset_config(name: str) -> InfinityConfig:
    """The configuration of a published size, ``infinity-2b`` at 1024 pixels; of another pixel budget with its name
    behind, as in ``infinity-2b-0.25M``."""
    size, _, budget = name.removeprefix("infinity-").partition("-")
    if size not in SIZES or (budget and budget not in BUDGETS) or not name.startswith("infinity-"):
        known = [f"infinity-{size}{suffix}" for size in SIZES for suffix in ("", *(f"-{b}" for b in BUDGETS))]
        raise InputError(f"unknown Infinity size {name!r}{did_you_mean(name, known)}")
    depth, width, heads = SIZES[size]
    grids = RATIOS[1.0][:BUDGETS[budget or "1M"]]
    network = InfinityGeneratorConfig(depth, width, heads, drop_path=0.25 if size == "20b" else 0.1)
    tokenizer = infinity_config(14, True, grids=grids) if size == "8b" else infinity_config(32, grids=grids)
    settings = InfinitySettings(3.0, top_p=0.97) if size == "8b" else InfinitySettings(4.0, temperature=0.5, top_p=0.97)
    return InfinityConfig(tokenizer, network, {"pictures": settings, "fid": replace(settings, temperature=1.0)})


def published_config(vae: dict[str, Any], infinity: dict[str, Any], grids: Sequence[tuple[int, int]]) -> InfinityConfig:
    """The configuration that the published constructors' keyword arguments mean, for a schedule."""
    patchify = bool(infinity.get("apply_spatial_patchify", 0))
    tokenizer = infinity_config(vae.get("codebook_dim", 32), patchify, vae.get("base_ch", 128), tuple(grids),
                                tuple(vae.get("encoder_ch_mult", ())))
    width = infinity.get("embed_dim", 1024)
    network = InfinityGeneratorConfig(
        infinity.get("depth", 16), width, infinity.get("num_heads", 16), drop_path=infinity.get("drop_path_rate", 0.0),
        mlp_width=round(width * infinity.get("mlp_ratio", 4.0) / 256) * 256,
        text_width=infinity.get("text_channels", 2048), longest_text=infinity.get("text_maxlen", 512))
    return InfinityConfig(tokenizer, network)
