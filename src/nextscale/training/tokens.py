"""Pictures as tokens, made once before a generator is trained on them: the making and checking of token caches.

The format is :mod:`nextscale.data.token_shards`'s. Every process of a launch makes the shards whose number leaves its
rank as the remainder; nothing is shared but the folder.
"""
from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nextscale import parallel
from nextscale.canvas import Canvas
from nextscale.data import PictureDataset
from nextscale.data.buckets import Bucket
from nextscale.data.captions import captions_fingerprint
from nextscale.data.controls import check_kinds, control_of, make_controls
from nextscale.data.crops import RANDOM_CROPS
from nextscale.data.token_buckets import begin_buckets, caches_in, is_cache, read_manifests, refuse_buckets
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_shards import (
    TokenJob,
    begin,
    check_shard,
    clear_leftovers,
    fingerprint_of,
    finish,
    shard_file,
    write_shard,
)
from nextscale.errors import DataError, InputError
from nextscale.plan import Plan
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.tokenizer import MAKES_CODES, STATISTICS

if TYPE_CHECKING:
    from nextscale.tokenizers.tokenizer import Tokenizer

_POLL_SECONDS = 0.2

ShardReport = Callable[[int, int], None]
"""Called after every batch with (pictures done, pictures to do) of this process."""


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A fingerprint of the part of a tokenizer that makes codes, which cached tokens are bound to: configuration,
    encoder and quantiser. Its decoder may be trained on and its statistics of use may move without other codes."""
    digest = hashlib.sha256(json.dumps(_chosen(tokenizer.config), sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if not name.startswith(MAKES_CODES) or name.endswith(STATISTICS):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _chosen(config: Any) -> Any:
    """What a configuration sets apart from its defaults, so that a field that a later version adds changes nothing."""
    if not is_dataclass(config):
        return config
    found = {}
    for field in fields(config):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if getattr(config, field.name) != default:
            found[field.name] = _chosen(getattr(config, field.name))
    return found


def describe(tokenizer: Tokenizer, dataset: PictureDataset, crops: int = 1, flips: bool = False,
             shard_pictures: int = 4096, control: Sequence[str] = (), captions: bool = False,
             latents: bool = False, schedule: Sequence[tuple[int, int]] | None = None) -> TokenJob:
    """The job of tokenizing a data set, which was opened at the tokenizer's picture size, or at that of a schedule.

    Raises:
        InputError: what was asked for doesn't go with the tokenizer or the pictures.
        DataError: captions were asked for, and pictures have none.
    """
    size, name = tokenizer.picture_size, dataset.source.name
    grids, width, bits = _cached(tokenizer)
    if schedule is not None:
        grids, (h, w) = tuple(schedule), schedule[-1]
        size = h * tokenizer.config.factor, w * tokenizer.config.factor
    if dataset.size != size or dataset.buckets is not None:
        raise InputError(f"{name}: the tokenizer takes pictures of {size[0]}x{size[1]} pixels; open the data set at "
                         "that size, or in buckets that have a schedule each")
    if latents and tokenizer.config.continuous:
        raise InputError("the tokenizer's tokens are latents already, their means and variances; leave latents out")
    if crops < 1 or shard_pictures < 1:
        raise InputError(f"crops ({crops}) and pictures a shard ({shard_pictures}) must be at least 1")
    if (crops > 1) != (dataset.crop in RANDOM_CROPS):
        raise InputError(f"crops is {crops}, but crop {dataset.crop!r} " +
                         ("is the same every time; use 'random' or 'random-resized', or 1" if crops > 1 else
                          "is another every time; ask for several, as in --crops 8"))
    if flips and dataset.left_right_matters:
        raise InputError(f"{name} says that left and right matter in its pictures; leave mirrored versions out")
    if any(control_of(kind).alpha for kind in check_kinds(control)) and not dataset.has_alpha:
        raise InputError(f"{name}: its pictures have no alpha masks, which one of the controls {', '.join(control)} is "
                         "taken from; use edges, canny, lines or small")
    told = ""
    if captions:
        dataset.need_captions()
        told = captions_fingerprint(dataset.captions(place) for place in range(len(dataset)))
    names = tuple(tuple(kind) for kind in dataset.class_names)
    return TokenJob(tokenizer_hash(tokenizer), grids, tokenizer.config.vocabulary, size,
                    Path(name).name, dataset.split, len(dataset), fingerprint_of(dataset.rows, dataset.labels, names),
                    names, dataset.crop, dataset.crop_area, crops, flips, shard_pictures, width,
                    control=tuple(control), captions=told, bits=bits,
                    latents=tokenizer.config.latent_width if latents else 0)


def _cached(tokenizer: Tokenizer) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """The grids that a cache has tokens of, the numbers of a vector and the bits of a token, each 0 where tokens are
    something else."""
    config = tokenizer.config
    width = config.latent_width
    return config.cached_grids, 2 * width if config.continuous else 0, width if config.tokens == "bits" else 0


@torch.no_grad()
def encode(tokenizer: Tokenizer, pixels: np.ndarray, latents: bool = False,
           plan: Plan | None = None) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, L), or bits (B, L, d), of pictures uint8 (B, 3, H, W), all scales of a plan (the tokenizer's own by
    default), coarse to fine; moments (B, L, 2C) of Gaussian latents. With ``latents`` also the latents (B, h w, C) in
    float16 that the tokens are of: what was rounded is coded, so that coding a cached latent again gives the cached
    tokens."""
    device = next(tokenizer.parameters()).device
    pictures = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).float() / 127.5 - 1
    if tokenizer.config.continuous:
        return tokenizer.cached_moments(pictures).cpu(), None
    if not latents:
        return torch.cat(tokenizer.encode(pictures, plan).tokens, 1).cpu(), None
    latent = tokenizer.latent(pictures).half()
    canvas = Canvas.empty(plan or tokenizer.plan, tokenizer.quantiser, len(pictures), device)
    found = pyramid.encode(latent.float(), canvas, lambda k, z: tokenizer.quantiser.quantise(z))
    return torch.cat(found.tokens, 1).cpu(), latent.flatten(2).transpose(1, 2).cpu()


