"""Features of texts on the disk: a folder that one text encoder's features fill, a shard a batch.

It holds::

    text-encoder.json            whose features these are and their number format, written first
    text-0123456789abcdef.safetensors ...
                                 values (N, W) of all tokens of its texts behind each other, lengths (n,), keys (n, 32),
                                 maybe pooled (n, P)

A text is found by its key, the SHA-256 of the encoder's name and the text. A shard is there whole or not at all and is
never changed, so several processes may read and write at once; what two of them made at the same time is there twice.
"""
from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.data.pictures_out import flush, writing
from nextscale.errors import DataError, InputError

FORMAT = 1
MANIFEST = "text-encoder.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OPEN_SHARDS = 64
"""Shards that are mapped at a time."""
ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file is taken for that of a process that died."""
_ABOUT = "nextscale"


@dataclass(frozen=True)
class TextSource:
    """Whose features: the encoder's name and fingerprint, width W of a token's and pooled_width P of a prompt's, 0
    without; dtype they are kept in."""

    name: str
    fingerprint: str
    width: int
    pooled_width: int
    dtype: str = "float16"
    format: int = FORMAT


class _Place(NamedTuple):
    """Where a text's features are: shard, its number there, and its tokens."""

    shard: str
    number: int
    first: int
    length: int


class TextCache:
    """A folder of features of one encoder; made where it isn't there.

    Args:
        folder: where.
        source: whose features; a dtype of "" takes the folder's, float16 in a new one.

    Memory: about 250 bytes a text, and no features but those asked for. Threads may share it.

    Raises:
        InputError: the folder holds another encoder's features, or the number format isn't known.
        DataError: it can't be written, read or is damaged.
    """

    def __init__(self, folder: str | Path, source: TextSource):
        self.folder = Path(folder)
        if source.dtype and source.dtype not in DTYPES:
            raise InputError(f"text features can't be kept as {source.dtype!r}; use one of {', '.join(DTYPES)}")
        path = self.folder / MANIFEST
        if not path.is_file():
            with writing(path) as temporary:
                told = asdict(source) | {"dtype": source.dtype or "float16"}
                temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                flush(temporary)
        self.source = self._check(source, _read_manifest(path))
        self._places: dict[bytes, _Place] = {}
        self._shards: set[str] = set()
        self._mapped: OrderedDict[str, Any] = OrderedDict()
        self._seen = -1
        self._lock = threading.RLock()
        self._forget_abandoned()
        self._look()

    def _check(self, wanted: TextSource, found: TextSource) -> TextSource:
        if (wanted.name, wanted.width, wanted.pooled_width) != (found.name, found.width, found.pooled_width):
            raise InputError(f"{self.folder} holds features of another text encoder ({_short(found)}, and this is "
                             f"{_short(wanted)}); choose another folder or remove it")
        if wanted.fingerprint != found.fingerprint:
            raise InputError(f"{self.folder} holds features of another {found.name}: its weights, tokenizer or limit "
                             f"differ ({found.fingerprint}, and this is {wanted.fingerprint}); choose another folder "
                             "or remove it")
        if wanted.dtype not in ("", found.dtype):
            raise InputError(f"{self.folder} holds features in {found.dtype}, not {wanted.dtype}; choose another "
                             "folder, or take what it has")
        return found

    def __len__(self) -> int:
        """Texts that are known to be there."""
        return len(self._places)

    def key(self, text: str) -> bytes:
        """What a text is found by, 32 bytes."""
        return hashlib.sha256(f"{self.source.name}\0{text}".encode()).digest()

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts whose features aren't there, each once, in their order."""
        with self._lock:
            wanted = {text: self.key(text) for text in texts}
            if any(key not in self._places for key in wanted.values()):
                self._look()  # another process may have made them
            return [text for text, key in wanted.items() if key not in self._places]

    def write(self, texts: Sequence[str], rows: Sequence[Tensor], pooled: Tensor | None = None) -> None:
        """Keep features: of n texts rows (T_i, W) each, and pooled vectors (n, P) where the source has them.

        Raises:
            InputError: other shapes, or values that the number format can't hold.
            DataError: they can't be written.
        """
        dtype, source = DTYPES[self.source.dtype], self.source
        shapes = {tuple(row.shape[1:]) for row in rows} | ({tuple(pooled.shape)} if pooled is not None else set())
        wanted = {(source.width,)} | ({(len(texts), source.pooled_width)} if source.pooled_width else set())
        if len(rows) != len(texts) or shapes != wanted:
            raise InputError(f"{source.name} gave features of {len(rows)} texts and shapes {sorted(shapes)}, not of "
                             f"{len(texts)} and {sorted(wanted)}")
        tensors = {"values": torch.cat([row.detach().to("cpu", dtype) for row in rows]),
                   "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
                   "keys": torch.tensor([list(self.key(text)) for text in texts], dtype=torch.uint8)}
        if pooled is not None:
            tensors["pooled"] = pooled.detach().to("cpu", dtype).contiguous()
        if not all(bool(tensors[name].isfinite().all()) for name in ("values", "pooled") if name in tensors):
            raise InputError(f"{source.name} gives features that {source.dtype} can't hold; keep them as bfloat16 in "
                             "another folder")
        name = f"text-{hashlib.sha256(tensors['keys'].numpy().tobytes()).hexdigest()[:16]}.safetensors"
        with writing(self.folder / name) as temporary:
            try:
                save_file(tensors, temporary, {_ABOUT: json.dumps({"fingerprint": source.fingerprint})})
            except SafetensorError as error:
                raise OSError(0, str(error)) from None
            temporary.chmod(0o644)
            flush(temporary)
        with self._lock:
            self._mapped.pop(name, None)
            self._add(name)

    def read(self, texts: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """Features of texts that are there, rows (T_i, W) each and pooled (n, P), as they are kept.

        Raises:
            DataError: a text isn't there, or its shard is gone or damaged.
        """
        with self._lock:
            rows, pooled = [], []
            for text in texts:
                place = self._places.get(self.key(text))
                if place is None:
                    raise DataError(f"{self.folder} holds no features of the text {text[:60]!r}")
                shard = self._map(place.shard)
                rows.append(shard.get_slice("values")[place.first : place.first + place.length])
                if self.source.pooled_width:
                    pooled.append(shard.get_slice("pooled")[place.number : place.number + 1])
            return rows, torch.cat(pooled) if pooled else None

    def _look(self) -> None:
        """Learn of the shards that are new."""
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            names = sorted(path.name for path in self.folder.glob("text-*.safetensors"))
        except OSError as error:
            raise DataError(f"{self.folder} can't be read ({error.strerror})") from None
        for name in names:
            if name not in self._shards:
                self._add(name)
        self._seen = changed

    def _add(self, name: str) -> None:
        shard = self._map(name)
        lengths, keys = shard.get_tensor("lengths").tolist(), shard.get_tensor("keys").numpy()
        first = 0
        for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            self._places.setdefault(key.tobytes(), _Place(name, number, first, length))
            first += length
        self._shards.add(name)

    def _map(self, name: str) -> Any:
        """A shard, mapped; its shapes and owner are checked when it is opened."""
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        path = self.folder / name
        advice = "remove it and begin again: what it held is encoded anew"
        try:
            shard: Any = safe_open(path, framework="pt")
            owner = json.loads((shard.metadata() or {}).get(_ABOUT, "{}")).get("fingerprint")
            values, keys = (shard.get_slice(part).get_shape() for part in ("values", "keys"))
            tokens = int(shard.get_tensor("lengths").sum())
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is gone or damaged ({' '.join(str(error).split())[:120]}); {advice}") from None
        if owner != self.source.fingerprint:
            raise InputError(f"{path} holds features of another text encoder than {MANIFEST} beside it names; {advice}")
        if values != [tokens, self.source.width] or keys[1:] != [32]:
            raise DataError(f"{path} holds features {values}, which {self.source.name} doesn't give; {advice}")
        self._mapped[name] = shard
        if len(self._mapped) > OPEN_SHARDS:
            self._mapped.popitem(last=False)
        return shard

    def _forget_abandoned(self) -> None:
        """Remove what killed processes left under temporary names; what is young may be a living one's."""
        for path in self.folder.glob(".text-*"):
            with suppress(OSError):  # another process was quicker, or the folder is only for reading
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def _short(source: TextSource) -> str:
    pooled = f" and {source.pooled_width} pooled" if source.pooled_width else ""
    return f"{source.name}, width {source.width}{pooled}"


def _read_manifest(path: Path) -> TextSource:
    advice = "remove the folder and begin again"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise DataError(f"{path} is of format {found['format']}, this version reads {FORMAT}; {advice}")
        source = TextSource(**found)
        if source.dtype not in DTYPES or not isinstance(source.width, int):
            raise ValueError(f"features of width {source.width!r} in {source.dtype!r}")
        return source
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
