"""Do pictures show what was asked for in words? Where a judge ranks the asked phrase among others, and how varied the
pictures of one phrase are."""
from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextscale.data.orders import mix
from nextscale.errors import InputError
from nextscale.evaluation.copies import pixel_rmse
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.text_judge import PictureTextJudge

CANDIDATES = 100
CLIP_SCORE_WEIGHT = 2.5
_OTHERS = 0x7E87
_Z = 1.959964  # of a 95% interval


class Rate(NamedTuple):
    """A share with its 95% interval."""

    rate: float
    low: float
    high: float


def wilson(rate: float, count: int) -> Rate:
    """Wilson's interval of a share that was found in ``count`` independent trials (Wilson, JASA 1927).

    centre (p + z^2 / 2n) / (1 + z^2 / n), half width z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n).
    """
    if count < 1:
        raise InputError("a share of no trials has no interval; give at least one picture")
    square = _Z**2 / count
    centre = (rate + square / 2) / (1 + square)
    half = _Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count)) / (1 + square)
    return Rate(rate, max(0.0, centre - half), min(1.0, centre + half))


def draw_others(asked: Sequence[int], concepts: Sequence[Hashable], count: int = CANDIDATES - 1,
                seed: int = 0) -> list[list[int]]:
    """Wrong answers for every asked phrase: ``count`` phrases of a list, of concepts all different from it and from
    each other.

    asked: (N,) positions in the list; concepts: (M,) what each phrase of the list is of. A draw hangs on the seed, the
    position and how often that position was asked for before, not on what else is asked. Raises InputError where there
    are too few concepts.
    """
    of_concept = {concept: i for i, concept in enumerate(dict.fromkeys(concepts))}
    number_M = np.array([of_concept[concept] for concept in concepts])
    if len(of_concept) <= count:
        raise InputError(f"{count} wrong phrases need {count + 1} concepts, the list has {len(of_concept)}")
    seen: dict[int, int] = {}
    found = []
    for position in asked:
        turn = seen[position] = seen.get(position, -1) + 1
        order_M = np.argsort(mix(seed, _OTHERS, position, turn, np.arange(len(concepts))), kind="stable")
        # The first phrase of each concept in a random order of all.
        first = np.unique(number_M[order_M], return_index=True)[1]
        order = order_M[np.sort(first)]
        found.append(order[number_M[order] != number_M[position]][:count].tolist())
    return found


@dataclass(frozen=True)
class Ranking:
    """Where a judge puts the asked phrase of N pictures.

    rank_N: from 1; ties count against it; candidates: of how many phrases, the asked one among them; cosine_N: of the
    picture and its phrase; others_N: mean cosine with the others; phrases: how many different ones were asked for.
    """

    rank_N: Tensor
    candidates: int
    cosine_N: Tensor
    others_N: Tensor
    phrases: int

    def top(self, k: int) -> Rate:
        """Share of the pictures whose phrase is among the k best.

        The interval is that of as many trials as there are phrases: pictures of one phrase are no independent trials.
        """
        return wilson(float((self.rank_N <= k).float().mean()), self.phrases)

    def figures(self) -> dict[str, Any]:
        """Everything as numbers; chance is k in ``candidates``."""
        tops = {f"top_{k}": self.top(k)._asdict() for k in (1, 5) if k < self.candidates}
        return {"pictures": len(self.rank_N), "phrases": self.phrases, "candidates": self.candidates, **tops,
                "median_rank": float(self.rank_N.median()), "cosine": float(self.cosine_N.mean()),
                "cosine_of_others": float(self.others_N.mean())}


