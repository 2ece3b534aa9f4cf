"""Token caches of several shapes: a folder with one cache an aspect-ratio bucket, each with a schedule of its own.

    buckets.json           which there are, written first
    320x256/, 256x320/     a cache each, as nextscale.data.token_shards has them, height x width in pixels
"""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nextscale.data.buckets import Bucket, bucket_name
from nextscale.data.pictures_out import flush, writing
from nextscale.data.token_shards import JOB, MANIFEST, TokenJob, TokenManifest, read_manifest
from nextscale.errors import DataError, InputError

BUCKETS = "buckets.json"


def begin_buckets(folder: Path, buckets: Sequence[Bucket]) -> list[Path]:
    """The folder of each bucket's cache; which there are is written down, or what was begun here compared.

    Raises:
        InputError: the folder holds other buckets, or a cache of one shape.
        DataError: it cannot be written or read.
    """
    names = [bucket_name(bucket) for bucket in buckets]
    if (folder / JOB).is_file() or (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds tokens of pictures of one shape; choose another folder or remove it")
    if (folder / BUCKETS).is_file():
        before = _names(folder)
        if before != names:
            raise InputError(f"{folder} holds tokens of another job (buckets {', '.join(before)}, not "
                             f"{', '.join(names)}); choose another folder or remove it")
    else:
        with writing(folder / BUCKETS) as temporary:
            temporary.write_text(json.dumps({"buckets": names}, indent=1) + "\n", encoding="utf-8")
            flush(temporary)
    return [folder / name for name in names]


def refuse_buckets(folder: Path) -> None:
    """Raises InputError where a folder that a cache of one shape is to be made in holds buckets."""
    if (folder / BUCKETS).is_file():
        raise InputError(f"{folder} holds tokens of several aspect-ratio buckets; choose another folder or remove it")


def caches_in(folder: Path) -> list[Path]:
    """The folders of a cache: of each bucket, or its own where it has one shape.

    Raises DataError where the list of buckets is damaged."""
    return [folder / name for name in _names(folder)] if (folder / BUCKETS).is_file() else [folder]


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a complete cache."""
    return all((one / MANIFEST).is_file() for one in caches_in(folder))


def read_manifests(folder: Path) -> list[TokenManifest]:
    """The manifests of a complete cache, one a bucket.

    Raises:
        DataError: as ``read_manifest``, or the buckets are not of one job.
    """
    found = [read_manifest(one) for one in caches_in(folder)]
    if len({_shared(manifest.job) for manifest in found}) > 1:
        raise DataError(f"{folder / BUCKETS} names caches that were not made together; remove the folder and tokenize "
                        "again")
    return found


def _shared(job: TokenJob) -> TokenJob:
    """What all buckets of a cache have in common."""
    return replace(job, grids=(), picture_size=(0, 0), pictures=0, fingerprint="", captions=str(bool(job.captions)))


def _names(folder: Path) -> list[str]:
    path = folder / BUCKETS
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["buckets"]
        if not names or not all(re.fullmatch(r"\d+x\d+", name) for name in names):
            raise ValueError("no buckets that could be")
        return list(names)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); remove it and run the same "
                        "`nextscale tokenize` again") from None
