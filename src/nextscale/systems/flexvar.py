"""FlexVAR: next-scale prediction of whole drafts instead of residuals (Jiao et al., arXiv 2502.20313).

Scale k codes the latent itself, resized to its grid, so every scale alone decodes to a picture of its size, and only
the last is shown. The transformer is VAR's without levels and with a position table that is resized to any grid:

    p(r_1, ..., r_K) = prod_k p(r_k | r_1, ..., r_(k-1)),   input of k+1: bicubic(codes of r_k)

Schedules are drawn at random in training, so one set of weights draws by any, in fewer or more steps, for other sizes
and aspect ratios.
"""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassTable
from nextscale.context import Hook
from nextscale.data.buckets import Bucket, aspect_buckets
from nextscale.devices import listed
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.flexvar import FlexVARGenerator, FlexVARGeneratorConfig
from nextscale.generators.var import initialise
from nextscale.heads.categorical import CategoricalHead, Filter
from nextscale.hub import NameMap
from nextscale.layers.resize import resize
from nextscale.objectives.teacher_forcing import teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import At
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.generation import Generation, Settings
from nextscale.sampling.guidance import ClassifierFree, Guidance
from nextscale.systems.class_conditional import ClassConditionalSystem, Schedule, SystemConfig
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import join_attention, llamagen_names
from nextscale.tokenizers.tokenizer import Tokenizer

LISTED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32)
"""Sides of grids whose tokens the published sampler draws; it takes the likeliest tokens at all others."""

STEPS = {5: (1, 2, 4, 8, 16), 6: (1, 2, 4, 6, 10, 16), 8: (1, 2, 3, 5, 7, 10, 13, 16),
         9: (1, 2, 3, 4, 5, 7, 10, 13, 16), 10: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         11: (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16), 12: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
         13: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16), 14: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16)}
"""Published schedules at 256 pixels, by their number of steps (that of 5 is this project's)."""
STEPS_512 = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32)


@dataclass(frozen=True)
class FlexVARSettings(Settings):
    """Settings with FlexVAR's own: greedy_unlisted takes the likeliest tokens at grids above ``largest`` cells a side
    or of a side that is not in ``LISTED``, as published; largest: up to which guidance is ramped, too."""

    greedy_unlisted: bool = True
    largest: int = 16


@dataclass(frozen=True)
class FlexVARGuidance(ClassifierFree):
    """t = (scale - 1) k / min(K - 1, 9) up to grids of ``largest`` cells a side, (scale - 1) beyond: more than the
    scale where there are more than ten steps."""

    largest: int = 16

    def share(self, at: At) -> float:
        return 1.0 if max(at.grid) > self.largest else at.step / max(1, min(at.steps - 1, 9))


@dataclass(frozen=True)
class GreedyUnlisted:
    """The published rule as a filter: the likeliest token alone is left where the grid was not trained much."""

    largest: int = 16
    listed: tuple[int, ...] = LISTED

    def __call__(self, logits: Tensor, at: At) -> Tensor:
        if max(at.grid) <= self.largest and all(side in self.listed for side in at.grid):
            return logits
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, logits.gather(-1, best))


@dataclass(frozen=True)
class FlexVARConfig(SystemConfig):
    """FlexVAR's configuration; the defaults are those of 1000 classes at 256 pixels.

    The tokenizer's grids are the default schedule of sampling, and the grids that a token cache holds, among which
    training chooses.
    """

    slug: ClassVar[str] = "flexvar"

    tokenizer: TokenizerConfig = field(default_factory=lambda: tokenizer_config(128, 256))
    generator: FlexVARGeneratorConfig = field(default_factory=FlexVARGeneratorConfig)
    settings: dict[str, FlexVARSettings] = field(default_factory=lambda: {
        purpose: FlexVARSettings(guidance_scale=3.5, top_k=900, top_p=0.95) for purpose in ("pictures", "fid")})


def tokenizer_config(width: int, feature_width: int, vocabulary: int = 8912, latent_width: int = 32,
                     sides: Sequence[int] = STEPS[10]) -> TokenizerConfig:
    """FlexVAE: LlamaGen's factor-16 layout with wider codes (8912 of them, as published, not 8192)."""
    sizes = AutoencoderConfig(width, (1, 1, 2, 2, 4), latent_width=latent_width, feature_width=feature_width,
                              latent_kernel=1)
    return TokenizerConfig(sizes, tuple((s, s) for s in sides), vocabulary, kind="l2-vq")


