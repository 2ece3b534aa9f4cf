"""SRDD: next-scale prediction as discrete diffusion (Kumar et al., arXiv 2509.22636).

A picture is degraded scale by scale to nothing, I_k = M(k) I_0, with no chance in it. The reverse chain is VAR under a
Markov view: scale k is predicted from the state alone, which is the picture so far,

    p(I_K | y) = prod_k p(I_k | I_(k-1), y),   ELBO = -sum_k KL(delta(I_k) || p(I_k | I_(k-1), y)) = -cross-entropy

so VAR's loss is the bound, and what samplers of diffusion do applies: guidance by schedules, drawing again as a
corrector, and replacing what is known at each level.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from nextscale.conditions.class_label import ClassTable
from nextscale.context import Hook
from nextscale.generators.srdd import SRDDGenerator, SRDDGeneratorConfig
from nextscale.generators.var import initialise
from nextscale.heads.categorical import CategoricalHead
from nextscale.heads.resampling import Resampling
from nextscale.plan import Plan, Visibility
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import Guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.class_conditional import ClassConditionalSystem, SystemConfig
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class SRDDSettings(Settings):
    """Settings with SRDD's own. resample: in how many rounds tokens are drawn again; resample_below: those that are
    less likely than this (1: all). See ``heads.resampling``."""

    resample: int = 0
    resample_below: float = 1.0


@dataclass(frozen=True)
class SRDDConfig(SystemConfig):
    """SRDD's configuration; sizes and sampling are VAR's, since the paper trains both alike."""

    slug: ClassVar[str] = "srdd"

    generator: SRDDGeneratorConfig = field(default_factory=SRDDGeneratorConfig)
    settings: dict[str, SRDDSettings] = field(default_factory=lambda: {
        "pictures": SRDDSettings(guidance_scale=5.0, top_k=900, top_p=0.95),
        "fid": SRDDSettings(guidance_scale=2.5, top_k=900, top_p=0.96)})


class SRDD(ClassConditionalSystem):
    """The system, see ``ClassConditionalSystem``; no weights are published."""

    config_type = SRDDConfig
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: SRDDConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = SRDDGenerator(config.generator, self.plan, config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    @property
    def plan(self) -> Plan:
        """The tokenizer's schedule; rows see their own step and the window's."""
        return replace(self.tokenizer.plan, visible=Visibility(self.config.generator.window))

    @property
    def markov(self) -> bool:
        return bool(self.config.generator.window == 0)

    def initialise(self, gate: float = 1e-3) -> SRDD:
        initialise(self.generator, self.head, self.labels, gate)
        return self

    def loop(self, run: Run, guidance: Guidance, used: SRDDSettings,
             hooks: Sequence[Hook], soft: Callable[..., Tensor] | None) -> Iterator[Run]:
        model = SimpleNamespace(generator=self.generator,
                                head=Resampling(self.head, used.resample, used.resample_below))
        return sample_steps(model, run, guidance, self.filters(used), hooks, soft)

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        return self.products_of_plan(pictures, plan)