def tokenize(tokenizer: Tokenizer, dataset: PictureDataset, folder: Path, crops: int = 1, flips: bool = False,
             shard_pictures: int = 4096, batch_size: int = 64, workers: int = 2, rank: int = 0, world: int = 1,
             report: ShardReport | None = None, control: Sequence[str] = (), captions: bool = False,
             latents: bool = False, schedules: Mapping[Bucket, Sequence[tuple[int, int]]] | None = None) -> bool:
    """Make this process's shards of a cache, those that are not there yet; says whether the whole cache is complete.

    workers: threads that decode pictures; rank, world: this process makes shards ``rank, rank + world, ...``; a job
    that was killed may go on with another world. To keep beside the tokens: control: kinds of control maps; captions:
    all of each picture; latents: what the encoder gave, in float16. schedules: of the buckets that the data set was
    opened in, coarse to fine; each that has pictures gets a cache of its own.

    Raises:
        InputError: the folder holds another job's tokens, or numbers out of range.
        DataError: a shard that is there is damaged, pictures have no captions, or the disk refuses.
    """
    if batch_size < 1 or workers < 1 or not 0 <= rank < world:
        raise InputError(f"batch size {batch_size} and workers {workers} must be at least 1, rank {rank} in "
                         f"0..{world - 1}")
    sets = dict[Bucket, PictureDataset]() if schedules is None else dataset.in_buckets()
    parts = [*sets.values()] if sets else [dataset]
    jobs = [describe(tokenizer, part, crops, flips, shard_pictures, control, captions, latents,
                     None if schedules is None else schedules.get(part.size)) for part in parts]
    broken_before = list(dataset.skipped)
    if sets:
        folders = begin_buckets(folder, list(sets))
    else:
        refuse_buckets(folder)
        folders = [folder]
    tokenizer.eval()
    missing = []
    for number, (place, part, job) in enumerate(zip(folders, parts, jobs, strict=True)):
        begin(place, job)
        # Each bucket begins with another process, so that many small ones are work for all.
        for shard in range((rank - number) % world, job.shards, world):
            clear_leftovers(place, shard)
            if (place / shard_file(shard)).is_file():
                check_shard(place / shard_file(shard), job, shard)
            else:
                missing.append((place, part, job, shard))
    total, done = sum(len(job.range_of(shard)) for _, _, job, shard in missing), 0
    for place, part, job, shard in missing:
        for count in _make_shard(tokenizer, part, place, job, shard, batch_size, workers):
            done += count
            if report is not None:
                report(done, total)
    found = [finish(place, job, broken_before) for place, job in zip(folders, jobs, strict=True)]
    return None not in found


