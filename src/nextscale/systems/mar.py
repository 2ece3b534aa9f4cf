"""MAR: autoregressive image generation without vector quantisation (Li et al., arXiv 2406.11838).

Tokens are vectors of a KL autoencoder's latent. They are drawn in a random order, a few at a time by the cosine
schedule: a bidirectional transformer gives every masked cell a hidden state from the tokens that are known, and a small
network denoises each token of the step by itself, given its hidden state:

    p(x_1, ..., x_n) = prod_k p(X_k | X_1, ..., X_(k-1)),    X_k the tokens of step k, independent given the rest
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter as _now
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextscale.conditions.class_label import ClassTable
from nextscale.context import Context, Hook
from nextscale.devices import made_once
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.mar import MARGenerator, MARGeneratorConfig, take
from nextscale.heads.diffusion_mlp import DiffusionMLPHead
from nextscale.heads.l2_mlp import L2MLPHead
from nextscale.hub import NameMap
from nextscale.layers.diffusion import cosine_chain
from nextscale.noise import Keyed, Noise
from nextscale.parallel import rand_pictures
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import Run
from nextscale.sampling import editing
from nextscale.sampling.diffusion import DiffusionSampling
from nextscale.sampling.generation import Generation, OutputKind, check_output, convert, picture_seeds
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.orders import Order, Unmasking, drawing_order, random_order, unmasked_counts
from nextscale.sampling.steps import sample_steps
from nextscale.systems.class_conditional import Label, Schedule
from nextscale.systems.continuous import (
    ContinuousConfig,
    ContinuousSettings,
    ContinuousSystem,
    at_least_0,
    one_of,
)
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import KL_NAMES, kl_config
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class MARSettings(ContinuousSettings):
    """Guidance, whose schedule ``linear`` grows with the share of tokens that are drawn, and temperature, and

    iterations: steps in which the tokens are drawn, from 1 to their number, which more than that means too; unmasking:
    how many each of them draws, more and more (``cosine``) or as many (``linear``); order: in which, every picture's
    own ``random`` one, which is how the network is trained, or the ``raster``'s; solver_steps: steps of the denoising
    chain, of 1000; clip: bound of what the chain takes for the clean values, which vary by about 1, 0 for none as
    published. At the noisy end the smallest error of a head grows a hundredfold: a head that was trained for minutes
    and not for weeks needs a bound.
    """

    guidance_schedule: str = "linear"
    iterations: int = 64
    solver_steps: int = 100
    clip: float = 0.0
    unmasking: Unmasking = "cosine"
    order: Order = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_0("clip", self.clip)
        one_of("unmasking", self.unmasking, Unmasking)
        one_of("order", self.order, Order)


@dataclass(frozen=True)
class MARConfig(ContinuousConfig):
    """MAR's configuration; the defaults are those of MAR-B for 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "mar"

    generator: MARGeneratorConfig = field(default_factory=MARGeneratorConfig)
    settings: dict[str, MARSettings] = field(default_factory=lambda: {
        "pictures": MARSettings(2.9), "fid": MARSettings(2.9, iterations=256)})


