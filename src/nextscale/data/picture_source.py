"""What every source of pictures offers, and what the kinds of source share: splits, class names, captions, notes."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.data.captions import texts_of_classes
from nextscale.data.images import check_header, open_image, picture_size
from nextscale.data.orders import mix
from nextscale.errors import DataError, InputError

NOTES_FILE = "nextscale.json"
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?![A-Za-z0-9])", re.IGNORECASE)


class PictureSource(ABC):
    """Where pictures come from: how many, how each is read, and what is known of them without decoding.

    Attributes:
        name: what messages call it.
        class_names: one list a label kind; may be empty.
        labels: (N, n) class of each picture, one column a label kind.
        split_keys: (N,) uint64, what the hash split is made from.
        split_of: (N,) index into ``split_names`` where the source itself knows splits, else None.
        has_alpha: whether pictures have masks.
        has_captions: whether any picture has a caption of its own; where none has, class names stand for them.
        left_right_matters: a mirrored picture would be wrong, so nobody mirrors them.
        blocks: (N,) number of the block that a picture is stored in, where reading one means reading its block and not
            all blocks fit into memory; else None.
        blocks_at_once: how many blocks stay in memory.
        lost: (title, reason) of what was left out while opening.
    """

    name: str
    class_names: list[list[str]]
    labels: np.ndarray
    split_keys: np.ndarray
    split_of: np.ndarray | None = None
    split_names: Sequence[str] = ()
    has_alpha: bool = False
    has_captions: bool = False
    left_right_matters: bool = False
    blocks: np.ndarray | None = None
    blocks_at_once: int = 1
    lost: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def title(self, position: int) -> str:
        """How errors and reports call a picture."""

    @abstractmethod
    def encoded(self, position: int) -> Path | bytes:
        """The picture's file, or its bytes. Raises InputError where there are none."""

    def mask(self, position: int) -> bytes | None:
        """The bytes of a picture's alpha mask, None for one that covers the picture."""
        return None

    def texts(self, position: int) -> tuple[str, ...]:
        """The picture's own captions."""
        return ()

    def captions(self, position: int) -> tuple[str, ...]:
        """Ways to say what the picture shows, the canonical one first: its own captions, or the names of its classes
        where no picture of the source has captions; none where there is nothing, or classes have numbers alone."""
        if self.has_captions:
            return self.texts(position)
        labels = zip(self.class_names, self.labels[position].tolist(), strict=True)
        return texts_of_classes(names[label] for names, label in labels if names[label] != str(label))

    def read(self, position: int) -> tuple[Image.Image, Image.Image | None]:
        """The picture and its alpha mask (L). Raises InputError where it is broken."""
        image = open_image(self.encoded(position), name=self.title(position))
        if not self.has_alpha:
            return image, None
        mask = self.mask(position)
        if mask is None:
            return image, Image.new("L", image.size, 255)
        alpha = open_image(mask, name=f"{self.title(position)} alpha").getchannel(0)
        if alpha.size != image.size:
            raise InputError(f"{self.title(position)}: its alpha mask is {alpha.size}, the picture {image.size}")
        return image, alpha

    def check(self, position: int) -> None:
        """Raises InputError where the picture's header alone shows that it cannot be read."""
        check_header(self.encoded(position), name=self.title(position))

    def size(self, position: int) -> tuple[int, int]:
        """(width, height) of the upright picture, from its header. Raises InputError where that cannot be read."""
        return picture_size(self.encoded(position), name=self.title(position))

    def named_splits(self) -> dict[str, np.ndarray]:
        """Splits the source itself defines: name -> (N,) bool."""
        if self.split_of is None:
            return {}
        return {name: self.split_of == i for i, name in enumerate(self.split_names)}

    def splits(self, validation_fraction: float) -> dict[str, np.ndarray]:
        """Splits by name, ``all`` among them. Where the source names none for validation, a hash of each picture
        takes a share of ``train`` for it."""
        splits = dict(self.named_splits())
        everything = np.ones(len(self), dtype=bool)
        if not splits.keys() - {"train", "test"}:
            held_out = mix(0x5B117, self.split_keys) < np.uint64(int(validation_fraction * 2**64))
            train = splits.get("train", np.zeros(len(self), dtype=bool) if splits else everything)
            splits |= {"train": train & ~held_out, "validation": train & held_out}
        return {**splits, "all": everything}


def split_named(name: str) -> str | None:
    """The split that a file or folder name begins with (``val-0003.tar``), None for any other name."""
    found = _SPLIT_NAME.match(name)
    return _SPLITS[found.group(1).lower()] if found else None


def splits_of_files(files: Sequence[Path]) -> list[str] | None:
    """The split of each file by its name or its folder's, None where one of them says nothing."""
    found = [split_named(file.name) or split_named(file.parent.name) for file in files]
    return None if None in found else [name for name in found if name is not None]


def text_key(text: str) -> int:
    """A hash of some text, the same on every machine."""
    data = text.encode("utf-8", "surrogateescape")
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return int(mix(len(data), *words))


def class_labels(values: Sequence[Any], names: list[str] | None, where: str) -> tuple[list[str], np.ndarray]:
    """Class names, and the class of each picture, from names or numbers from 0.

    Raises:
        DataError: a picture without a label, a number that is not named, or anything else.
    """
    if any(value is None for value in values):
        raise DataError(f"{where} has rows without a label; fill or drop them")
    if all(isinstance(value, str) for value in values):
        found = sorted(set(values))
        index = {text: i for i, text in enumerate(found)}
        return found, np.array([index[value] for value in values], dtype=np.int64)
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise DataError(f"{where} is neither class numbers from 0 nor class names")
    names = names or [str(i) for i in range(max(values) + 1)]
    if max(values) >= len(names):
        raise DataError(f"{where} has class {max(values)}, but only {len(names)} classes are named")
    return names, np.array(values, dtype=np.int64)


def stack_labels(columns: Sequence[tuple[list[str], np.ndarray]], count: int) -> tuple[list[list[str]], np.ndarray]:
    """Class names and labels (N, n) of several label kinds."""
    if not columns:
        return [], np.zeros((count, 0), dtype=np.int64)
    return [names for names, _ in columns], np.stack([labels for _, labels in columns], axis=1)


def left_right_note(folder: Path) -> bool:
    """What ``nextscale.json`` in a folder of pictures says: ``{"left_right_matters": true}``; False without one.

    Raises:
        DataError: the file is there and says anything else.
    """
    path = folder / NOTES_FILE
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(notes, dict) or set(notes) - {"left_right_matters"}:
        raise DataError(f'{path}: the one key that is known is "left_right_matters"; correct the file')
    value = notes.get("left_right_matters", False)
    if not isinstance(value, bool):
        raise DataError(f"{path}: left_right_matters is {value!r}; write true or false")
    return value
