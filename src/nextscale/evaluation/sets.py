"""Sets of pictures to compare: of a data set, drawn by a model, or sent through a tokenizer; all seen block by block.

Every set names what it depends on (``request``), so that its features can be kept on disk and found again.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nextscale.context import Hook
from nextscale.data import PictureDataset
from nextscale.data.controls import make_controls
from nextscale.errors import InputError
from nextscale.evaluation.blocks import Blocks
from nextscale.evaluation.features import Extractor
from nextscale.evaluation.text_judge import PictureTextJudge

THUMBNAIL = 32  # pixels a side, for nearest neighbours by pixels


class Codec(Protocol):
    """A tokenizer as this room sees it: pictures to tokens of every step and back; fewer steps give a preview."""

    def encode(self, pictures: Tensor) -> list[Tensor]: ...

    def decode(self, tokens: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    codec: encodes and decodes; system: also draws and scores, None for a tokenizer alone; size: height and width in
    pixels; vocabulary, bits: of the codebook and of a coded picture, 0 and None where tokens are vectors; classes,
    class_names: of the labels, a kind each.
    """

    name: str
    fingerprint: str
    codec: Codec
    size: tuple[int, int]
    vocabulary: int
    bits: float | None
    system: Any = None
    classes: tuple[int, ...] = ()
    class_names: Sequence[Sequence[str]] = ()

    @property
    def takes_prompts(self) -> bool:
        """Whether text says what its pictures are of: then it has no classes."""
        return hasattr(self.system, "prompts")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of control maps that it may be steered by."""
        return getattr(getattr(getattr(self.system, "config", None), "control", None), "kinds", ())

    def labels(self, rows_Bn: Tensor) -> Any:
        """Rows of label indices as ``generate`` takes them, where it has classes."""
        return [tuple(None if index == size else index for index, size in zip(row, self.classes, strict=True))
                for row in rows_Bn.tolist()]


@dataclass(frozen=True)
class Pictures:
    """A set: what it depends on, how many, and ``read(range)`` giving (n, 3, H, W) in [-1, 1].

    labels_Nn: label rows, equal where pictures are of the same, None where nothing is known of them.
    """

    request: Mapping[str, Any]
    total: int
    read: Callable[[range], Tensor]
    labels_Nn: Tensor | None = None

    def some(self, positions: Sequence[int]) -> Tensor:
        return torch.cat([self.read(range(i, i + 1)) for i in positions])


def of_dataset(dataset: PictureDataset, limit: int | None = None) -> Pictures:
    """Pictures of a data set; with ``limit``, so many of them spread evenly over it."""
    places = places_of(dataset, limit)

    def read(block: range) -> Tensor:
        pixels, _ = dataset.read(places[block.start:block.stop])
        return torch.from_numpy(pixels[:, :3].astype(np.float32) / np.float32(127.5) - np.float32(1))

    # A sample of the pixels stands for all of them: reading a large set just to name it would double the work.
    digest = hashlib.sha256(dataset.rows[places].tobytes() + dataset.labels.numpy().tobytes())
    for i in np.linspace(0, len(places) - 1, min(8, len(places))).round().astype(np.int64):
        digest.update(dataset.read(places[i:i + 1])[0].tobytes())
    request = {"data": dataset.source.name, "split": dataset.split, "size": list(dataset.size),
               "pictures": len(places), "digest": digest.hexdigest()[:16]}
    return Pictures(request, len(places), read, dataset.labels[torch.from_numpy(places)])


def places_of(dataset: PictureDataset, limit: int | None = None) -> np.ndarray:
    """The positions of all pictures; with ``limit``, of so many spread evenly over the set."""
    if limit is None or limit >= len(dataset):
        return np.arange(len(dataset))
    return np.linspace(0, len(dataset) - 1, limit).round().astype(np.int64)


def of_blocks(blocks: Blocks) -> Pictures:
    """Pictures that a block file holds under ``pictures`` as bytes."""
    from nextscale import hub

    kept: dict[int, Tensor] = {}

    def read(wanted: range) -> Tensor:
        parts = []
        for block in blocks.ranges:
            if block.stop <= wanted.start or block.start >= wanted.stop:
                continue
            if block.start not in kept:
                kept.clear()
                kept[block.start] = hub.read_tensors(blocks.path(block))["pictures"]
            lo, hi = max(block.start, wanted.start) - block.start, min(block.stop, wanted.stop) - block.start
            parts.append(kept[block.start][lo:hi])
        return torch.cat(parts).float() / 127.5 - 1

    return Pictures(blocks.request, blocks.total, read)


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, rounded to the nearest grey level."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def feature_blocks(out: Any, pictures: Pictures, extractor: Extractor) -> tuple[Blocks, Callable[[range], Any]]:
    """Features (and logits) of a set: where they lie, and how a block is computed."""
    request = {"of": dict(pictures.request), "features": extractor.name, "weights": extractor.fingerprint}

    def make(block: range) -> dict[str, Tensor]:
        found = extractor(pictures.read(block))
        return {"features": found.features_BD, **{f"logits_{kind}": one for kind, one in enumerate(found.logits)}}

    return Blocks(out, "features", request, pictures.total), make


def thumbnail_blocks(out: Any, pictures: Pictures) -> tuple[Blocks, Callable[[range], Any]]:
    """Small versions of a set, at most 32 pixels a side, averaged down: what nearest neighbours by pixels look at."""

    def make(block: range) -> dict[str, Tensor]:
        found = pictures.read(block)
        if max(found.shape[-2:]) > THUMBNAIL:
            found = F.interpolate(found, size=(THUMBNAIL, THUMBNAIL), mode="area")
        return {"thumbnails": to_bytes(found)}

    return Blocks(out, "thumbnails", {"of": dict(pictures.request), "side": THUMBNAIL}, pictures.total), make


def judged_blocks(out: Any, pictures: Pictures, judge: PictureTextJudge) -> tuple[Blocks, Callable[[range], Any]]:
    """A text judge's vectors of a set."""
    request = {"of": dict(pictures.request), "judge": judge.name, "weights": judge.fingerprint}

    def make(block: range) -> dict[str, Tensor]:
        return {"vectors": judge.pictures(pictures.read(block))}

    return Blocks(out, "judged", request, pictures.total), make


