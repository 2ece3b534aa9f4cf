"""What systems of continuous latents share: tokens are vectors, drawn by a flow or diffusion, without a likelihood."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.errors import InputError
from nextscale.heads.categorical import Filter
from nextscale.parallel import randn_pictures
from nextscale.plan import Plan
from nextscale.sampling.generation import GuidedSettings
from nextscale.sampling.score import LogProb
from nextscale.systems.class_conditional import ClassConditionalSystem, SystemConfig
from nextscale.tokenizers import gaussian, pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.published import join_attention, kl_config


@dataclass(frozen=True)
class ContinuousSettings(GuidedSettings):
    """Guidance, and a temperature that multiplies the noise which the solver adds, where it adds any.

    Raises InputError for a temperature below 0, and one that is no number.
    """

    def __post_init__(self) -> None:
        at_least_0("temperature", self.temperature)


def at_least_0(name: str, value: float) -> None:
    """Raises InputError for a setting below 0, and one that is infinite or no number."""
    if not 0 <= value < math.inf:
        raise InputError(f"{name} is {value}; it must be at least 0 and finite")


def one_of(name: str, value: str, choices: Any) -> None:
    """Raises InputError for a setting that is none of a ``Literal``'s values."""
    if value not in get_args(choices):
        raise InputError(f"{name} {value!r} is unknown; use {' or '.join(get_args(choices))}")


@dataclass(frozen=True)
class ContinuousConfig(SystemConfig):
    """The configuration of a system of continuous latents; the default tokenizer is KL-16 for 256 pixels."""

    tokenizer: TokenizerConfig = field(default_factory=kl_config)
    settings: dict[str, Any] = field(default_factory=lambda: {"pictures": ContinuousSettings(),
                                                              "fid": ContinuousSettings()})


class ContinuousSystem(ClassConditionalSystem):
    """A ``ClassConditionalSystem`` whose tokenizer is of kind ``kl``. Its head gives losses and samples of vectors."""

    likelihood = False

    def __init__(self, config: ContinuousConfig):
        if not config.tokenizer.continuous:
            raise InputError(f"{type(self).__name__} needs a tokenizer of continuous latents, kind 'kl', not "
                             f"{config.tokenizer.kind!r}")
        super().__init__(config)

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return join_attention(tensors) if part == "tokenizer" else tensors

    def filters(self, used: Any) -> tuple[Filter, ...]:
        return ()

    def soft(self, used: Any) -> Callable[..., Tensor] | None:
        return None

    @property
    def token_shape(self) -> tuple[int, ...]:
        return (self.config.tokenizer.autoencoder.latent_width,)

    def check_values(self, step: int, tokens: Tensor) -> None:
        if not bool(tokens.isfinite().all()):
            raise InputError(f"tokens: step {step} has values that are no numbers")

    def log_prob(self, *args: Any, **options: Any) -> LogProb:
        raise InputError(f"{type(self).__name__} draws vectors by a flow or a diffusion and knows no likelihood; its "
                         "loss on pictures is `loss`")

    @torch.no_grad()
    def training_tokens(self, cached: Tensor, plan: Plan | None = None) -> list[Tensor]:
        """The vectors of every step, (B, L_k, C), of cached moments (B, L, 2C), the finest grid's last: of one draw
        from the Gaussians, with torch's generator."""
        height, width = (plan or self.tokenizer.plan).grid
        cached = cached[:, -height * width:]
        noise = randn_pictures(*cached.shape[:-1], cached.shape[-1] // 2, device=cached.device)
        drawn = self.tokenizer.quantiser.scaled(gaussian.draw(cached, noise, dim=-1))
        return self.steps_of(drawn.transpose(1, 2).unflatten(2, (height, width)), plan)

    def steps_of(self, latent_BCHW: Tensor, plan: Plan | None = None, order: Tensor | None = None) -> list[Tensor]:
        """The vectors of every step of a latent, by a plan and an order of cells (the system's own by default)."""
        plan = plan or self.plan
        quantiser = self.tokenizer.quantiser
        canvas = Canvas.empty(plan, quantiser, len(latent_BCHW), latent_BCHW.device)
        order = self.order(plan) if order is None else order
        return pyramid.encode(latent_BCHW, canvas, lambda k, z: quantiser.quantise(z), order=order).tokens

    def check_smoothing(self, label_smoothing: float) -> None:
        """Raises InputError where labels should be smoothed: vectors have none."""
        if label_smoothing:
            raise InputError(f"label_smoothing is for codes; {type(self).__name__} draws vectors, leave it at 0")

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of vectors (B, L_k, C) of every step, its mean at every step (K,), and None."""
        raise NotImplementedError
