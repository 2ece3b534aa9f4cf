"""What text-to-picture systems share: prompts, negative prompts, and the training loss by captions."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.conditions.text import TextCondition, TextRows
from nextscale.conditions.text_encoders import open_text_encoder
from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_words import WordEncoder
from nextscale.errors import InputError
from nextscale.objectives.distillation import Direction, distillation_loss
from nextscale.parallel import rand_pictures
from nextscale.plan import Plan
from nextscale.sampling.generation import Generation, Preview
from nextscale.systems.system import Config, Schedule, System
from nextscale.tokenizers import pyramid


@dataclass(frozen=True)
class PromptRows:
    """Prompts with their features, a row each; what they are led away from, where that was given."""

    prompts: tuple[str, ...]
    features: TextFeatures
    negative: TextFeatures | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, items: slice) -> PromptRows:
        return PromptRows(self.prompts[items], self.features.gather(items),
                          None if self.negative is None else self.negative.gather(items))

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompts)


Prompts = PromptRows | TextFeatures | Sequence[str | None] | str | None
Negative = TextFeatures | Sequence[str] | str | None


class TextConditionalSystem(System):
    """A system whose pictures are of prompts.

    ``text`` makes conditions of an encoder's features; ``encoder`` makes features of prompts. One that is trained with
    the system (``config.words``) is a module and lies in its weights file; any other is opened by name
    (``config.encoder``) at the first prompt, unless its user has set one.
    """

    transformer_parts: tuple[str, ...] = ("generator", "head", "text")
    # Of the generator alone: blocks of a text encoder, and of what draws in rounds, have the same names.
    adapter_targets = tuple(f"generator.*.{name}" for name in (
        "attention.qkv", "attention.projection", "text.query", "text.kv", "text.projection", "mlp.expand",
        "mlp.contract"))
    text: Any

    # Which parameters read the text encoder's features, as patterns of their names.
    text_front: ClassVar[tuple[str, ...]] = ("text.*",)

    def __init__(self, config: Config):
        super().__init__(config)
        self.encoder: Any = None  # an attribute of the class would hide a module
        if self.config.words is not None:
            self.encoder = WordEncoder(self.config.words)
            self.transformer_parts = (*self.transformer_parts, "encoder")

    def features(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, where the system lies. Raises MissingExtraError where the encoder's package isn't there,
        InputError for what are no prompts."""
        if self.encoder is None:
            self.encoder = open_text_encoder(self.config.encoder, device=self.device, offload="auto")
        found: TextFeatures = self.encoder.encode(prompts).to(self.device)
        return found

    def label_rows(self, labels: Prompts, count: int | None = None) -> PromptRows:
        """Prompts with their features: one prompt serves ``count`` pictures, None is the empty prompt; features may be
        given in the place of prompts."""
        if isinstance(labels, PromptRows):
            return labels
        if isinstance(labels, TextFeatures):
            return PromptRows(("",) * len(labels), labels.to(self.device))
        if labels is None or isinstance(labels, str):
            if count is not None and count < 1:
                raise InputError(f"count is {count}; it must be at least 1")
            labels = [labels] * (count or 1)
        prompts = ["" if prompt is None else prompt for prompt in labels]
        if not prompts:
            raise InputError("no prompts were given; give at least one, or None for none")
        if count is not None and len(prompts) != count:
            raise InputError(f"{len(prompts)} prompts were given for {count} pictures")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise InputError(f"prompt {prompt!r} is no text")
        return PromptRows(tuple(prompts), self.features(prompts))

    def prompts(self, prompts: Prompts, negative: Negative = None, count: int | None = None) -> PromptRows:
        """Prompts with what they are led away from: one negative prompt for all, or one a picture, or their features.
        ``generate``, ``stream``, ``edit`` and ``enlarge`` take such rows in the place of prompts."""
        rows = self.label_rows(prompts, count)
        given = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, (list, tuple)) else []
        blank = sum(isinstance(prompt, str) and not prompt.strip() for prompt in given)
        if blank:
            logging.getLogger("nextscale").warning(
                f"text: {blank} of {len(given)} prompts {'is' if blank == 1 else 'are'} empty, which asks for nothing "
                "in particular; any picture may come (None says the same without this line)")
        if negative is None:
            return rows
        if isinstance(negative, TextFeatures):
            several = negative.to(self.device)
            away: Any = several.gather([0] * len(rows)) if len(several) == 1 else several
        else:
            away = [negative] * len(rows) if isinstance(negative, str) else list(negative)
        if len(away) != len(rows):
            raise InputError(f"{len(away)} negative prompts were given for {len(rows)} pictures; give one, or one each")
        features = away if isinstance(away, TextFeatures) else self.features(away)
        return PromptRows(rows.prompts, rows.features, features)

    @classmethod
    def takes(cls, config: Any) -> dict[str, bool]:
        return {"captions": True, "latents": False}

    def training_rows(self, batch: Mapping[str, Any]) -> Any:
        return batch["caption"]

    def generate(self, prompts: Prompts = None, count: int | None = None, *,  # type: ignore[override]
                 negative_prompt: Negative = None, ratio: float | None = None, **options: Any) -> Generation:
        """Draw pictures of prompts: one for ``count`` pictures, or one a picture.

        negative_prompt: what they are led away from instead of nothing, one for all or one a picture; ratio: width to
        height, the nearest that the system has; options: as ``System.generate``'s. Raises InputError where both a ratio
        and a schedule are given.
        """
        options = self.shaped(ratio, options)
        return super().generate(self.prompts(prompts, negative_prompt, count), None, **options)

    def stream(self, prompts: Prompts = None, count: int | None = None, *,  # type: ignore[override]
               negative_prompt: Negative = None, ratio: float | None = None, **options: Any) -> Iterator[Preview]:
        """The same step by step, see ``System.stream``."""
        options = self.shaped(ratio, options)
        return super().stream(self.prompts(prompts, negative_prompt, count), None, **options)

    def edit(self, pictures: Tensor, redraw: Tensor, prompts: Prompts = None, *,  # type: ignore[override]
             negative_prompt: Negative = None, ratio: float | None = None, **options: Any) -> Generation:
        """Redraw a region, see ``System.edit``; pictures are of the shape that the ratio means."""
        options = self.shaped(ratio, options)
        return super().edit(pictures, redraw, self.prompts(prompts, negative_prompt, len(pictures)), **options)

    def enlarge(self, pictures: Tensor, prompts: Prompts = None, *,  # type: ignore[override]
                negative_prompt: Negative = None, ratio: float | None = None, **options: Any) -> Generation:
        """Super-resolution, see ``System.enlarge``, to the shape that the ratio means."""
        options = self.shaped(ratio, options)
        return super().enlarge(pictures, self.prompts(prompts, negative_prompt, len(pictures)), **options)

    def shaped(self, ratio: float | None, options: dict[str, Any]) -> dict[str, Any]:
        """Options with the schedule of a ratio (width to height) among them."""
        if ratio is None:
            return options
        if options.get("schedule") is not None:
            raise InputError("ratio and schedule both say which scales; give one")
        return {**options, "schedule": self.schedule_of_ratio(1 / ratio)}

    def schedule_of_ratio(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio (height / width). Raises InputError where the system has one shape only."""
        raise InputError(f"{type(self).__name__} draws one shape only, {self.plan.grid[0]}x{self.plan.grid[1]} cells; "
                         "leave the ratio out")

    def label_names(self, row: str) -> str:
        return row

    def nothing(self, features: TextFeatures) -> TextFeatures:
        """The features that mean no prompt was given, as many as these."""
        found: TextFeatures = self.text.nothing(features)
        return found

    def condition(self, rows: PromptRows) -> TextCondition:
        return TextCondition(self.text, rows.features, rows.negative, self.nothing)

    def dropped(self, rows: Any, label_dropout: float, part_dropout: float) -> TextRows:
        """Conditions of features, or of captions, some of them dropped, by ``rand_pictures``."""
        gone_B = rand_pictures(len(rows), device=self.device) < label_dropout if label_dropout else None
        return self.conditioned(rows, gone_B)

    def conditioned(self, rows: Any, gone_B: Tensor | None = None) -> TextRows:
        """The same where it is said which pictures lose their prompt."""
        features = (rows if isinstance(rows, TextFeatures) else self.training_features(rows)).to(self.device)
        if gone_B is not None:
            features = features.replaced(self.nothing(features), gone_B)
        found: TextRows = self.text(features)
        return found

    def forced(self, tokens: Sequence[Tensor], correct: bool = False, latent: Tensor | None = None,
               plan: Plan | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """What a training pass predicts, and the un-embedded input of every step. correct, latent: for systems that
        train on corrupted input; plan: of all steps, where it isn't the model's own."""
        with torch.no_grad():
            canvas = Canvas.empty(plan or self.plan, self.tokenizer.quantiser, len(tokens[0]), self.device)
            return list(tokens), pyramid.replay(list(tokens), canvas).reads

    def distillation_loss(self, teacher: TextConditionalSystem, tokens: Sequence[Tensor], rows: tuple[Any, Any],
                          label_dropout: float = 0.1, step_weights: Sequence[float] | None = None,
                          direction: Direction = "teacher-student", correct: bool = False, plan: Plan | None = None,
                          **options: Any) -> tuple[Tensor, ...]:
        """How far this system's distributions of all tokens are from those of a teacher of the same tokenizer, see
        ``nextscale.objectives.distillation``. rows: captions or features, for this system and for the teacher, who drop
        those of the same pictures; correct, options: as ``forced`` has them."""
        tokens, reads = self.forced(tokens, correct, plan=plan, **options)
        gone_B = rand_pictures(len(tokens[0]), device=self.device) < label_dropout if label_dropout else None
        with torch.no_grad():
            taught = teacher.conditioned(rows[1], gone_B)
        conditions = self.conditioned(rows[0], gone_B), taught
        return distillation_loss(self, teacher, plan or self.plan, tokens, reads, conditions,
                                 step_weights or (1.0,) * len(plan or self.plan), direction,
                                 self.further_divergence(teacher, tokens, conditions, direction))

    def further_divergence(self, teacher: Any, tokens: Sequence[Tensor], conditions: tuple[TextRows, TextRows],
                           direction: Direction) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What ``distillation_loss`` adds, of both hidden states, where a system draws by more than its head's
        logits."""
        return None

    def training_features(self, captions: Sequence[str]) -> TextFeatures:
        """Features of captions in training: with a gradient to an encoder that is trained along."""
        if not isinstance(self.encoder, WordEncoder):
            with torch.no_grad():
                return self.features(captions)
        found: TextFeatures = self.encoder(self.encoder.tokenise(captions).to(self.device))
        return found