@dataclass(frozen=True)
class LabelMap:
    """From one list of classes to another, a kind each: ``rows(labels)`` translates; ``how`` says by what."""

    tables: tuple[Tensor, ...]
    how: str

    def rows(self, labels_Nn: Tensor) -> Tensor:
        return torch.stack([table[labels_Nn[:, kind]] for kind, table in enumerate(self.tables)], 1)


def match_labels(names: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]],
                 counts: Sequence[int] = ()) -> LabelMap | None:
    """How labels called ``names`` translate to classes called ``wanted`` (of ``counts`` where these have no names).

    Kind by kind: by name where every name is known, by index where one side has numbers for names and the counts
    allow it; None where a kind fits neither way.
    """
    sizes = list(counts) or [len(kind) for kind in wanted]
    if not names or len(names) != len(sizes):
        return None
    tables, how = [], set()
    for kind, of_kind in enumerate(names):
        there = list(wanted[kind]) if kind < len(wanted) else []
        if there and set(of_kind) <= set(there):
            tables.append(torch.tensor([there.index(name) for name in of_kind]))
            how.add("name")
        elif (_numbers(of_kind) or not there or _numbers(there)) and len(of_kind) <= sizes[kind]:
            tables.append(torch.arange(len(of_kind)))
            how.add("index")
        else:
            return None
    return LabelMap(tuple(tables), " and ".join(sorted(how)))


