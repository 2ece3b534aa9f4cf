"""STAR: scale-wise text-to-image generation (Ma et al., arXiv 2406.10797).

VAR's tokenizer and its prediction scale after scale, with three changes: the start is a text encoder's vector of the
prompt and every block attends to its tokens; places are rotary and run from corner to corner at every scale; and fine
scales may be drawn in rounds by a small network that sees what the rounds before drew (causal-driven stable sampling).

    p(r_1, ..., r_K | text) = prod_k p(r_k | r_1, ..., r_(k-1), text)
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.conditions.text import PlainText, TextRows
from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_words import WordConfig
from nextscale.context import Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.star import StableSampler, STARGenerator, STARGeneratorConfig, initialise
from nextscale.heads.stable_sampling import InStableRounds, StableSamplingHead, known_share
from nextscale.hub import NameMap
from nextscale.layers.norms import layer_norm
from nextscale.objectives.distillation import Direction, divergence
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.objectives.token_dropping import TokenDropping, by_step, token_dropping_loss
from nextscale.parallel import rand_pictures
from nextscale.plan import Plan, places
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.system import Config
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.systems.var import PLANS, squares
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class STARSettings(Settings):
    """Settings with those of stable sampling.

    rounds: of every scale, 0 for all of its tokens at once; empty draws every scale at once. random_rounds: how many of
    the first rounds choose by chance which tokens become known, instead of by their probability. base_until: at scales
    before this index these rounds draw from the transformer's own logits, see ``InStableRounds``; 13 with the rounds of
    ``ROUNDS_1024`` is the published "1024" mode.
    """

    rounds: tuple[int, ...] = ()
    random_rounds: int = 5
    base_until: int = 0


ROUNDS_1024 = (0,) * 9 + (8,) * 4 + (15,)


@dataclass(frozen=True)
class STARConfig(Config):
    """STAR's configuration; the defaults are those of 256 pixels at depth 16.

    dropping: of the training, which rows of the finest scales it does without; encoder: what ``open_text_encoder``
    opens for its prompts; words: instead, the text encoder that is trained and saved with the model.
    """

    slug: ClassVar[str] = "star"

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: STARGeneratorConfig = field(default_factory=STARGeneratorConfig)
    settings: dict[str, STARSettings] = field(default_factory=lambda: {
        purpose: STARSettings(5.0, top_k=600, top_p=0.8) for purpose in ("pictures", "fid")})
    dropping: TokenDropping = field(default_factory=TokenDropping)
    encoder: str = "clip:stabilityai/stable-diffusion-2-1"
    words: WordConfig | None = None

    def __post_init__(self) -> None:
        network, words = self.generator, self.words
        if self.tokenizer.continuous or self.tokenizer.tokens == "bits":
            raise InputError(f"STAR predicts codes by their index, not the tokens of kind {self.tokenizer.kind!r}")
        if words is not None and {network.text_width, network.vector_width} != {words.width}:
            raise InputError(f"STAR: its word encoder gives features of width {words.width}; set text_width to it, not "
                             f"to {network.text_width}, and leave pooled_width out")


class STAR(TextConditionalSystem):
    """The system, see ``TextConditionalSystem``. What is no prompt is the empty one, as the text encoder encodes it."""

    config_type = STARConfig
    parts = ("base", "sampler")
    text_front = ("generator.pooled.*", "generator.blocks.*.text.kv.*", "generator.blocks.*.text.v_bias",
                  "head.sampler.pooled.*")

    def __init__(self, config: STARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        network, width = config.generator, config.tokenizer.latent_width
        self.generator = STARGenerator(network, config.tokenizer.plan, width)
        sampler = StableSampler(network, config.tokenizer.plan, width) if network.sampler_blocks else None
        self.head = StableSamplingHead(network.width, config.tokenizer.vocabulary, sampler)
        self.text = PlainText(network.text_width, network.vector_width)
        self.part = "base"
        self._empty: tuple[Any, TextFeatures] | None = None

    def initialise(self, gate: float = 1e-3) -> STAR:
        """The published initialisation; there are no gates."""
        initialise((self.generator, self.head), self.generator, self.head.base)
        return self

    # Prompts

    def nothing(self, features: TextFeatures) -> TextFeatures:
        """The empty prompt's features, as many as these; of an encoder that doesn't learn they are made once."""
        if self.encoder is not None and self._empty is not None and self._empty[0] is self.encoder:
            empty = self._empty[1].to(features.values.device)
        else:
            empty = self.training_features([""])
            if self.config.words is None:
                self._empty = self.encoder, empty
        return empty.gather([0] * len(features))

    # Sampling

    def loop(self, run: Run, guidance: Guidance, used: STARSettings, hooks: Sequence[Hook], soft: Any) -> Iterator[Run]:
        if not used.rounds:
            return super().loop(run, guidance, used, hooks, soft)
        self.check_rounds(used.rounds, run.plan)
        head = InStableRounds(self.head, used.rounds, used.random_rounds, used.base_until)
        return sample_steps(_WithHead(self.generator, head), run, guidance, self.filters(used), hooks, soft)

    def check_rounds(self, rounds: Sequence[int], plan: Plan) -> None:
        """Raises InputError for rounds that are not one number a scale, or are of scales that nothing was trained
        for."""
        network = self.config.generator
        if not network.sampler_blocks:
            raise InputError("rounds: this model has no network that draws in rounds (generator.sampler_blocks is 0); "
                             "leave rounds out")
        if len(rounds) != len(plan) or min(rounds) < 0:
            raise InputError(f"rounds: {tuple(rounds)} are given for {len(plan)} scales; give each a number, 0 for all "
                             "of its tokens at once")
        if any(rounds[:network.sampled_from]):
            raise InputError(f"rounds: {tuple(rounds)}; the network is trained for scales from index "
                             f"{network.sampled_from} on, those before take 0")

    # Training

    def train_part(self, part: str) -> None:
        """``base``: all but the network of stable sampling; ``sampler``: that one alone."""
        super().train_part(part)
        if part == "sampler" and self.head.sampler is None:
            raise InputError("part 'sampler': this model has none; set generator.sampler_blocks, 3 in the published "
                             "one, before the base is trained")
        self.part = part
        self.requires_grad_(part == "base")
        for module in (self.head.sampler, self.head.again):
            if module is not None:
                module.requires_grad_(part == "sampler")

    def loss(self, tokens: Sequence[Tensor], rows: Any, label_dropout: float = 0.1, part_dropout: float = 0.0,
             step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The cross-entropy of the part that is trained; the base's in training with ``config.dropping``. rows: text
        features, or captions. The sampler's: see ``sampler_loss``."""
        if self.part == "sampler":
            return self.sampler_loss(tokens, rows, label_dropout, part_dropout, step_weights, label_smoothing)
        plan = replace(self.plan, steps=self.plan.steps[:len(tokens)])
        kept = self.config.dropping.kept(plan, self.device) if self.generator.training else None
        if kept is None:
            return super().loss(tokens, rows, label_dropout, part_dropout, step_weights, label_smoothing)
        reads, cond = self.inputs(tokens), self.dropped(rows, label_dropout, part_dropout)
        return token_dropping_loss(self.generator, self.head, plan, tokens, reads, cond, kept, step_weights,
                                   label_smoothing)

    def sampler_loss(self, tokens: Sequence[Tensor], rows: Any, label_dropout: float = 0.1, part_dropout: float = 0.0,
                     step_weights: Sequence[float] | None = None, label_smoothing: float = 0.0,
                     known_BL: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of a scale's hidden tokens given its other ones, the mean over all of them; NaN at the scales
        that the sampler doesn't draw.

        known: which tokens of the scales that it draws, all at once, are shown; None shows each with probability
        arccos(r) / (pi / 2), r drawn evenly for every picture.
        """
        first = self.config.generator.sampled_from
        if len(tokens) <= first or self.head.sampler is None or self.head.again is None:
            raise InputError(f"sampler: it draws scales from index {first} on, but {len(tokens)} are given; set "
                             "generator.sampled_from")
        plan = replace(self.plan, steps=self.plan.steps[:len(tokens)])
        with torch.no_grad():
            cond = self.dropped(rows, label_dropout, part_dropout)
            hidden = teacher_forced(self.generator, plan, self.inputs(tokens), cond)
            target = torch.cat(list(tokens), 1)[:, plan.span(first, len(plan))]
            if known_BL is None:
                known_BL = self.shown(target)
        entropy, right = self.head.again.loss(self.sampler_hidden(plan, hidden, cond, target, known_BL), target,
                                              label_smoothing)
        return by_step(plan, plan.step_of_row[plan.span(first, len(plan))].to(self.device), entropy, right,
                       step_weights, ~known_BL)

    def shown(self, target_BL: Tensor) -> Tensor:
        """Which tokens of the scales that the sampler draws it is shown in training, by chance."""
        share_B1 = known_share(rand_pictures(len(target_BL), 1, device=self.device))
        return rand_pictures(*target_BL.shape, device=self.device) < share_B1

    def sampler_hidden(self, plan: Plan, hidden: Tensor, cond: TextRows, target_BL: Tensor, known_BL: Tensor) -> Tensor:
        """Hidden states, normalised, of the sampler at all scales that it draws, given those of all rows and some of
        the tokens."""
        span = plan.span(self.config.generator.sampled_from, len(plan))
        codes = self.tokenizer.quantiser.embed(target_BL) * known_BL[..., None]
        cell, step = (tags[:, span] for tags in places(plan, self.device))
        return layer_norm(self.head.sampler(plan, codes, hidden[:, span], cond, cell, step, apart=True))

    def further_divergence(self, teacher: STAR, tokens: Sequence[Tensor], conditions: tuple[TextRows, TextRows],
                           direction: Direction) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The sampler's, at the tokens that it is not shown."""
        if self.head.sampler is None:
            return None

        def apart(found: Tensor, taught: Tensor) -> Tensor:
            target = torch.cat(list(tokens), 1)[:, self.plan.span(self.config.generator.sampled_from, len(self.plan))]
            known = self.shown(target)
            own = self.head.again(self.sampler_hidden(self.plan, found, conditions[0], target, known))
            with torch.no_grad():
                wanted = teacher.head.again(teacher.sampler_hidden(self.plan, taught, conditions[1], target, known))
            away_BL = divergence(own, wanted, direction) * ~known
            return away_BL.sum() / (~known).sum().clamp_min(1)

        return apart

    def inputs(self, tokens: Sequence[Tensor]) -> list[Tensor | None]:
        """The un-embedded input of every step, from the tokens of those before."""
        return self.forced(tokens)[1]

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        """Those of the base's training without dropping; none are told for others."""
        return self.products_of_plan(pictures, plan) if self.part == "base" and not self.config.dropping.keep else []

    # Published weights

    def published_names(self) -> tuple[NameMap, ...]:
        from nextscale.systems.var_published import TOKENIZER_NAMES

        return TOKENIZER_NAMES, GENERATOR_NAMES


class _WithHead:
    """A network with a head that samples in rounds, as the loop takes it."""

    def __init__(self, generator: STARGenerator, head: InStableRounds):
        self.generator, self.head = generator, head


_BLOCKS: tuple[tuple[str, str], ...] = (
    (r"attn\.scale_mul_1H11", "attention.scale_1H11"),
    (r"attn\.mat_qkv\.weight", "attention.qkv.weight"),
    (r"attn\.(q_bias|v_bias)", r"attention.\2"),
    (r"attn\.proj\.(weight|bias)", r"attention.projection.\2"),
    (r"cross_attn\.scale_mul_1H11", "text.scale_1H11"),
    (r"cross_attn\.mat_q\.weight", "text.query.weight"),
    (r"cross_attn\.q_bias", "text.query.bias"),
    (r"cross_attn\.mat_kv\.weight", "text.kv.weight"),
    (r"cross_attn\.v_bias", "text.v_bias"),
    (r"cross_attn\.proj\.(weight|bias)", r"text.projection.\2"),
    (r"ffn\.fc1\.(weight|bias)", r"mlp.expand.\2"),
    (r"ffn\.fc2\.(weight|bias)", r"mlp.contract.\2"),
)
GENERATOR_NAMES: NameMap = (
    ("pos_start", "generator.start"),
    (r"lvl_embed\.weight", "generator.level.weight"),
    (r"word_embed\.(weight|bias)", r"generator.word.\1"),
    (r"encoder_proj\.(weight|bias)", r"generator.pooled.\1"),
    (r"head_logits\.(weight|bias)", r"head.base.\1"),
    *((rf"blocks\.(\d+)\.{theirs}", rf"generator.blocks.\1.{ours}") for theirs, ours in _BLOCKS),
    *((rf"feat_extract_blocks\.(\d+)\.{theirs}", rf"head.sampler.blocks.\1.{ours}") for theirs, ours in _BLOCKS),
    ("pos_start_last", "head.sampler.start"),
    (r"lvl_embed_2\.weight", "head.sampler.level.weight"),
    (r"word_embed_head\.(weight|bias)", r"head.sampler.word.\1"),
    (r"encoder_proj2\.(weight|bias)", r"head.sampler.pooled.\1"),
    (r"head_proj\.(weight|bias)", r"head.sampler.join.\1"),
    (r"head_logits2\.(weight|bias)", r"head.again.\1"),
    # What is left of VAR's classes, which nothing reads, and zeros.
    (r"class_emb\.weight|.*zero_k_bias", None),
)
"""Published tensor names of ``["trainer"]["var_wo_ddp"]``."""


# Published sizes: pixels, depth, blocks of the sampler

SIZES = {"star-256-d16": (256, 16, 0), "star-256-d30": (256, 30, 0), "star-512-d30": (512, 30, 0),
         "star-1024-d30": (1024, 30, 3), "star-1024-d30-base": (1024, 30, 0)}
"""The last has the weights that came without the network of stable sampling."""


def preset_config(name: str) -> STARConfig:
    """The configuration of a published size."""
    if name not in SIZES:
        raise InputError(f"unknown STAR size {name!r}{did_you_mean(name, SIZES)}")
    pixels, depth, blocks = SIZES[name]
    network = STARGeneratorConfig.of_depth(depth, sampler_blocks=blocks)
    assert isinstance(network, STARGeneratorConfig)
    settings = STARSettings(5.0, top_k=600, top_p=0.8)
    if blocks:
        settings = replace(settings, rounds=ROUNDS_1024, base_until=13)
    dropping = TokenDropping(8800 if pixels == 1024 else 0)
    return STARConfig(TokenizerConfig(grids=squares(PLANS[pixels])), network,
                      {"pictures": settings, "fid": replace(settings, top_k=4096 if blocks else 600)}, dropping)
