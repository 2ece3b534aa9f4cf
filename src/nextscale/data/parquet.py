"""Hugging Face-layout parquet files, read row group by row group."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextscale.data.captions import CAPTION_FIELDS, texts_of
from nextscale.data.emoji_captions import COLUMNS, emoji_captions
from nextscale.data.picture_source import (
    PictureSource,
    class_labels,
    left_right_note,
    splits_of_files,
    stack_labels,
)
from nextscale.errors import DataError, InputError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow

HELD_BYTES = 2 << 30


class ParquetSource(PictureSource):
    """Parquet file(s) in Hugging Face layout: a column of image structs (``bytes``) or of bytes, labels as integers
    (named by the ``huggingface`` metadata where it is there) or strings, captions as strings or lists of them,
    optionally a column ``alpha`` of masks. Files whose names or folders begin with ``train``, ``validation`` or
    ``test`` are splits. A file with the emoji set's columns has captions made of them.

    Encoded pictures are read by row group through a memory map, and the latest groups stay in memory. Where all fit
    into ``held_bytes`` a picture can be asked for in any order; else ``blocks`` says which lie together.

    Args:
        files: in the order of rows.
        label_columns: columns that hold classes; by default ``label`` and ``style_label`` where they are there.
        held_bytes: memory for encoded pictures.
        caption_field: column of captions; by default ``text``, ``caption`` or ``prompt``.

    Raises:
        DataError: unreadable, cut short, empty, columns missing or different.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(
        self,
        files: Sequence[Path],
        label_columns: Sequence[str] | None = None,
        held_bytes: int = HELD_BYTES,
        caption_field: str | None = None,
    ) -> None:
        self.name = str(files[0]) if len(files) == 1 else str(files[0].parent)
        footers = [_footer(file) for file in files]
        schemas = [footer.schema.to_arrow_schema() for footer in footers]
        if not sum(footer.num_rows for footer in footers):
            raise DataError(f"{self.name} has no rows; check the file")
        schema = schemas[0]
        image = image_column(schema, self.name)
        self.has_alpha = "alpha" in schema.names
        if self.has_alpha and not is_picture_type(schema.field("alpha").type):
            raise DataError(f"{self.name}: column 'alpha' holds {schema.field('alpha').type}, not pictures")
        pictures = [image, "alpha"] if self.has_alpha else [image]
        captions = caption_column(schema, self.name, caption_field)
        told = [captions] if captions else list(COLUMNS) if set(COLUMNS) <= set(schema.names) else []
        plain = [name for name in ("concept_split", "style_split") if name in schema.names]
        columns = default_labels(schema) if label_columns is None else list(label_columns)
        self._image = image
        self._groups = _RowGroups(files, footers, pictures, held_bytes)
        wanted = list(dict.fromkeys([*columns, *plain, *told]))
        table = _read_columns(files, schemas, wanted, pictures, self.name)
        labels = [label_column(table, name, self.name) for name in columns]
        self.class_names, self.labels = stack_labels(labels, len(table) if wanted else self._groups.rows)
        self._told = table.select(told) if told else None
        self.has_captions = any(table.column(name).null_count < len(table) for name in told)
        self.split_keys = np.arange(len(self), dtype=np.uint64)
        self._split_columns = {name: np.array([v == "test" for v in table.column(name).to_pylist()]) for name in plain}
        self._find_splits(files, footers)
        self.blocks, self.blocks_at_once = self._groups.blocks()
        notes = _notes(schema)
        # The emoji set was first written without the note; its list of flag classes tells it.
        self.left_right_matters = bool(notes.get("left_right_matters", "flag_classes" in notes))
        self.left_right_matters |= left_right_note(files[0].parent)

    def _find_splits(self, files: Sequence[Path], footers: Sequence[Any]) -> None:
        found = splits_of_files(files) if len(files) > 1 else None
        if found is not None and not self._split_columns:
            self.split_names = sorted(set(found))
            numbers = [self.split_names.index(name) for name in found]
            self.split_of = np.repeat(numbers, [footer.num_rows for footer in footers])

    def title(self, position: int) -> str:
        """File and row of the picture."""
        return f"{self.name} row {position}"

    def encoded(self, position: int) -> bytes:
        """See :meth:`PictureSource.encoded`."""
        data = self._groups.value(self._image, position)
        if data is None:
            raise InputError(f"{self.title(position)} has no picture bytes")
        return data

    def mask(self, position: int) -> bytes | None:
        """See :meth:`PictureSource.mask`."""
        return self._groups.value("alpha", position)

    def texts(self, position: int) -> tuple[str, ...]:
        """See :meth:`PictureSource.texts`."""
        if self._told is None:
            return ()
        row = {name: self._told.column(name)[position].as_py() for name in self._told.column_names}
        return emoji_captions(row) if len(row) > 1 else texts_of(*row.values())

    def named_splits(self) -> dict[str, np.ndarray]:
        """Splits of the files' names, or the emoji set's where its columns are there: concepts held out, and styles
        of other concepts."""
        if len(self._split_columns) < 2:
            return super().named_splits()
        concept, style = self._split_columns["concept_split"], self._split_columns["style_split"]
        return {"train": ~concept & ~style, "concept-test": concept, "style-test": ~concept & style}