class FlexVAR(ClassConditionalSystem):
    """The system, see ``ClassConditionalSystem``; ``generate`` and ``stream`` take any ``schedule``."""

    config_type = FlexVARConfig
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: FlexVARConfig):
        super().__init__(config)
        if config.tokenizer.kind != "l2-vq":
            raise InputError(f"FlexVAR needs a tokenizer of whole drafts, kind 'l2-vq', not {config.tokenizer.kind!r}")
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = FlexVARGenerator(config.generator, config.tokenizer.plan,
                                          config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    def initialise(self, gate: float = 1e-3) -> FlexVAR:
        initialise(self.generator, self.head, self.labels, gate)
        return self

    # Sampling

    def plan_of(self, schedule: Schedule | None) -> Plan:
        plan = self.plan if schedule is None else Plan.scales(schedule, self.plan.visible)
        self.generator.check_plan(plan)
        return plan

    def schedule_for(self, size: tuple[int, int]) -> Schedule | None:
        """The model's own scales stretched to a size, the first of them one cell; the published ones at 32x32 cells."""
        grid = self.grid_of(size)
        if grid == self.plan.grid:
            return None
        if grid == (32, 32):
            return [(side, side) for side in STEPS_512]
        return list(self.plan.scales_to(grid))

    @classmethod
    def schedules(cls, tokenizer: TokenizerConfig, largest_ratio: float, multiple: int) -> dict[Bucket, Schedule]:
        """The model's own scales stretched to every bucket of ``aspect_buckets``."""
        factor, (height, width) = tokenizer.factor, tokenizer.plan.grid
        if multiple % factor or height != width:
            raise InputError(f"buckets: sides that are multiples of {multiple} pixels don't fit a square of "
                             f"{height * factor}x{width * factor} and the tokenizer's factor {factor}")
        return {(h, w): tokenizer.plan.scales_to((h // factor, w // factor))
                for h, w in aspect_buckets(height * factor, largest_ratio, multiple)}

    def guidance(self, used: FlexVARSettings) -> Guidance:
        if used.guidance_scale == 1 or used.guidance_schedule != "ramp":
            return super().guidance(used)
        return FlexVARGuidance(used.guidance_scale, largest=used.largest)

    def filters(self, used: FlexVARSettings) -> tuple[Filter, ...]:
        greedy = (GreedyUnlisted(used.largest),) if used.greedy_unlisted else ()
        return (*super().filters(used), *greedy)

    @torch.no_grad()
    def refine(self, pictures: Tensor, labels: Any = None, *, schedule: Schedule | None = None,
               hooks: Sequence[Hook] = (), **options: Any) -> Generation:
        """Image to image: scales up to the size of ``pictures`` (B, 3, h, w) in [-1, 1] are theirs, the rest is drawn.

        Small pictures are enlarged with new detail; pictures of full size come back through the tokenizer. ``options``
        are those of ``generate``. Raises InputError where the sides are no multiple of the tokenizer's factor, or where
        no grid of the schedule fits into them.
        """
        plan = self.plan_of(schedule)
        latent = self.tokenizer.latent(self.tokenizer.whole_cells(pictures.to(self.device)))
        height, width = latent.shape[-2:]
        given = [k for k, step in enumerate(plan) if step.grid[0] <= height and step.grid[1] <= width]
        if not given or given != list(range(len(given))):
            raise InputError(f"picture: none of the grids {[step.grid for step in plan]} fits into its latent of "
                             f"{height}x{width} cells")
        quantise = self.tokenizer.quantiser.quantise
        tokens = [quantise(resize(latent, plan.steps[k].grid, "area")) for k in given]
        tokens += [tokens[0].new_zeros(len(pictures), step.rows) for step in plan.steps[len(given):]]
        keep = [torch.full_like(found, k < len(given), dtype=torch.bool) for k, found in enumerate(tokens)]
        return self.generate(labels, len(pictures), schedule=schedule, hooks=[*hooks, ForcedTokens(tokens, keep)],
                             batch_size=len(pictures), **options)

    # Training

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0, plan: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forcing cross-entropy. While training, of a random schedule among the given grids (``draw_steps``,
        with torch's generator); the values of steps left out are NaN. plan: of all grids, where they are not the
        model's own."""
        all_steps = plan or self.plan
        chosen = list(range(len(tokens)))
        if self.generator.training:
            chosen = draw_steps(all_steps.grids[:len(tokens)], random.Random(int(torch.randint(2**31, ()))))
        plan = Plan(tuple(all_steps.steps[k] for k in chosen), all_steps.visible)
        kept = [tokens[k] for k in chosen]
        with torch.no_grad():
            canvas = Canvas.empty(plan, self.tokenizer.quantiser, len(labels_Bn), labels_Bn.device)
            reads = pyramid.replay(kept, canvas).reads
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        weights = None if step_weights is None else [step_weights[k] for k in chosen]
        loss, by_step, right = teacher_forcing_loss(self.generator, self.head, plan, kept, reads, cond, weights,
                                                    label_smoothing)
        index = listed(chosen, by_step.device)
        found = torch.stack([by_step, right.to(by_step)])
        spread = by_step.new_full((2, len(tokens)), torch.nan).index_copy_(1, index, found)
        return loss, spread[0], spread[1]

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        from nextscale.systems.var_published import GENERATOR_NAMES

        return llamagen_names(len(self.config.tokenizer.autoencoder.multipliers)), GENERATOR_NAMES

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return join_attention(tensors) if part == "tokenizer" else tensors


def draw_steps(grids: Sequence[tuple[int, int]], rng: random.Random, usual: float = 0.05) -> list[int]:
    """Which of the grids one training step is about (published code, stated there for the sides 1, 2, ..., 16).

    With probability ``usual`` the schedule of VAR. Else the first two, five eighths of the grids that follow up to
    10/16 of the last, two fifths of the larger ones, and the last. Then one of those between is dropped with
    probability 0.1, a second with 0.05, a third with 0.02, a fourth with 0.01. While more rows are left than VAR's
    schedule would have (680 at 16x16), one of the last four goes, be it the last itself, but never the first of all.

    Raises InputError for fewer than three grids.
    """
    rows = [h * w for h, w in grids]
    if len(grids) < 3:
        raise InputError(f"FlexVAR trains on at least three grids, got {len(grids)}")
    if rng.random() < usual:
        wanted = {1, *(round(side * max(grids[-1]) / 16) for side in STEPS[10])}
        return [k for k, grid in enumerate(grids) if max(grid) in wanted]
    border = 10 / 16 * max(grids[-1])
    low = [k for k in range(2, len(grids) - 1) if max(grids[k]) <= border]
    high = [k for k in range(2, len(grids) - 1) if max(grids[k]) > border]
    chosen = [0, 1, *sorted(rng.sample(low, round(len(low) * 5 / 8)) + rng.sample(high, round(len(high) * 2 / 5))),
              len(grids) - 1]
    x = rng.random()
    for _ in range((x > 0.9) + (x > 0.95) + (x > 0.98) + (x > 0.99)):
        if len(chosen) > 3:
            chosen.pop(rng.randrange(2, len(chosen) - 1))
    while sum(rows[k] for k in chosen) > 680 / 256 * rows[-1]:
        chosen.pop(rng.randrange(max(1, len(chosen) - 4), len(chosen)))
    return chosen


# Published sizes

def preset_config(name: str) -> FlexVARConfig:
    """The configuration of a published size, flexvar-d16, flexvar-d20 or flexvar-d24."""
    depths = {"flexvar-d16": 16, "flexvar-d20": 20, "flexvar-d24": 24}
    if name not in depths:
        raise InputError(f"unknown FlexVAR size {name!r}{did_you_mean(name, depths)}")
    sizes = FlexVARGeneratorConfig.of_depth(depths[name])
    assert isinstance(sizes, FlexVARGeneratorConfig)
    return FlexVARConfig(generator=sizes)


def published_config(vae: dict[str, Any], var: dict[str, Any]) -> FlexVARConfig:
    """The configuration that the published constructors' keyword arguments mean."""
    tokenizer = tokenizer_config(vae.get("ch", 128), vae.get("z_channels", 256), vae.get("codebook_size", 8912),
                                 vae.get("codebook_embed_dim", 32), var.get("patch_nums", STEPS[10]))
    generator = FlexVARGeneratorConfig(
        depth=var.get("depth", 16), width=var.get("embed_dim", 1024), heads=var.get("num_heads", 16),
        mlp_ratio=var.get("mlp_ratio", 4.0), shared_modulation=var.get("shared_aln", False),
        l2_attention=var.get("attn_l2_norm", True), drop_path=var.get("drop_path_rate", 0.0))
    return FlexVARConfig(tokenizer, generator, (var.get("num_classes", 1000),))
