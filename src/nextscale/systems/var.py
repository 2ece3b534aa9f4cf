"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al., arXiv 2404.02905).

A multi-scale VQ tokenizer turns a picture into K token maps, coarse to fine; a transformer predicts each map from all
coarser ones, every token of a map at once:

    p(r_1, ..., r_K) = prod_k p(r_k | r_1, ..., r_(k-1))

The input of scale k is the picture so far (the canvas), resized to that scale; a class steers through adaLN.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from nextscale.conditions.class_label import ClassTable
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.var import VARGenerator, VARGeneratorConfig, initialise
from nextscale.heads.categorical import CategoricalHead
from nextscale.hub import NameMap
from nextscale.plan import Plan
from nextscale.sampling.generation import Settings
from nextscale.systems.class_conditional import ClassConditionalSystem, SystemConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class VARConfig(SystemConfig):
    """VAR's configuration; the defaults are those of 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "var"

    generator: VARGeneratorConfig = field(default_factory=VARGeneratorConfig)
    settings: dict[str, Settings] = field(default_factory=lambda: {
        "pictures": Settings(guidance_scale=5.0, top_k=900, top_p=0.95),
        "fid": Settings(guidance_scale=2.5, top_k=900, top_p=0.96)})


class VAR(ClassConditionalSystem):
    """The system, see ``ClassConditionalSystem``."""

    config_type: ClassVar[type[SystemConfig]] = VARConfig
    # Modulations, a third of the weights, act on one row a picture only.
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: VARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = VARGenerator(config.generator, config.tokenizer.plan,
                                      config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    def initialise(self, gate: float = 1e-3) -> VAR:
        initialise(self.generator, self.head, self.labels, gate)
        return self

    def published_names(self) -> tuple[NameMap, ...]:
        from nextscale.systems.var_published import GENERATOR_NAMES, TOKENIZER_NAMES

        return TOKENIZER_NAMES, GENERATOR_NAMES

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        return self.products_of_plan(pictures, plan)


# Published sizes and settings

PLANS = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
         1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}


def squares(sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((s, s) for s in sides)


SMALL = {
    "var-d6-64px": VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 2, 4, 6), 1, 2, 32, 32, "middle"), squares((1, 2, 3, 4, 6, 8))),
        VARGeneratorConfig(6, 256, 4, shared_modulation=True)),
    "var-d2-16px": VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle"), squares((1, 2, 3, 4)), 32),
        VARGeneratorConfig.of_depth(2), (10,)),
}


def preset_config(name: str) -> VARConfig:
    """The configuration of a published size, var-d16, var-d20, var-d24, var-d30 (256 px) or var-d36-s (512 px), or of
    a small one of this project: var-d6-64px, the size of emoji-64, and var-d2-16px, for trying code in a second."""
    depths = {"var-d16": 16, "var-d20": 20, "var-d24": 24, "var-d30": 30}
    if name in depths:
        return VARConfig(generator=VARGeneratorConfig.of_depth(depths[name]))
    if name in SMALL:
        return SMALL[name]
    if name == "var-d36-s":
        return VARConfig(TokenizerConfig(grids=squares(PLANS[512])),
                         VARGeneratorConfig.of_depth(36, shared_modulation=True))
    raise InputError(f"unknown VAR size {name!r}{did_you_mean(name, [*depths, 'var-d36-s', *SMALL])}")