class MAR(ContinuousSystem):
    """The system, see ``ClassConditionalSystem`` and ``ContinuousSystem``."""

    config_type = MARConfig
    undecayed = ("head",)
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: MARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        network, latent_width = config.generator, config.tokenizer.autoencoder.latent_width
        self.generator = MARGenerator(network, self.plan.grid, latent_width)
        sizes = (network.width, latent_width, network.head_width, network.head_depth)
        self.head = L2MLPHead(*sizes) if network.head == "l2" else DiffusionMLPHead(*sizes, network.head_draws)
        self.labels = ClassTable(config.classes, network.width)

    def initialise(self, gate: float = 1e-3) -> MAR:
        """The published start, which has no gates but those that start at 0."""
        self.generator.initialise()
        self.head.initialise()
        for table in self.labels.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.02)
        return self

    @property
    def plan(self) -> Plan:
        """The whole map at once, the last of the tokenizer's scales: how pictures are encoded and trained on."""
        return Plan((Step(self.tokenizer.plan.grid),))

    # Sampling

    def plan_for(self, used: MARSettings, schedule: Schedule | None = None) -> Plan:
        """The steps of a generation: how many cells of the map each draws."""
        grid = self.plan_of(schedule).grid
        return Plan(unmasking(grid, grid[0] * grid[1], used.iterations, used.unmasking, used.order))

    def start(self, labels_Bn: Tensor, guidance: Guidance, noise: Noise, plan: Plan | None = None,
              order: Tensor | None = None) -> Run:
        """A run at its first step. order (B|1, L, 3): in which cells are drawn, else the plan's, where it has one, and
        every picture's own random one where it hasn't."""
        run = super().start(labels_Bn, guidance, noise, plan or self.plan_for(self.config.settings["pictures"]))
        if order is None and in_raster_order(run.plan):
            order = run.plan.cells[None]
        found = random_order(noise, Step(run.plan.grid), device=self.device) if order is None else order
        run.order = found.to(self.device)
        return run

    def loop(self, run: Run, guidance: Guidance, used: MARSettings, hooks: Sequence[Hook],
             soft: Callable[..., Tensor] | None) -> Iterator[Run]:
        head = self.head
        if isinstance(head, DiffusionMLPHead):
            head = DiffusionSampling(head, cosine_chain(used.solver_steps), used.temperature, used.clip)
        model = Denoising(self.generator, head)
        return sample_steps(model, run, guidance, self.filters(used), hooks, soft)

    def tokens_of(self, run: Run) -> list[Tensor]:
        """The whole map's tokens, (B, L, C), in raster order; cells that are not drawn yet are 0."""
        return [run.canvas.value.flatten(2).transpose(1, 2)]

    # Editing

    @torch.no_grad()
    def edit(self, pictures: Tensor, redraw: Tensor, labels: Sequence[Label] | Label = None, *, seed: int = 0,
             seeds: Sequence[int] | None = None, purpose: str = "pictures", output: OutputKind = "pil",
             progress: bool | None = None, schedule: Schedule | None = None, hooks: Sequence[Hook] = (),
             **settings: Any) -> Generation:
        """Redraw a region: the tokens of untouched cells are known from the start, and those of the others are drawn
        in a random order, in no more iterations than there are. Arguments as ``ClassConditionalSystem.edit`` has them.
        """
        check_output(output)
        self.check_edit(pictures, redraw, schedule)
        rows, used, began = self.label_rows(labels, len(pictures)), self.settings_for(purpose, settings), _now()
        all_seeds, given = picture_seeds(len(rows), seed, seeds), self.encode(pictures)
        known = [editing.latent_mask(redraw.to(self.device), step.grid).flatten(1) > 0.5 for step in self.plan]
        counts = [tuple(one) for one in torch.stack([k.sum(1) for k in known], 1).tolist()]
        drawn = [tokens.clone() for tokens in given]
        for same in sorted(set(counts)):  # pictures with as many known cells share their steps
            here = [i for i, found in enumerate(counts) if found == same]
            noise = Keyed.from_seeds([all_seeds[i] for i in here], self.device)
            found = self.redrawn(rows[here], [t[here] for t in given], [k[here] for k in known], noise, used, hooks)
            for tokens, new in zip(drawn, found, strict=True):
                tokens[here] = new
        return Generation(convert(self.decode(drawn), output), drawn, None, all_seeds,
                          [self.label_names(row) for row in rows], used, _now() - began)

    def enlarge(self, pictures: Tensor, labels: Sequence[Label] | Label = None, *, scales: int | None = None,
                hooks: Sequence[Hook] = (), **options: Any) -> Generation:
        """Raises InputError: no step takes a small picture's tokens for the ones behind it to refine."""
        raise InputError(f"{type(self).__name__} can't enlarge: it has no scales to give; resize the picture and "
                         "`edit` it")

    def redrawn(self, labels_Bn: Tensor, given: Sequence[Tensor], known: Sequence[Tensor], noise: Noise,
                used: MARSettings, hooks: Sequence[Hook] = ()) -> list[Tensor]:
        """Tokens of every scale, those that aren't known (B, L) drawn anew; as many are known in every picture."""
        (tokens,), (known_BL,), grid = given, known, self.plan.grid
        count, length = int(known_BL[0].sum()), known_BL.shape[1]
        if count == length:
            return [tokens]
        steps = Plan(given_step(grid, count) + unmasking(grid, length - count, used.iterations, used.unmasking))
        guidance = self.guidance(used)
        order = known_first(drawing_order(used.order, noise, Step(grid), device=self.device), known_BL, grid)
        run = self.start(labels_Bn, guidance, noise, steps, order)
        if count:
            run.force(take(tokens, self.generator.raster(order[:, :count]), tokens))
        *_, last = self.sampled(run, guidance, used, hooks)
        return self.tokens_of(last)

    # Training

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, None]:
        """The denoising loss of masked tokens: the mean over all of them, the same as the map's (1,), and None.

        One share of all tokens is masked in every picture of a batch (``masked_share``), at random places of its own.
        step_weights of a single step change nothing.
        """
        self.check_smoothing(label_smoothing)
        (target_BLC,) = tokens
        masked = math.ceil(target_BLC.shape[1] * masked_share(self.config.generator.least_masked))
        order_BL = rand_pictures(*target_BLC.shape[:2], device=target_BLC.device).argsort(1)
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        loss = self.masked_loss(target_BLC, order_BL, masked, cond)
        return loss, loss.detach()[None], None

    def masked_loss(self, target_BLC: Tensor, order_BL: Tensor, masked: int, cond_BD: Tensor) -> Tensor:
        """The mean loss of the last ``masked`` cells in orders of raster numbers, given the others."""
        target = target_BLC.gather(1, order_BL[..., None].expand_as(target_BLC))
        known = target.shape[1] - masked
        hidden = self.hidden(target[:, :known], order_BL, cond_BD)[:, known:]
        return self.head.loss(hidden, target[:, known:]).mean()

    def hidden(self, known_BnC: Tensor, order_BL: Tensor, cond_BD: Tensor) -> Tensor:
        """Hidden states (B, L, D) of all cells in orders of raster numbers, given the first n tokens."""
        cells = made_once(order_BL.device, grid_cells, Step(self.generator.grid))[order_BL]
        call = self.generator.call_of(known_BnC, cells, cond_BD, 0, slice(known_BnC.shape[1], order_BL.shape[1]))
        hidden: Tensor = self.generator(call, Context())
        return hidden

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        return KL_NAMES, [*TRANSFORMER_NAMES, *head_names("diffloss", "head")]

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The published rows of classes and of no class are one table here."""
        return super().published_tensors(part, tensors) if part == "tokenizer" else joined_classes(tensors)


class Denoising:
    """A body, and a head that samples by a chain, as the loop takes them."""

    def __init__(self, generator: nn.Module, head: Any):
        self.generator, self.head = generator, head


def given_step(grid: tuple[int, int], count: int) -> tuple[Step, ...]:
    """The step of cells that are given, none where there are none."""
    return (Step(grid, count=count),) if count else ()


def unmasking(grid: tuple[int, int], cells: int, iterations: int, schedule: Unmasking = "cosine",
              order: Order = "random") -> tuple[Step, ...]:
    """Steps that draw some cells of a grid by a schedule, in at most as many iterations; where the order is the
    raster's, which must be that of all cells, the steps have their places."""
    counts = unmasked_counts(cells, min(iterations, cells), schedule)
    if order == "random":
        return tuple(Step(grid, count=count) for count in counts)
    places = iter(range(cells))
    return tuple(Step(grid, places=tuple(islice(places, count))) for count in counts)


