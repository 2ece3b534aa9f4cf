"""A VAR that a picture steers: what CAR, SCALAR and their like share. With control off they are VAR, bit for bit."""
from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nextscale.context import Hook
from nextscale.control.maps import UNCONTROLLED, ControlHook
from nextscale.errors import InputError, did_you_mean
from nextscale.hub import NameMap
from nextscale.parallel import rand_pictures
from nextscale.plan import Plan
from nextscale.sampling.generation import Generation, Preview, Settings
from nextscale.sampling.guidance import Guidance, Nested, make_guidance
from nextscale.sampling.score import LogProb
from nextscale.systems.class_conditional import Label
from nextscale.systems.var import VAR, VARConfig

Maps = Any
"""A control map or one a picture: PIL pictures, or bytes (B, P, H, W) or (P, H, W), with P 1 (grey) or 3 planes."""


@dataclass(frozen=True)
class ControlSettings(Settings):
    """Settings with the control's own.

    control_scale: None keeps the control in every branch, so that guidance is by the label alone (as published); a
    number guides by the control, too: u + control_scale (v - u) + guidance_scale (c - v), with c given label and
    control, v the control alone and u nothing.
    """

    control_scale: float | None = None


@dataclass(frozen=True)
class ControlledConfig(VARConfig):
    """VAR's configuration and that of its control part."""

    control: Any = None
    settings: dict[str, ControlSettings] = field(default_factory=lambda: {  # type: ignore[assignment]
        "pictures": ControlSettings(guidance_scale=5.0, top_k=900, top_p=0.95),
        "fid": ControlSettings(guidance_scale=2.5, top_k=900, top_p=0.96)})


