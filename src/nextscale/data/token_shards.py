"""Token caches: pictures as codes in safetensors shards, with a manifest that says what they are of.

A cache is a folder::

    job.json                       what is being made, written first
    tokens-00000.safetensors ...   tokens (N, A, L) or (N, A, L, width), labels (N, n), ids (N,)
                                   maybe control (N, A, P, H, W), latents (N, A, h w, C), captions of the pictures
    manifest.json                  the job and every shard's range and checksum, written last

N pictures of a shard, A versions of each (crops times mirrorings), L tokens of a version over all scales, coarse to
fine; control maps are uint8, P planes, made of the very crop that was encoded; latents are float16, what the encoder
gave at the last scale's h w cells, C numbers each, before it was coded; captions are UTF-8 bytes with the places where
each begins. A shard is there whole or not at all, so a job that was killed goes on where it was, and several processes
can share one job: each makes shards of its own, and whoever sees the last one writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nextscale.data.bits import pack_bits, packed_width, unpack_bits
from nextscale.data.captions import PackedCaptions
from nextscale.data.controls import check_kinds, plane_count
from nextscale.data.pictures_out import flush, writing
from nextscale.errors import DataError, InputError

FORMAT = 1
JOB, MANIFEST = "job.json", "manifest.json"
_CHECK_BYTES = 1 << 24
_ABOUT = "nextscale"
# Fields that came later: a job without them has the fingerprint that it had before.
_LATER = ("width", "control", "captions", "bits", "latents")
_CAPTIONS = {"text": "caption_text", "starts": "caption_starts", "firsts": "caption_firsts"}


@dataclass(frozen=True)
class TokenJob:
    """What a cache holds.

    Attributes:
        tokenizer: fingerprint of the tokenizer's weights and configuration.
        grids: the schedule of scales, coarse to fine, as (h, w) pairs; the last alone where tokens are vectors.
        vocabulary: number of codes; tokens lie in [0, vocabulary). 0 where they are vectors, 2^d of d bits.
        picture_size: height and width in pixels of what was encoded.
        data, split: name of the data set and of its split.
        pictures: how many the split has.
        fingerprint: of their ids, labels and class names.
        class_names: one tuple a label kind.
        crop, crop_area: how pictures were cut, see :func:`nextscale.data.crops.resize_crop`.
        crops: versions by crop; more than 1 where crops are random.
        flips: whether mirrored versions are there too.
        shard_pictures: pictures a shard.
        width: numbers of a token that is a vector (mean and log-variance, in float16), 0 where tokens are codes.
        format: version of the layout.
        control: kinds of the control maps that lie beside the tokens.
        captions: fingerprint of the pictures' captions, which lie beside the tokens; "" where they don't.
        bits: bits d of a token that is bits and not an index, 0 of others; a shard holds it as ceil(d / 8) bytes.
        latents: numbers C of a cell of the latents that lie beside the tokens, 0 where they don't.
    """

    tokenizer: str
    grids: tuple[tuple[int, int], ...]
    vocabulary: int
    picture_size: tuple[int, int]
    data: str
    split: str
    pictures: int
    fingerprint: str
    class_names: tuple[tuple[str, ...], ...] = ()
    crop: str = "center"
    crop_area: float = 1.0
    crops: int = 1
    flips: bool = False
    shard_pictures: int = 4096
    width: int = 0
    format: int = FORMAT
    control: tuple[str, ...] = ()
    captions: str = ""
    bits: int = 0
    latents: int = 0

    @property
    def length(self) -> int:
        """Tokens L of one version of a picture."""
        return sum(h * w for h, w in self.grids)

    @property
    def versions(self) -> int:
        """Versions A of each picture; version ``crop * (1 + flips) + mirrored``."""
        return self.crops * (2 if self.flips else 1)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.pictures // self.shard_pictures)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest signed integers that hold the vocabulary; float16 of vectors, uint8 of packed bits."""
        if self.width:
            return torch.float16
        if self.bits:
            return torch.uint8
        return next(dtype for dtype in (torch.int16, torch.int32, torch.int64)
                    if self.vocabulary - 1 <= torch.iinfo(dtype).max)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one version's tokens as a shard holds them, (L,) or (L, width)."""
        width = self.width or packed_width(self.bits)
        return (self.length, width) if width else (self.length,)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """The shape of one version's latent, (h w, C) of the last scale."""
        h, w = self.grids[-1]
        return h * w, self.latents

    def stored(self, tokens: Tensor) -> Tensor:
        """Tokens (..., L), vectors (..., L, width) or bits (..., L, d) as a shard holds them."""
        return (pack_bits(tokens) if self.bits else tokens).to(self.dtype)

    def opened(self, stored: Tensor) -> Tensor:
        """Tokens from what a shard holds: in its type, or bits (..., L, d) as booleans."""
        return unpack_bits(stored, self.bits) if self.bits else stored

    def misfit(self, stored: Tensor) -> str:
        """What is wrong with values of tokens, nothing where they are what the job has."""
        if self.width:
            return "" if bool(stored.isfinite().all()) else "that are no finite numbers"
        if self.bits:
            spare = -self.bits % 8
            return "" if not bool((stored[..., -1] & ((1 << spare) - 1)).any()) else f"of more than {self.bits} bits"
        inside = not stored.numel() or 0 <= int(stored.min()) <= int(stored.max()) < self.vocabulary
        return "" if inside else f"outside 0..{self.vocabulary - 1}"

    def range_of(self, shard: int) -> range:
        """Positions in the split that a shard covers."""
        start = shard * self.shard_pictures
        return range(start, min(start + self.shard_pictures, self.pictures))


