"""SCALAR's control (Xu et al., arXiv 2507.19946): features of the control map, added at every block's input.

A frozen encoder E looks at the control map I_c once. For scale k with p_k cells a side and block l:

    C_kl = W_kl resize(E(I_c), p_k) + b_kl;    the input of block l at the rows of scale k:  x <- x + C_kl

SCALAR-Uni, one model for several kinds of maps, first brings every kind into the space of the picture's own features
by a linear layer: F(E(I_c)), trained with |F(E(I_c)) - E(picture)|^2 beside the cross-entropy.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.context import Context, Function
from nextscale.control.encoders import QUARTERS, fitted, open_encoder
from nextscale.control.maps import ControlConfig, ControlHook, layer_of
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.plan import Plan
from nextscale.run import Rows


@dataclass(frozen=True)
class EncodingConfig(ControlConfig):
    """kinds: of control maps, several make SCALAR-Uni; drop: see ``ControlConfig``; encoder: see
    ``control.encoders``; feature_width: channels that it gives. encoder_side, encoder_after: DINOv2's, the pixels
    that it looks at and after which shares of its blocks features are taken; other encoders refuse other values
    than these. resize: how features shrink to a scale's grid, ``area`` as VAR's own latents do, or ``bilinear``,
    ``bicubic``. share_over: what projections are shared over (``none``: one a scale and block). inject: blocks that
    get the control, ``all``, ``first-half``, ``every-n`` or ``input``. freeze_backbone: train the projections
    alone; ``first-half``: and the later half of the blocks, and the head. start: of the projections, ``zero`` (then
    the model begins as its base) or ``normal``. align: ``shared``, or one linear layer a ``kind``; align_weight: of
    the alignment in SCALAR-Uni's loss. whiten: features are centred and decorrelated by what they are on training
    maps, measured when training begins; projections learn several times faster of an encoder whose features are all
    alike large and positive."""

    encoder: str = "dinov2:facebook/dinov2-small"
    feature_width: int = 1536
    encoder_side: int = 224
    encoder_after: tuple[float, ...] = QUARTERS
    resize: Literal["area", "bilinear", "bicubic"] = "area"
    share_over: Literal["none", "layers", "scales", "both"] = "none"
    inject: str = "all"
    freeze_backbone: bool | Literal["first-half"] = True
    start: Literal["zero", "normal"] = "zero"
    align: Literal["shared", "kind"] = "shared"
    align_weight: float = 1.0
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InputError(f"control kinds are {', '.join(self.kinds) or 'none'}; give at least one, each once")
        if self.feature_width < 1 or self.align_weight < 0:
            raise InputError(f"feature_width is {self.feature_width}, it must be at least 1; align_weight is "
                             f"{self.align_weight}, it must not be negative")
        if self.encoder_side < 1 or not self.encoder_after or not all(0 < share <= 1 for share in self.encoder_after):
            raise InputError(f"encoder_side is {self.encoder_side}, it must be positive; encoder_after is "
                             f"{self.encoder_after}, it must be shares of the blocks, above 0 and up to 1")
        if not self.encoder.startswith("dinov2:") and (self.encoder_side, self.encoder_after) != (224, QUARTERS):
            raise InputError(f"encoder_side and encoder_after are DINOv2's; encoder {self.encoder} has neither")
        self.layers(4)

    @property
    def unified(self) -> bool:
        """Whether this is SCALAR-Uni."""
        return len(self.kinds) > 1

    @property
    def cached(self) -> tuple[str, ...]:
        """Kinds of maps that training wants beside the tokens: SCALAR-Uni aligns with the pictures themselves."""
        return (*self.kinds, "picture") if self.unified else self.kinds

    def layers(self, depth: int) -> tuple[int, ...]:
        """Blocks that get the control. Raises InputError for an unknown ``inject``."""
        count = self.inject.removeprefix("every-")
        if count != self.inject and count.isdecimal() and int(count) > 0:
            return tuple(range(0, depth, int(count)))
        known = {"all": range(depth), "first-half": range(depth // 2), "input": range(1)}
        if self.inject not in known:
            raise InputError(f"inject is {self.inject!r}; use all, first-half, every-2 (or another number) or input")
        return tuple(known[self.inject])


class Whitening(nn.Module):
    """x -> (x - m) W of features (B, C, h, w), W = (cov + floor * largest)^-1/2 with the largest eigenvalue of the
    features' covariance; the identity until they were measured. What varies less than the floor is left smaller than
    1, since it may be noise."""

    stays_float32 = True
    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, floor: float = 1e-3):
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @property
    def measured(self) -> bool:
        return bool(self.mean.any())

    def forward(self, features: Tensor) -> Tensor:
        return ((features - self.mean[:, None, None]).movedim(1, 3) @ self.matrix).movedim(3, 1)

    @torch.no_grad()
    def measure(self, parts: Iterable[Tensor]) -> None:
        """Takes m and W from the features of all places."""
        count, total, square = 0, self.mean.double() * 0, self.matrix.double() * 0
        for part in parts:
            rows = part.movedim(1, 3).flatten(0, 2).double()
            count, total, square = count + len(rows), total + rows.sum(0), square + rows.T @ rows
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        values = values.clamp_min(0)
        self.mean.copy_(mean)
        self.matrix.copy_((vectors / (values + self.floor * values[-1]).clamp_min(1e-12).sqrt()) @ vectors.T)


class ControlEncoding(nn.Module):
    """Projections of a frozen encoder's features, weight (K|1, layers|1, C_f, C) and bias, and the alignment."""

    name = "encoding"

    def __init__(self, config: EncodingConfig, base: VARGeneratorConfig, plan: Plan):
        super().__init__()
        self.config, self.plan = config, plan
        self.layers = {layer: i for i, layer in enumerate(config.layers(base.depth))}
        scales = 1 if config.share_over in ("scales", "both") else len(plan)
        layers = 1 if config.share_over in ("layers", "both") else len(self.layers)
        self.weight = nn.Parameter(torch.zeros(scales, layers, config.feature_width, base.width))
        self.bias = nn.Parameter(torch.zeros(scales, layers, base.width))
        self.alignment = nn.ModuleList(
            nn.Linear(config.feature_width, config.feature_width)
            for _ in (config.kinds if config.align == "kind" else config.kinds[:1])) if config.unified else None
        self.whitening = Whitening(config.feature_width) if config.whiten else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Projections at zero, or small; the alignment at the identity."""
        if self.config.start == "normal":
            nn.init.trunc_normal_(self.weight, std=0.02)
        for layer in self.alignment or ():
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def look(self, maps: Tensor, most: int = 64) -> Tensor:
        """E of maps or pictures uint8 (B, 1 or 3, H, W): (B, C_f, h, w) in float32, whitened where the configuration
        says so. Raises InputError where the encoder gives another number of channels than ``feature_width``."""
        c = self.config
        encoder = open_encoder(c.encoder, self.plan.grid, c.encoder_side, c.encoder_after).to(maps.device)
        with torch.autocast(maps.device.type, enabled=False):
            found = torch.cat([encoder(part.float().div(127.5).sub(1).expand(-1, 3, -1, -1))
                               for part in maps.split(most)])
        if found.shape[1] != self.config.feature_width:
            raise InputError(f"encoder {self.config.encoder} gives {found.shape[1]} channels, but "
                             f"control.feature_width is {self.config.feature_width}; set it to {found.shape[1]}")
        return found if self.whitening is None else self.whitening(found)

    def measure(self, maps: Tensor) -> None:
        """Measures, once, what features of maps uint8 (B, 1 or 3, H, W) of training pictures are like."""
        if self.whitening is not None and not self.whitening.measured:
            self.whitening.measure(self.look(part) for part in maps.split(64))

    def aligned(self, features: Tensor, kind_B: Tensor) -> Tensor:
        """Features (B, C_f, h, w) of maps of some kinds, brought to where pictures' features are; kind_B: of each."""
        if self.alignment is None:
            return features
        x = features.flatten(2).transpose(1, 2).to(self.weight.dtype)
        found = torch.stack([layer(x) for layer in self.alignment])[
            kind_B if self.config.align == "kind" else torch.zeros_like(kind_B), torch.arange(len(x), device=x.device)]
        return found.transpose(1, 2).unflatten(2, tuple(features.shape[2:]))

    def mixed(self, maps: Mapping[str, Tensor], weights: Mapping[str, Any] | None = None) -> Tensor:
        """sum_m w_m F(E(I_m)), (B, C_f, h, w), of maps by kind; weights: a number a kind, or (1|B, h', w') in the
        picture's plane, made to add up to 1 everywhere; even by default.

        Raises InputError for kinds that the model doesn't know, weights of kinds without maps, negative ones, and such
        as add up to nothing.
        """
        for kind in weights or ():
            if kind not in maps:
                raise InputError(f"control weights: there is one of {kind!r}, but maps are of {', '.join(maps)}")
        parts, shares = [], []
        for kind, given in maps.items():
            if kind not in self.config.kinds:
                raise InputError(f"the model takes controls of {', '.join(self.config.kinds)}, not of {kind!r}")
            number = torch.full((len(given),), self.config.kinds.index(kind), device=given.device)
            parts.append(self.aligned(self.look(given), number))
            share = torch.as_tensor((weights or {}).get(kind, 1.0 if not weights else 0.0), dtype=torch.float32)
            if share.ndim not in (0, 3) or not bool(((share >= 0) & share.isfinite()).all()):
                raise InputError(f"control weights of {kind!r}: give a number or masks (1, h, w), finite and not "
                                 f"negative, got {float(share) if share.ndim == 0 else tuple(share.shape)}")
            share = share.to(given.device)
            h, w = parts[-1].shape[2:]
            shares.append(fitted(share[:, None], (h, w)) if share.ndim == 3 else share)
        total = torch.stack(torch.broadcast_tensors(*shares)).sum(0)
        if bool((total <= 0).any()):
            raise InputError("control weights must add up to more than 0 everywhere")
        return sum((w / total).to(part.dtype) * part for w, part in zip(shares, parts, strict=True))  # type: ignore[return-value]

    def encode(self, features: Tensor) -> list[Tensor]:
        """The features at every scale's grid, (B, L_k, C_f)."""
        maps = (fitted(features, step.grid, self.config.resize) for step in self.plan)
        return [one.flatten(2).transpose(1, 2).to(self.weight.dtype) for one in maps]

    def project(self, scale: int, layer: int, features_BLC: Tensor) -> Tensor:
        """C_kl, (B, L_k, C)."""
        k, i = scale % len(self.weight), self.layers[layer] % self.weight.shape[1]
        return features_BLC @ self.weight[k, i] + self.bias[k, i]