def _numbers(names: Sequence[str]) -> bool:
    return all(name.isdecimal() for name in names)


def labels_to_draw(source: str, count: int, subject: Subject, dataset: PictureDataset | None, seed: int) -> Tensor:
    """A label row for every picture, (count, n); picture i has the same whatever the count.

    source: ``data`` (as often as the data set has them, shuffled by the seed), ``even`` (all classes in turn, the kinds
    of label independent of each other), ``none`` (no label: the model's null row).

    Raises InputError where the data set's classes are not the model's.
    """
    number = torch.arange(count)
    if source == "none":
        return torch.tensor(subject.classes).expand(count, -1)
    if source == "even":
        rows, rest = [], number
        for size in subject.classes:
            rows.append(rest % size)
            rest = rest // size
        return torch.stack(rows, 1)
    if dataset is None:
        raise InputError("labels from the data need --data; use --labels even")
    known = match_labels(dataset.class_names, subject.class_names, subject.classes)
    if known is None:
        raise InputError(f"{dataset.source.name}: its classes ({_sizes(dataset.class_names)}) are not the model's "
                         f"({subject.classes}); use --labels even")
    return known.rows(dataset.labels[places_to_draw(count, dataset, seed)])


def places_to_draw(count: int, dataset: PictureDataset, seed: int) -> Tensor:
    """Which of the data set's pictures a drawn one is like, (count,): all of them in turn, shuffled by the seed."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return order[torch.arange(count) % len(dataset)]


def maps_of(dataset: PictureDataset, places_N: Tensor, kind: str | None) -> dict[str, Any]:
    """What ``generate`` and ``log_prob`` take of some pictures' own control maps; nothing without a kind."""
    if kind is None:
        return {}
    pixels, _ = dataset.read(places_N.numpy())
    return {"control": {kind: torch.from_numpy(make_controls(pixels, [kind]))}}


def _sizes(names: Sequence[Sequence[str]]) -> str:
    return " x ".join(str(len(kind)) for kind in names) or "none"


def told(hooks: Sequence[Hook]) -> dict[str, list[str]]:
    """What pictures hang on of the hooks that they are drawn with."""
    found = [repr(hook) for hook in hooks if not hook.same_pictures]
    return {"hooks": found} if found else {}


def sample_blocks(out: Any, subject: Subject, labels_Nn: Tensor, rule: Mapping[str, Any], seed: int, purpose: str,
                  settings: Mapping[str, Any], batch_size: int, hooks: Sequence[Hook] = (),
                  labels_of: Callable[[Tensor], Any] | None = None,
                  steered: Callable[[range], Mapping[str, Any]] = lambda block: {},
                  ) -> tuple[Blocks, Callable[[range], Any]]:
    """Pictures that a system draws: picture i has seed ``seed + i`` and the i-th label, which came about by ``rule``.
    labels_of: rows as the system takes them, by default those of classes; steered: what else ``generate`` takes for
    some of the pictures, which ``rule`` names, too.

    The count is no part of the request: asking for more goes on with what is there.
    """
    used = subject.system.settings_for(purpose, dict(settings))
    request = {"model": subject.fingerprint, "seed": seed, "settings": repr(used), "size": list(subject.size),
               "labels": dict(rule), **told(hooks)}

    def make(block: range) -> dict[str, Tensor]:
        rows_Bn = labels_Nn[block.start:block.stop]
        labels = (labels_of or subject.labels)(rows_Bn)
        drawn = subject.system.generate(labels, seeds=[seed + i for i in block], purpose=purpose, output="torch",
                                        batch_size=batch_size, progress=False, hooks=hooks, **settings,
                                        **steered(block))
        found = {"pictures": to_bytes(drawn.images), "labels": rows_Bn}
        return found if drawn.log_prob is None else {**found, "log_prob": drawn.log_prob.float().cpu()}

    return Blocks(out, "samples", request, len(labels_Nn)), make
