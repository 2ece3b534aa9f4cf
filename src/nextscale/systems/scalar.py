"""SCALAR and SCALAR-Uni: scale-wise controllable visual autoregressive learning (Xu et al., arXiv 2507.19946).

A frozen vision encoder looks at a control map; a linear layer for every scale and block adds what it saw to the block's
input. No more tokens and no more blocks than VAR. SCALAR-Uni takes several kinds of maps, and mixes of them that it was
not trained on, by aligning their features with the picture's own.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.control.scalar import ControlEncoding, EncodingConfig, EncodingHook, alignment_loss, pick
from nextscale.data.controls import control_of
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.var import VARGeneratorConfig
from nextscale.parallel import rand_pictures
from nextscale.systems.controlled import ControlledConfig, ControlledSystem, Maps


@dataclass(frozen=True)
class SCALARConfig(ControlledConfig):
    """SCALAR's configuration: VAR's, and that of its encodings."""

    slug: ClassVar[str] = "scalar"

    control: EncodingConfig = field(default_factory=EncodingConfig)


class SCALAR(ControlledSystem):
    """The system, see ``ControlledSystem``; the backbone is trained, too, unless ``control.freeze_backbone``."""

    config_type = SCALARConfig

    def __init__(self, config: SCALARConfig):
        super().__init__(config)
        self.control: ControlEncoding = ControlEncoding(config.control, config.generator, self.plan)
        if config.control.freeze_backbone:
            for frozen in (self.generator, self.head, self.labels):
                frozen.requires_grad_(False)
        if config.control.freeze_backbone == "first-half":
            for trained in (*self.generator.blocks[config.generator.depth // 2:], self.head):
                trained.requires_grad_(True)

    def initialise(self, gate: float = 1e-3) -> SCALAR:
        super().initialise(gate)
        self.control.initialise()
        return self

    def look_at(self, maps: Tensor) -> None:
        parts = maps.split([control_of(kind).planes for kind in self.config.control.cached], 1)
        self.control.measure(torch.cat([part.expand(-1, 3, -1, -1) for part in parts]))

    def attach(self, maps: Maps | Mapping[str, Maps], *, count: int | None = None,  # type: ignore[override]
               kind: str | None = None, weights: Mapping[str, Any] | None = None) -> EncodingHook:
        """The encodings as a hook, for maps of ``count`` pictures.

        maps: of one kind (``kind``, the model's first by default), or of several by kind, mixed by ``weights`` (see
        ``ControlEncoding.mixed``).
        """
        given = maps if isinstance(maps, Mapping) else {kind or self.config.control.kinds[0]: maps}
        if not given:
            raise InputError("control: no maps are given")
        ready = {name: self.maps_of(one, count).to(self.device) for name, one in given.items()}
        return self._hook(self.control.mixed(ready, weights))

    def _hook(self, features: Tensor) -> EncodingHook:
        return EncodingHook(self.control, self.generator.name, features)

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None, label_smoothing: float = 0.0,
             control: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy; SCALAR-Uni's with the alignment, of one kind of map a picture: drawn in training, in turn
        otherwise."""
        if control is None or not self.config.control.unified:
            return super().loss(tokens, labels_Bn, label_dropout, part_dropout, step_weights, label_smoothing, control)
        kinds, pictures = self.config.control.kinds, len(control)
        kind_B = torch.arange(pictures, device=control.device) % len(kinds)
        if self.control.training:
            kind_B = (rand_pictures(pictures, device=control.device) * len(kinds)).long()
        shown = pick(control[:, :-3], [control_of(kind).planes for kind in kinds], kind_B)
        aligned = self.control.aligned(self.control.look(shown), kind_B)
        loss, by_step, right = self.hooked_loss(tokens, labels_Bn, [self.dropping(self._hook(aligned))], label_dropout,
                                                part_dropout, step_weights, label_smoothing)
        distance = alignment_loss(aligned, self.control.look(control[:, -3:]))
        return loss + self.config.control.align_weight * distance, by_step, right


# Sizes

DEPTHS = {"scalar-d12": 12, "scalar-d16": 16, "scalar-d20": 20, "scalar-d24": 24}


def preset_config(name: str) -> SCALARConfig:
    """The configuration of a size of the paper, scalar-d12 to scalar-d24 (256 px), with DINOv2's small network."""
    if name not in DEPTHS:
        raise InputError(f"unknown SCALAR size {name!r}{did_you_mean(name, DEPTHS)}")
    return SCALARConfig(generator=VARGeneratorConfig.of_depth(DEPTHS[name]))
