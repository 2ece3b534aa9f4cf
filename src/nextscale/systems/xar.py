"""xAR: next-X prediction over noisy entities (Ren et al., arXiv 2502.20388).

A map is cut into an ordered list of entities X_1 .. X_N: single positions, cells, subsamples, whole scales, or the
whole picture. One transformer is both the autoregressive model and the flow network: it sees X_1 .. X_n at flow times
t_1 .. t_n and gives the velocity of X_n. In training every time is drawn by itself, so no prediction rests on a clean
context; when pictures are drawn, entities before the one under way stand at t = 0. With one entity it is an ordinary
flow model.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nextscale.conditions.class_label import ClassTable
from nextscale.context import Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.xar import XARGenerator, XARGeneratorConfig
from nextscale.heads.solver import Solve
from nextscale.heads.velocity import VelocityHead
from nextscale.hub import NameMap
from nextscale.layers.linear import initialise_products
from nextscale.objectives.noisy_context import noisy_context_loss
from nextscale.plan import Plan, entities
from nextscale.run import Run
from nextscale.sampling.flow import euler, euler_maruyama, stochastic_times, uniform_times
from nextscale.sampling.generation import Generation
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.class_conditional import Label
from nextscale.systems.continuous import ContinuousConfig, ContinuousSettings, ContinuousSystem
from nextscale.systems.flowar import published_tokenizer
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import KL_NAMES
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class XARSettings(ContinuousSettings):
    """Settings with xAR's own; the ``ramp`` of guidance over entities is the published one.

    solver: ``euler-maruyama``, the stochastic equation, whose noise ``temperature`` multiplies, or ``euler``;
    solver_steps: network evaluations an entity.
    """

    solver: Literal["euler-maruyama", "euler"] = "euler-maruyama"
    solver_steps: int = 50


@dataclass(frozen=True)
class XARConfig(ContinuousConfig):
    """xAR's configuration; the defaults are those of 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "xar"

    generator: XARGeneratorConfig = field(default_factory=XARGeneratorConfig)
    settings: dict[str, XARSettings] = field(default_factory=lambda: {
        purpose: XARSettings(2.7, solver_steps=40) for purpose in ("pictures", "fid")})


class XAR(ContinuousSystem):
    """The system, see ``ContinuousSystem``."""

    config_type = XARConfig
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.gate", "mlp.expand", "mlp.contract")

    def __init__(self, config: XARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        self.entities = entities(config.generator.entity, config.tokenizer.grids, config.generator.size)
        latent_width = config.tokenizer.autoencoder.latent_width
        self.generator = XARGenerator(config.generator, self.plan, latent_width)
        self.head = VelocityHead(config.generator.width, latent_width)
        self.labels = ClassTable(config.classes, config.generator.width)

    @property
    def plan(self) -> Plan:
        """The entities; rows see all earlier ones and their own."""
        return self.entities

    def initialise(self, gate: float = 1e-3) -> XAR:
        """The published initialisation, which has no gates of its own."""
        self.generator.initialise()
        initialise_products(self.head)
        for table in self.labels.parameters():
            nn.init.normal_(table, std=0.02)
        return self

    # Sampling

    def solver(self, used: XARSettings) -> Solve:
        """The solver of the settings. Raises InputError where they don't fit each other."""
        if used.solver == "euler":
            if used.temperature != 1:
                raise InputError("temperature: Euler's method adds no noise that it could change; leave it at 1, or "
                                 "use solver 'euler-maruyama'")
            times = uniform_times(used.solver_steps)
            return lambda field, x, noise: euler(field, x, times)
        if used.solver != "euler-maruyama":
            raise InputError(f"solver {used.solver!r} is unknown; use euler-maruyama or euler")
        times = stochastic_times(used.solver_steps)
        return lambda field, x, noise: euler_maruyama(field, x, times, lambda i: used.temperature * noise(i))

    def loop(self, run: Run, guidance: Guidance, used: XARSettings, hooks: Sequence[Hook], soft: Any) -> Iterator[Run]:
        head = self.head.solved(self.solver(used))
        return sample_steps(SimpleNamespace(generator=self.generator, head=head), run, guidance, hooks=hooks)

    # Editing

    def enlarge(self, pictures: Tensor, labels: Sequence[Label] | Label = None, *, scales: int | None = None,
                hooks: Sequence[Hook] = (), **options: Any) -> Generation:
        """As ``ClassConditionalSystem.enlarge``. Raises InputError where entities are no scales."""
        if self.config.generator.entity != "scale":
            raise InputError(f"xAR over entities {self.config.generator.entity!r} can't enlarge: it has no scales to "
                             "give; resize the picture and `edit` it")
        return super().enlarge(pictures, labels, scales=scales, hooks=hooks, **options)

    # Training

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, None]:
        """The flow loss under noisy (or ``generator.context="clean"``) context, the mean over positions, and its mean
        over every entity (K,).

        tokens: of every entity, (B, L_k, C); of the first ones only, to train these. Times and noise are drawn with
        torch's generator.
        """
        self.check_smoothing(label_smoothing)
        plan = replace(self.plan, steps=self.plan.steps[:len(tokens)])
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        loss, by_step_K = noisy_context_loss(self.generator, self.head, plan, tokens, cond, step_weights,
                                              clean=self.config.generator.context == "clean")
        return loss, by_step_K, None

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        from nextscale.systems.flowar_published import STACK_NAMES

        return KL_NAMES, [*STACK_NAMES, (r"time_embed\.mlp\.0\.(weight|bias)", r"generator.time.expand.\1"),
                          (r"time_embed\.mlp\.2\.(weight|bias)", r"generator.time.mix.\1"),
                          (r"pred\.(weight|bias)", r"head.\1")]