def rank_phrases(judge: PictureTextJudge, pictures_ND: Tensor, asked: Sequence[str],
                 others: Sequence[Sequence[str]]) -> Ranking:
    """The rank of every picture's asked phrase among it and the others, by cosine.

    pictures_ND: the judge's vectors of N pictures; asked: their phrases; others: wrong ones of each, equally many, of
    the same form: names that :func:`draw_others` drew, or the same name in the other styles. Raises InputError where
    numbers differ or a vector is not a number.
    """
    widths = {len(one) for one in others}
    if not asked or not len(pictures_ND) == len(asked) == len(others) or len(widths) != 1 or 0 in widths:
        raise InputError(f"{len(pictures_ND)} pictures have {len(asked)} asked phrases and {len(others)} rows of "
                         f"{sorted(widths)} others; give each picture one phrase and equally many others")
    index = {text: i for i, text in enumerate(dict.fromkeys([*asked, *(text for row in others for text in row)]))}
    vectors_PD = judge.phrases(list(index))
    if not (pictures_ND.isfinite().all() and vectors_PD.isfinite().all()):
        raise InputError(f"{judge.name} gave vectors that are not numbers; check its weights")
    rows_NC = torch.tensor([[index[right], *(index[text] for text in row)]
                            for right, row in zip(asked, others, strict=True)])
    # Not as one matrix product, whose columns may differ in their last bit where phrases are the same.
    cosine_NC = torch.cat([(of_BD[:, None] * vectors_PD[of_BC]).sum(2)
                           for of_BD, of_BC in zip(pictures_ND.split(64), rows_NC.split(64), strict=True)])
    rank_N = 1 + (cosine_NC[:, 1:] >= cosine_NC[:, :1]).sum(1)
    return Ranking(rank_N, rows_NC.shape[1], cosine_NC[:, 0], cosine_NC[:, 1:].mean(1), len(set(asked)))


def clip_score(cosine_N: Tensor) -> float:
    """CLIPScore: mean of 2.5 max(cos, 0) (Hessel et al., arXiv 2104.08718, eq. 1); others write 100 max(cos, 0)."""
    return float(CLIP_SCORE_WEIGHT * cosine_N.clamp_min(0).mean())


def text_figures(judge: PictureTextJudge, pictures: Tensor, asked: Sequence[str], others: Sequence[Sequence[str]],
                 styles: Sequence[Sequence[str]] | None = None) -> dict[str, Any]:
    """What a judge says of pictures (N, 3, S, S') in [-1, 1] that were asked for by phrases.

    others: see :func:`rank_phrases`; styles: of each picture its phrase in the other styles.

    Returns ``judge``, ``phrases`` (figures of a :class:`Ranking`), ``styles`` where given, ``clip_score``, and
    ``diversity``: the mean distance of pictures of one phrase, in the judge's vectors and in grey levels of pixels
    (NaN where no phrase has two pictures).
    """
    vectors_ND = judge.pictures(pictures)
    ranking = rank_phrases(judge, vectors_ND, asked, others)
    found = {"judge": judge.name, "fingerprint": judge.fingerprint, "phrases": ranking.figures(),
             "clip_score": clip_score(ranking.cosine_N), "diversity": phrase_diversity(pictures, vectors_ND, asked)}
    if styles is not None:
        found["styles"] = rank_phrases(judge, vectors_ND, asked, styles).figures()
    return found


def phrase_diversity(pictures: Tensor, vectors_ND: Tensor, asked: Sequence[str]) -> dict[str, Any]:
    """How far apart pictures of one phrase lie, mean over phrases of the mean over pairs: of unit vectors, in [0, 2],
    and of pixels as root mean square error in grey levels."""
    index = {text: i for i, text in enumerate(dict.fromkeys(asked))}
    labels_N1 = torch.tensor([[index[text]] for text in asked])
    of_vectors, of_pixels = pairwise_distance(vectors_ND, labels_N1), pairwise_distance(pictures, labels_N1)
    return {"phrases": of_vectors.labels, "pairs": of_vectors.pairs, "judge": of_vectors.mean,
            "pixels": float(pixel_rmse(torch.tensor(of_pixels.mean), pictures))}
