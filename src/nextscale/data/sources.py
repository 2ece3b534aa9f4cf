"""Where pictures come from: folders of images and Hugging Face-layout parquet files.

A source knows names, labels and splits without decoding anything, and reads one picture at a time.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from nextscale.data.images import SUFFIXES, check_header, open_image
from nextscale.data.orders import mix
from nextscale.errors import DataError, InputError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow


class PictureSource(ABC):
    """Where pictures come from: how many, how each is read, and what is known of them without decoding."""

    name: str
    class_names: list[list[str]]
    labels: np.ndarray
    """(N, n) class of each picture, one column a label kind; n may be 0."""
    split_keys: np.ndarray
    """(N,) uint64, what the hash split is made from."""
    has_alpha: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def title(self, position: int) -> str:
        """How errors and reports call a picture."""

    @abstractmethod
    def read(self, position: int) -> tuple[Image.Image, Image.Image | None]:
        """The picture and its alpha mask (L). Raises InputError where it is broken."""

    @abstractmethod
    def check(self, position: int) -> None:
        """Raises InputError where the picture's header alone shows that it cannot be read."""

    def named_splits(self) -> dict[str, np.ndarray]:
        """Splits the source itself defines: name -> (N,) bool."""
        return {}


class FolderSource(PictureSource):
    """Image files below a folder; where every one lies in a subfolder, the first subfolders are the classes."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.folder = folder
        self.files = sorted(_image_files(folder))
        if not self.files:
            raise DataError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); check the path")
        tops = [file.parts[0] if len(file.parts) > 1 else None for file in self.files]
        names = sorted({top for top in tops if top is not None})
        if None in tops or not names:
            self.class_names, self.labels = [], np.zeros((len(self.files), 0), dtype=np.int64)
        else:
            index = {name: i for i, name in enumerate(names)}
            self.class_names = [names]
            self.labels = np.array([[index[top]] for top in tops if top is not None], dtype=np.int64)
        # From the path and not the position: adding pictures then moves no other from one split to another.
        self.split_keys = np.array([_text_key(file.as_posix()) for file in self.files], dtype=np.uint64)

    def title(self, position: int) -> str:
        """Path of the picture."""
        return str(self.folder / self.files[position])

    def read(self, position: int) -> tuple[Image.Image, Image.Image | None]:
        """See :meth:`PictureSource.read`; a folder has no masks."""
        return open_image(self.folder / self.files[position]), None

    def check(self, position: int) -> None:
        """See :meth:`PictureSource.check`."""
        check_header(self.folder / self.files[position])


def _image_files(folder: Path) -> Iterator[Path]:
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield (Path(top) / file).relative_to(folder)


def _text_key(text: str) -> int:
    data = text.encode("utf-8", "surrogateescape")
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return int(mix(len(data), *words))


class ParquetSource(PictureSource):
    """Parquet file(s) in Hugging Face layout: a column of image structs (``bytes``) or of bytes, labels as integers
    (named by the ``huggingface`` metadata where it is there) or strings, optionally a column ``alpha`` of masks.

    Encoded pictures stay in memory as they are in the file.
    """

    def __init__(self, files: Sequence[Path], label_columns: Sequence[str] | None) -> None:
        self.name = str(files[0]) if len(files) == 1 else str(files[0].parent)
        table = _read_tables(files)
        if not table.num_rows:
            raise DataError(f"{self.name} has no rows; check the file")
        self._images = _binary_column(table, _image_column(table, self.name), self.name)
        self.has_alpha = "alpha" in table.column_names
        self._alphas = _binary_column(table, "alpha", self.name) if self.has_alpha else None
        if label_columns is None:
            label_columns = [name for name in ("label", "style_label") if name in table.column_names]
        columns = [_label_column(table, name, self.name) for name in label_columns]
        self.class_names = [names for names, _ in columns]
        self.labels = np.stack([labels for _, labels in columns], axis=1) if columns else np.zeros((len(table), 0), int)
        self.split_keys = np.arange(table.num_rows, dtype=np.uint64)
        self._split_columns = {
            name: np.array([value == "test" for value in table.column(name).to_pylist()])
            for name in ("concept_split", "style_split")
            if name in table.column_names
        }

    def title(self, position: int) -> str:
        """File and row of the picture."""
        return f"{self.name} row {position}"

    def read(self, position: int) -> tuple[Image.Image, Image.Image | None]:
        """See :meth:`PictureSource.read`."""
        image = open_image(self._bytes(position), name=self.title(position))
        if self._alphas is None:
            return image, None
        mask = self._alphas[position].as_py()
        if mask is None:
            return image, Image.new("L", image.size, 255)
        alpha = open_image(mask, name=f"{self.title(position)} alpha").getchannel(0)
        if alpha.size != image.size:
            raise InputError(f"{self.title(position)}: its alpha mask is {alpha.size}, the picture {image.size}")
        return image, alpha

    def check(self, position: int) -> None:
        """See :meth:`PictureSource.check`."""
        check_header(self._bytes(position), name=self.title(position))

    def _bytes(self, position: int) -> bytes:
        data = self._images[position].as_py()
        if data is None:
            raise InputError(f"{self.title(position)} has no picture bytes")
        return bytes(data)

    def named_splits(self) -> dict[str, np.ndarray]:
        """The emoji set's splits, where its columns are there: concepts held out, and styles of other concepts."""
        if len(self._split_columns) < 2:
            return {}
        concept, style = self._split_columns["concept_split"], self._split_columns["style_split"]
        return {"train": ~concept & ~style, "concept-test": concept, "style-test": ~concept & style}


