"""WebDataset tar shards on a local disk, as a source that is read in any order.

A shard holds samples: files that share a name up to its first dot. ``0001.jpg`` is the picture of sample ``0001``,
``0001.txt`` its caption, ``0001.cls`` its class, ``0001.json`` fields of both. The ``webdataset`` package reads shards
as streams, in which an exact resume or a shuffle by seed cannot be had, and decodes pickles; here the headers are read
once and a picture then is a read at an offset. Nothing is ever unpacked and no path inside a shard is ever opened.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.data.captions import texts_in, texts_of
from nextscale.data.images import SUFFIXES
from nextscale.data.picture_source import (
    PictureSource,
    class_labels,
    left_right_note,
    splits_of_files,
    stack_labels,
    text_key,
)
from nextscale.errors import DataError, InputError

_BLOCK = 512
_TEXTS = (".txt", ".caption")
_LARGEST_PICTURE = 1 << 28
_LARGEST_TEXT = 1 << 20


@dataclass
class _Sample:
    """Where one sample lies: (member name, offset, bytes) of its picture, the rest read already."""

    key: str
    picture: tuple[str, int, int] | None = None
    captions: tuple[str, ...] = ()
    label: int | str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


class TarSource(PictureSource):
    """Local WebDataset shards. Where all file names begin with ``train``, ``val`` or ``test``, these are the splits.

    Args:
        files: the shards, in the order of samples.
        label_fields: fields of the samples' ``.json`` that hold classes; by default ``.cls``, or else ``label``, where
            every sample has it.
        caption_field: field of the samples' ``.json`` that holds captions, one or a list; by default ``.txt`` or
            ``.caption``, or else ``text``, ``caption`` or ``prompt``.

    Raises:
        DataError: a shard that is no plain tar file or was cut short; no pictures; samples without the fields.
    """

    def __init__(
        self, files: Sequence[Path], label_fields: Sequence[str] | None = None, caption_field: str | None = None
    ) -> None:
        self.name = str(files[0]) if len(files) == 1 else str(files[0].parent)
        self._shards = list(files)
        samples: list[_Sample] = []
        shards: list[int] = []
        lost: list[tuple[str, str]] = []
        for number, file in enumerate(files):
            for sample in _samples(file):
                if sample.picture is None:
                    lost.append((f"{file}:{sample.key}", f"{file}:{sample.key} has no picture beside its other files"))
                    continue
                samples.append(sample)
                shards.append(number)
        if not samples:
            raise DataError(f"{self.name} holds no samples with a picture ({', '.join(SUFFIXES)}); check the shards")
        self.lost = lost
        places = [sample.picture for sample in samples if sample.picture is not None]
        self._names = [name for name, _, _ in places]
        self._where = np.array([(offset, size) for _, offset, size in places], dtype=np.int64)
        self._shard = np.array(shards, dtype=np.int32)
        self._captions = [
            sample.captions if sample.captions and caption_field is None else texts_in(sample.fields, caption_field)
            for sample in samples
        ]
        self.has_captions = any(self._captions)
        if caption_field is not None and not self.has_captions:
            raise DataError(f"{self.name}: no sample has a caption in field {caption_field!r} of its .json")
        self.class_names, self.labels = self._find_labels(samples, label_fields)
        self.split_keys = np.array([text_key(sample.key) for sample in samples], dtype=np.uint64)
        found = splits_of_files(files) if len(files) > 1 else None
        if found is not None:
            self.split_names = sorted(set(found))
            self.split_of = np.array([self.split_names.index(name) for name in found])[self._shard]
        self.left_right_matters = left_right_note(files[0].parent)

    def _find_labels(
        self, samples: Sequence[_Sample], fields: Sequence[str] | None
    ) -> tuple[list[list[str]], np.ndarray]:
        if fields is not None:
            columns = [
                class_labels([s.fields.get(name) for s in samples], None, f"{self.name}: field {name!r}")
                for name in fields
            ]
            return stack_labels(columns, len(samples))
        for where, values in (
            (".cls", [sample.label for sample in samples]),
            ("field 'label'", [sample.fields.get("label") for sample in samples]),
        ):
            if all(value is not None for value in values):
                return stack_labels([class_labels(values, None, f"{self.name}: {where}")], len(samples))
        return stack_labels([], len(samples))

    def title(self, position: int) -> str:
        """Shard and member of the picture."""
        return f"{self._shards[self._shard[position]]}:{self._names[position]}"

    def encoded(self, position: int) -> bytes:
        """See :meth:`PictureSource.encoded`."""
        offset, size = (int(value) for value in self._where[position])
        if size > _LARGEST_PICTURE:
            raise InputError(f"{self.title(position)} has {size:,} bytes, the bound is {_LARGEST_PICTURE:,}")
        try:
            with self._shards[self._shard[position]].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise InputError(f"{self.title(position)} cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise InputError(f"{self.title(position)} ends after {len(data)} of {size} bytes; fetch its shard again")
        return data

    def texts(self, position: int) -> tuple[str, ...]:
        """See :meth:`PictureSource.texts`."""
        return self._captions[position]


def _samples(file: Path) -> Iterator[_Sample]:
    """Samples of one shard in its order; raises DataError where it is damaged."""
    found: dict[str, _Sample] = {}
    try:
        # "r:" takes no compression: inside a compressed archive no offset can be read.
        with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            end = 0
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isreg() and not member.issparse():
                    _take(found, archive, member)
            _check_end(file, raw, end)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check the path") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{file} is cut short or no plain tar file ({reason}); fetch it again, uncompressed") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}); check its permissions") from None
    yield from found.values()


def _check_end(file: Path, raw: Any, end: int) -> None:
    """A whole archive ends with blocks of zeros; Python's reader takes one that lacks them for whole."""
    raw.seek(0, 2)
    length = raw.tell()
    raw.seek(end)
    after = raw.read(_BLOCK)
    if length < end or len(after) < _BLOCK:
        raise DataError(f"{file} is cut short: it ends at byte {length:,} without a tar file's end; fetch it again")
    if any(after):
        raise DataError(f"{file} is damaged at byte {end:,}; fetch it again")


def _take(found: dict[str, _Sample], archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, dot, rest = base.partition(".")
    if not stem or not dot:
        return
    key, suffix = _plain(f"{folder}/{stem}" if folder else stem), f".{rest.lower()}"
    if suffix in SUFFIXES:
        found.setdefault(key, _Sample(key)).picture = (_plain(member.name), member.offset_data, member.size)
    elif suffix in (*_TEXTS, ".cls", ".json"):
        sample = found.setdefault(key, _Sample(key))
        text = _text(archive, member)
        if suffix in _TEXTS:
            sample.captions = texts_of(text)
        elif suffix == ".cls":
            sample.label = int(text) if text.strip().isdecimal() else text.strip()
        else:
            _take_fields(sample, text)


def _take_fields(sample: _Sample, text: str) -> None:
    try:
        fields = json.loads(text)
    except ValueError:
        return
    if not isinstance(fields, dict):
        return
    sample.fields = fields


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream = archive.extractfile(member)  # a view of the bytes; nothing is written
    if stream is None or member.size > _LARGEST_TEXT:
        return ""
    return stream.read().decode("utf-8", "replace")


def _plain(name: str) -> str:
    """A member's name on one line, whatever is in it."""
    return name.encode("unicode_escape").decode("ascii") if not name.isprintable() else name
