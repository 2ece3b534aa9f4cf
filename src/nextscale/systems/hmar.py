"""HMAR: hierarchical masked autoregressive image generation (Kumbong et al., arXiv 2506.04421).

Two modules on VAR's tokenizer. The next-scale module is VAR with a Markov view: a scale's rows attend to each other
alone, and all that they know of coarser scales is the canvas that they read, so nothing is kept in memory. The mask
module, which shares its first blocks, draws the least confident tokens of a scale again in a few rounds.
"""
from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassTable
from nextscale.context import Context, Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.hmar import HMARGenerator, HMARGeneratorConfig
from nextscale.generators.var import initialise
from nextscale.heads.masked_rounds import MaskedRoundsHead
from nextscale.hub import NameMap
from nextscale.layers.resize import resize
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import OWN_STEP, Plan
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.class_conditional import ClassConditionalSystem, SystemConfig
from nextscale.systems.var import PLANS
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.tokenizer import Tokenizer

_FINE = tuple((side * side,) for side in PLANS[256][3:])
ROUNDS = {256: ((1,), (1, 3), (1, 1, 2, 5), *_FINE),
          512: ((1,), (1, 3), (1, 1, 2, 5), (5, 11), *((side * side,) for side in PLANS[512][4:])),
          1024: ((1,), (1, 3), (1, 1, 2, 5), (3, 5, 8), *((side * side,) for side in PLANS[1024][4:]))}
"""Published schedules of rounds, by pixels: 14 network evaluations at 256."""
ROUNDS_TIMED = ((1,), (1, 3), (1, 3, 5), *_FINE)
"""The published one of speed measurements at 256 pixels: 13."""


@dataclass(frozen=True)
class HMARSettings(Settings):
    """Settings with HMAR's own. rounds: how many tokens of every scale are settled in each of its rounds; empty draws
    every scale at once, by the next-scale module alone. sighted: in editing, the mask module draws what isn't known of
    a scale, in sight of what is; else, and without rounds, the next-scale module, which sees coarser scales only."""

    rounds: tuple[tuple[int, ...], ...] = ()
    sighted: bool = True