def _read_tables(files: Sequence[Path]) -> pyarrow.Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "train", "read parquet files") from None
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file, partitioning=None))
        except FileNotFoundError:
            raise DataError(f"{file}: no such file; check the path") from None
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0][:160]
            raise DataError(f"{file} cannot be read as parquet ({reason}); fetch or build it again") from None
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException:
        raise DataError(f"the parquet files beside {files[0]} differ in their columns; open them one by one") from None


def _is_picture_type(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_column(table: pyarrow.Table, name: str) -> str:
    fields = [field.name for field in table.schema if _is_picture_type(field.type)]
    for wanted in ("image", "img", "picture"):
        if wanted in fields:
            return wanted
    if not fields:
        raise DataError(f"{name} has no column of pictures among {', '.join(table.column_names)}")
    return fields[0]


def _binary_column(table: pyarrow.Table, column: str, name: str) -> pyarrow.ChunkedArray:
    import pyarrow.compute

    values = table.column(column)
    if not _is_picture_type(values.type):
        raise DataError(f"{name}: column {column!r} holds {values.type}, not pictures")
    return pyarrow.compute.struct_field(values, "bytes") if hasattr(values.type, "fields") else values


def _label_column(table: pyarrow.Table, column: str, name: str) -> tuple[list[str], np.ndarray]:
    """Class names of a column and the class of each row."""
    if column not in table.column_names:
        raise DataError(f"{name} has no column {column!r}; it has {', '.join(table.column_names)}")
    values = table.column(column).to_pylist()
    if any(value is None for value in values):
        raise DataError(f"{name}: column {column!r} has rows without a label; fill or drop them")
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        index = {text: i for i, text in enumerate(names)}
        return names, np.array([index[value] for value in values], dtype=np.int64)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise DataError(f"{name}: column {column!r} is neither class numbers from 0 nor class names")
    names = _huggingface_names(table, column) or [str(i) for i in range(max(values) + 1)]
    if max(values) >= len(names):
        raise DataError(f"{name}: column {column!r} has class {max(values)}, but only {len(names)} classes are named")
    return names, np.array(values, dtype=np.int64)


def _huggingface_names(table: pyarrow.Table, column: str) -> list[str] | None:
    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
        return [str(name) for name in names]
    except (ValueError, KeyError, TypeError):
        return None


def open_source(spec: str | Path, columns: Sequence[str] | None = None) -> PictureSource:
    """The source that a name or path stands for; see :func:`nextscale.data.datasets.open_dataset`."""
    if str(spec) == "emoji":
        from nextscale.data.emoji_set import emoji_set_path

        return ParquetSource([Path(emoji_set_path())], columns)
    path = Path(spec)
    if path.is_file():
        return ParquetSource([path], columns)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or parquet file; name one, or use 'emoji' for the shipped set")
    try:
        parquet = sorted(path.rglob("*.parquet"))
        if parquet:
            return ParquetSource(parquet, columns)
        return FolderSource(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
