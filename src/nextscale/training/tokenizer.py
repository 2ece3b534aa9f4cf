"""Training a tokenizer: the task that the trainer runs (flow 1 of the design)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.data.sheets import save_image, sheet
from nextscale.objectives.reconstruction import (
    ReconstructionWeights,
    adaptive_scale,
    adversarial_weight,
    discriminator_loss,
    psnr,
    reconstruction_loss,
)
from nextscale.tokenizers.discriminator import PatchDiscriminator
from nextscale.tokenizers.multiscale_vq import MultiScaleVQ, MultiScaleVQConfig
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups


@dataclass(frozen=True)
class TokenizerRecipe:
    """What a tokenizer's training adds to its model and the trainer's settings.

    revive_every: steps between revivals of dead codes (0 for never); revive_below: a code is dead when it is hit less
    than this share of the mean; revive_until: share of the training after which codes are left alone.
    discriminator_width: channels of the patch discriminator's first layer.
    """

    model: MultiScaleVQConfig = field(default_factory=MultiScaleVQConfig)
    weights: ReconstructionWeights = field(default_factory=ReconstructionWeights)
    revive_every: int = 50
    revive_below: float = 0.03
    revive_until: float = 0.8
    discriminator_width: int = 64


class TokenizerTask:
    """Trains a :class:`MultiScaleVQ`; with an adversarial weight, a patch discriminator beside it.

    perceptual: frozen module that measures a distance of two pictures; held_out: pictures (N, 3, S, S') that sample
    sheets reconstruct, each beside its original. codes_of: a trained tokenizer whose codes stay as they are while its
    decoder alone is trained on, so that generators of these codes go on working.
    """

    def __init__(self, recipe: TokenizerRecipe, perceptual: nn.Module | None = None, held_out: Tensor | None = None,
                 codes_of: MultiScaleVQ | None = None):
        self.recipe, self.perceptual, self.held_out = recipe, perceptual, held_out
        self.codes_stay = codes_of is not None
        self.tokenizer = codes_of or MultiScaleVQ(recipe.model)
        self.trained: list[nn.Module] = [self.tokenizer]
        if self.codes_stay:
            self.trained = [self.tokenizer.from_latent, self.tokenizer.decoder]
            self.tokenizer.requires_grad_(False)
            for part in self.trained:
                part.requires_grad_(True)
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if perceptual is not None:
            perceptual.eval().requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"tokenizer": self.tokenizer}
        self.phases: tuple[str, ...] = ("main",)
        if recipe.weights.adversarial:
            self.discriminator = PatchDiscriminator(recipe.discriminator_width)
            self.modules["discriminator"] = self.discriminator
            self.phases = ("main", "discriminator")
        self._residuals_NC: Tensor | None = None
        self._pair: tuple[Tensor, Tensor] | None = None

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        if phase == "discriminator":
            return decay_groups([self.discriminator], weight_decay)
        if self.recipe.model.codebook_update == "ema":
            self.tokenizer.quantiser.codebook.weight.requires_grad_(False)
        return decay_groups(self.trained, weight_decay)

    def averaged(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if phase == "discriminator":
            return self._discriminator_loss(at)
        picture, weights = batch["picture"], self.recipe.weights
        picture = picture.contiguous(memory_format=torch.channels_last)
        output = self.tokenizer.decode_only(picture) if self.codes_stay else self.tokenizer(picture)
        self._residuals_NC = output.residuals_NC
        loss, terms = reconstruction_loss(picture, output, weights, self.perceptual)
        weight = adversarial_weight(weights, at.progress)
        if weight:
            adversarial = -self.discriminator(output.reconstruction).mean()
            scale = adaptive_scale(loss, adversarial, self.tokenizer.decoder.output.weight)
            loss = loss + weight * scale * adversarial
            terms["adversarial"] = adversarial.detach()
        self._pair = (picture, output.reconstruction.detach()) if "discriminator" in self.phases else None
        return loss, terms

    def _discriminator_loss(self, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if self._pair is None or not adversarial_weight(self.recipe.weights, at.progress):
            return None, {}
        real, fake = self._pair
        return discriminator_loss(self.discriminator(real), self.discriminator(fake)), {}

    def after_step(self, at: TrainingStep) -> Metrics:
        recipe, quantiser = self.recipe, self.tokenizer.quantiser
        revived = 0
        due = recipe.revive_every and at.step % recipe.revive_every == 0 and at.progress < recipe.revive_until
        if due and not self.codes_stay and self._residuals_NC is not None:
            revived = quantiser.revive(self._residuals_NC, recipe.revive_below)
        if at.step % 20:
            return {"revived": float(revived)}
        hits_V = quantiser.usage_KV.sum(0)
        share_V = hits_V / hits_V.sum()
        perplexity = torch.exp(-(share_V * share_V.clamp_min(1e-12).log()).sum())
        return {"revived": float(revived), "perplexity": perplexity, "usage_last": quantiser.usage()[-1]}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        if self.held_out is None:
            return None
        tokenizer = averaged["tokenizer"].eval()
        assert isinstance(tokenizer, MultiScaleVQ)
        x = self.held_out.to(next(tokenizer.parameters()).device)
        y = reconstruct(tokenizer, x)
        both = torch.stack([x[:64], y[:64]], 1).flatten(0, 1)
        save_image(sheet(both, columns=16), out / f"reconstruction-{at.step:08d}.png")
        return {"held_out/psnr": float(psnr(x, y).mean())}

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


@torch.no_grad()
def reconstruct(tokenizer: MultiScaleVQ, pictures: Tensor, batch: int = 64,
                each: Callable[[int], None] | None = None) -> Tensor:
    """Pictures through the codes and back, in batches."""
    found = []
    for start in range(0, len(pictures), batch):
        found.append(tokenizer.decode(tokenizer.encode(pictures[start:start + batch]).canvas))
        if each is not None:
            each(min(start + batch, len(pictures)))
    return torch.cat(found)
