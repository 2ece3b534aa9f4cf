"""Labelled pictures by position: folders, parquet, tar shards, sets of the Hugging Face hub, or the shipped emoji set.

:func:`open_dataset` is the way in. Pictures that cannot be read are skipped, and ``dataset.skipped`` names them;
a set that fits into memory is decoded once when it is opened, so that nothing is found broken in mid-training.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextscale.data.buckets import Bucket, bucket_name, nearest_bucket
from nextscale.data.crops import CROP_AREA, DRAWS, RANDOM_CROPS, Crop, check_crop, resize_crop
from nextscale.data.images import open_fitted, to_uint8
from nextscale.data.orders import mix
from nextscale.data.sources import PictureSource, open_source
from nextscale.errors import DataError, InputError

MEMORY_BYTES = 1 << 30
_DECODERS = 2
_CROP_DRAW = 0xC409
_NAMED = 5


@dataclass(frozen=True)
class Sample:
    """One picture: uint8 (3, H, W), its labels, its alpha mask uint8 (1, H, W) if it has one, its stable id, and the
    first of its captions if it has any."""

    picture: Tensor
    labels: tuple[int, ...]
    alpha: Tensor | None
    id: int
    caption: str | None = None


class PictureDataset:
    """Pictures of one split of a source, by position: all of one size, or each of its bucket's.

    Args:
        source: where they come from.
        size: side in pixels, or (height, width).
        rows: positions in the source that belong to this set.
        split: name of the split, for messages.
        crop: how pictures of other proportions are fitted, see :func:`~nextscale.data.crops.resize_crop`.
        memory_bytes: sets whose decoded pictures fit are decoded now; of larger ones (and where crops are random or
            buckets asked for) the headers are checked now and pictures found broken later are replaced by the next
            good one. Of parquet files larger than memory nothing is checked, since that would read them whole.
        report: called with (done, total) while opening.
        crop_area: of random crops, see :func:`~nextscale.data.crops.window`.
        buckets: (height, width) of aspect-ratio buckets; each picture goes to the one of the nearest proportions, and
            ``size`` is not used.

    Attributes:
        skipped: (title, reason) of every picture found broken so far.
        class_names: one list a label kind.
        labels: long (N, n).
        rows: (N,) position of each picture in the source: its id.
        bucket_of: (N,) index of each picture's bucket, None without buckets.
        blocks, blocks_at_once: see :class:`~nextscale.data.picture_source.PictureSource`.

    Raises:
        DataError: nothing readable is left.
    """

    def __init__(
        self,
        source: PictureSource,
        size: int | tuple[int, int],
        rows: np.ndarray,
        split: str,
        crop: Crop = "center",
        memory_bytes: int = MEMORY_BYTES,
        report: Callable[[int, int], None] | None = None,
        crop_area: float = CROP_AREA,
        buckets: Sequence[Bucket] | None = None,
    ) -> None:
        check_crop(crop, crop_area)
        self.source, self.split, self.crop, self.crop_area = source, split, crop, crop_area
        self.size = (size, size) if isinstance(size, int) else size
        self.buckets = list(buckets) if buckets else None
        self.class_names = source.class_names
        self.has_alpha, self.has_captions = source.has_alpha, source.has_captions
        self.left_right_matters = source.left_right_matters
        self.skipped: list[tuple[str, str]] = list(source.lost)
        self._skipped_rows: set[int] = set()
        self._lock = threading.Lock()
        height, width = self.size
        planes = 4 if self.has_alpha else 3
        fixed = crop not in RANDOM_CROPS and self.buckets is None
        in_memory = fixed and source.blocks is None and len(rows) * planes * height * width <= memory_bytes
        # Allocated lazily by the system, so an unused tail (broken pictures) costs nothing.
        self._pixels = np.empty((len(rows), planes, height, width), dtype=np.uint8) if in_memory else None
        good = self._look(rows, report)
        self.skipped.sort()
        if not good.any():
            why = f"; the first: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(f"{source.name} has no readable picture in split {split!r}{why}")
        if self._pixels is not None and not good.all():
            self._pixels = self._pixels[good]
        self.rows = rows[good]
        self.bucket_of = None if self.buckets is None else nearest_bucket(self._sizes[good], self.buckets)
        self.labels = torch.from_numpy(np.ascontiguousarray(source.labels[self.rows], dtype=np.int64))
        self.blocks = None if source.blocks is None else source.blocks[self.rows]
        self.blocks_at_once = source.blocks_at_once

    def _look(self, rows: np.ndarray, report: Callable[[int, int], None] | None) -> np.ndarray:
        """Decodes the pictures, reads their sizes or checks their headers; which are good, (N,) bool."""
        good = np.zeros(len(rows), dtype=bool)
        self._sizes = np.ones((len(rows) if self.buckets else 0, 2), dtype=np.int64)
        if self.source.blocks is not None and self.buckets is None:
            return ~good

        def look(place: int) -> None:
            row = int(rows[place])
            try:
                if self.buckets is not None:
                    self._sizes[place] = self.source.size(row)
                elif self._pixels is None:
                    self.source.check(row)
                else:
                    self._pixels[place] = self._decode(row, self.size)
                good[place] = True
            except InputError as error:
                self._skip(row, error)

        with ThreadPoolExecutor(_DECODERS) as pool:
            for done, _ in enumerate(pool.map(look, range(len(rows)), chunksize=1), 1):
                if report is not None and (done % 64 == 0 or done == len(rows)):
                    report(done, len(rows))
        return good

    def _skip(self, row: int, error: InputError) -> None:
        with self._lock:
            if row not in self._skipped_rows:
                self._skipped_rows.add(row)
                self.skipped.append((self.source.title(row), str(error)))

    def _decode(self, row: int, size: tuple[int, int], epoch: int = 0, seed: int = 0) -> np.ndarray:
        """uint8 (3 or 4, H, W): the fitted picture, and its mask as the fourth plane."""
        words = mix(seed, _CROP_DRAW, epoch, row, np.arange(DRAWS)) if self.crop in RANDOM_CROPS else np.zeros(DRAWS)
        draws = ((words.astype(np.uint64) >> np.uint64(11)) * 2.0**-53).tolist()
        if not self.has_alpha:
            encoded, title = self.source.encoded(row), self.source.title(row)
            return to_uint8(open_fitted(encoded, size, self.crop, draws, self.crop_area, name=title)).numpy()
        image, alpha = self.source.read(row)
        if alpha is None:
            raise InputError(f"{self.source.title(row)} has no alpha mask")
        fitted = [resize_crop(one, size, self.crop, draws, self.crop_area) for one in (image, alpha)]
        return np.concatenate([to_uint8(one).numpy() for one in fitted])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label_counts(self) -> list[list[int]]:
        """How many pictures each class has, one list a label kind."""
        return [
            torch.bincount(self.labels[:, kind], minlength=len(names)).tolist()
            for kind, names in enumerate(self.class_names)
        ]

    @property
    def empty_classes(self) -> list[str]:
        """Classes of the source without a readable picture in this split."""
        return [
            name
            for names, counts in zip(self.class_names, self.label_counts, strict=True)
            for name, count in zip(names, counts, strict=True)
            if not count
        ]

    def in_buckets(self) -> dict[Bucket, PictureDataset]:
        """The pictures of every bucket that has any, each as a set of that one size; they share what is known to be
        broken."""
        if self.buckets is None or self.bucket_of is None:
            raise InputError(f"{self.source.name} was opened without buckets")
        found = {}
        for number, bucket in enumerate(self.buckets):
            here = np.flatnonzero(self.bucket_of == number)
            if len(here):
                one = copy(self)
                one.size, one.buckets, one.bucket_of = bucket, None, None
                one.rows, one.labels = self.rows[here], self.labels[torch.from_numpy(here)]
                one.skipped = list(self.skipped)
                one.blocks = None if self.blocks is None else self.blocks[here]
                found[bucket] = one
        return found

    def size_of(self, position: int) -> tuple[int, int]:
        """(height, width) that a picture is fitted to."""
        return self.size if self.buckets is None or self.bucket_of is None else self.buckets[self.bucket_of[position]]

    def captions(self, position: int) -> tuple[str, ...]:
        """Ways to say what a picture shows, the canonical one first; none where there is nothing to say. See
        :meth:`~nextscale.data.picture_source.PictureSource.captions`."""
        return self.source.captions(int(self.rows[position]))

    def caption(self, position: int) -> str | None:
        """The first of a picture's captions, None where it has none."""
        return next(iter(self.captions(position)), None)

    def read(
        self, positions: Sequence[int] | np.ndarray, epochs: Sequence[int] | np.ndarray | None = None, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decoded pictures of some positions, and the positions that were really read.

        Args:
            positions: (B,), all of one bucket where the set has buckets.
            epochs: (B,) what random crops hang on beside the seed and the picture's id; by default 0.
            seed: of random crops.

        Returns:
            uint8 (B, 3 or 4, H, W), the alpha mask as the fourth plane where the set has masks; positions (B,),
            which differ from those asked for where a picture was broken and the next good one took its place.

        Raises:
            InputError: pictures of several buckets.
        """
        asked = np.asarray(positions, dtype=np.int64)
        if self._pixels is not None:
            return self._pixels[asked], asked
        if self.bucket_of is not None and len(set(self.bucket_of[asked].tolist())) > 1:
            raise InputError("pictures of several buckets cannot lie in one batch; draw them by a BucketOrder")
        drawn = np.zeros_like(asked) if epochs is None else np.asarray(epochs, dtype=np.int64)
        read = [self._decode_or_next(int(at), int(epoch), seed) for at, epoch in zip(asked, drawn, strict=True)]
        return np.stack([pixels for pixels, _ in read]), np.array([place for _, place in read], dtype=np.int64)

    def _decode_or_next(self, position: int, epoch: int, seed: int) -> tuple[np.ndarray, int]:
        for shift in range(len(self)):
            place = (position + shift) % len(self)
            row = int(self.rows[place])
            if row in self._skipped_rows or (
                self.bucket_of is not None and self.bucket_of[place] != self.bucket_of[position]
            ):
                continue
            try:
                return self._decode(row, self.size_of(place), epoch, seed), place
            except InputError as error:
                self._skip(row, error)
        raise DataError(f"{self.source.name} has no readable picture left; {self.skipped[0][1]}")

    def __getitem__(self, position: int) -> Sample:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of a set of {len(self)} pictures")
        pixels, places = self.read([position % len(self)])
        whole = torch.from_numpy(pixels[0].copy())
        place = int(places[0])
        alpha = whole[3:] if self.has_alpha else None
        labels = tuple(self.labels[place].tolist())
        return Sample(whole[:3], labels, alpha, int(self.rows[place]), self.caption(place))

    def summary(self) -> str:
        """One line: how many pictures, of what, and how many were skipped."""
        classes = " x ".join(f"{len(names)} classes" for names in self.class_names) or "no classes"
        line = f"{self.source.name} [{self.split}]: {len(self):,} pictures, {classes}"
        if self.has_captions:
            line += ", captions"
        return f"{line}, {len(self.skipped):,} skipped as unreadable" if self.skipped else line

    def bucket_counts(self) -> dict[str, int]:
        """How many pictures each bucket has, by its name (height x width); empty without buckets."""
        if self.buckets is None or self.bucket_of is None:
            return {}
        counts = np.bincount(self.bucket_of, minlength=len(self.buckets)).tolist()
        return {bucket_name(bucket): count for bucket, count in zip(self.buckets, counts, strict=True)}

    def need_captions(self) -> None:
        """Raises DataError, one line that counts and names them, where pictures have no caption; class names are
        captions where no picture of the source has one of its own."""
        without = [row for row in self.rows.tolist() if not self.source.captions(row)]
        if without:
            classes = "" if self.has_captions else ", and no class has a name"
            raise DataError(
                f"{self.source.name} [{self.split}]: {len(without):,} of {len(self):,} pictures have no caption, the "
                f"first is {self.source.title(without[0])}{classes}; add a .txt beside it, or a text to its row or "
                "metadata, or name the field that has them by caption_field"
            )

    def need_classes(self) -> None:
        """Raises DataError, one line that names them, where classes have no readable picture (or there are none)."""
        if not self.class_names:
            raise DataError(f"{self.source.name}: the pictures have no classes; put them into one folder a class")
        if self.empty_classes:
            raise DataError(
                f"{self.source.name} [{self.split}]: no readable picture in {_listed(self.empty_classes)}; "
                "add pictures, remove the class, or use another split"
            )


def _listed(names: Sequence[str]) -> str:
    """``class 'a'`` or ``3 classes: a, b, c``, the first few of many."""
    if len(names) == 1:
        return f"class {names[0]!r}"
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{len(names):,} classes: {', '.join(names[:_NAMED])}{more}"


def open_dataset(
    spec: str | Path,
    size: int | tuple[int, int],
    split: str = "train",
    columns: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    crop: Crop = "center",
    memory_bytes: int = MEMORY_BYTES,
    report: Callable[[int, int], None] | None = None,
    crop_area: float = CROP_AREA,
    buckets: Iterable[Bucket] | None = None,
    captions: bool = False,
    caption_field: str | None = None,
) -> PictureDataset:
    """Opens a set of labelled pictures.

    Args:
        spec: ``"emoji"`` (the shipped set); a folder of images (subfolders are classes, captions in ``.txt`` files
            beside them or in ``metadata.jsonl``); a Hugging Face-layout parquet file, or a folder of them; a
            WebDataset ``.tar`` shard, a folder of them, or ``name-{000..099}.tar``; ``"hf:owner/name"`` or
            ``"hf:owner/name:configuration"`` for the ``datasets`` library.
        size: side in pixels, or (height, width).
        split: ``train``, ``validation``, ``test``, or ``all``. Folders, parquet files and shards named for splits
            make them; where none is named for validation, a hash of each picture's path, key or row takes a share of
            ``train``. The emoji set has ``train``, ``concept-test`` (concepts held out in all styles), ``style-test``
            (styles of other concepts).
        columns: parquet columns (or fields of ``metadata.jsonl``, of samples' ``.json``) that hold labels; by default
            ``label`` and ``style_label`` where they are there.
        validation_fraction: share of the training pictures in ``validation``, in [0, 1).
        crop: ``center``, ``pad``, ``adm``, ``random`` or ``random-resized``, see
            :func:`~nextscale.data.crops.resize_crop`.
        memory_bytes: see :class:`PictureDataset`.
        report: called with (done, total) while opening.
        crop_area: least share of the area that ``random-resized`` keeps, in (0, 1].
        buckets: (height, width) of aspect-ratio buckets, see :func:`~nextscale.data.buckets.aspect_buckets`.
        captions: every picture must have one.
        caption_field: parquet column (or field of ``metadata.jsonl``, of samples' ``.json``) that holds captions, one
            text or a list; by default ``text``, ``caption`` or ``prompt``.

    Raises:
        DataError: no such place, nothing in it, unreadable, cut short, columns or captions missing.
        InputError: unknown split or crop, fraction out of range.
        MissingExtraError: parquet without pyarrow, ``hf:`` without ``datasets``.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise InputError(f"validation_fraction is {validation_fraction}, it must be at least 0 and below 1")
    check_crop(crop, crop_area)
    source = open_source(spec, columns, caption_field=caption_field)
    splits = source.splits(validation_fraction)
    if split not in splits:
        raise InputError(f"{source.name} has no split {split!r}; it has {', '.join(splits)}")
    rows = np.flatnonzero(splits[split])
    if not len(rows):
        raise DataError(f"split {split!r} of {source.name} is empty ({len(source)} pictures in all); use 'all'")
    chosen = None if buckets is None else list(buckets)
    dataset = PictureDataset(source, size, rows, split, crop, memory_bytes, report, crop_area, chosen)
    if captions:
        dataset.need_captions()
    return dataset


def terminal_report(done: int, total: int) -> None:
    """A ``report`` for :func:`open_dataset`: one line that counts up, on terminals only."""
    if sys.stderr.isatty():
        print(f"\rreading pictures {done:,}/{total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)