# Published sizes

def _size(depth: int, width: int, heads: int, guidance: float, steps: int) -> XARConfig:
    settings = XARSettings(guidance, solver_steps=steps)
    return XARConfig(generator=XARGeneratorConfig((depth, depth), width, heads, dropout=0.1),
                     settings={"pictures": settings, "fid": settings})


SIZES = {
    "xar-base": _size(8, 768, 12, 2.7, 40),
    "xar-large": _size(16, 1024, 16, 2.3, 50),
    "xar-huge": _size(20, 1280, 16, 2.2, 50),
    "xar-64px": XARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 2, 4, 6), 1, 2, 16, 32, "encoder", latent_kernel=1),
                        ((1, 1), (2, 2), (4, 4), (8, 8)), kind="kl"),
        XARGeneratorConfig((4, 4), 192, 6, size=4)),
}


def preset_config(name: str) -> XARConfig:
    """The configuration of a published size for 256 pixels, xar-base, xar-large or xar-huge, or of a small one of this
    project, xar-64px, which trains on a processor."""
    if name not in SIZES:
        raise InputError(f"unknown xAR size {name!r}{did_you_mean(name, SIZES)}")
    return SIZES[name]


def published_config(vae: dict[str, Any], xar: dict[str, Any]) -> XARConfig:
    """The configuration that the published constructors' keyword arguments mean (``AutoencoderKL(...)``, ``xAR(...)``).
    Raises InputError on values that no published checkpoint has and that are not built here."""
    width, heads = xar.get("encoder_embed_dim", 1024), xar.get("encoder_num_heads", 16)
    if (xar.get("decoder_embed_dim", width), xar.get("decoder_num_heads", heads)) != (width, heads):
        raise InputError("encoder and decoder of different widths or heads are not built here; published ones agree")
    if xar.get("clusters", 4) != 4:
        raise InputError(f"clusters={xar['clusters']} is not built here; published weights have 4")
    network = XARGeneratorConfig((xar.get("encoder_depth", 16), xar.get("decoder_depth", 16)), width, heads,
                                 xar.get("mlp_ratio", 4.0), xar.get("attn_dropout", 0.0))
    return XARConfig(published_tokenizer(vae, (16,)), network, (xar.get("class_num", 1000),))