def _make_shard(tokenizer: Tokenizer, dataset: PictureDataset, folder: Path, job: TokenJob, shard: int,
                batch_size: int, workers: int) -> Iterator[int]:
    """Encode and write one shard; yields how many pictures each batch took."""
    covered = job.range_of(shard)
    # Batches begin at the shard's first picture, so a shard that is made anew has the very same tokens.
    batches = [np.arange(start, min(start + batch_size, covered.stop)) for start in covered[::batch_size]]
    tokens: list[Tensor] = []
    maps: list[Tensor] = []
    latents: list[Tensor] = []
    kept, skipped = [], []
    plan = None if tokenizer.config.continuous else Plan.scales(job.grids)
    reads = _read_ahead(dataset, [(batch, crop) for batch in batches for crop in range(job.crops)], workers)
    for asked in batches:
        versions, controls, encoded, good = [], [], [], np.ones(len(asked), dtype=bool)
        for pixels, places in islice(reads, job.crops):
            for version in (pixels, pixels[..., ::-1])[:1 + job.flips]:
                coded, latent = encode(tokenizer, version[:, :3], job.latents > 0, plan)
                versions.append(job.stored(coded))
                if latent is not None:
                    encoded.append(latent)
                if job.control:
                    controls.append(torch.from_numpy(make_controls(version, job.control)))
            # For a picture that turned out broken only now the next good one was read, which has a place of its own.
            good &= places == asked
        for parts, all_parts in ((versions, tokens), (controls, maps), (encoded, latents)):
            if parts:
                all_parts.append(torch.stack(parts, 1)[torch.from_numpy(good)])
        kept.append(asked[good])
        reasons = dict(dataset.skipped)
        titles = [dataset.source.title(int(dataset.rows[place])) for place in asked[~good]]
        skipped += [(title, reasons.get(title, "unreadable")) for title in titles]
        yield len(asked)
    found = np.concatenate(kept)
    captions = [dataset.captions(place) for place in found.tolist()] if job.captions else None
    write_shard(folder, job, shard, torch.cat(tokens), dataset.labels[torch.from_numpy(found)],
                torch.from_numpy(dataset.rows[found].astype(np.int64)), skipped, torch.cat(maps) if maps else None,
                captions, torch.cat(latents) if latents else None)


