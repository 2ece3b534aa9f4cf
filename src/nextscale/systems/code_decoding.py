"""CoDe: collaborative decoding (Chen et al., arXiv 2411.17787), two VARs on one tokenizer.

The drafter, a large VAR, draws the first N scales; the refiner, a small one, reads them in one call and draws the
others. Plain trained models will do. Each can be tuned for its part: the drafter on the scales it draws, the refiner
towards what a large VAR would have said.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextscale.acceleration.code_decoding import (
    check_draft_steps,
    check_pair,
    sample_collaboratively,
    score_collaboratively,
)
from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassCondition, ClassTable
from nextscale.context import Hook
from nextscale.errors import InputError, did_you_mean
from nextscale.generators.var import VARGenerator, VARGeneratorConfig, initialise
from nextscale.heads.categorical import CategoricalHead
from nextscale.hub import NameMap
from nextscale.noise import Noise
from nextscale.objectives.distillation import Direction, distillation_loss
from nextscale.objectives.teacher_forcing import teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import Guidance, make_guidance
from nextscale.sampling.score import LogProb
from nextscale.systems.class_conditional import Label, Schedule, SystemConfig
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers import pyramid


@dataclass(frozen=True)
class CollaborativeSettings(Settings):
    """Settings with CoDe's own. draft_steps: how many scales the drafter draws, from 0, the refiner alone, to all;
    None: as many as the pair's configuration says."""

    draft_steps: int | None = None


PUBLISHED = {"top_k": 600, "temperatures": (1.1,) * 7 + (1.0,) * 3, "temperature_last": True}


@dataclass(frozen=True)
class CollaborativeConfig(VARConfig):
    """Two VARs: ``generator`` is the refiner's network, ``drafter`` the drafter's.

    draft_steps: N, the scales that are drafted; direction: of the refiner's divergence, see ``divergence``.

    Raises InputError where draft_steps leaves one of the two nothing to draw.
    """

    slug: ClassVar[str] = "code_decoding"

    drafter: VARGeneratorConfig = field(default_factory=lambda: VARGeneratorConfig.of_depth(30))
    draft_steps: int = 8
    direction: Direction = "student-teacher"
    settings: dict[str, CollaborativeSettings] = field(default_factory=lambda: {  # type: ignore[assignment]
        "pictures": CollaborativeSettings(5.0, top_p=0.95, **PUBLISHED),  # type: ignore[arg-type]
        "fid": CollaborativeSettings(2.5, top_p=0.96, **PUBLISHED)})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        scales = len(self.tokenizer.plan)
        if not 0 < self.draft_steps < scales:
            raise InputError(f"draft_steps is {self.draft_steps}; a pair on {scales} scales drafts 1 to {scales - 1}")


class Drafter(nn.Module):
    """The drafter's network, head and labels."""

    def __init__(self, config: CollaborativeConfig):
        super().__init__()
        self.generator = VARGenerator(config.drafter, config.tokenizer.plan, config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.drafter.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.drafter.width)