@dataclass(frozen=True)
class HMARConfig(SystemConfig):
    """HMAR's configuration; the defaults are those of 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "hmar"

    generator: HMARGeneratorConfig = field(default_factory=lambda: HMARGeneratorConfig(mask_blocks=8))
    settings: dict[str, HMARSettings] = field(default_factory=lambda: {
        purpose: HMARSettings(2.7, top_k=1000, top_p=0.99, rounds=ROUNDS[256]) for purpose in ("pictures", "fid")})


class HMAR(ClassConditionalSystem):
    """The system, see ``ClassConditionalSystem``; likelihood and training are the next-scale module's."""

    config_type = HMARConfig
    parts = ("next", "mask")
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: HMARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = HMARGenerator(config.generator, self.plan, config.tokenizer.autoencoder.latent_width)
        self.head = MaskedRoundsHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)
        self.part = "next"

    @property
    def plan(self) -> Plan:
        """The tokenizer's schedule; rows see their own step alone."""
        return replace(self.tokenizer.plan, visible=OWN_STEP)

    @property
    def markov(self) -> bool:
        return True

    def initialise(self, gate: float = 1e-3) -> HMAR:
        initialise(self.generator, self.head.next, self.labels, gate)
        self.start_mask_module()
        return self

    @torch.no_grad()
    def start_mask_module(self) -> None:
        """Give the mask module the weights of the next-scale module's own end, from which it is trained."""
        blocks = self.generator.blocks[len(self.generator.blocks) - len(self.generator.mask_blocks):]
        self.generator.mask_blocks.load_state_dict(blocks.state_dict())
        self.generator.mask_head_modulation.load_state_dict(self.generator.head_modulation.state_dict())
        self.head.mask.load_state_dict(self.head.next.state_dict())

    # Sampling

    def loop(self, run: Run, guidance: Guidance, used: HMARSettings,
             hooks: Sequence[Hook], soft: Any) -> Iterator[Run]:
        rounds = check_rounds(used.rounds, run.plan)
        return sample_steps(_InRounds(self, rounds, used.sighted and bool(used.rounds)), run, guidance,
                            self.filters(used), hooks, soft)

    # Training

    def train_part(self, part: str) -> None:
        """``next``: all but the mask module. ``mask``: the mask module alone, from the next-scale module's weights."""
        super().train_part(part)
        self.part = part
        own = [self.generator.mask_blocks, self.generator.mask_head_modulation, self.head.mask]
        self.requires_grad_(part == "next")
        for module in own:
            module.requires_grad_(part == "mask")
        self.generator.mask_embed.requires_grad_(part == "mask")
        if part == "mask":
            self.start_mask_module()

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The cross-entropy of the part that is trained. step_weights: of every scale's rows; None: ``row_weights``.
        The mask module's: see ``mask_loss``."""
        weights = self.row_weights(self.plan)[:len(tokens)] if step_weights is None else step_weights
        if self.part == "mask":
            return self.mask_loss(tokens, labels_Bn, label_dropout, part_dropout, weights, label_smoothing)
        return super().loss(tokens, labels_Bn, label_dropout, part_dropout, weights, label_smoothing)

    def row_weights(self, plan: Plan) -> list[float]:
        """As published: scales weigh as ``scale_weights`` says in the next-scale module's loss, masked rows alike in
        the mask module's."""
        if self.part == "mask":
            return super().row_weights(plan)
        return [weight / step.rows for weight, step in zip(scale_weights(plan), plan, strict=True)]

    def mask_loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
                  part_dropout: float = 0.0, step_weights: Sequence[float] | None = None, label_smoothing: float = 0.0,
                  share: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of masked tokens given the scale's other ones: the mean over all, each weighed by its scale's
        step_weights (None: alike), over each scale's, and the share of right guesses at each scale; NaN for the first
        scale, which is left out. Raises InputError where all scales but the first weigh nothing.

        share: of every scale's tokens that are masked, rounded up, at the same places in all pictures; None draws one
        share for all scales evenly. Places and share are drawn with torch's generator.
        """
        plan, device = self.plan, labels_Bn.device
        weights = [1.0] * len(tokens) if step_weights is None else list(step_weights)
        if not any(weights[1:]):
            raise InputError("the mask module trains on scales after the first; step_weights and prefix.first must "
                             "leave it one")
        share = float(torch.rand(())) if share is None else share
        hidden = [torch.zeros(step.rows, dtype=torch.bool) for step in plan.steps[:len(tokens)]]
        for mask in hidden[1:]:
            mask[torch.randperm(len(mask))[:math.ceil(share * len(mask))]] = True
        hidden_L = torch.cat(hidden).to(device)
        plan = replace(plan, steps=plan.steps[:len(tokens)])
        with torch.no_grad():
            canvas = Canvas.empty(plan, self.tokenizer.quantiser, len(labels_Bn), device)
            reads = pyramid.replay(list(tokens), canvas).reads
            own = [resize(canvas.contribution(k, step), plan.steps[k].grid, "area").flatten(2).transpose(1, 2)
                   for k, step in enumerate(tokens)]
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        call = teacher_forcing_call(self.generator, plan, reads, cond)
        first = plan.steps[0].rows
        known = [read for read in reads if read is not None]
        later = self.generator.embed_round(plan, torch.cat(known, 1), torch.cat(own, 1)[:, first:],
                                           hidden_L[first:].expand(len(labels_Bn), -1), call.rows.cond, 1, len(plan))
        call = replace(call, x=torch.cat([call.x[:, :first], later], 1), round=1)
        entropy_BL, right_BL = self.head.mask.loss(self.generator(call, Context()), torch.cat(list(tokens), 1),
                                                   label_smoothing)
        by_step, right = (torch.stack([values[:, s.lo:s.hi][:, hidden_L[s.lo:s.hi]].mean()
                                       for s in plan.spans(0, len(plan))]) for values in (entropy_BL, right_BL))
        weight_L = torch.tensor(weights, device=device)[plan.step_of_row.to(device)] * hidden_L
        return (entropy_BL * weight_L).sum() / (len(labels_Bn) * weight_L.sum()), by_step.detach(), right

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        """Those of the next-scale module's training; none are told for the mask module's."""
        return self.products_of_plan(pictures, plan) if self.part == "next" else []

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        from nextscale.systems.var_published import GENERATOR_NAMES, TOKENIZER_NAMES

        names: list[tuple[str, str | None]] = [
            (theirs, None if ours is None else re.sub(r"^head\.", "head.next.", ours))
            for theirs, ours in GENERATOR_NAMES]
        names += [(f"mask_{theirs}", ours.replace("generator.blocks", "generator.mask_blocks"))
                  for theirs, ours in GENERATOR_NAMES if ours is not None and theirs.startswith("blocks")]
        return TOKENIZER_NAMES, [
            *names, (r"mask_embed\.weight", "generator.mask_embed"),
            (r"mask_blocks\.\d+\.attn\.zero_k_bias", None), (r"mask_head\.(weight|bias)", r"head.mask.\1"),
            (r"mask_head_nm\.ada_lin\.1\.(weight|bias)", r"generator.mask_head_modulation.\1")]

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the combined file: its base and next-scale blocks are the blocks here, one after the other."""
        if part == "tokenizer":
            return tensors
        shared = self.config.generator.depth - self.config.generator.mask_blocks
        return {_renamed(name, shared): tensor for name, tensor in tensors.items()}


