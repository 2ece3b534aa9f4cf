"""Sets of the Hugging Face ``datasets`` library, by their names on the hub or as its folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nextscale.data.captions import texts_of
from nextscale.data.parquet import caption_column, default_labels, image_column, label_column
from nextscale.data.picture_source import PictureSource, left_right_note, split_named, stack_labels
from nextscale.errors import DataError, InputError, MissingExtraError

PREFIX = "hf:"


class HuggingFaceSource(PictureSource):
    """A set that ``datasets`` opens, memory-mapped from its Arrow files, so that any order is cheap however large.

    Args:
        spec: ``owner/name`` or ``owner/name:configuration`` of the hub, a folder that ``load_dataset`` reads, or one
            that ``save_to_disk`` wrote.
        label_columns: columns that hold classes; by default ``label`` and ``style_label`` where they are there.
        caption_field: column of captions; by default ``text``, ``caption`` or ``prompt``.

    Raises:
        DataError: it cannot be opened, or has no column of pictures, or none of captions where one is named.
        MissingExtraError: ``datasets`` is not installed.
    """

    def __init__(
        self, spec: str, label_columns: list[str] | None = None, caption_field: str | None = None
    ) -> None:
        self.name = f"{PREFIX}{spec}"
        parts = _open(spec, self.name)
        self._parts = list(parts.values())
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        count = int(self._starts[-1])
        if not count:
            raise DataError(f"{self.name} has no rows; name another set or configuration")
        schema = self._parts[0].features.arrow_schema
        self._image = image_column(schema, self.name)
        self._pictures = [_undecoded(part, self._image).select_columns([self._image]) for part in self._parts]
        columns = default_labels(schema) if label_columns is None else label_columns
        self._caption = caption_column(schema, self.name, caption_field)
        self.has_captions = self._caption is not None
        self._told = [part.select_columns([self._caption]) for part in self._parts] if self._caption else []
        table = self._table(columns, schema)
        labels = [label_column(table, name, self.name) for name in columns]
        self.class_names, self.labels = stack_labels(labels, count)
        self.split_keys = np.arange(count, dtype=np.uint64)
        names = [split_named(name) or name for name in parts]
        self.split_names = list(dict.fromkeys(names))
        if len(parts) > 1 or names[0] != "train":
            numbers = [self.split_names.index(name) for name in names]
            self.split_of = np.repeat(numbers, [len(part) for part in self._parts])
        folder = Path(spec)
        self.left_right_matters = folder.is_dir() and left_right_note(folder)

    def _table(self, columns: list[str], schema: Any) -> Any:
        import pyarrow

        for name in columns:
            if name not in schema.names:
                raise DataError(f"{self.name} has no column {name!r}; it has {', '.join(schema.names)}")
        if not columns:
            return pyarrow.table({})
        tables = [part.select_columns(columns).with_format("arrow")[:] for part in self._parts]
        return pyarrow.concat_tables(tables).replace_schema_metadata(schema.metadata)

    def _row(self, parts: list[Any], position: int, column: str) -> Any:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return parts[part][position - int(self._starts[part])][column]

    def title(self, position: int) -> str:
        """Set and row of the picture."""
        return f"{self.name} row {position}"

    def encoded(self, position: int) -> Path | bytes:
        """See :meth:`PictureSource.encoded`."""
        value = self._row(self._pictures, position, self._image)
        if isinstance(value, dict):
            # Sets made from a folder keep the path alone.
            value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
        if value is None:
            raise InputError(f"{self.title(position)} has no picture bytes")
        return value if isinstance(value, Path) else bytes(value)

    def texts(self, position: int) -> tuple[str, ...]:
        """See :meth:`PictureSource.texts`."""
        return () if self._caption is None else texts_of(self._row(self._told, position, self._caption))


def _open(spec: str, name: str) -> dict[str, Any]:
    """The set's splits by name."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "open Hugging Face data sets") from None
    try:
        if is_saved(Path(spec)):
            found = datasets.load_from_disk(spec)
        elif Path(spec).is_dir():
            found = datasets.load_dataset(spec)
        else:
            place, _, configuration = spec.partition(":")
            found = datasets.load_dataset(place, configuration or None)
    except Exception as error:  # whatever the library, the hub or the network raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(f"{name} cannot be opened ({reason}); check the name and the network") from None
    if isinstance(found, datasets.DatasetDict):
        return dict(found)
    return {"train": found}


def _undecoded(part: Any, column: str) -> Any:
    """The split with encoded bytes in its column of pictures, which our own safe reader then opens."""
    import datasets

    if isinstance(part.features[column], datasets.Image):
        return part.cast_column(column, datasets.Image(decode=False))
    return part


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
