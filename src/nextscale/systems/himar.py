"""Hi-MAR: hierarchical masked autoregressive models with low-resolution token pivots (Zheng et al., arXiv 2505.20288).

MAR in two phases under one set of weights. Phase 0 draws the tokens of a coarse map, the latent of the picture at half
its size, as MAR does. Phase 1 draws the fine map in a few steps, conditioned on pivots: not on the coarse tokens, but
on the hidden states that they were drawn from, so that training and sampling see the same. Its head is a diffusion
transformer over the whole map, which draws all masked cells at every step; those that stay masked are drawn again.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextscale.conditions.class_label import ClassTable
from nextscale.context import Context, Hook
from nextscale.devices import made_once
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.himar import HiMARGenerator, HiMARGeneratorConfig
from nextscale.generators.mar import take
from nextscale.heads.categorical import Evaluate, Filter
from nextscale.heads.diffusion_mlp import DiffusionMLPHead
from nextscale.heads.joint_diffusion import JointDiffusionHead
from nextscale.hub import NameMap
from nextscale.layers.diffusion import cosine_chain
from nextscale.noise import Noise
from nextscale.parallel import rand_pictures, randn_pictures
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import Call, Run, Sample
from nextscale.sampling.diffusion import DiffusionSampling, JointDiffusionSampling
from nextscale.sampling.guidance import Guidance, Stepwise, Unguided
from nextscale.sampling.orders import Order, Unmasking, drawing_order, masked_after
from nextscale.sampling.steps import sample_steps
from nextscale.systems.class_conditional import Schedule
from nextscale.systems.continuous import ContinuousConfig, ContinuousSettings, at_least_0, one_of
from nextscale.systems.mar import (
    CLIP,
    MAR,
    SMALL_TOKENIZER,
    TRANSFORMER_NAMES,
    Denoising,
    given_step,
    head_names,
    in_raster_order,
    known_first,
    masked_share,
    unmasking,
)
from nextscale.tokenizers import gaussian
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import KL_NAMES, kl_config
from nextscale.tokenizers.tokenizer import Tokenizer


def two_maps(config: TokenizerConfig) -> TokenizerConfig:
    """A continuous tokenizer's configuration with its last grid, one of half its sides, and latents of the picture at
    both sizes. Raises InputError where the last grid's sides are odd."""
    h, w = config.grids[-1]
    if h % 2 or w % 2:
        raise InputError(f"Hi-MAR needs a map of even sides, half of which its coarse map has; this one is {h}x{w}")
    return replace(config, grids=((h // 2, w // 2), (h, w)), coarse="picture")


@dataclass(frozen=True)
class HiMARSettings(ContinuousSettings):
    """Guidance on the schedule ``linear`` or ``constant`` of each phase's own tokens, temperature, and

    coarse_guidance_scale: guidance of phase 0; coarse_iterations, iterations: steps of the phases;
    coarse_solver_steps, solver_steps: of the two heads' chains; clip, unmasking, order: as MAR has them, of both
    phases.
    """

    guidance_schedule: str = "linear"
    coarse_guidance_scale: float = 1.0
    coarse_iterations: int = 32
    iterations: int = 4
    coarse_solver_steps: int = 100
    solver_steps: int = 250
    clip: float = 0.0
    unmasking: Unmasking = "cosine"
    order: Order = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_0("clip", self.clip)
        one_of("unmasking", self.unmasking, Unmasking)
        one_of("order", self.order, Order)


@dataclass(frozen=True)
class HiMARConfig(ContinuousConfig):
    """Hi-MAR's configuration; the defaults are those of Hi-MAR-B for 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "himar"

    tokenizer: TokenizerConfig = field(default_factory=lambda: two_maps(kl_config()))
    generator: HiMARGeneratorConfig = field(default_factory=HiMARGeneratorConfig)
    settings: dict[str, HiMARSettings] = field(default_factory=lambda: {
        purpose: HiMARSettings(2.5, coarse_guidance_scale=2.7) for purpose in ("pictures", "fid")})


class PhaseHeads(nn.Module):
    """The heads of the two phases."""

    def __init__(self, config: HiMARGeneratorConfig, grid: tuple[int, int], token_width: int):
        super().__init__()
        self.coarse = DiffusionMLPHead(config.width, token_width, config.head_width, config.head_depth,
                                       config.head_draws)
        self.joint = JointDiffusionHead(grid, config.width, token_width, config.joint_width, config.joint_depth,
                                        config.joint_heads, config.joint_mlp_ratio, config.head_draws)

    def initialise(self) -> None:
        """The published start of both."""
        self.coarse.initialise()
        self.joint.initialise()


class HiMAR(MAR):
    """The system, see ``ClassConditionalSystem`` and ``ContinuousSystem``."""

    config_type = HiMARConfig  # type: ignore[assignment]

    def __init__(self, config: HiMARConfig):
        nn.Module.__init__(self)
        if config.tokenizer.coarse != "picture" or len(config.tokenizer.grids) != 2:
            raise InputError("Hi-MAR needs a tokenizer of two grids whose coarse one is of the picture itself "
                             f"(coarse 'picture'); this one has {len(config.tokenizer.grids)} grids and coarse "
                             f"{config.tokenizer.coarse!r}")
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer)
        latent_width, network = config.tokenizer.autoencoder.latent_width, config.generator
        self.generator = HiMARGenerator(network, *config.tokenizer.grids, latent_width)
        self.head = PhaseHeads(network, config.tokenizer.grids[-1], latent_width)
        self.labels = ClassTable(config.classes, network.width)

    @classmethod
    def fitted(cls, tokenizer: Tokenizer) -> Tokenizer:
        """The same weights for two maps."""
        fitted = Tokenizer(two_maps(tokenizer.config))
        fitted.load_state_dict(tokenizer.state_dict())
        return fitted.eval()

    @property
    def plan(self) -> Plan:
        """The two maps, each at once: how pictures are encoded and trained on."""
        return self.tokenizer.plan

    # Pictures and tokens

    @torch.no_grad()
    def encode(self, pictures: Tensor, schedule: Schedule | None = None) -> list[Tensor]:
        """The means (B, L_k, C) of the picture at half its size and of the picture."""
        self.plan_of(schedule)
        moments = self.tokenizer.cached_moments(pictures.to(self.device))
        return self._split(self.tokenizer.quantiser.scaled(moments.chunk(2, -1)[0]))

    @torch.no_grad()
    def training_tokens(self, cached: Tensor, plan: Plan | None = None) -> list[Tensor]:
        noise = randn_pictures(*cached.shape[:2], cached.shape[2] // 2, device=cached.device)
        return self._split(self.tokenizer.quantiser.scaled(gaussian.draw(cached, noise, -1)), plan)

    def _split(self, latents_BLC: Tensor, plan: Plan | None = None) -> list[Tensor]:
        return list(latents_BLC.split([step.rows for step in plan or self.plan], 1))

    def tokens_of(self, run: Run) -> list[Tensor]:
        """The coarse tokens, then the fine map's where its phase has begun, in raster order."""
        small = self.generator.small
        coarse = [tokens for tokens, step in zip(run.tokens, run.plan, strict=False) if step.grid == small]
        drawn = torch.cat(coarse, 1)
        cells = run.order[:, :drawn.shape[1]]
        places = (cells[..., 1] * small[1] + cells[..., 2]).expand(len(drawn), -1)[..., None]
        map_BSC = drawn.new_zeros(len(drawn), self.generator.coarse, drawn.shape[-1])
        found = [map_BSC.scatter(1, places.expand_as(drawn), drawn)]
        return found if len(coarse) == len(run.tokens) else found + super().tokens_of(run)

    # Sampling

    def plan_for(self, used: HiMARSettings, schedule: Schedule | None = None) -> Plan:  # type: ignore[override]
        """Steps that draw the coarse cells, each once, then steps that draw all fine cells that are still masked."""
        self.plan_of(schedule)
        small, grid = self.generator.small, self.generator.grid
        return Plan(unmasking(small, self.generator.coarse, used.coarse_iterations, used.unmasking, used.order)
                    + refinement(grid, grid[0] * grid[1], used.iterations, used.unmasking))

    def guidance(self, used: HiMARSettings) -> Guidance:
        return self._guidance(used, self.plan_for(used))

    def _guidance(self, used: HiMARSettings, plan: Plan) -> Guidance:
        """A scale for every step: 1 + (scale - 1) of its phase times the share of its map that isn't masked behind it,
        never quite 1 (published code)."""
        if used.guidance_schedule not in ("linear", "constant"):
            raise InputError(f"guidance_schedule {used.guidance_schedule!r} is unknown here; use linear or constant")
        if used.guidance_scale == used.coarse_guidance_scale == 1:
            return Unguided()
        scales, coarse, cells = [], self.generator.coarse, self.generator.cells - self.generator.coarse
        for k, step in enumerate(plan):
            fine = step.grid == self.generator.grid
            left = (plan.steps[k + 1].rows if k + 1 < len(plan) else 0) if fine else coarse - plan.starts[k + 1]
            total, scale = (cells, used.guidance_scale) if fine else (coarse, used.coarse_guidance_scale)
            share = 1.0 if used.guidance_schedule == "constant" else (total - max(1, left)) / total
            scales.append(1 + (scale - 1) * share)
        return Stepwise(tuple(scales))

    def start(self, labels_Bn: Tensor, guidance: Guidance, noise: Noise, plan: Plan | None = None,
              order: Tensor | None = None) -> Run:
        """A run at its first step. order (B|1, S + L, 3): in which the coarse cells are drawn and the fine ones
        settled, else the raster's, where the plan draws by it, and every picture's own random one where it doesn't."""
        plan = plan or self.plan_for(self.config.settings["pictures"])
        if order is None:
            rule: Order = "raster" if in_raster_order(plan) else "random"
            order = torch.cat([drawing_order(rule, noise, Step(grid), phase, self.device) for phase, grid in
                               enumerate((self.generator.small, self.generator.grid))], 1)
        coarse, fine = order.split([self.generator.coarse, order.shape[1] - self.generator.coarse], 1)
        known = 0
        rows = [coarse]
        for step in plan:  # a fine step draws those that come last in the order: all that aren't settled
            if step.grid == self.generator.grid:
                given = not known and step.rows < fine.shape[1]
                rows.append(fine[:, :step.rows] if given else fine[:, fine.shape[1] - step.rows:])
                known = step.rows
        return super().start(labels_Bn, guidance, noise, plan, torch.cat(rows, 1))

    def loop(self, run: Run, guidance: Guidance, used: HiMARSettings, hooks: Sequence[Hook],  # type: ignore[override]
             soft: Callable[..., Tensor] | None) -> Iterator[Run]:
        heads = TwoPhases(self.generator,
                          DiffusionSampling(self.head.coarse, cosine_chain(used.coarse_solver_steps), used.temperature,
                                            used.clip),
                          JointDiffusionSampling(self.head.joint, cosine_chain(used.solver_steps), used.temperature,
                                                 used.clip))
        return sample_steps(Denoising(self.generator, heads), run, guidance, self.filters(used), hooks, soft)

    # Editing

    def redrawn(self, labels_Bn: Tensor, given: Sequence[Tensor], known: Sequence[Tensor], noise: Noise,
                used: HiMARSettings,  # type: ignore[override]
                hooks: Sequence[Hook] = ()) -> list[Tensor]:
        """Tokens of both maps, those that aren't known (B, L) drawn anew; as many are known in every picture."""
        counts, lengths = [int(k[0].sum()) for k in known], [k.shape[1] for k in known]
        if counts[1] == lengths[1]:
            return list(given)
        grids = (self.generator.small, self.generator.grid)
        orders = [known_first(drawing_order(used.order, noise, Step(grid), phase, self.device), k, grid)
                  for phase, (grid, k) in enumerate(zip(grids, known, strict=True))]
        steps = given_step(grids[0], counts[0])
        if counts[0] < lengths[0]:
            steps += unmasking(grids[0], lengths[0] - counts[0], used.coarse_iterations, used.unmasking)
        steps += given_step(grids[1], counts[1]) + refinement(grids[1], lengths[1] - counts[1], used.iterations,
                                                              used.unmasking)
        plan = Plan(steps)
        guidance = self._guidance(used, plan)
        run = self.start(labels_Bn, guidance, noise, plan, torch.cat(orders, 1))
        at = [0] if counts[0] else []
        at += [steps.index(Step(grids[1], count=counts[1]))] if counts[1] else []
        for _ in self._given(run, at, given, guidance, used, hooks):
            pass
        return self.tokens_of(run)

    def _given(self, run: Run, at: Sequence[int], given: Sequence[Tensor], guidance: Guidance,
               used: HiMARSettings, hooks: Sequence[Hook] = ()) -> Iterator[Run]:
        """A run through its loop, in which the steps ``at`` are given."""
        while not run.done:
            if run.cursor in at:
                step = run.plan.steps[run.cursor]
                cells = run.order[:, run.plan.span(run.cursor, run.cursor + 1)]
                tokens = given[0 if step.grid == self.generator.small else 1]
                run.force(take(tokens, cells[..., 1] * step.grid[1] + cells[..., 2], tokens))
            else:
                yield next(self.sampled(run, guidance, used, hooks))

    # Training

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, None]:
        """Both phases' losses, which each picture goes through: 2 s L_0 + 0.75 (1 - s) L_1, s the coarse cells' share
        of all; both by themselves (2,), and None.

        L_0 is MAR's. L_1 is the squared error at masked fine cells, the mean over all cells (published code). Pivots
        stand where phase 0 had to predict; a share of pictures, which falls as ``progress`` rises, has none at all.
        """
        self.check_smoothing(label_smoothing)
        if len(tokens) != 2:
            raise InputError("Hi-MAR trains both maps together; leave the prefix out")
        (coarse_BSC, fine_BLC), network = tokens, self.config.generator
        b, device = len(labels_Bn), labels_Bn.device
        masked = [math.ceil(coarse_BSC.shape[1] * masked_share(network.least_masked)),
                  math.ceil(fine_BLC.shape[1] * math.cos(math.pi / 2 * float(torch.rand(()))))]
        orders = [rand_pictures(b, t.shape[1], device=device).argsort(1) for t in tokens]
        share = network.pivot_share * min(1.0, self.progress / network.pivot_warmup if network.pivot_warmup else 1.0)
        without_B = rand_pictures(b, device=device) <= 1 - share
        conds = [self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout)) for _ in range(2)]
        hidden = self.coarse_hidden(coarse_BSC, orders[0], masked[0], conds[0])
        predicted = orders[0][:, coarse_BSC.shape[1] - masked[0]:]
        target = take(coarse_BSC, predicted, coarse_BSC)
        loss_0 = self.head.coarse.loss(take(hidden, predicted, hidden), target).mean()
        pivots = self.pivots(hidden.detach(), predicted, without_B)
        hidden = self.fine_hidden(fine_BLC, orders[1], masked[1], conds[1], pivots)
        squared_BL = self.head.joint.loss(hidden, fine_BLC)
        loss_1 = take(squared_BL[..., None], orders[1][:, fine_BLC.shape[1] - masked[1]:], hidden).sum() \
            / squared_BL.numel()
        weights = step_weights or (1.0, 1.0)
        part = coarse_BSC.shape[1] / self.generator.cells
        loss = weights[0] * part * 2 * loss_0 + weights[1] * (1 - part) * 0.75 * loss_1
        return loss, torch.stack([loss_0, loss_1]).detach(), None

    def coarse_hidden(self, target_BSC: Tensor, order_BS: Tensor, masked: int, cond_BD: Tensor) -> Tensor:
        """Phase 0's hidden states (B, S, D) in raster order, the last ``masked`` cells of the orders masked."""
        known = order_BS[:, :order_BS.shape[1] - masked]
        cells = made_once(order_BS.device, grid_cells, Step(self.generator.small))[order_BS]
        call = self.generator.coarse_call(take(target_BSC, known, target_BSC), cells, cond_BD, 0,
                                          slice(known.shape[1], order_BS.shape[1]))
        hidden = self.generator(call, Context())[:, :order_BS.shape[1]]
        return torch.zeros_like(hidden).scatter(1, order_BS[..., None].expand_as(hidden), hidden)

    def pivots(self, hidden_BSD: Tensor, predicted_BN: Tensor, without_B: Tensor) -> Tensor:
        """Embedded pivots (B, S, C) of the cells that phase 0 predicted; learned tokens in the place of the others, and
        of all in pictures without."""
        learned = self.generator.learned_pivots(len(hidden_BSD))
        stands = torch.zeros(hidden_BSD.shape[:2], dtype=torch.bool, device=hidden_BSD.device)
        stands = stands.scatter(1, predicted_BN, True) & ~without_B[:, None]
        return torch.where(stands[..., None], self.generator.pivot(hidden_BSD), learned)

    def fine_hidden(self, target_BLC: Tensor, order_BL: Tensor, masked: int, cond_BD: Tensor,
                    pivots_BSC: Tensor) -> Tensor:
        """Phase 1's hidden states (B, L, D) in raster order, the last ``masked`` cells of the orders masked."""
        known = order_BL[:, :order_BL.shape[1] - masked]
        cells = made_once(order_BL.device, grid_cells, Step(self.generator.grid))[order_BL]
        call = self.generator.fine_call(pivots_BSC, take(target_BLC, known, target_BLC), cells, cond_BD, 1)
        hidden = self.generator(call, Context())[:, self.generator.coarse:]
        return torch.zeros_like(hidden).scatter(1, order_BL[..., None].expand_as(hidden), hidden)

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        return KL_NAMES, [*TRANSFORMER_NAMES, *OWN_NAMES, *head_names("diffloss", "head.coarse")]

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As for MAR; convolutions of one cell are linear layers here."""
        found = super().published_tensors(part, tensors)
        if part == "tokenizer":
            return found
        return {name: tensor.flatten(1) if name.endswith("_embedder.proj.weight") else tensor
                for name, tensor in found.items()}


class TwoPhases:
    """The heads of a run: of coarse steps, whose hidden states are kept as pivots, and of fine ones."""

    def __init__(self, generator: HiMARGenerator, coarse: Any, fine: Any):
        self.generator, self.coarse, self.fine = generator, coarse, fine

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Any, filters: Sequence[Filter] = (),
               soft: Any = None) -> Sample:
        if run.plan.steps[run.cursor].grid == self.generator.grid:
            return self.fine.sample(evaluate, call, run, guidance, filters)

        def keeping(call: Call) -> Tensor:
            hidden = evaluate(call)
            self.generator.keep_pivots(run, hidden[:, call.predicts])
            return hidden

        return self.coarse.sample(keeping, call, run, guidance, filters)


def refinement(grid: tuple[int, int], cells: int, iterations: int, schedule: Unmasking = "cosine") -> tuple[Step, ...]:
    """Steps that each draw all cells that are still masked by a schedule, in at most as many iterations."""
    left = [cells, *masked_after(cells, min(iterations, cells), schedule)]
    return tuple(Step(grid, count=count) for count in left[:-1])


# Published weights: files ``Hi-MAR-B/checkpoint-last.pth`` and so on of ``HiDream-ai/Hi-MAR``, key ``model_ema``

_JOINT = ((r"t_embedder\.mlp\.0", "time.expand"), (r"t_embedder\.mlp\.2", "time.mix"),
          (r"x_embedder\.proj", "network.input"), (r"c_embedder\.proj", "condition"),
          (r"final_layer\.linear", "network.output"), (r"final_layer\.adaLN_modulation\.1", "network.modulation"))
_JOINT_BLOCK = ((r"attn\.qkv", "qkv"), (r"attn\.proj", "projection"), (r"mlp\.fc1", "mlp.expand"),
                (r"mlp\.fc2", "mlp.contract"), (r"adaLN_modulation\.1", "modulation"))
_END = r"\.(weight|bias)"

OWN_NAMES: tuple[tuple[str, str | None], ...] = (
    (rf"cond_z_proj{_END}", r"generator.pivot.\1"), (rf"cond_proj{_END}", r"generator.coarse_word.\1"),
    (r"cond_tokens", "generator.coarse_tokens"),
    (r"(encoder|decoder)_task_emb\.weight", r"generator.\1_phase.weight"),
    (rf"(encoder|decoder)_blocks_ada\.1{_END}", r"generator.\1_modulation.\2"),
    (r"(encoder|decoder)_blocks\.(\d+)\.adaLN_(scale|shift)", r"generator.\1.\2.\3"),
    (r"cond_diffloss\.net\.(c_)?pos_embed", None),  # fixed waves, and zeros that nothing reads
    *((rf"cond_diffloss\.net\.{theirs}{_END}", rf"head.joint.{ours}.\1") for theirs, ours in _JOINT),
    *((rf"cond_diffloss\.net\.blocks\.(\d+)\.{theirs}{_END}", rf"head.joint.network.blocks.\1.{ours}.\2")
      for theirs, ours in _JOINT_BLOCK))


# Published sizes

SIZES = {"himar-base": ((768, 12, 12, 12), (1024, 6), (512, 6, 8), (2.5, 2.7, 4)),
         "himar-large": ((1024, 16, 16, 16), (1280, 8), (512, 8, 8), (3.5, 3.5, 4)),
         "himar-huge": ((1280, 20, 20, 16), (1536, 12), (768, 12, 12), (3.2, 5.5, 12))}
"""Width, depths of encoder and decoder, heads; width and depth of the single-token head; width, depth and heads of the
joint one; guidance of the fine and the coarse phase, iterations of the fine one."""


def preset_config(name: str) -> HiMARConfig:
    """The configuration of a published size, himar-base, himar-large or himar-huge (256 px), or of a small one of this
    project: himar-64px, 6.6 million parameters over 4x4 and 8x8 tokens."""
    if name == "himar-64px":
        network = HiMARGeneratorConfig(192, 4, 4, 6, buffer=16, head_width=256, head_depth=3, dropout=0.0,
                                       joint_width=128, joint_depth=3, joint_heads=4)
        return HiMARConfig(two_maps(SMALL_TOKENIZER), network, settings=_settings(2.0, 2.0, 4, 8, CLIP))
    if name not in SIZES:
        raise InputError(f"unknown Hi-MAR size {name!r}{did_you_mean(name, [*SIZES, 'himar-64px'])}")
    sizes, head, joint, sampling = SIZES[name]
    network = HiMARGeneratorConfig(*sizes, head_width=head[0], head_depth=head[1], joint_width=joint[0],
                                   joint_depth=joint[1], joint_heads=joint[2])
    return HiMARConfig(generator=network, settings=_settings(*sampling))


def _settings(guidance: float, coarse: float, iterations: int, coarse_iterations: int = 32,
              clip: float = 0.0) -> dict[str, HiMARSettings]:
    used = HiMARSettings(guidance, coarse_guidance_scale=coarse, iterations=iterations,
                         coarse_iterations=coarse_iterations, clip=clip)
    return {"pictures": used, "fid": used}


def published_config(vae: Mapping[str, Any], himar: Mapping[str, Any]) -> HiMARConfig:
    """The configuration that the published constructors' keyword arguments mean.

    Raises InputError on values that no published checkpoint has and that this library does not build.
    """
    side = himar.get("img_size", 256) // 16
    for key, only in (("patch_size", 1), ("decoder_embed_dim", himar.get("encoder_embed_dim", 1024)),
                      ("decoder_num_heads", himar.get("encoder_num_heads", 16)), ("vae_stride", 16), ("cos", True),
                      ("cond_dim", himar.get("vae_embed_dim", 16)), ("proj_dropout", himar.get("attn_dropout", 0.1))):
        if himar.get(key, only) != only:
            raise InputError(f"{key}={himar[key]} is not built here; published weights have {only}")
    network = HiMARGeneratorConfig(
        himar.get("encoder_embed_dim", 1024), himar.get("encoder_depth", 16), himar.get("decoder_depth", 16),
        himar.get("encoder_num_heads", 16), himar.get("mlp_ratio", 4.0), himar.get("buffer_size", 64),
        himar.get("diffloss_w", 1024), himar.get("diffloss_d", 3), himar.get("diffusion_batch_mul", 4),
        himar.get("attn_dropout", 0.1), himar.get("mask_ratio_min", 0.7), himar.get("gdm_w", 768),
        himar.get("gdm_d", 3), himar.get("head", 8), himar.get("ratio", 4), himar.get("step_stage2_rate", 0.5))
    small = himar.get("cond_scale", 4)
    tokenizer = kl_config(vae.get("ch", 128), himar.get("vae_embed_dim", 16),
                          tuple(vae.get("ch_mult", (1, 1, 2, 2, 4))), ((small, small), (side, side)))
    return HiMARConfig(replace(tokenizer, coarse="picture"), network, (himar.get("class_num", 1000),))
