"""The tokens of a whole cache by position, mapped from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextscale.data.buckets import bucket_name
from nextscale.data.captions import PackedCaptions
from nextscale.data.controls import planes_of
from nextscale.data.token_buckets import caches_in, read_manifests
from nextscale.data.token_shards import (
    MANIFEST,
    MappedShard,
    Shard,
    TokenJob,
    TokenManifest,
    check_shard,
    shard_file,
)
from nextscale.errors import DataError, InputError


class TokenDataset:
    """The tokens of a complete cache by position; shards are mapped, so a cache larger than memory works. Of a cache of
    several shapes the buckets come one after the other.

    Opening reads every shard once: its length, checksum, and the ranges of tokens and labels are verified.

    Args:
        folder: where ``nextscale tokenize`` wrote.
        report: called with (done, total) shards while verifying.

    Attributes:
        jobs: what the cache holds, one a bucket; job: the first, which the others differ from in grids, sizes and
            pictures alone.
        bucket_of: (N,) index of each picture's bucket, None where there is one shape.
        skipped: (title, reason) of every picture that was left out as unreadable.
        labels: long (N, n).
        rows: (N,) ids of the pictures, as the data set counts them.
        class_names: one tuple a label kind.
        mapped: tokens of every shard as they lie in its file, (N, A, L) or (N, A, L, width).
        controls: control maps (N, A, P, H, W) of every shard, None where the cache has none.
        caption_counts: (N,) how many captions each picture has, None where the cache has none.

    Raises:
        DataError: not a complete cache, or a shard is missing, cut short, damaged or of another cache.
    """

    def __init__(self, folder: str | Path, report: Callable[[int, int], None] | None = None) -> None:
        self.folder = Path(folder)
        folders, manifests = caches_in(self.folder), read_manifests(self.folder)
        self.jobs = [manifest.job for manifest in manifests]
        self.job, self.class_names = self.jobs[0], self.jobs[0].class_names
        # Lengths of all before the contents of any: what was cut short is told at once.
        for place, manifest in zip(folders, manifests, strict=True):
            if len(manifest.shards) != manifest.job.shards:
                raise DataError(f"{place / MANIFEST} names {len(manifest.shards)} shards, its job has "
                                f"{manifest.job.shards}; run the same `nextscale tokenize` again")
            for entry in manifest.shards:
                _check_length(place, entry)
        shards: list[MappedShard] = []
        total = sum(len(manifest.shards) for manifest in manifests)
        for place, manifest in zip(folders, manifests, strict=True):
            for mapped in _checked(place, manifest):
                shards.append(mapped)
                if report is not None:
                    report(len(shards), total)
        self.skipped = tuple(dict.fromkeys(one for manifest in manifests for one in manifest.skipped))
        counts_of = [manifest.count for manifest in manifests]
        self.bucket_of = np.repeat(np.arange(len(counts_of)), counts_of) if folders != [self.folder] else None
        self.mapped = [mapped.tokens_NAL for mapped in shards]
        self.controls = [mapped.control_NAPHW for mapped in shards]
        self._latents = [mapped.latents_NALC for mapped in shards]
        self._captions = [mapped.captions for mapped in shards if mapped.captions is not None]
        counts = [packed.counts for packed in self._captions]
        self.caption_counts = torch.cat(counts).numpy() if self.job.captions else None
        self._starts = np.cumsum([0, *(len(mapped.ids_N) for mapped in shards)])
        self.labels = torch.cat([mapped.labels_Nn for mapped in shards])
        self.rows = torch.cat([mapped.ids_N for mapped in shards]).numpy()
        if not len(self):
            raise DataError(f"{self.folder} holds no picture; all of them were unreadable")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def job_of(self, positions: Sequence[int] | np.ndarray) -> TokenJob:
        """The job of some positions. Raises InputError where they are of several buckets."""
        if self.bucket_of is None:
            return self.job
        found = np.unique(self.bucket_of[np.asarray(positions, dtype=np.int64)])
        if len(found) != 1:
            raise InputError("tokens of several buckets cannot lie in one batch; draw them by a BucketOrder")
        return self.jobs[int(found[0])]

    def read(self, positions: Sequence[int] | np.ndarray, versions: Sequence[int] | np.ndarray | int = 0) -> Tensor:
        """Tokens (B, L) or (B, L, width) of some positions, each in the version asked for, in the cache's type; tokens
        that are bits as booleans (B, L, d)."""
        return self.job.opened(self._gathered(self.mapped, positions, versions))

    def read_latents(self, positions: Sequence[int] | np.ndarray,
                     versions: Sequence[int] | np.ndarray | int = 0) -> Tensor:
        """The latents (B, h w, C) of some positions, float16: what the encoder gave at the last scale's cells.

        Raises:
            InputError: the cache has none.
        """
        self.need(latents=True)
        return self._gathered([mapped for mapped in self._latents if mapped is not None], positions, versions)

    def _gathered(self, mapped: Sequence[Tensor], positions: Sequence[int] | np.ndarray,
                  versions: Sequence[int] | np.ndarray | int) -> Tensor:
        """Rows (B, ...) of tensors (N, A, ...), one a shard, by position and version."""
        self.job_of(positions)
        places = np.asarray(positions, dtype=np.int64)
        wanted = np.broadcast_to(np.asarray(versions, dtype=np.int64), places.shape)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        like = mapped[int(shards[0]) if len(shards) else 0]
        found = torch.empty(len(places), *like.shape[2:], dtype=like.dtype)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            rows = torch.from_numpy(places[here] - self._starts[shard])
            found[torch.from_numpy(here)] = mapped[shard][rows, torch.from_numpy(wanted[here])]
        return found

    def captions(self, position: int) -> tuple[str, ...]:
        """The captions of a picture, the canonical one first.

        Raises:
            InputError: the cache has none.
        """
        packed, row = self._captions_at(position)
        return packed.of(row)

    def caption(self, position: int, number: int = 0) -> str:
        """Caption ``number`` of a picture, by default the canonical one. Raises as :meth:`captions`."""
        packed, row = self._captions_at(position)
        return packed.one(row, number)

    def _captions_at(self, position: int) -> tuple[PackedCaptions, int]:
        self.need(captions=True)
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._captions[shard], int(position - self._starts[shard])

    def need(self, captions: bool = False, latents: bool = False) -> None:
        """Raises InputError where the cache lacks what is asked for."""
        for name, wanted, there in (("captions", captions, self.job.captions), ("latents", latents, self.job.latents)):
            if wanted and not there:
                raise InputError(f"{self.folder} has no {name}; make them with `nextscale tokenize --{name}`, into "
                                 "another folder")

    def read_control(self, positions: Sequence[int] | np.ndarray, kinds: Sequence[str],
                     versions: Sequence[int] | np.ndarray | int = 0) -> Tensor:
        """Control maps uint8 (B, P, H, W) of some kinds, their planes one behind the other.

        Raises:
            InputError: the cache has none of a kind.
        """
        planes = torch.tensor(planes_of(kinds, self.job.control))
        places = np.asarray(positions, dtype=np.int64)
        wanted = np.broadcast_to(np.asarray(versions, dtype=np.int64), places.shape)
        found = torch.empty(len(places), len(planes), *self.job_of(places).picture_size, dtype=torch.uint8)
        for i, place in enumerate(places):
            shard = int(np.searchsorted(self._starts, place, side="right")) - 1
            maps = self.controls[shard]
            assert maps is not None
            found[i] = maps[int(place - self._starts[shard]), int(wanted[i])][planes]
        return found

    def summary(self) -> str:
        """One line: how many pictures, of what, in which versions."""
        job = self.job
        classes = " x ".join(f"{len(names)} classes" for names in self.class_names) or "no classes"
        versions = f", {job.versions} versions of each" if job.versions > 1 else ""
        if job.control:
            versions += f", with maps of {', '.join(job.control)}"
        if self.caption_counts is not None:
            versions += f", {int(self.caption_counts.sum()):,} captions"
        if job.latents:
            versions += ", latents"
        tokens = f"{job.length} " + ("vectors" if job.width else f"tokens on {len(job.grids)} scales")
        if self.bucket_of is not None:
            counts = np.bincount(self.bucket_of, minlength=len(self.jobs)).tolist()
            tokens = "buckets (height x width) " + ", ".join(
                f"{bucket_name(one.picture_size)} {count:,}" for one, count in zip(self.jobs, counts, strict=True))
        line = (f"{self.folder}: tokens of {len(self):,} pictures of {job.data} [{job.split}], {classes}{versions}, "
                f"{tokens}")
        return f"{line}, {len(self.skipped):,} skipped as unreadable" if self.skipped else line


def _check_length(folder: Path, entry: Shard) -> None:
    path = folder / entry.file
    if Path(entry.file).name != entry.file or not path.is_file():
        raise DataError(f"{path} is missing; run the same `nextscale tokenize` again to make it anew")
    found = path.stat().st_size
    if found != entry.bytes:
        how = "cut short" if found < entry.bytes else "too long"
        raise DataError(f"{path} is {how} ({found:,} of {entry.bytes:,} bytes); remove it and run the same "
                        "`nextscale tokenize` again, which makes only what is missing")


def _checked(folder: Path, manifest: TokenManifest) -> Iterator[MappedShard]:
    """The shards of one cache, mapped and read once."""
    for number, entry in enumerate(manifest.shards):
        mapped = check_shard(folder / shard_file(number), manifest.job, number)
        if (entry.count, entry.sha256) != (len(mapped.ids_N), mapped.sha256):
            raise DataError(f"{folder / entry.file} is not the shard that {MANIFEST} lists; tokenize again")
        yield mapped