def _read_ahead(dataset: PictureDataset, wanted: Sequence[tuple[np.ndarray, int]],
                workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``dataset.read`` of positions, each with the number of its random crop, a few decoded ahead by threads."""
    with ThreadPoolExecutor(workers, thread_name_prefix="nextscale-tokens") as pool:
        ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        try:
            for positions, crop in wanted:
                ahead.append(pool.submit(dataset.read, positions, np.full(len(positions), crop)))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def check_fits(folder: Path, job: TokenJob, tokenizer: Tokenizer, own_schedule: bool = True) -> None:
    """Raises InputError where a cache was not made by this very tokenizer, naming the first thing that differs.
    own_schedule: whether it must be of the tokenizer's own schedule, as all but caches of several shapes are."""
    config, fingerprint = tokenizer.config, tokenizer_hash(tokenizer)
    pairs = [("tokens of", _kind(job.bits), _kind(_cached(tokenizer)[2])),
             ("the vocabulary", str(job.vocabulary), str(config.vocabulary)),
             ("the fingerprint", job.tokenizer, fingerprint)]
    if own_schedule:
        pairs[:0] = [("the schedule", _sides(job.grids), _sides(_cached(tokenizer)[0]))]
        pairs.insert(3, ("pictures of", "{}x{}".format(*job.picture_size), "{}x{}".format(*tokenizer.picture_size)))
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise InputError(f"{folder}: these tokens were made by another tokenizer, with {what} {theirs} and not "
                             f"{ours}; name the tokenizer that made them, or tokenize again into another folder")


def _sides(grids: tuple[tuple[int, int], ...]) -> str:
    return "-".join(str(h) if h == w else f"{h}x{w}" for h, w in grids)


def _kind(bits: int) -> str:
    return f"{bits} bits" if bits else "one number"


def world_from_environment() -> tuple[int, int]:
    """(rank, world) of a ``torchrun`` launch, (0, 1) without one. Raises InputError where they make no sense."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdigit() for text in given) or int(given[0]) >= int(given[1]):
        raise InputError(f"RANK={given[0]} and WORLD_SIZE={given[1]} are no place in a launch; unset them, or start "
                         "with torchrun")
    return int(given[0]), int(given[1])


def own_device(name: str) -> str:
    """The device of this process: under ``torchrun`` with several on a machine, each takes its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local and name in ("auto", "cuda") and torch.cuda.is_available() else name


def cached_tokens(tokenizer: Tokenizer, dataset: PictureDataset, folder: Path, flips: bool = False, workers: int = 1,
                  report: ShardReport | None = None, control: Sequence[str] = (), captions: bool = False,
                  latents: bool = False, schedules: Mapping[Bucket, Sequence[tuple[int, int]]] | None = None
                  ) -> TokenDataset:
    """A training's own cache: made where it isn't there, by all processes of the launch together."""
    if not tokenize(tokenizer, dataset, folder, flips=flips, workers=workers, rank=parallel.rank(),
                    world=parallel.world(), report=report, control=control, captions=captions, latents=latents,
                    schedules=schedules):
        # torchrun ends every process when one dies, so this can't outlive the one that it waits for.
        while not is_cache(folder):
            time.sleep(_POLL_SECONDS)
    return TokenDataset(folder)


def open_tokens(folder: Path, tokenizer: Tokenizer, split: str,
                held_out_split: str | None) -> tuple[TokenDataset, TokenDataset | None]:
    """The caches that ``nextscale tokenize`` wrote below a folder: to train on, and held out where there is one.

    Raises:
        DataError: no such cache, not complete, damaged.
        InputError: made by another tokenizer.
    """
    found = sorted(path.name for path in folder.glob("*") if is_cache(path))
    if not (folder / split).is_dir():
        there = f"it has {', '.join(found)}" if found else "it holds no tokens"
        raise DataError(f"{folder} has no tokens of split {split!r}, {there}; make them with `nextscale tokenize`")
    held_out = next((name for name in (held_out_split, "validation") if held_out_split and name in found), None)
    names = [split] if held_out is None else [split, held_out]
    # What is wrong with either is told before the long reading of both.
    for name in names:
        manifests = read_manifests(folder / name)
        for manifest in manifests:
            check_fits(folder / name, manifest.job, tokenizer, own_schedule=caches_in(folder / name) == [folder / name])
    caches = [TokenDataset(folder / name) for name in names]
    if len(caches) > 1 and caches[0].class_names != caches[1].class_names:
        raise InputError(f"{folder}: {split} and {held_out} have other classes; tokenize both from the same data set")
    return caches[0], caches[1] if len(caches) > 1 else None