def in_raster_order(plan: Plan) -> bool:
    """Whether a plan of ``unmasking`` says which cells its steps draw."""
    return plan.steps[0].places is not None


def known_first(order_BL3: Tensor, known_BL: Tensor, grid: tuple[int, int]) -> Tensor:
    """An order (B|1, L, 3) with the known cells (B, L), in raster order, moved to its front; the others stay in
    theirs."""
    order_BL3 = order_BL3.expand(len(known_BL), -1, -1)
    place_BL = order_BL3[..., 1] * grid[1] + order_BL3[..., 2]
    turn = (~known_BL.gather(1, place_BL)).long().argsort(dim=1, stable=True)
    return order_BL3.gather(1, turn[..., None].expand_as(order_BL3))


def masked_share(least: float, uniform: float | None = None) -> float:
    """The share of tokens that a batch masks: normal of mean 1 and deviation 0.25, cut to least..1 (MAR's section 3.4).

    1 + 0.25 F^-1(F(a) + u (F(0) - F(a))), a = (least - 1) / 0.25, F the normal distribution function; u in [0, 1) is
    drawn with torch's generator where it isn't given.
    """
    u = float(torch.rand(())) if uniform is None else uniform
    low = 0.5 * (1 + math.erf((least - 1) / 0.25 / math.sqrt(2)))
    share = torch.tensor(low + u * (0.5 - low), dtype=torch.float64)
    return min(1.0, max(least, 1 + 0.25 * math.sqrt(2) * float(torch.erfinv(2 * share - 1))))


# Published weights: files ``checkpoint-last.pth``, whose averaged weights lie under ``model_ema``

_BLOCK = (("norm1", "attention_norm"), (r"attn\.qkv", "attention.qkv"), (r"attn\.proj", "attention.projection"),
          ("norm2", "mlp_norm"), (r"mlp\.fc1", "mlp.expand"), (r"mlp\.fc2", "mlp.contract"))
_END = r"\.(weight|bias)"

TRANSFORMER_NAMES: tuple[tuple[str, str | None], ...] = (
    ("classes", "labels.tables.0.weight"),
    (rf"z_proj{_END}", r"generator.word.\1"), (rf"z_proj_ln{_END}", r"generator.word_norm.\1"),
    (r"(encoder|decoder)_pos_embed_learned", r"generator.\1_position"),
    (r"diffusion_pos_embed_learned", "generator.output_position"), (r"mask_token", "generator.masked"),
    (rf"decoder_embed{_END}", r"generator.between.\1"), (rf"(encoder|decoder)_norm{_END}", r"generator.\1_norm.\2"),
    *((rf"(encoder|decoder)_blocks\.(\d+)\.{theirs}{_END}", rf"generator.\1.\2.{ours}.\3") for theirs, ours in _BLOCK))