class EncodingHook(ControlHook):
    """The encodings on a base, bound to features (B, C_f, h, w) of the maps of a run's pictures."""

    def __init__(self, encoding: ControlEncoding, base: str, features: Tensor):
        super().__init__(encoding.name, features, encoding.encode)
        self.encoding, self.base = encoding, base

    def part(self, pictures: slice) -> EncodingHook:
        return EncodingHook(self.encoding, self.base, self.maps[pictures])

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        layer = layer_of(address, self.base)
        if layer is None or layer not in self.encoding.layers:
            return inner(x, rows)
        return inner(self.where_acts(ctx, x + self.added(ctx, layer, rows).to(x.dtype), x), rows)

    def added(self, ctx: Context, layer: int, rows: Rows) -> Tensor:
        """C_l of a call's rows, (R, L, C); the same in every branch, so computed for one."""
        features, copies = self.bound(ctx), len(ctx.branches)
        if rows.spans is None or any(s.hi - s.lo != self.encoding.plan.steps[s.step].rows for s in rows.spans):
            raise InputError("control encoding: it is added to whole steps; put hooks that select rows before it")
        pictures = len(features.acts) // copies
        parts = [self.encoding.project(s.step, layer, features.steps[s.step][:pictures]) for s in rows.spans]
        return torch.cat(parts, 1).repeat(copies, 1, 1)


def alignment_loss(aligned: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of aligned features and those of the pictures, over positions and channels."""
    return F.mse_loss(aligned.float(), target.float().detach())


def pick(maps: Tensor, planes: Sequence[int], kind_B: Tensor) -> Tensor:
    """Of maps (B, P, H, W), the ``planes`` of their kinds one behind the other, the chosen kind's: (B, 3, H, W)."""
    parts = [part.expand(-1, 3, -1, -1) for part in maps.split(list(planes), 1)]
    return torch.stack(parts)[kind_B, torch.arange(len(maps), device=maps.device)]
