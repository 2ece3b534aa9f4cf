"""Likelihood: what the model says of real pictures, in nats a token and bits a dimension (flow 5 of the design)."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nextscale.data import PictureDataset
from nextscale.data.captions import captions_fingerprint
from nextscale.evaluation.blocks import Blocks
from nextscale.evaluation.sets import Pictures, Subject, maps_of, match_labels


def likelihood_blocks(out: Any, subject: Subject, pictures: Pictures, dataset: PictureDataset, limit: int | None,
                      batch_size: int, control: str | None = None) -> tuple[Blocks, Callable[[range], Any], str]:
    """Log-probability (n, K) of the tokens of pictures at every step, given their labels, and their own maps of the
    kind ``control``.

    pictures: ``sets.of_dataset(dataset, limit)``. Where the data's classes aren't the model's, pictures are scored
    without a label, and where text steers and they have no caption, without a prompt; the third result says which.
    """
    known = None if subject.takes_prompts else match_labels(dataset.class_names, subject.class_names, subject.classes)
    places = torch.arange(len(dataset)) if limit is None or limit >= len(dataset) else \
        torch.linspace(0, len(dataset) - 1, limit, dtype=torch.float64).round().long()
    how = "no label" if known is None else f"the picture's label (matched by {known.how})"
    how += f" and its {control} map" if control else ""
    request = {"of": dict(pictures.request), "model": subject.fingerprint, "condition": how,
               **subject.system.scored_with()}
    captions: list[str | None] = []
    if subject.takes_prompts:
        captions = [dataset.caption(place) for place in places.tolist()]
        how = "the picture's caption" if any(captions) else "no prompt"
        digest = captions_fingerprint([caption or ""] for caption in captions)
        request |= {"condition": how, "captions": digest}

    def make(block: range) -> dict[str, Tensor]:
        found = []
        for start in range(block.start, block.stop, batch_size):
            part = range(start, min(start + batch_size, block.stop))
            labels: Any = None
            if captions:
                labels = captions[part.start:part.stop]
            elif known is not None:
                rows = known.rows(dataset.labels[places[part.start:part.stop]])
                labels = [tuple(row) for row in rows.tolist()]
            else:
                labels = [None] * len(part)
            steered = maps_of(dataset, places[part.start:part.stop], control)
            found.append(subject.system.log_prob(pictures.read(part), labels, **steered).step.float().cpu())
        return {"step": torch.cat(found)}

    return Blocks(out, "likelihood", request, pictures.total), make, how


def likelihood_figures(log_prob_NK: Tensor, rows_K: list[int], dimensions: int) -> dict[str, Any]:
    """Nats a token (all, and at every step), bits a dimension and a picture, with standard errors over pictures.

    log_prob_NK: nats; rows_K: tokens at every step; dimensions: colour values of a picture. A token is the unit of the
    first, so the finest step counts most; bits a dimension are those of the coded picture, not of its pixels.
    """
    nats_NK = -log_prob_NK.double()
    tokens = torch.tensor(rows_K, dtype=torch.float64)
    total_N = nats_NK.sum(1)
    error = float(total_N.std() / math.sqrt(len(total_N))) if len(total_N) > 1 else float("nan")
    bits = math.log(2) * dimensions
    return {
        "pictures": len(total_N),
        "nats_a_token": float(total_N.mean() / tokens.sum()), "nats_a_token_error": error / float(tokens.sum()),
        "nats_a_token_by_step": (nats_NK.mean(0) / tokens).tolist(),
        "bits_a_dimension": float(total_N.mean()) / bits, "bits_a_dimension_error": error / bits,
        "bits_a_dimension_by_step": (nats_NK.mean(0) / bits).tolist(),
        "nats_a_picture": float(total_N.mean()), "bits_a_picture": float(total_N.mean()) / math.log(2),
    }
