"""FlowAR: scale-wise autoregression meets flow matching (Ren et al., arXiv 2412.15205).

Next-scale prediction of continuous latents. Scale k's target s_k is the latent of any KL autoencoder, averaged down to
its grid; a transformer under VAR's visibility reads the scale before, enlarged to the full grid and averaged down, and
gives hidden states z_k; a flow network moves noise to s_k given z_k, all positions of a scale together:

    x_t = (1 - t) s_k + t e,  e ~ N(0, 1),  t ~ U(0, 1);   loss = sum_k p_k^2 / p_K^2 |v(x_t, t, z_k) - (e - s_k)|^2

The time never enters the transformer, so a scale's hidden states are computed once for all steps of its solver.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassTable
from nextscale.context import Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.flowar import FlowARGenerator, FlowARGeneratorConfig
from nextscale.heads.flow_transformer import FlowHeadConfig, FlowTransformerHead
from nextscale.heads.solver import Solve
from nextscale.hub import NameMap
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.run import Run
from nextscale.sampling.flow import euler, fine_end_times, uniform_times
from nextscale.sampling.guidance import Guidance, Unguided, WithinTimes
from nextscale.sampling.steps import sample_steps
from nextscale.systems.continuous import ContinuousConfig, ContinuousSettings, ContinuousSystem
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import KL_NAMES, kl_config
from nextscale.tokenizers.tokenizer import Tokenizer

SIDES = (1, 2, 4, 8, 16)
"""Published schedule for 256 pixels."""

TIMES = {"fine-end": fine_end_times, "uniform": uniform_times}


@dataclass(frozen=True)
class FlowARSettings(ContinuousSettings):
    """Settings with FlowAR's own; the ``ramp`` of guidance over scales is the published one.

    solver_steps: of Euler's method, a scale; times: their spacing, ``fine-end`` (coarse down to 0.3, fine from 0.25) or
    ``uniform``; guidance_until: the flow time, 1 for noise and 0 for the latent, from which on guidance acts.
    """

    solver_steps: int = 25
    times: Literal["fine-end", "uniform"] = "fine-end"
    guidance_until: float = 0.9


@dataclass(frozen=True)
class FlowARConfig(ContinuousConfig):
    """FlowAR's configuration; the defaults are those of 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "flowar"

    tokenizer: TokenizerConfig = field(default_factory=lambda: kl_config(grids=tuple((s, s) for s in SIDES)))
    generator: FlowARGeneratorConfig = field(default_factory=FlowARGeneratorConfig)
    settings: dict[str, FlowARSettings] = field(default_factory=lambda: {
        purpose: FlowARSettings(4.3) for purpose in ("pictures", "fid")})


class FlowAR(ContinuousSystem):
    """The system, see ``ContinuousSystem``."""

    config_type = FlowARConfig
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.gate", "mlp.expand", "mlp.contract")

    def __init__(self, config: FlowARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        latent_width = config.tokenizer.autoencoder.latent_width
        self.generator = FlowARGenerator(config.generator, self.plan, latent_width)
        self.head = FlowTransformerHead(config.generator.flow, self.plan, latent_width, config.generator.width)
        self.labels = ClassTable(config.classes, config.generator.width)

    def initialise(self, gate: float = 1e-3) -> FlowAR:
        """The published initialisation, with the flow's output left at zero; it has no gates of its own."""
        self.generator.initialise()
        self.head.initialise()
        for table in self.labels.parameters():
            nn.init.normal_(table, std=0.02)
        return self

    # Sampling

    def guidance(self, used: FlowARSettings) -> Guidance:
        if used.guidance_scale == 1:
            return Unguided()
        return WithinTimes(used.guidance_scale, used.guidance_schedule, high=used.guidance_until)

    def solver(self, used: FlowARSettings) -> Solve:
        """Euler's method under the settings. Raises InputError where they are not its own."""
        if used.times not in TIMES:
            raise InputError(f"times {used.times!r} are unknown{did_you_mean(used.times, TIMES)}")
        if used.temperature != 1:
            raise InputError("temperature: FlowAR's solver adds no noise that it could change; leave it at 1")
        times = TIMES[used.times](used.solver_steps)
        return lambda field, x, noise: euler(field, x, times)

    def loop(self, run: Run, guidance: Guidance, used: FlowARSettings, hooks: Sequence[Hook], soft: Any
             ) -> Iterator[Run]:
        head = self.head.solved(self.solver(used))
        return sample_steps(SimpleNamespace(generator=self.generator, head=head), run, guidance, hooks=hooks)

    # Training

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, None]:
        """The flow loss, sum_k w_k p_k^2 / p_K^2 of the means over scales, with w_k = 1 by default; these means (K,).

        tokens: of every scale, (B, L_k, C); of the first scales only, to train these. Times and noise are drawn with
        torch's generator.
        """
        self.check_smoothing(label_smoothing)
        plan = replace(self.plan, steps=self.plan.steps[:len(tokens)])
        with torch.no_grad():
            canvas = Canvas.empty(self.plan, self.tokenizer.quantiser, len(labels_Bn), labels_Bn.device)
            reads = pyramid.replay(list(tokens), canvas).reads
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        error_BL = self.head.loss(teacher_forced(self.generator, plan, reads, cond), torch.cat(list(tokens), 1))
        by_step_K = torch.stack([error_BL[:, s.lo:s.hi].mean() for s in plan.spans(0, len(plan))])
        weights = step_weights or (1.0,) * len(plan)
        shares = [w * step.rows / self.plan.steps[-1].rows for w, step in zip(weights, plan, strict=True)]
        return (by_step_K * by_step_K.new_tensor(shares)).sum(), by_step_K.detach(), None

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        from nextscale.systems.flowar_published import GENERATOR_NAMES

        return KL_NAMES, GENERATOR_NAMES


