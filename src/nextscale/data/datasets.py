"""Labelled pictures by position: a folder of images, Hugging Face-layout parquet, or the shipped emoji set.

:func:`open_dataset` is the way in. Pictures that cannot be read are skipped, and ``dataset.skipped`` names them;
a set that fits into memory is decoded once when it is opened, so that nothing is found broken in mid-training.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextscale.data.images import Crop, resize_crop, to_uint8
from nextscale.data.orders import mix
from nextscale.data.sources import PictureSource, open_source
from nextscale.errors import DataError, InputError

MEMORY_BYTES = 1 << 30
_DECODERS = 2


@dataclass(frozen=True)
class Sample:
    """One picture: uint8 (3, H, W), its labels, its alpha mask uint8 (1, H, W) if it has one, its stable id."""

    picture: Tensor
    labels: tuple[int, ...]
    alpha: Tensor | None
    id: int


class PictureDataset:
    """Pictures of one split of a source, all of one size, by position.

    Args:
        source: where they come from.
        size: side in pixels, or (height, width).
        rows: positions in the source that belong to this set.
        split: name of the split, for messages.
        crop: how pictures of other proportions are fitted, see :func:`~nextscale.data.images.resize_crop`.
        memory_bytes: sets whose decoded pictures fit are decoded now; of larger ones the headers are checked now and
            pictures found broken later are replaced by the next good one.
        report: called with (done, total) while opening.

    Attributes:
        skipped: (title, reason) of every picture found broken so far.
        class_names: one list a label kind.
        labels: long (N, n).

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
    ) -> None:
        self.source, self.split, self.crop = source, split, crop
        self.size = (size, size) if isinstance(size, int) else size
        self.class_names = source.class_names
        self.has_alpha = source.has_alpha
        self.skipped: list[tuple[str, str]] = []
        self._skipped_rows: set[int] = set()
        self._lock = threading.Lock()
        height, width = self.size
        planes = 4 if self.has_alpha else 3
        in_memory = len(rows) * planes * height * width <= memory_bytes
        # Allocated lazily by the system, so an unused tail (broken pictures) costs nothing.
        self._pixels = np.empty((len(rows), planes, height, width), dtype=np.uint8) if in_memory else None
        good = np.zeros(len(rows), dtype=bool)

        def look(place: int) -> None:
            try:
                if self._pixels is None:
                    source.check(int(rows[place]))
                else:
                    self._pixels[place] = self._decode(int(rows[place]))
                good[place] = True
            except InputError as error:
                self._skip(int(rows[place]), error)

        with ThreadPoolExecutor(_DECODERS) as pool:
            for done, _ in enumerate(pool.map(look, range(len(rows)), chunksize=1), 1):
                if report is not None and (done % 64 == 0 or done == len(rows)):
                    report(done, len(rows))
        self.skipped.sort()
        if not good.any():
            why = f"; the first: {self.skipped[0][1]}" if self.skipped else ""
            raise DataError(f"{source.name} has no readable picture in split {split!r}{why}")
        if self._pixels is not None and not good.all():
            self._pixels = self._pixels[good]
        self.rows = rows[good]
        self.labels = torch.from_numpy(np.ascontiguousarray(source.labels[self.rows], dtype=np.int64))

    def _skip(self, row: int, error: InputError) -> None:
        with self._lock:
            if row not in self._skipped_rows:
                self._skipped_rows.add(row)
                self.skipped.append((self.source.title(row), str(error)))

    def _decode(self, row: int) -> np.ndarray:
        """uint8 (3 or 4, H, W): the fitted picture, and its mask as the fourth plane."""
        image, alpha = self.source.read(row)
        planes = [to_uint8(resize_crop(image, self.size, self.crop)).numpy()]
        if self.has_alpha:
            if alpha is None:
                raise InputError(f"{self.source.title(row)} has no alpha mask")
            planes.append(to_uint8(resize_crop(alpha, self.size, self.crop)).numpy())
        return np.concatenate(planes)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def label_counts(self) -> list[list[int]]:
        """How many pictures each class has, one list a label kind."""
        return [
            torch.bincount(self.labels[:, kind], minlength=len(names)).tolist()
            for kind, names in enumerate(self.class_names)
        ]

    def read(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decoded pictures of some positions, and the positions that were really read.

        Returns:
            uint8 (B, 3 or 4, H, W), the alpha mask as the fourth plane where the set has masks; positions (B,),
            which differ from those asked for where a picture was broken and the next good one took its place.
        """
        asked = np.asarray(positions, dtype=np.int64)
        if self._pixels is not None:
            return self._pixels[asked], asked
        read = [self._decode_or_next(int(position)) for position in asked]
        return np.stack([pixels for pixels, _ in read]), np.array([place for _, place in read], dtype=np.int64)

    def _decode_or_next(self, position: int) -> tuple[np.ndarray, int]:
        for shift in range(len(self)):
            place = (position + shift) % len(self)
            row = int(self.rows[place])
            if row in self._skipped_rows:
                continue
            try:
                return self._decode(row), place
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
        return Sample(whole[:3], tuple(self.labels[place].tolist()), alpha, int(self.rows[place]))

    def summary(self) -> str:
        """One line: how many pictures, of what, and how many were skipped."""
        classes = " x ".join(f"{len(names)} classes" for names in self.class_names) or "no classes"
        line = f"{self.source.name} [{self.split}]: {len(self):,} pictures, {classes}"
        return f"{line}, {len(self.skipped):,} skipped as unreadable" if self.skipped else line


def open_dataset(
    spec: str | Path,
    size: int | tuple[int, int],
    split: str = "train",
    columns: Sequence[str] | None = None,
    validation_fraction: float = 0.05,
    crop: Crop = "center",
    memory_bytes: int = MEMORY_BYTES,
    report: Callable[[int, int], None] | None = None,
) -> PictureDataset:
    """Opens a set of labelled pictures.

    Args:
        spec: ``"emoji"`` (the shipped set), a folder of images (subfolders are classes), a Hugging Face-layout
            parquet file, or a folder of such files.
        size: side in pixels, or (height, width).
        split: ``train``, ``validation`` (a hash of each picture's path or row decides), or ``all``; the emoji set has
            ``train``, ``concept-test`` (concepts held out in all styles), ``style-test`` (styles of other concepts).
        columns: parquet columns that hold labels; by default ``label`` and ``style_label`` where they are there.
        validation_fraction: share of pictures in ``validation``, in [0, 1).
        crop: ``center`` or ``pad``.
        memory_bytes: see :class:`PictureDataset`.
        report: called with (done, total) while opening.

    Raises:
        DataError: no such place, nothing in it, unreadable, columns missing.
        InputError: unknown split, fraction out of range.
        MissingExtraError: parquet without pyarrow.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise InputError(f"validation_fraction is {validation_fraction}, it must be at least 0 and below 1")
    source = open_source(spec, columns)
    splits = source.named_splits()
    if not splits:
        held_out = mix(0x5B117, source.split_keys) < np.uint64(int(validation_fraction * 2**64))
        splits = {"train": ~held_out, "validation": held_out}
    splits["all"] = np.ones(len(source), dtype=bool)
    if split not in splits:
        raise InputError(f"{source.name} has no split {split!r}; it has {', '.join(splits)}")
    rows = np.flatnonzero(splits[split])
    if not len(rows):
        raise DataError(f"split {split!r} of {source.name} is empty ({len(source)} pictures in all); use 'all'")
    return PictureDataset(source, size, rows, split, crop, memory_bytes, report)




def terminal_report(done: int, total: int) -> None:
    """A ``report`` for :func:`open_dataset`: one line that counts up, on terminals only."""
    if sys.stderr.isatty():
        print(f"\rreading pictures {done:,}/{total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)