class ControlledSystem(VAR):
    """VAR and a control part, whose weights have a file of their own beside the base's.

    ``control`` in what follows: maps of the pictures, see ``maps_of``; None for VAR alone.
    """

    further = ("control",)
    starts_from = ("var",)
    control: nn.Module

    def attach(self, maps: Any, **options: Any) -> ControlHook:
        """The control as a hook on the network, for maps of the one kind of the model's, or maps by kind."""
        raise NotImplementedError

    def look_at(self, maps: Tensor) -> None:
        """Called once before training, with maps uint8 (B, P, H, W) of ``config.control.cached`` of some training
        pictures; for what has to be measured of them."""

    def maps_of(self, control: Maps, count: int | None = None) -> Tensor:
        """Maps as bytes (B, P, H, W) of the model's size; one map serves ``count`` pictures.

        Raises InputError where they are of another size or number, or no bytes.
        """
        h, w = self.tokenizer.picture_size
        if isinstance(control, Image.Image):
            control = [control]
        if isinstance(control, (list, tuple)) and all(isinstance(one, Image.Image) for one in control):
            given = [np.atleast_3d(np.asarray(one if one.mode in ("L", "RGB") else one.convert("RGB")))
                     for one in control]
            if len({one.shape for one in given}) > 1:
                raise InputError("control: the maps have different sizes; give all in one")
            control = torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2) if given else torch.empty(0)
        if not isinstance(control, Tensor) or control.dtype != torch.uint8:
            found = control.dtype if isinstance(control, Tensor) else type(control).__name__
            raise InputError(f"control: maps are pictures or bytes (torch.uint8), got {found}")
        maps = control[None] if control.ndim == 3 else control
        if maps.ndim != 4 or maps.shape[1] not in (1, 3) or tuple(maps.shape[2:]) != (h, w):
            raise InputError(f"control: maps of this model are {h}x{w} pixels with 1 or 3 planes, got "
                             f"{tuple(maps.shape)}; resize them first")
        if count is not None and len(maps) == 1:
            maps = maps.expand(count, -1, -1, -1)
        if count is not None and len(maps) != count:
            raise InputError(f"control: {len(maps)} maps were given for {count} pictures")
        return maps

    def guidance(self, used: Settings) -> Guidance:
        """Guidance by the settings: by the label, and by the control where ``control_scale`` is given."""
        scale = getattr(used, "control_scale", None)
        if scale is None:
            return make_guidance(used.guidance_scale, used.guidance_schedule)
        return Nested(("conditional", "unconditional", f"unconditional{UNCONTROLLED}"),
                      (used.guidance_scale - 1, scale - 1), used.guidance_schedule)

    def with_control(self, hooks: Sequence[Hook], control: Any, labels: Sequence[Label] | Label, count: int | None,
                     options: Mapping[str, Any]) -> list[Hook]:
        """Hooks with the control behind them: it sees whole steps, whatever the others select."""
        if control is None:
            if options:
                raise InputError(f"{', '.join(options)}: given without a control")
            return list(hooks)
        known = [name for name in inspect.signature(self.attach).parameters if name not in ("maps", "count")]
        for name in options:
            if name not in known:
                there = f"; there are {', '.join(known)}" if known else f": {self.config.slug} has none"
                raise InputError(f"control_options: {name!r} is unknown{did_you_mean(name, known, there)}")
        return [*hooks, self.attach(control, count=len(self.label_rows(labels, count)), **options)]

    def generate(self, labels: Sequence[Label] | Label = None, count: int | None = None, *,
                 control: Any = None, control_options: Mapping[str, Any] | None = None, hooks: Sequence[Hook] = (),
                 **rest: Any) -> Generation:
        """Draw pictures steered by maps, see ``ClassConditionalSystem.generate``; control_options: see ``attach``."""
        hooks = self.with_control(hooks, control, labels, count, control_options or {})
        return super().generate(labels, count, hooks=hooks, **rest)

    def stream(self, labels: Sequence[Label] | Label = None, count: int | None = None, *,
               control: Any = None, control_options: Mapping[str, Any] | None = None, hooks: Sequence[Hook] = (),
               **rest: Any) -> Iterator[Preview]:
        """The same step by step."""
        hooks = self.with_control(hooks, control, labels, count, control_options or {})
        return super().stream(labels, count, hooks=hooks, **rest)

    def log_prob(self, pictures_or_tokens: Tensor | Sequence[Tensor],  # type: ignore[override]
                 labels: Sequence[Label] | Label = None, *, control: Any = None,
                 control_options: Mapping[str, Any] | None = None, hooks: Sequence[Hook] = (), **rest: Any) -> LogProb:
        """Log-probability given maps, see ``ClassConditionalSystem.log_prob``."""
        tokens = (self.encode(pictures_or_tokens, rest.get("schedule")) if isinstance(pictures_or_tokens, Tensor)
                  else pictures_or_tokens)
        hooks = self.with_control(hooks, control, [None] * len(tokens[0]), None, control_options or {})
        return super().log_prob(tokens, labels, hooks=hooks, **rest)

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None, label_smoothing: float = 0.0,
             control: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See ``ClassConditionalSystem.loss``. control: maps (B, P, H, W) of ``config.control.cached``; None: VAR's."""
        hooks = [] if control is None else [self.dropping(self.attach(control, count=len(labels_Bn)))]
        return self.hooked_loss(tokens, labels_Bn, hooks, label_dropout, part_dropout, step_weights, label_smoothing)

    def dropping(self, hook: ControlHook) -> ControlHook:
        """In training the hook, without effect on ``config.control.drop`` of the pictures; they learn as VAR's do."""
        drop = self.config.control.drop
        if drop and (self.control.training or self.generator.training):  # either may be frozen
            hook.shown = rand_pictures(len(hook.maps), device=hook.maps.device) >= drop
        return hook

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        return []  # VAR's are not all that is computed, and most of the weights have no gradients

    def to_precision(self, precision: str) -> ControlledSystem:
        super().to_precision(precision)
        for parameter in self.control.parameters():  # what was measured of features stays as exact as it was
            parameter.data = parameter.data.to(next(self.head.parameters()).dtype)
        return self

    def control_names(self) -> NameMap:
        """Map from the published names of the control's file to this library's; empty where none is known."""
        return ()

    def published_names(self) -> tuple[NameMap, ...]:
        return (*super().published_names(), self.control_names())

