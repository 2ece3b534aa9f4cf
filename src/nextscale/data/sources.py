"""From what a user writes to the source of pictures that it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nextscale.data.folders import FolderSource
from nextscale.data.huggingface import PREFIX, HuggingFaceSource, is_saved
from nextscale.data.parquet import HELD_BYTES, ParquetSource
from nextscale.data.picture_source import PictureSource
from nextscale.data.tars import TarSource
from nextscale.errors import DataError, InputError

__all__ = ["FolderSource", "HuggingFaceSource", "ParquetSource", "PictureSource", "TarSource", "open_source"]

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_source(
    spec: str | Path,
    columns: Sequence[str] | None = None,
    held_bytes: int = HELD_BYTES,
    caption_field: str | None = None,
) -> PictureSource:
    """The source that a name or path stands for; see :func:`nextscale.data.datasets.open_dataset`."""
    text, named = str(spec), None if columns is None else list(columns)
    if text == "emoji":
        from nextscale.data.emoji_set import emoji_set_path

        return ParquetSource([Path(emoji_set_path())], columns, held_bytes, caption_field)
    if text.startswith(PREFIX):
        return HuggingFaceSource(text[len(PREFIX) :], named, caption_field)
    if _BRACES.search(text):
        return TarSource(_expand(text), columns, caption_field)
    path = Path(spec)
    if path.is_file():
        if _is_tar(path):
            return TarSource([path], columns, caption_field)
        return ParquetSource([path], columns, held_bytes, caption_field)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or parquet file; name one, or use 'emoji' for the shipped set")
    try:
        if is_saved(path):
            return HuggingFaceSource(text, named, caption_field)
        for suffix in ("parquet", "tar"):
            files = sorted(path.rglob(f"*.{suffix}"))
            if files and suffix == "parquet":
                return ParquetSource(files, columns, held_bytes, caption_field)
            if files:
                return TarSource(files, columns, caption_field)
        return FolderSource(path, columns, caption_field)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _is_tar(path: Path) -> bool:
    return any(suffix in (".tar", ".tgz") for suffix in path.suffixes)


def _expand(text: str) -> list[Path]:
    """The shards that ``name-{000..012}.tar`` stands for, as WebDataset writes it."""
    found = _BRACES.search(text)
    assert found is not None
    first, last = int(found.group(1)), int(found.group(2))
    if last < first or last - first >= 1_000_000:
        raise InputError(f"{text}: the shards count from {first} to {last}; write the smaller number first")
    head, tail, width = text[: found.start()], text[found.end() :], len(found.group(1))
    paths = [Path(f"{head}{number:0{width}d}{tail}") for number in range(first, last + 1)]
    if not all(_is_tar(path) for path in paths):
        raise InputError(f"{text}: numbered shards are .tar files; name a folder for other files")
    return paths