def head_names(theirs: str, ours: str) -> list[tuple[str, str | None]]:
    """The names of a published denoising network and of ours."""
    parts = ((r"time_embed\.mlp\.0", "time.expand"), (r"time_embed\.mlp\.2", "time.mix"), ("cond_embed", "condition"),
             ("input_proj", "network.input"), (r"final_layer\.linear", "network.output"),
             (r"final_layer\.adaLN_modulation\.1", "network.modulation"))
    blocks = (("in_ln", "norm"), (r"mlp\.0", "expand"), (r"mlp\.2", "contract"),
              (r"adaLN_modulation\.1", "modulation"))
    return [*((rf"{theirs}\.net\.{name}{_END}", rf"{ours}.{our}.\1") for name, our in parts),
            *((rf"{theirs}\.net\.res_blocks\.(\d+)\.{name}{_END}", rf"{ours}.network.blocks.\1.{our}.\2")
              for name, our in blocks)]


def joined_classes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors with one table ``classes`` of all classes and, in its last row, none."""
    joined = dict(tensors)
    parts = [joined.pop(name, None) for name in ("class_emb.weight", "fake_latent")]
    if parts[0] is not None and parts[1] is not None:
        joined["classes"] = torch.cat([parts[0], parts[1]])
    return joined


# Published sizes

SIZES = {"mar-base": ((768, 12, 12, 12), (1024, 6), 2.9), "mar-large": ((1024, 16, 16, 16), (1280, 8), 3.0),
         "mar-huge": ((1280, 20, 20, 16), (1536, 12), 3.2)}
"""Width, depths of encoder and decoder, heads; width and depth of the head's network; guidance."""

SMALL_TOKENIZER = TokenizerConfig(AutoencoderConfig(32, (1, 2, 4, 6), 1, 2, 16, 32, "encoder", latent_kernel=1),
                                  ((8, 8),), kind="kl")
"""For pictures of 64 pixels, as the recipe own-64-kl-tokenizer trains it."""


def preset_config(name: str) -> MARConfig:
    """The configuration of a published size, mar-base, mar-large or mar-huge (256 px), or of a small one of this
    project: mar-64px, 5 million parameters over 8x8 tokens."""
    if name == "mar-64px":
        network = MARGeneratorConfig(192, 4, 4, 6, buffer=16, head_width=256, head_depth=3, dropout=0.0)
        return MARConfig(SMALL_TOKENIZER, network, settings=_settings(2.0, CLIP))
    if name not in SIZES:
        raise InputError(f"unknown MAR size {name!r}{did_you_mean(name, [*SIZES, 'mar-64px'])}")
    sizes, head, guidance = SIZES[name]
    return MARConfig(generator=MARGeneratorConfig(*sizes, head_width=head[0], head_depth=head[1]),
                     settings=_settings(guidance))


CLIP = 4.0
"""The bound of clean values for small models."""


def _settings(guidance: float, clip: float = 0.0) -> dict[str, MARSettings]:
    return {"pictures": MARSettings(guidance, clip=clip), "fid": MARSettings(guidance, iterations=256, clip=clip)}


def published_config(vae: Mapping[str, Any], mar: Mapping[str, Any]) -> MARConfig:
    """The configuration that the published constructors' keyword arguments mean.

    Raises InputError on values that no published checkpoint has and that this library does not build.
    """
    for key, only in (("patch_size", 1), ("decoder_embed_dim", mar.get("encoder_embed_dim", 1024)),
                      ("decoder_num_heads", mar.get("encoder_num_heads", 16)), ("vae_stride", 16),
                      ("proj_dropout", mar.get("attn_dropout", 0.1))):
        if mar.get(key, only) != only:
            raise InputError(f"{key}={mar[key]} is not built here; published weights have {only}")
    side = mar.get("img_size", 256) // 16
    network = MARGeneratorConfig(
        mar.get("encoder_embed_dim", 1024), mar.get("encoder_depth", 16), mar.get("decoder_depth", 16),
        mar.get("encoder_num_heads", 16), mar.get("mlp_ratio", 4.0), mar.get("buffer_size", 64),
        mar.get("diffloss_w", 1024), mar.get("diffloss_d", 3), mar.get("diffusion_batch_mul", 4),
        mar.get("attn_dropout", 0.1), mar.get("mask_ratio_min", 0.7))
    tokenizer = kl_config(vae.get("ch", 128), mar.get("vae_embed_dim", 16), tuple(vae.get("ch_mult", (1, 1, 2, 2, 4))),
                          ((side, side),))
    return MARConfig(tokenizer, network, (mar.get("class_num", 1000),))