def _renamed(name: str, shared: int) -> str:
    if match := re.fullmatch(r"(base|ns)_blocks\.(\d+)\.(.*)", name):
        return f"blocks.{int(match[2]) + (shared if match[1] == 'ns' else 0)}.{match[3]}"
    return {"word_embed_bias": "word_embed.bias"}.get(name, re.sub(r"^ns_head", "head", name))


class _InRounds:
    """The system with its head under a schedule of rounds, as the loop takes it."""

    def __init__(self, system: HMAR, rounds: Sequence[Sequence[int]], sighted: bool):
        self.generator: nn.Module = system.generator
        self.head = system.head.in_rounds(rounds, sighted)


def check_rounds(rounds: Sequence[Sequence[int]], plan: Plan) -> list[list[int]]:
    """A schedule of rounds for a plan, every scale at once where there is none. Raises InputError where numbers don't
    add up to a scale's tokens, or the first scale, which has no input to look at again, has more than one round."""
    if not rounds:
        return [[step.rows] for step in plan]
    found = [list(counts) for counts in rounds]
    if len(found) != len(plan):
        raise InputError(f"rounds: {len(found)} scales are given, the schedule has {len(plan)}")
    for k, (counts, step) in enumerate(zip(found, plan, strict=True)):
        if sum(counts) != step.rows or min(counts, default=0) < 1:
            raise InputError(f"rounds: scale {k} settles {counts}; the numbers must be positive and add up to its "
                             f"{step.rows} tokens")
    if len(found[0]) > 1:
        raise InputError("rounds: the first scale has no input that a second round could look at; give it one round")
    return found


def scale_weights(plan: Plan) -> list[float]:
    """The published ``lognorm`` weights of scales, which sum to 1 (paper's section 4.3, published configurations).

    With rho_k = p_k / p_K, mean m and standard deviation s (one degree of freedom less) over the scales, and the order
    of scales turned around: w_k proportional to exp(-((rho_(K-1-k) - m) / s)^2 / 2). A single scale weighs 1.
    """
    sides = [math.sqrt(step.grid[0] * step.grid[1]) for step in plan]
    shares = [side / sides[-1] for side in sides]
    if len(shares) < 2:
        return [1.0]
    m, s = statistics.mean(shares), statistics.stdev(shares)
    if s == 0:
        return [1 / len(shares)] * len(shares)
    weights = [math.exp(-((share - m) / s) ** 2 / 2) for share in reversed(shares)]
    return [w / sum(weights) for w in weights]


# Published sizes

def preset_config(name: str) -> HMARConfig:
    """The configuration of a published size, hmar-d16, hmar-d20, hmar-d24 or hmar-d30 (256 px)."""
    sizes = {"hmar-d16": (16, 2.7, 1000), "hmar-d20": (20, 2.9, 950), "hmar-d24": (24, 3.1, 900),
             "hmar-d30": (30, 2.7, 1000)}
    if name not in sizes:
        raise InputError(f"unknown HMAR size {name!r}{did_you_mean(name, sizes)}")
    depth, guidance, top_k = sizes[name]
    network = HMARGeneratorConfig.of_depth(depth, mask_blocks=8)
    assert isinstance(network, HMARGeneratorConfig)
    settings = HMARSettings(guidance, top_k=top_k, top_p=0.99, rounds=ROUNDS[256])
    return HMARConfig(generator=network, settings={"pictures": settings, "fid": settings})


def published_config(vae: dict[str, Any], hmar: dict[str, Any]) -> HMARConfig:
    """The configuration that the published constructors' keyword arguments mean."""
    from nextscale.systems.var_published import published_config as of_var

    var = of_var(vae, {key: value for key, value in hmar.items() if key != "n_layers_train"})
    network = HMARGeneratorConfig(**{**vars(var.generator), "mask_blocks": hmar.get("n_layers_train", 2)})
    return HMARConfig(var.tokenizer, network, var.classes)
