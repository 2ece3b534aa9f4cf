"""Training a tokenizer: the task that the trainer runs (flow 1 of the design)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.data.sheets import save_image, sheet
from nextscale.layers.resize import resize
from nextscale.objectives.reconstruction import (
    SSIM_SIDE,
    ReconstructionWeights,
    adaptive_scale,
    adversarial_weight,
    discriminator_loss,
    psnr,
    reconstruction_loss,
    ssim,
)
from nextscale.tokenizers.bitwise import Bits
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.discriminator import PatchDiscriminator
from nextscale.tokenizers.quantiser import CodebookQuantiser, Quantiser
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups

_USAGE_EVERY = 20


@dataclass(frozen=True)
class TokenizerRecipe:
    """What a tokenizer's training adds to its model and the trainer's settings.

    revive_every: steps between revivals of dead codes (0 for never); revive_below: a code is dead when it is hit less
    than this share of the mean; revive_until: share of the training after which codes are left alone. Kinds without a
    codebook have nothing to revive. discriminator_width: channels of the patch discriminator's first layer.
    drafts: where scales replace each other (a schedule of ``l2-vq``), how many of the coarser ones, drawn at random,
    are coded, decoded and compared with the picture at their own size beside the last (FlexVAR, arXiv 2502.20313,
    section 3.2); every one counts in the loss as much as the last.
    """

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    weights: ReconstructionWeights = field(default_factory=ReconstructionWeights)
    revive_every: int = 50
    revive_below: float = 0.03
    revive_until: float = 0.8
    discriminator_width: int = 64
    drafts: int = 1


class TokenizerTask:
    """Trains a :class:`Tokenizer` of any kind; with an adversarial weight, a patch discriminator beside it.

    perceptual: frozen module that measures a distance of two pictures; held_out: pictures (N, 3, S, S') that sample
    sheets reconstruct, each beside its original. codes_of: a trained tokenizer whose codes stay as they are while its
    decoder alone is trained on, so that generators of these codes go on working.
    """

    def __init__(self, recipe: TokenizerRecipe, perceptual: nn.Module | None = None, held_out: Tensor | None = None,
                 codes_of: Tokenizer | None = None):
        self.recipe, self.perceptual, self.held_out = recipe, perceptual, held_out
        self.codes_stay = codes_of is not None
        self.tokenizer = codes_of or Tokenizer(recipe.model)
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
        quantiser = self.tokenizer.quantiser
        if self.recipe.model.codebook_update == "ema" and isinstance(quantiser, CodebookQuantiser):
            quantiser.codebook.weight.requires_grad_(False)
        return decay_groups(self.trained, weight_decay)

    def averaged(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if phase == "discriminator":
            return self._discriminator_loss(at)
        picture, weights = batch["picture"], self.recipe.weights
        picture = picture.contiguous(memory_format=torch.channels_last)
        plan = self.tokenizer.plan_for(picture)
        wants_entropy = weights.of_entropy(self.recipe.model.kind) != 0
        output = (self.tokenizer.decode_only(picture, plan) if self.codes_stay
                  else self.tokenizer(picture, wants_entropy, plan))
        self._residuals_NC = output.residuals_NC
        loss, terms = reconstruction_loss(picture, output, weights, self.perceptual, self.recipe.model.kind)
        drafts = self._drafts(picture, wants_entropy)
        if drafts:
            loss = (loss + torch.stack(drafts).sum()) / (1 + len(drafts))
            terms["drafts"] = torch.stack(drafts).detach().mean()
        weight: float | Tensor = adversarial_weight(weights, at.progress)
        if weight:
            adversarial = -self.discriminator(output.reconstruction).mean()
            if weights.adversarial_adaptive:
                weight = weight * adaptive_scale(loss, adversarial, self.tokenizer.decoder.output.weight)
            loss = loss + weight * adversarial
            terms["adversarial"] = adversarial.detach()
        self._pair = (picture, output.reconstruction.detach()) if "discriminator" in self.phases else None
        return loss, terms

    def _drafts(self, picture: Tensor, wants_entropy: bool) -> list[Tensor]:
        """The losses of some coarser scales, each against the picture at its size."""
        grids, config = self.recipe.model.grids, self.recipe.model
        if config.kind != "l2-vq" or len(grids) == 1 or self.codes_stay or picture.shape[-2:] != (
                self.tokenizer.picture_size):
            return []
        found = []
        for step in torch.randperm(len(grids) - 1)[:self.recipe.drafts].tolist():
            output = self.tokenizer.draft(picture, step, wants_entropy)
            height, width = output.reconstruction.shape[-2:]
            small = resize(picture, (height, width), "area")
            loss, _ = reconstruction_loss(small, output, self.recipe.weights, self.perceptual, config.kind)
            found.append(loss)
        return found

    def _discriminator_loss(self, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if self._pair is None or not adversarial_weight(self.recipe.weights, at.progress):
            return None, {}
        real, fake = self._pair
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        return discriminator_loss(on_real, on_fake), {
            "discriminator/real": on_real.detach().mean(), "discriminator/fake": on_fake.detach().mean()}

    def after_step(self, at: TrainingStep) -> Metrics:
        """Revives dead codes, and now and then tells how the codes of every scale are used (on training batches, by
        their moving average)."""
        recipe, quantiser = self.recipe, self.tokenizer.quantiser
        found: dict[str, float | Tensor] = {}
        if self.codes_stay:
            return found
        if isinstance(quantiser, CodebookQuantiser) and recipe.revive_every:
            found["revived"] = 0.0
            if (self._residuals_NC is not None and at.progress < recipe.revive_until
                    and at.step % recipe.revive_every == 0):
                found["revived"] = float(quantiser.revive(self._residuals_NC, recipe.revive_below))
        if self.recipe.model.continuous:
            found["latent_scale"] = quantiser.scale.clone()
        elif at.step % _USAGE_EVERY == 0:
            found.update(usage_metrics(quantiser))
        return found

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        if self.held_out is None:
            return None
        tokenizer = averaged["tokenizer"].eval()
        assert isinstance(tokenizer, Tokenizer)
        x = self.held_out.to(next(tokenizer.parameters()).device)
        y = reconstruct(tokenizer, x)
        both = torch.stack([x[:64], y[:64]], 1).flatten(0, 1)
        save_image(sheet(both, columns=16), out / f"reconstruction-{at.step:08d}.png")
        found = {"held_out/psnr": float(psnr(x, y).mean()), "held_out/l1": float((x - y).abs().mean())}
        if min(x.shape[-2:]) >= SSIM_SIDE:
            found["held_out/ssim"] = float(ssim(x, y).mean())
        if self.perceptual is not None:
            parts = zip(x.split(64), y.split(64), strict=True)
            found["held_out/perceptual"] = float(
                sum(self.perceptual(a, b).mean() * len(a) for a, b in parts) / len(x))
        return found

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


def usage_metrics(quantiser: Quantiser) -> dict[str, Tensor]:
    """Share of the codes in use and perplexity of every scale, ``usage_k`` and ``perplexity_k``, and of bitwise kinds
    ``balance_k``, from the record that a quantiser keeps while it is trained."""
    found = {"usage": quantiser.usage(), "perplexity": quantiser.perplexity()}
    if isinstance(quantiser, Bits):
        found["balance"] = quantiser.balance()
    return {f"{name}_{k}": value for name, values_K in found.items() for k, value in enumerate(values_K)}


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, pictures: Tensor, batch: int = 64,
                each: Callable[[int], None] | None = None) -> Tensor:
    """Pictures through the codes and back, in batches."""
    found = []
    for start in range(0, len(pictures), batch):
        found.append(tokenizer.decode(tokenizer.encode(pictures[start:start + batch]).canvas))
        if each is not None:
            each(min(start + batch, len(pictures)))
    return torch.cat(found)
