"""CAR: controllable autoregressive modelling for visual generation (Yao et al., arXiv 2410.04671).

A trained VAR is left as it is. Beside it walks a tower of half as many blocks, which sees a control map (edges, depth,
a sketch) in the pixels of every scale and rewrites the inputs of VAR's later half, U-Net style; only the tower is
trained. Without a map it is VAR.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from nextscale.control.car import ControlTower, TowerConfig, TowerHook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.var import VARGeneratorConfig
from nextscale.hub import NameMap
from nextscale.systems.controlled import ControlledConfig, ControlledSystem, Maps


@dataclass(frozen=True)
class CARConfig(ControlledConfig):
    """CAR's configuration: VAR's, and the tower's."""

    slug: ClassVar[str] = "car"

    control: TowerConfig = field(default_factory=TowerConfig)


class CAR(ControlledSystem):
    """The system, see ``ControlledSystem``; what is trained is the tower alone."""

    config_type = CARConfig

    def __init__(self, config: CARConfig):
        super().__init__(config)
        self.control: ControlTower = ControlTower(config.control, config.generator, self.plan)
        self.train_part("")

    def initialise(self, gate: float = 1e-3) -> CAR:
        super().initialise(gate)
        self.control.initialise()
        return self

    def train_part(self, part: str) -> None:
        """The tower; there is no other part."""
        if part:
            super().train_part(part)
        for frozen in (self.generator, self.head, self.labels):
            frozen.requires_grad_(False)

    def attach(self, maps: Maps | Mapping[str, Maps], *, count: int | None = None) -> TowerHook:  # type: ignore[override]
        """The tower as a hook, for maps of ``count`` pictures; they may be given by their kind."""
        if isinstance(maps, Mapping):
            (kind,) = self.config.control.kinds
            if tuple(maps) != (kind,):
                raise InputError(f"the model takes a control of {kind}, not of {', '.join(maps) or 'nothing'}")
            maps = maps[kind]
        return TowerHook(self.control, self.generator, self.maps_of(maps, count).to(self.device))

    def control_names(self) -> NameMap:
        from nextscale.systems.var_published import GENERATOR_NAMES

        blocks = [(f"car_{theirs}", ours.replace("generator.", "")) for theirs, ours in GENERATOR_NAMES
                  if ours is not None and theirs.startswith("blocks")]
        return [
            *blocks, (r"car_blocks\.\d+\.attn\.zero_k_bias", None),
            (r"car_control_convs\.conv_in\.(weight|bias)", r"encoder.input.\1"),
            (r"car_control_convs\.blocks\.(\d+)\.(weight|bias)", r"encoder.layers.\1.\2"),
            (r"car_control_convs\.conv_out\.(weight|bias)", r"encoder.output.\1"),
            (r"car_var_conv\.(weight|bias)", r"content.\1"),
            (r"car_skip_norm\.(\d+)\.(weight|bias)", r"joins.\1.norm.\2"),
            (r"car_skip_linear\.(\d+)\.(weight|bias)", r"joins.\1.linear.\2")]


# Published sizes

DEPTHS = {"car-d12": 12, "car-d16": 16, "car-d20": 20, "car-d24": 24, "car-d30": 30}


def preset_config(name: str) -> CARConfig:
    """The configuration of a published size, car-d12 to car-d30 (256 px), for canny edges; released towers of other
    kinds (car-d16: canny, hed, depth, normal, sketch) have the same sizes."""
    if name not in DEPTHS:
        raise InputError(f"unknown CAR size {name!r}{did_you_mean(name, DEPTHS)}")
    return CARConfig(generator=VARGeneratorConfig.of_depth(DEPTHS[name]))


def published_config(vae: dict[str, Any], car: dict[str, Any]) -> CARConfig:
    """The configuration that the published constructors' keyword arguments mean."""
    from nextscale.systems.var_published import published_config as of_var

    var = of_var(vae, car)
    return CARConfig(var.tokenizer, var.generator, var.classes)


def split_published(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A merged state dict as the base's and the tower's."""
    tower: Sequence[str] = [name for name in tensors if "car_" in name]
    return {n: t for n, t in tensors.items() if n not in tower}, {n: tensors[n] for n in tower}