# Published sizes

def _size(depth: int, width: int, heads: int, flow: FlowHeadConfig, settings: FlowARSettings) -> FlowARConfig:
    network = FlowARGeneratorConfig((depth, depth), width, heads, dropout=0.1, flow=flow)
    return FlowARConfig(generator=network, settings={"pictures": settings, "fid": settings})


SIZES = {
    "flowar-small": _size(6, 768, 12, FlowHeadConfig(2, 1024, 16), FlowARSettings(4.3)),
    "flowar-large": _size(8, 1024, 16, FlowHeadConfig(12, 1024, 16, cross=True), FlowARSettings(2.4)),
    "flowar-huge": _size(15, 1536, 16, FlowHeadConfig(12, 1536, 24, cross=True),
                         FlowARSettings(2.4, solver_steps=50, times="uniform", guidance_until=0.7)),
    "flowar-64px": FlowARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 2, 4, 6), 1, 2, 16, 32, "encoder", latent_kernel=1),
                        tuple((s, s) for s in SIDES[:4]), kind="kl"),
        FlowARGeneratorConfig((3, 3), 192, 6, flow=FlowHeadConfig(2, 256, 4))),
}


def preset_config(name: str) -> FlowARConfig:
    """The configuration of a published size for 256 pixels, flowar-small, flowar-large or flowar-huge, or of a small
    one of this project, flowar-64px, which trains on a processor."""
    if name not in SIZES:
        raise InputError(f"unknown FlowAR size {name!r}{did_you_mean(name, SIZES)}")
    return SIZES[name]


def published_config(vae: dict[str, Any], flowar: dict[str, Any]) -> FlowARConfig:
    """The configuration that the published constructors' keyword arguments mean (``AutoencoderKL(...)``,
    ``FlowAR(...)``). Raises InputError on values that no published checkpoint has and that are not built here."""
    width, heads = flowar.get("encoder_embed_dim", 1024), flowar.get("encoder_num_heads", 16)
    if (flowar.get("decoder_embed_dim", width), flowar.get("decoder_num_heads", heads)) != (width, heads):
        raise InputError("encoder and decoder of different widths or heads are not built here; published ones agree")
    flow = FlowHeadConfig(flowar.get("diffloss_d", 3), flowar.get("diffloss_w", 1024),
                          flowar.get("diffloss_w", 1024) // 64, cross=flowar.get("cross", False))
    network = FlowARGeneratorConfig((flowar.get("encoder_depth", 16), flowar.get("decoder_depth", 16)), width, heads,
                                    flowar.get("mlp_ratio", 4.0), flowar.get("attn_dropout", 0.0), flow)
    return FlowARConfig(published_tokenizer(vae, tuple(flowar.get("scale", SIDES))), network,
                        (flowar.get("class_num", 1000),))


def published_tokenizer(vae: dict[str, Any], sides: Sequence[int]) -> TokenizerConfig:
    """The configuration of the published ``AutoencoderKL(...)`` with a schedule."""
    return kl_config(vae.get("ch", 128), vae.get("embed_dim", 16), tuple(vae.get("ch_mult", (1, 1, 2, 2, 4))),
                     tuple((side, side) for side in sides))