@dataclass(frozen=True)
class Shard:
    """A shard's line in the manifest: file, first position it covers and the one after its last, pictures in it (fewer
    where some could not be read), bytes of the file, SHA-256 of its tensors' bytes."""

    file: str
    start: int
    stop: int
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenManifest:
    """A whole cache: its job, its shards, (title, reason) of every picture that was left out as unreadable."""

    job: TokenJob
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """Pictures in the cache."""
        return sum(shard.count for shard in self.shards)


def fingerprint_of(ids: np.ndarray, labels: Tensor, class_names: Sequence[Sequence[str]]) -> str:
    """A fingerprint of which pictures a set has and what they are called, but not of their pixels."""
    digest = hashlib.sha256(json.dumps([list(kind) for kind in class_names]).encode())
    digest.update(np.ascontiguousarray(ids, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(labels.numpy(), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def begin(folder: Path, job: TokenJob) -> None:
    """Write down what is being made, or check that what was begun here is the same.

    Raises:
        InputError: the folder holds another job's tokens.
        DataError: it cannot be written or read.
    """
    for name in (MANIFEST, JOB):
        if (folder / name).is_file():
            before = read_manifest(folder).job if name == MANIFEST else _job(_read_json(folder / JOB), folder / JOB)
            differing = [f.name for f in fields(TokenJob) if getattr(before, f.name) != getattr(job, f.name)]
            if differing:
                told = "; ".join(f"{field} {_short(getattr(before, field))}, not {_short(getattr(job, field))}"
                                 for field in differing[:3])
                raise InputError(f"{folder} holds tokens of another job ({told}); choose another folder or remove it")
            return
    _write_json(folder / JOB, asdict(job))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def shard_file(shard: int) -> str:
    """A shard's file name."""
    return f"tokens-{shard:05d}.safetensors"


def write_shard(folder: Path, job: TokenJob, shard: int, tokens_NAL: Tensor, labels_Nn: Tensor, ids_N: Tensor,
                skipped: Sequence[tuple[str, str]] = (), control_NAPHW: Tensor | None = None,
                captions: Sequence[Sequence[str]] | None = None, latents_NALC: Tensor | None = None) -> None:
    """Write one shard under a temporary name, flush it to the disk, then rename. Tokens: as the job stores them.

    Raises:
        InputError: a token lies outside the vocabulary, or a token or latent isn't finite.
        DataError: it cannot be written.
    """
    if misfit := job.misfit(tokens_NAL):
        raise InputError(f"shard {shard} has tokens {misfit}; is this the right tokenizer?")
    tensors = {"tokens": tokens_NAL.to(job.dtype).contiguous(), "labels": labels_Nn.long().contiguous(),
               "ids": ids_N.long().contiguous()}
    if control_NAPHW is not None:
        tensors["control"] = control_NAPHW.contiguous()
    if latents_NALC is not None:
        tensors["latents"] = latents_NALC.half().contiguous()
        if not bool(tensors["latents"].isfinite().all()):
            raise InputError(f"shard {shard} has latents that float16 can't hold; leave latents out")
    if captions is not None:
        packed = PackedCaptions.pack(captions)
        tensors |= {name: getattr(packed, part) for part, name in _CAPTIONS.items()}
    about = {"job": job_fingerprint(job), "shard": shard, "sha256": _digest(tensors.values()),
             "skipped": [*map(list, skipped)]}
    # One entry, because safetensors writes several in an order of its own and the same shard must have the same bytes.
    metadata = {_ABOUT: json.dumps(about, sort_keys=True)}
    path = folder / shard_file(shard)
    with writing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(0, str(error)) from None
        temporary.chmod(0o644)
        flush(temporary)


def clear_leftovers(folder: Path, shard: int) -> None:
    """Remove what a killed process left of a shard under temporary names."""
    for path in folder.glob(f".{Path(shard_file(shard)).stem}.*"):
        path.unlink(missing_ok=True)


def job_fingerprint(job: TokenJob) -> str:
    """What ties a shard to its job."""
    told = {name: value for name, value in asdict(job).items() if value or name not in _LATER}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _names(job: TokenJob) -> list[str]:
    """The tensors of a job's shards, in the order of their checksum."""
    return ["tokens", "labels", "ids", *(["control"] if job.control else []), *(["latents"] if job.latents else []),
            *(_CAPTIONS.values() if job.captions else [])]


def _digest(tensors: Iterable[Tensor]) -> str:
    """A checksum of tensors, in the order in which they lie in :class:`MappedShard`."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for part in _parts(tensor):
            digest.update(part.numpy().data)
    return digest.hexdigest()


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor cut along its first axis, so that a mapped one is never in memory as a whole."""
    row = max(1, tensor[:1].numel() * tensor.element_size())
    return tensor.split(max(1, _CHECK_BYTES // row))


@dataclass(frozen=True)
class MappedShard:
    """A shard's tensors, mapped from the file and not read but for labels and ids; its checksum; (title, reason) of
    what it lacks."""

    tokens_NAL: Tensor
    labels_Nn: Tensor
    ids_N: Tensor
    sha256: str
    skipped: tuple[tuple[str, str], ...]
    control_NAPHW: Tensor | None = None
    latents_NALC: Tensor | None = None
    captions: PackedCaptions | None = None

    def tensors(self) -> list[Tensor]:
        """All that the file holds, in the order of its checksum."""
        packed = self.captions
        rest = [self.control_NAPHW, self.latents_NALC, *((packed.text, packed.starts, packed.firsts) if packed else ())]
        return [self.tokens_NAL, self.labels_Nn, self.ids_N, *(tensor for tensor in rest if tensor is not None)]


def map_shard(path: Path, job: TokenJob, shard: int) -> MappedShard:
    """Map a shard and check its shapes and that it is of this job.

    Raises:
        DataError: missing, cut short, damaged, or of another cache.
    """
    advice = "remove it and run the same `nextscale tokenize` again, which makes only what is missing"
    try:
        with safe_open(path, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in _names(job)}
            about = json.loads((opened.metadata() or {}).get(_ABOUT, "{}"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run the same `nextscale tokenize` again to make it anew") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path} is cut short or damaged ({reason}); {advice}") from None
    tokens, labels, ids = found["tokens"], found["labels"], found["ids"]
    if about.get("job") != job_fingerprint(job) or about.get("shard") != shard:
        raise DataError(f"{path} belongs to another cache than {JOB} beside it; {advice}")
    covered = len(job.range_of(shard))
    shapes = (tuple(tokens.shape), tuple(labels.shape), tuple(ids.shape))
    count = len(ids)
    if shapes != ((count, job.versions, *job.token_shape), (count, len(job.class_names)), (count,)) or count > covered:
        raise DataError(f"{path} holds tokens, labels and ids of shapes {shapes}, which its job doesn't have; {advice}")
    if tokens.dtype != job.dtype:
        raise DataError(f"{path} holds {tokens.dtype} and not {job.dtype}; {advice}")
    control = found.get("control")
    planes = (count, job.versions, plane_count(job.control), *job.picture_size)
    if control is not None and (tuple(control.shape) != planes or control.dtype != torch.uint8):
        raise DataError(f"{path} holds control maps {tuple(control.shape)} of {control.dtype} and not {planes} of "
                        f"uint8; {advice}")
    latents = found.get("latents")
    shape = (count, job.versions, *job.latent_shape)
    if latents is not None and (tuple(latents.shape) != shape or latents.dtype != torch.float16):
        raise DataError(f"{path} holds latents {tuple(latents.shape)} of {latents.dtype} and not {shape} of float16; "
                        f"{advice}")
    captions = None
    if job.captions:
        captions = PackedCaptions(**{part: found[name] for part, name in _CAPTIONS.items()})
        if misfit := captions.misfit(count):
            raise DataError(f"{path} holds captions {misfit}; {advice}")
    skipped = tuple((title, reason) for title, reason in about["skipped"])
    return MappedShard(tokens, labels.clone(), ids.clone(), about["sha256"], skipped, control, latents, captions)


def check_shard(path: Path, job: TokenJob, shard: int) -> MappedShard:
    """:func:`map_shard`, and its checksum and the ranges of tokens and labels. Reads the whole file once.

    Raises:
        DataError: as :func:`map_shard`, or the contents are not what was written.
    """
    mapped = map_shard(path, job, shard)
    digest = hashlib.sha256()
    for tensor in mapped.tensors():
        for part in _parts(tensor):
            digest.update(part.numpy().data)
            if tensor is mapped.tokens_NAL and (misfit := job.misfit(part)):
                raise DataError(f"{path} holds tokens {misfit}; it is damaged, remove it and run the same `nextscale "
                                "tokenize` again")
    if digest.hexdigest() != mapped.sha256:
        raise DataError(f"{path} doesn't have the checksum that it was written with; it is damaged, remove it and run "
                        "the same `nextscale tokenize` again")
    sizes = torch.tensor([len(names) for names in job.class_names])
    if mapped.labels_Nn.numel() and not bool(((mapped.labels_Nn >= 0) & (mapped.labels_Nn < sizes)).all()):
        raise DataError(f"{path} holds labels that none of its classes has; it is damaged, remove it")
    return mapped


def finish(folder: Path, job: TokenJob, skipped: Sequence[tuple[str, str]] = ()) -> TokenManifest | None:
    """Write the manifest if every shard is there; None where some are still missing.

    skipped: pictures found broken before any shard was made.

    Raises:
        DataError: a shard is damaged, or the manifest cannot be written.
    """
    if not all((folder / shard_file(shard)).is_file() for shard in range(job.shards)):
        return None
    shards, left_out = [], list(skipped)
    for shard in range(job.shards):
        path, covered = folder / shard_file(shard), job.range_of(shard)
        mapped = map_shard(path, job, shard)
        left_out += mapped.skipped
        shards.append(Shard(path.name, covered.start, covered.stop, len(mapped.ids_N), path.stat().st_size,
                            mapped.sha256))
    manifest = TokenManifest(job, tuple(shards), tuple(dict.fromkeys(left_out)))
    _write_json(folder / MANIFEST, {"count": manifest.count, **asdict(manifest)})
    return manifest


def read_manifest(folder: Path) -> TokenManifest:
    """The manifest of a complete cache.

    Raises:
        DataError: no cache there, one that isn't complete, or a damaged manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOB).is_file():
            job = _job(_read_json(folder / JOB), folder / JOB)
            there = sum((folder / shard_file(shard)).is_file() for shard in range(job.shards))
            raise DataError(f"{folder} is not complete: {there} of {job.shards} shards are there; run the same "
                            "`nextscale tokenize` again, it goes on from them")
        raise DataError(f"{folder} holds no tokens (no {MANIFEST}); make them with `nextscale tokenize`")
    found = _read_json(path)
    try:
        shards = tuple(Shard(**entry) for entry in found["shards"])
        skipped = tuple((str(title), str(reason)) for title, reason in found["skipped"])
        return TokenManifest(_job(found["job"], path), shards, skipped)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _job(found: dict[str, Any], path: Path) -> TokenJob:
    try:
        if found["format"] != FORMAT:
            raise DataError(f"{path} is of format {found['format']}, this version reads {FORMAT}; tokenize again into "
                            "another folder")
        names = tuple(tuple(str(name) for name in kind) for kind in found["class_names"])
        job = TokenJob(**{**found, "grids": tuple((int(h), int(w)) for h, w in found["grids"]), "class_names": names,
                          "control": check_kinds(found.get("control", ())),
                          "picture_size": tuple(int(side) for side in found["picture_size"])})
        if min(job.length, job.vocabulary + job.width, job.pictures, job.shard_pictures, job.crops) < 1:
            raise ValueError("sizes must be at least 1")
        if min(job.bits, job.latents) < 0 or (job.bits and job.vocabulary != 2**job.bits):
            raise ValueError("bits or latents are of no such size")
        return job
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged ({type(error).__name__}: {error}); remove it and run the same "
                     "`nextscale tokenize` again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and tokenize again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__} and no settings; remove it and tokenize again")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        flush(temporary)
