"""M-VAR: decoupled scale-wise autoregressive modelling (Ren et al., arXiv 2411.10433).

VAR with its attention taken apart: inside a scale rows attend to each other, in both directions; between scales a
Mamba-2 scan goes through all rows, coarse to fine, at a cost that grows with their number alone. Tokenizer, inputs,
labels, loss and sampling are VAR's.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from nextscale.conditions.class_label import ClassTable
from nextscale.errors import InputError, WeightsError, did_you_mean
from nextscale.generators.m_var import MVARGenerator, initialise_scans
from nextscale.generators.var import VARGeneratorConfig, initialise
from nextscale.heads.categorical import CategoricalHead
from nextscale.hub import NameMap
from nextscale.plan import OWN_STEP, Plan
from nextscale.sampling.generation import Settings
from nextscale.systems.class_conditional import ClassConditionalSystem, SystemConfig
from nextscale.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class MVARConfig(SystemConfig):
    """M-VAR's configuration; the defaults are those of 1000 classes at 256 pixels."""

    slug: ClassVar[str] = "m_var"

    generator: VARGeneratorConfig = field(default_factory=VARGeneratorConfig)
    settings: dict[str, Settings] = field(default_factory=lambda: {
        "pictures": Settings(guidance_scale=5.0, top_k=900, top_p=0.95),
        "fid": Settings(guidance_scale=2.5, top_k=900, top_p=0.96)})


class MVAR(ClassConditionalSystem):
    """The system, see ``ClassConditionalSystem``."""

    config_type = MVARConfig
    adapter_targets = ("attention.qkv", "attention.projection", "mamba.input", "mamba.output", "mlp.expand",
                       "mlp.contract")

    def __init__(self, config: MVARConfig):
        super().__init__(config)
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = MVARGenerator(config.generator, self.plan, config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    @property
    def plan(self) -> Plan:
        """The tokenizer's schedule; attention sees its own step alone, what came before comes by the scan."""
        return replace(self.tokenizer.plan, visible=OWN_STEP)

    def initialise(self, gate: float = 1e-3) -> MVAR:
        """As published: gate is the factor on the weights of the attention's and the scan's gates. The MLP's gate
        is treated as scales and shifts are."""
        initialise(self.generator, self.head, self.labels, gate)
        initialise_scans(self.generator)
        return self

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        return self.products_of_plan(pictures, plan)

    # Published weights

    def published_names(self) -> tuple[NameMap, NameMap]:
        from nextscale.systems.var_published import GENERATOR_NAMES, TOKENIZER_NAMES

        ours = r"generator.blocks.\1.mamba"
        return TOKENIZER_NAMES, [
            *GENERATOR_NAMES, (r"blocks\.\d+\.attn\.patch_nums", None),
            *((rf"blocks\.(\d+)\.mamba\.{theirs}", f"{ours}.{name}") for theirs, name in (
                (r"in_proj\.weight", "input.weight"), (r"conv1d\.(weight|bias)", r"convolution.\2"),
                ("dt_bias", "rates.dt_bias"), ("A_log", "rates.a_log"), ("D", "rates.skip"),
                (r"norm\.weight", "norm_weight"), (r"out_proj\.weight", "output.weight")))]

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors as they are. Their depth and scales must be the model's; whether attention takes unit lengths
        is told by the presence of its scales, and followed."""
        if part == "generator":
            self._check_sizes(tensors)
            unit = any(name.endswith("attn.scale_mul_1H11") for name in tensors)
            self.generator.use_unit_lengths(unit)
            self.config = replace(self.config, generator=self.generator.config)
        return tensors

    def _check_sizes(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises WeightsError where a file's depth or scales are not the model's."""
        blocks = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
        depth = max(blocks, default=-1) + 1
        if depth != self.config.generator.depth:
            raise WeightsError(f"the file holds {depth} blocks, the model has {self.config.generator.depth}; load it "
                               f"as m-var-d{depth}, or by a configuration of that depth")
        cells = tensors.get("blocks.0.attn.patch_nums")
        if cells is not None and not cells.is_meta and cells.tolist() != [step.rows for step in self.plan]:
            raise WeightsError(f"the file is for scales of {cells.tolist()} tokens, the model has "
                               f"{[step.rows for step in self.plan]}")


# Published sizes and settings

SIZES = {"m-var-d12": 12, "m-var-d16": 16, "m-var-d20": 20, "m-var-d24": 24, "m-var-d30": 30, "m-var-d32": 32}
PLAIN_ATTENTION = ("m-var-d16", "m-var-d20")
"""Published without unit lengths in their attention."""


def preset_config(name: str) -> MVARConfig:
    """The configuration of a published size, m-var-d12, d16, d20, d24, d30 or d32 (256 px)."""
    if name not in SIZES:
        raise InputError(f"unknown M-VAR size {name!r}{did_you_mean(name, SIZES)}")
    return MVARConfig(generator=VARGeneratorConfig.of_depth(SIZES[name], l2_attention=name not in PLAIN_ATTENTION))


def training_recipe(name: str) -> dict[str, Any]:
    """The published training of a size as a recipe for ``nextscale train generator``, but for its tokenizer and data.

    1,281,167 pictures an epoch; learning rate 1e-4 (8e-5 from depth 24) a batch of 256. Depth 32's is not published;
    depth 30's stands in. Weight decay that grows to 0.08 at depth 30 and fp16 are not built: 0.05 and bf16 instead.
    """
    depth = preset_config(name).generator.depth
    batch = 1024 if depth >= 30 else 768
    epochs = {12: 200, 16: 200, 20: 250}.get(depth, 350)
    steps = epochs * 1_281_167 // batch
    return {
        "system": "m_var", "generator": {key: value for key, value in vars(preset_config(name).generator).items()},
        "gate": 1e-3 if depth <= 20 else 1e-4 if depth == 24 else 1e-5, "label_dropout": 0.1,
        "train": {"steps": steps, "batch_size": batch, "warmup_steps": steps // 50, "schedule": "linear",
                  "learning_rate": (1e-4 if depth < 24 else 8e-5) * batch / 256, "gradient_clip": 2.0,
                  "final_learning_rate_ratio": 0.1 if depth < 24 else 0.01, "weight_decay": 0.05}}


def published_config(vae: dict[str, Any], mvar: dict[str, Any]) -> MVARConfig:
    """The configuration that the published constructors' keyword arguments mean."""
    from nextscale.systems.var_published import published_config as of_var

    var = of_var(vae, mvar)
    return MVARConfig(var.tokenizer, var.generator, var.classes)