class _RowGroups:
    """Bytes of some columns by row, read a row group at a time; the latest stay up to a bound of bytes."""

    def __init__(self, files: Sequence[Path], footers: Sequence[Any], columns: list[str], held_bytes: int) -> None:
        self.columns, self.held_bytes = columns, held_bytes
        self._places: list[tuple[Path, int, Any]] = []
        counts, sizes = [], []
        for file, footer in zip(files, footers, strict=True):
            for group in range(footer.num_row_groups):
                about = footer.row_group(group)
                chunks = [about.column(i) for i in range(about.num_columns)]
                self._places.append((file, group, footer))
                counts.append(about.num_rows)
                wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
                sizes.append(sum(chunk.total_uncompressed_size for chunk in wanted))
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._kept: OrderedDict[int, dict[str, pyarrow.Array]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def rows(self) -> int:
        return int(self._starts[-1])

    def blocks(self) -> tuple[np.ndarray | None, int]:
        """The row group of each row and how many of the largest groups are held, (None, 1) where all are."""
        if self._sizes.sum() <= self.held_bytes:
            return None, 1
        at_once = max(1, int(self.held_bytes // max(1, self._sizes.max())))
        return np.repeat(np.arange(len(self._sizes)), np.diff(self._starts)), at_once

    def value(self, column: str, row: int) -> bytes | None:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            arrays = self._kept.get(group)
            if arrays is None:
                self._kept[group] = arrays = self._read(group)
                while len(self._kept) > 1 and self._sizes[list(self._kept)].sum() > self.held_bytes:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(group)
        value = arrays[column][row - int(self._starts[group])].as_py()
        return None if value is None else bytes(value)

    def _read(self, group: int) -> dict[str, pyarrow.Array]:
        import pyarrow
        import pyarrow.parquet as parquet

        file, number, footer = self._places[group]
        try:
            with parquet.ParquetFile(file, metadata=footer, memory_map=True) as opened:
                table = opened.read_row_group(number, columns=self.columns, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file} row group {number} cannot be read ({_reason(error)}); fetch it again") from None
        return {name: _only_bytes(table.column(name)) for name in self.columns}


def _only_bytes(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, "bytes") if hasattr(column.type, "fields") else column


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _footer(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "train", "read parquet files") from None
    try:
        return pyarrow.parquet.read_metadata(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; check the path") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as parquet ({_reason(error)}); fetch or build it again") from None


def _read_columns(
    files: Sequence[Path], schemas: Sequence[Any], columns: Sequence[str], pictures: Sequence[str], name: str
) -> pyarrow.Table:
    """Columns of all files that are small enough to be held."""
    import pyarrow
    import pyarrow.parquet

    for column in columns:
        if column not in schemas[0].names:
            raise DataError(f"{name} has no column {column!r}; it has {', '.join(schemas[0].names)}")
    needed = {*columns, *pictures}
    for schema in schemas:
        if any(one not in schema.names or schema.field(one).type != schemas[0].field(one).type for one in needed):
            raise DataError(f"the parquet files beside {files[0]} differ in their columns; open them one by one")
    try:
        tables = [
            pyarrow.parquet.read_table(file, columns=list(columns), partitioning=None, memory_map=True)
            for file in files
        ]
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name} cannot be read as parquet ({_reason(error)}); fetch or build it again") from None
    return pyarrow.concat_tables(tables).replace_schema_metadata(schemas[0].metadata)


def is_picture_type(kind: Any) -> bool:
    """Whether an Arrow type holds encoded pictures: a struct with ``bytes``, or bytes."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def image_column(schema: pyarrow.Schema, name: str) -> str:
    """The column of pictures: ``image``, ``img``, ``picture``, or the first that can be one."""
    fields = [field.name for field in schema if is_picture_type(field.type)]
    for wanted in ("image", "img", "picture"):
        if wanted in fields:
            return wanted
    if not fields:
        raise DataError(f"{name} has no column of pictures among {', '.join(schema.names)}")
    return fields[0]


def caption_column(schema: pyarrow.Schema, name: str, wanted: str | None = None) -> str | None:
    """The column of captions: the one that is wanted, else the first usual one, None where there is none.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    held = {field.name for field in schema if _holds_text(field.type)}
    if wanted is None:
        return next((column for column in CAPTION_FIELDS if column in held), None)
    if wanted not in schema.names:
        raise DataError(f"{name} has no column {wanted!r}; it has {', '.join(schema.names)}")
    if wanted not in held:
        raise DataError(f"{name}: column {wanted!r} holds {schema.field(wanted).type}, not captions; name one of texts")
    return wanted


def _holds_text(kind: Any) -> bool:
    """Whether an Arrow type is that of texts or of lists of them."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def default_labels(schema: pyarrow.Schema) -> list[str]:
    """Columns that hold classes where none are named."""
    return [name for name in ("label", "style_label") if name in schema.names]


def label_column(table: pyarrow.Table, column: str, name: str) -> tuple[list[str], np.ndarray]:
    """Class names of a column and the class of each row."""
    names = _huggingface_names(table.schema, column)
    return class_labels(table.column(column).to_pylist(), names, f"{name}: column {column!r}")


def _huggingface_names(schema: pyarrow.Schema, column: str) -> list[str] | None:
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError):
        return None


def _notes(schema: pyarrow.Schema) -> dict[str, Any]:
    """What nextscale wrote about a set into its file."""
    try:
        notes = json.loads((schema.metadata or {}).get(b"nextscale", b"{}"))
    except ValueError:
        return {}
    return notes if isinstance(notes, dict) else {}