class CollaborativeSystem(VAR):
    """The system, see ``ClassConditionalSystem``; by itself the VAR that it extends is the refiner."""

    config_type: ClassVar[type[SystemConfig]] = CollaborativeConfig
    parts = ("refiner", "drafter")
    further = ("drafter",)
    starts_from = ("var",)

    def __init__(self, config: CollaborativeConfig):
        super().__init__(config)
        self.drafter: Any = Drafter(config)
        self.part = "refiner"

    def initialise(self, gate: float = 1e-3) -> CollaborativeSystem:
        super().initialise(gate)
        initialise(self.drafter.generator, self.drafter.head, self.drafter.labels, gate)
        return self

    def to_precision(self, precision: str) -> CollaborativeSystem:
        super().to_precision(precision)
        self.drafter.to(next(self.head.parameters()).dtype)
        return self

    def compile_networks(self, backend: Any = "inductor") -> None:
        super().compile_networks(backend)
        self.drafter.generator.compile(backend=backend)

    # Sampling and likelihood

    def steps_drafted(self, given: int | None) -> int:
        """How many scales the drafter draws. Raises InputError for more than there are."""
        steps = self.config.draft_steps if given is None else given
        check_draft_steps(steps, self.plan)
        return int(steps)

    def settings_for(self, purpose: str, changes: dict[str, Any]) -> Any:
        used = super().settings_for(purpose, changes)
        return replace(used, draft_steps=self.steps_drafted(used.draft_steps))  # so that a picture's metadata has it

    def networks(self, plan: Plan, used: Any = None) -> Sequence[tuple[Any, range]]:
        drafted = self.steps_drafted(None if used is None else used.draft_steps)
        both = ((self.drafter, range(drafted)), (self, range(drafted, len(plan))))
        return [(model, steps) for model, steps in both if steps]

    def start(self, labels_Bn: Tensor, guidance: Guidance, noise: Noise, plan: Plan | None = None) -> Run:
        run = super().start(labels_Bn, guidance, noise, plan)
        run.condition = ClassCondition(self.drafter.labels, labels_Bn)
        return run

    def loop(self, run: Run, guidance: Guidance, used: Any, hooks: Sequence[Hook],
             soft: Callable[..., Tensor] | None) -> Iterator[Run]:
        return sample_collaboratively(self.drafter, self, run, self.steps_drafted(used.draft_steps),
                                      lambda condition: replace(condition, table=self.labels),  # type: ignore[type-var]
                                      guidance, self.filters(used), hooks, soft)

    def scored_with(self) -> dict[str, Any]:
        return {"draft_steps": self.config.draft_steps}

    def log_prob(self, pictures_or_tokens: Tensor | Sequence[Tensor], labels: Sequence[Label] | Label = None,
                 guidance: Guidance | None = None, filters: Sequence[Any] = (), schedule: Schedule | None = None,
                 hooks: Sequence[Hook] = (), draft_steps: int | None = None) -> LogProb:
        """Log-probability as ``ClassConditionalSystem.log_prob`` has it: drafted scales under the drafter, the others
        under the refiner, given the same tokens. It is exact. draft_steps: as the setting."""
        plan = self.plan_of(schedule)
        tokens = (self.encode(pictures_or_tokens, schedule) if isinstance(pictures_or_tokens, Tensor)
                  else self._checked(pictures_or_tokens, plan))
        guidance, rows = guidance or make_guidance(1.0), self.label_rows(labels, len(tokens[0]))
        with torch.no_grad():
            return score_collaboratively(
                self.drafter, self, plan, tokens, self._reads(tokens),
                (ClassCondition(self.drafter.labels, rows), ClassCondition(self.labels, rows)),
                self.steps_drafted(draft_steps), guidance, guidance.branches, filters, hooks)

    def _reads(self, tokens: Sequence[Tensor]) -> list[Tensor | None]:
        canvas = Canvas.empty(self.plan, self.tokenizer.quantiser, len(tokens[0]), tokens[0].device)
        return pyramid.replay(list(tokens), canvas).reads

    # Training (section 3.3)

    def train_part(self, part: str) -> None:
        """``refiner``: distilled from the drafter, which is the teacher, so it comes first. ``drafter``: on the scales
        that it drafts alone."""
        super().train_part(part)
        self.part = part
        for module in (self.generator, self.head, self.labels):
            module.requires_grad_(part == "refiner")
        self.drafter.requires_grad_(part == "drafter")

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of the part that is trained, the cross-entropy of every step and the share of right guesses.

        The drafter's: cross-entropy of the scales up to N; figures of the others are NaN. The refiner's: the divergence
        from the teacher's distribution at every token, with weight 1 behind scale N and lambda up to it, which falls
        from 1 to 0 over the training (eq. 6; the published direction is an option, since only the paper has it).
        label_smoothing is the drafter's.
        """
        labels_Bn = self.labels.drop(labels_Bn, label_dropout, part_dropout)
        weights, drafted = list(step_weights or (1.0,) * len(tokens)), self.config.draft_steps
        if self.part == "drafter":
            tokens, weights = tokens[:drafted], weights[:drafted]
        plan = replace(self.plan, steps=self.plan.steps[:len(tokens)])
        with torch.no_grad():
            reads = self._reads(tokens)
        if self.part == "drafter":
            loss, *figures = teacher_forcing_loss(self.drafter.generator, self.drafter.head, plan, tokens, reads,
                                                  self.drafter.labels(labels_Bn), weights, label_smoothing)
            unseen = figures[0].new_full((len(self.plan) - len(tokens),), torch.nan)
            return loss, torch.cat([figures[0], unseen]), torch.cat([figures[1], unseen])
        weights = [w * (1 - self.progress) if k < drafted else w for k, w in enumerate(weights)]
        with torch.no_grad():
            teacher = self.drafter.labels(labels_Bn)
        loss, by_step, right, _ = distillation_loss(self, self.drafter, plan, tokens, reads,
                                                    (self.labels(labels_Bn), teacher), weights, self.config.direction)
        return loss, by_step, right

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        return []  # a training pass goes through one network or both, and one of them has no gradients

    # Published weights

    def published_names(self) -> tuple[NameMap, ...]:
        tokenizer, network = super().published_names()
        return tokenizer, network, network


def pair(drafter: VAR, refiner: VAR, draft_steps: int, **changes: Any) -> CollaborativeSystem:
    """Two trained VARs as a pair, without training: their networks are shared, not copied.

    The tokenizer and the sampling settings are the refiner's. changes: of the configuration. Raises InputError where
    they are no VARs, or their tokenizers, schedules or classes differ.
    """
    for role, one in (("drafter", drafter), ("refiner", refiner)):
        if one.config.slug != "var":
            raise InputError(f"CoDe: the {role} is a {one.config.slug}; a pair's folder holds two plain VARs, others "
                             "go on from each other by `sample_collaboratively`")
    check_pair(drafter, refiner)
    own = refiner.config
    settings = {purpose: CollaborativeSettings(**vars(found)) for purpose, found in own.settings.items()}
    config = CollaborativeConfig(own.tokenizer, own.generator, own.classes, own.class_names, **{
        "settings": settings, "drafter": drafter.config.generator, "draft_steps": draft_steps, **changes})
    with torch.device("meta"):
        system = CollaborativeSystem(config)
    for name in ("tokenizer", "generator", "head", "labels"):
        setattr(system, name, getattr(refiner, name))
    for name in ("generator", "head", "labels"):
        setattr(system.drafter, name, getattr(drafter, name))
    return system.train(refiner.training)


# Published pairs

DRAFT_STEPS = {f"code-n{n}": n for n in (6, 7, 8, 9)}


def preset_config(name: str) -> CollaborativeConfig:
    """The configuration of a published pair, code-n6 to code-n9: var-d30 drafts 6 to 9 of ten scales, var-d16 refines.

    Files of ``Zigeng/VAR_CoDe`` on the Hugging Face hub: ``drafter_N.pth`` and ``refiner_N.pth``; those of plain VARs
    load as well.
    """
    if name not in DRAFT_STEPS:
        raise InputError(f"unknown CoDe pair {name!r}{did_you_mean(name, DRAFT_STEPS)}")
    return CollaborativeConfig(generator=VARGeneratorConfig.of_depth(16), draft_steps=DRAFT_STEPS[name])
