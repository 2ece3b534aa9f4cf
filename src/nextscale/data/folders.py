"""A folder of image files, with or without class folders, captions beside the pictures or in ``metadata.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.data.captions import texts_in, texts_of
from nextscale.data.images import SUFFIXES
from nextscale.data.picture_source import (
    PictureSource,
    class_labels,
    left_right_note,
    split_named,
    stack_labels,
    text_key,
)
from nextscale.errors import DataError

METADATA_FILE = "metadata.jsonl"
LARGEST_TEXT = 1 << 20


class FolderSource(PictureSource):
    """Image files below a folder.

    - Where all lie in folders named for splits (``train``, ``val``, ``test``), these are the splits.
    - Where all lie in subfolders (of these), the first subfolders are the classes; one without pictures stays a class
      with none, so that it is found out.
    - ``metadata.jsonl``, as Hugging Face's imagefolder has it: one JSON object a line, ``file_name`` relative to it,
      the caption under ``text``, ``caption`` or ``prompt``, or a list of several, the class under ``label`` (where all
      pictures have one).
    - ``name.txt`` beside ``name.jpg`` is its caption where the metadata has none.

    Args:
        folder: the folder.
        label_fields: fields of the metadata that hold classes; by default ``label``, or the subfolders.
        caption_field: field of the metadata that holds captions, in the place of those above and of files beside.

    Raises:
        DataError: no pictures, metadata that is broken or names absent files, or no captions in their field.
    """

    def __init__(
        self, folder: Path, label_fields: Sequence[str] | None = None, caption_field: str | None = None
    ) -> None:
        self.name = str(folder)
        self.folder = folder
        pictures, texts, metadata_files, folders = _walk(folder)
        self.files = sorted(pictures)
        if not self.files:
            raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); check the path")
        self._beside = texts if caption_field is None else {}
        metadata = _read_metadata(folder, metadata_files, set(self.files))
        self._captions = {file: found for file, row in metadata.items() if (found := texts_in(row, caption_field))}
        if caption_field is not None and not self._captions:
            raise DataError(f"{folder}: no picture has a caption in field {caption_field!r} of {METADATA_FILE}")
        self.has_captions = bool(self._captions) or any(file.with_suffix("") in self._beside for file in self.files)
        depth = self._find_splits()
        if not self._take_labels(metadata, label_fields):
            self._classes_from_folders(folders, depth)
        # From the path and not the position: adding pictures then moves no other from one split to another.
        self.split_keys = np.array([text_key(file.as_posix()) for file in self.files], dtype=np.uint64)
        self.left_right_matters = left_right_note(folder)

    def _find_splits(self) -> int:
        """How many folders above the classes name splits: 0 or 1."""
        found = [split_named(file.parts[0]) if len(file.parts) > 1 else None for file in self.files]
        exact = {file.parts[0].lower() for file in self.files}
        if None in found or any(split_named(name) is None or not name.isalpha() for name in exact):
            return 0
        self.split_names = sorted({name for name in found if name is not None})
        self.split_of = np.array([self.split_names.index(name) for name in found if name is not None])
        return 1

    def _take_labels(self, metadata: dict[Path, dict[str, Any]], fields: Sequence[str] | None) -> bool:
        if fields is None:
            fields = ["label"] if metadata and all("label" in metadata.get(file, {}) for file in self.files) else []
        if not fields:
            return False
        rows = [metadata.get(file, {}) for file in self.files]
        where = f"{self.name}: field {{}} of {METADATA_FILE}"
        columns = [class_labels([row.get(field) for row in rows], None, where.format(repr(field))) for field in fields]
        self.class_names, self.labels = stack_labels(columns, len(self.files))
        return True

    def _classes_from_folders(self, folders: list[Path], depth: int) -> None:
        tops = [file.parts[depth] if len(file.parts) > depth + 1 else None for file in self.files]
        if None in tops:
            self.class_names, self.labels = stack_labels([], len(self.files))
            return
        empty = {place.parts[depth] for place in folders if len(place.parts) == depth + 1}
        names = sorted({top for top in tops if top is not None} | empty)
        index = {name: i for i, name in enumerate(names)}
        labels = np.array([index[top] for top in tops if top is not None], dtype=np.int64)
        self.class_names, self.labels = stack_labels([(names, labels)], len(self.files))

    def title(self, position: int) -> str:
        """Path of the picture."""
        return str(self.folder / self.files[position])

    def encoded(self, position: int) -> Path:
        """See :meth:`PictureSource.encoded`."""
        return self.folder / self.files[position]

    def texts(self, position: int) -> tuple[str, ...]:
        """See :meth:`PictureSource.texts`."""
        file = self.files[position]
        if file in self._captions:
            return self._captions[file]
        suffix = self._beside.get(file.with_suffix(""))
        if suffix is None:
            return ()
        try:
            with (self.folder / file.with_suffix(suffix)).open("rb") as opened:
                return texts_of(opened.read(LARGEST_TEXT).decode("utf-8", "replace"))
        except OSError:
            return ()


def _walk(folder: Path) -> tuple[list[Path], dict[Path, str], list[Path], list[Path]]:
    """Pictures, texts (path without suffix -> suffix), metadata files and folders, all relative."""
    pictures: list[Path] = []
    texts: dict[Path, str] = {}
    metadata: list[Path] = []
    below: list[Path] = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = Path(top).relative_to(folder)
        below.extend(place / name for name in folders)
        for name in files:
            lower = name.lower()
            if name.startswith("."):
                continue
            if lower.endswith(SUFFIXES):
                pictures.append(place / name)
            elif lower.endswith(".txt"):
                texts[place / name[:-4]] = name[-4:]
            elif name == METADATA_FILE:
                metadata.append(place / name)
    return pictures, texts, metadata, below


def _read_metadata(folder: Path, files: Sequence[Path], pictures: set[Path]) -> dict[Path, dict[str, Any]]:
    found: dict[Path, dict[str, Any]] = {}
    for file in files:
        path = folder / file
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = Path(os.path.normpath(file.parent / row["file_name"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path} line {number} is no JSON object with a file_name; correct it") from None
            if name not in pictures:
                raise DataError(f"{path} line {number} names {row['file_name']!r}, which is no picture there")
            found[name] = row
    return found
