"""What pictures of a model that text steers are asked for by, and where a judge ranks what was asked for."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.data import PictureDataset
from nextscale.data.emoji_captions import STYLE_WORDS, split_style, with_style
from nextscale.data.prompts import Prompt
from nextscale.errors import InputError
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.text_agreement import CANDIDATES, clip_score, draw_others, rank_phrases
from nextscale.evaluation.text_judge import PictureTextJudge

MOST_CAPTIONS = 20_000
"""Captions of a data set that wrong answers are drawn from, at most, spread over it."""


@dataclass(frozen=True)
class Prompts:
    """What samples are asked for by.

    texts: as the file or the pictures of the data have them, in their order; negatives: what each is led away from, ""
    for nothing; source: what they are from; captions: whether they are those of a data set. A row of labels is the
    place of a prompt among the different ones.
    """

    texts: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str
    captions: bool = False

    @classmethod
    def of_dataset(cls, dataset: PictureDataset) -> Prompts:
        """The canonical captions of a data set's pictures. Raises DataError where pictures have none."""
        dataset.need_captions()
        texts = tuple(str(dataset.caption(place)) for place in range(len(dataset)))
        return cls(texts, ("",) * len(texts), f"captions of {dataset.source.name} [{dataset.split}]", True)

    @classmethod
    def of_file(cls, prompts: Sequence[Prompt], name: str) -> Prompts:
        """Those of a file. Raises InputError where one has a ratio of its own."""
        if any(one.ratio is not None for one in prompts):
            raise InputError(f"{name}: pictures that are measured have one shape; take the ratios out of the prompts")
        return cls(tuple(one.text for one in prompts), tuple(one.negative for one in prompts), name)

    @property
    def different(self) -> list[tuple[str, str]]:
        """Prompts with their negative ones, each once."""
        return list(dict.fromkeys(zip(self.texts, self.negatives, strict=True)))

    @property
    def digest(self) -> str:
        """What tells these prompts from others."""
        return hashlib.sha256(json.dumps([self.texts, self.negatives]).encode()).hexdigest()[:16]

    def rows(self, source: str, count: int, seed: int) -> Tensor:
        """A row for every picture, (count, 1); picture i has the same whatever the count.

        source: ``data`` (as often as they are there, shuffled by the seed), ``even`` (the different ones in turn),
        ``none`` (the empty prompt).
        """
        number, different = torch.arange(count), self.different
        if source == "none":
            return torch.full((count, 1), len(different))
        if source == "even":
            return (number % len(different))[:, None]
        place = {one: i for i, one in enumerate(different)}
        each = torch.tensor([place[one] for one in zip(self.texts, self.negatives, strict=True)])
        order = torch.randperm(len(each), generator=torch.Generator().manual_seed(seed))
        return each[order[number % len(each)]][:, None]

    def labels(self, system: Any, rows_B1: Tensor) -> Any:
        """The rows as ``generate`` takes them."""
        chosen = [[*self.different, ("", "")][row] for row in rows_B1[:, 0].tolist()]
        away = [negative for _, negative in chosen]
        return system.prompts([text for text, _ in chosen], away if any(away) else None)


def caption_rows(dataset: PictureDataset, places: np.ndarray) -> Tensor | None:
    """Label rows (N, 1) of pictures that are equal where their captions are, None where some have none."""
    texts = [dataset.caption(place) for place in places.tolist()]
    if None in texts:
        return None
    index = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([[index[text]] for text in texts])


def things_of(texts: Sequence[str]) -> list[str]:
    """What phrases are of, each once, without the style that canonical captions of the emoji set end with."""
    return list(dict.fromkeys(split_style(text)[0] for text in texts))


def things_in(dataset: PictureDataset) -> list[str]:
    """What the pictures of a whole data set are of, all its splits; of a large one of ``MOST_CAPTIONS`` pictures."""
    source = dataset.source
    places = np.linspace(0, len(source) - 1, min(len(source), MOST_CAPTIONS)).round().astype(int).tolist()
    return things_of([texts[0] for place in places if (texts := source.captions(place))])


def agreement(judge: PictureTextJudge, vectors_ND: Tensor, asked: Sequence[str],
              things: Sequence[str]) -> dict[str, Any]:
    """Figures of a judge on pictures that were asked for by phrases, ``rank_phrases`` of each.

    vectors_ND: the judge's, of the pictures; things: what wrong phrases are of, with the style of the asked one; fewer
    than 100 make fewer candidates, and chance more. ``styles``: of those pictures whose phrase names a style of the
    emoji set, the same phrase among the other styles. ``diversity``: mean distance of the judge's vectors of one
    phrase.
    """
    split = [split_style(phrase) for phrase in asked]
    pool = list(dict.fromkeys([*things, *(thing for thing, _ in split)]))
    figures: dict[str, Any] = {"pictures": len(asked)}
    if len(pool) < 2:
        return {**figures, "note": "one phrase has no others to be ranked among; ask for several"}
    place = {thing: i for i, thing in enumerate(pool)}
    drawn = draw_others([place[thing] for thing, _ in split], range(len(pool)), min(CANDIDATES, len(pool)) - 1)
    others = [[with_style(pool[i], word) for i in row] for row, (_, word) in zip(drawn, split, strict=True)]
    ranking = rank_phrases(judge, vectors_ND, asked, others)
    figures |= {"phrases": ranking.figures(), "clip_score": clip_score(ranking.cosine_N)}
    styled = [i for i, (_, word) in enumerate(split) if word]
    if styled:
        words = [word for word, _ in STYLE_WORDS.values()]
        variants = [[with_style(split[i][0], word) for word in words if word != split[i][1]] for i in styled]
        figures["styles"] = rank_phrases(judge, vectors_ND[styled], [asked[i] for i in styled], variants).figures()
    index = {text: i for i, text in enumerate(dict.fromkeys(asked))}
    apart = pairwise_distance(vectors_ND, torch.tensor([[index[text]] for text in asked]))
    if apart.pairs:
        figures["diversity"] = apart._asdict()
    return figures
