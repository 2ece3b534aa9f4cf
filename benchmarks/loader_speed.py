"""How many pictures a second the loader prepares here, and whether a training step waits for it.

    python benchmarks/loader_speed.py --data photos.parquet [--workers 1 2] [--trainer-rate N] [--json OUT]

The pictures of ``--data`` are written as JPEGs (quality 90) of each of ``--sides`` into a temporary folder, and read as
training reads them: opened, cut to ``--size``, mirrored, turned into a batch of floats. Nothing decoded is kept, so
this is the case of a set larger than memory. For each side also the time of one picture decoded whole and at reduced
size, and how near the two are (PSNR).

The trainer's rate is that of the multi-scale tokenizer's step (forward and backward, no discriminator) with
``--width`` channels, or ``--trainer-rate``. Seconds are those of the clock on the wall, or with ``--clock cpu`` the
time that the process was given, for a machine that others use too; rates are then those of one core.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nextscale.data import Loader, ShuffledOrder, open_dataset
from nextscale.data.images import open_fitted, open_image, resize_crop
from nextscale.errors import NextscaleError
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask

QUALITY = 90
LATENT_FACTOR = 16


def write_jpegs(spec: str, side: int, count: int, folder: Path) -> Path:
    """The first ``count`` pictures of a set as JPEGs of side x side."""
    source = open_dataset(spec, side, split="all", memory_bytes=0)
    folder.mkdir()
    for i in range(min(count, len(source))):
        pixels = source[i].picture.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=QUALITY)
    return folder


def loader_rate(folder: Path, size: int, crop: Any, batch: int, workers: int, seconds: float,
                clock: Callable[[], float]) -> float:
    """Pictures a second that a loader gives, after the first batches."""
    dataset = open_dataset(folder, size, split="all", crop=crop, memory_bytes=0)
    loader = Loader(dataset, ShuffledOrder(len(dataset)), batch, flip=True, workers=workers)
    batches = loader.batches(0)
    for _ in range(workers + 2):  # those prepared ahead
        next(batches)
    began, until, done = clock(), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        done += len(next(batches)["id"])
    rate = done / (clock() - began)
    batches.close()
    return rate


def reduced_decoding(folder: Path, size: int) -> dict[str, float]:
    """Milliseconds of the processor for a picture decoded whole and at reduced size, and the PSNR between the two."""
    took, errors = [0.0, 0.0], []
    files = sorted(folder.iterdir())
    for file in files:
        data = file.read_bytes()
        began = time.process_time()
        whole = resize_crop(open_image(data), size)
        middle = time.process_time()
        reduced = open_fitted(data, size)
        took[0] += middle - began
        took[1] += time.process_time() - middle
        errors.append(np.square(np.asarray(whole, dtype=np.float64) - np.asarray(reduced, dtype=np.float64)).mean())
    found = {"whole_ms": took[0] / len(files) * 1e3, "reduced_ms": took[1] / len(files) * 1e3}
    if max(errors) > 0:
        found["psnr_db"] = float(10 * math.log10(255**2 / np.mean(errors)))
    return found


def trainer_rate(size: int, width: int, batch: int, clock: Callable[[], float]) -> float:
    """Pictures a second of the tokenizer's step on this processor, without the optimiser's own time."""
    side = size // LATENT_FACTOR
    grids = tuple((g, g) for g in [*(g for g in (1, 2, 3, 4, 5, 6, 8, 10, 13) if g < side), side])
    model = TokenizerConfig(autoencoder=AutoencoderConfig(width=width), grids=grids)
    task = TokenizerTask(TokenizerRecipe(model))
    pictures = {"picture": torch.rand(batch, 3, size, size) * 2 - 1}
    at = TrainingStep(0, 10, 0.0, 0, 0)
    best = math.inf
    for _ in range(2):
        began = clock()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = task.loss("main", pictures, at)
        assert loss is not None
        loss.backward()
        best = min(best, clock() - began)
    return batch / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pictures, as open_dataset takes them")
    parser.add_argument("--size", type=int, default=256, help="side of a training picture in pixels")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 1024], help="sides of the stored JPEGs")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--crop", default="center")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure, on the wall")
    parser.add_argument("--trainer-rate", type=float, help="pictures a second; measured where it is not given")
    parser.add_argument("--width", type=int, default=32, help="of the measured tokenizer")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": cores, "clock": args.clock, "size": args.size, "loader": {}, "reduced": {}}
    unit = "pictures/s" if args.clock == "wall" else "pictures/s of one core"
    print(f"{cores} cores, clock: {args.clock}, {args.pictures} JPEGs to {args.size}x{args.size}, crop {args.crop}")
    if args.trainer_rate is None:
        found["trainer"] = trainer_rate(args.size, args.width, 2, clock)
        print(f"tokenizer of width {args.width}, a training step: {found['trainer']:.2f} {unit}")
    else:
        found["trainer"] = args.trainer_rate
    with tempfile.TemporaryDirectory() as place:
        for side in args.sides:
            folder = write_jpegs(args.data, side, args.pictures, Path(place) / str(side))
            found["reduced"][side] = times = reduced_decoding(folder, args.size)
            near = f", {times['psnr_db']:.1f} dB apart" if "psnr_db" in times else ""
            print(f"{side}x{side}: {times['whole_ms']:.2f} ms whole, {times['reduced_ms']:.2f} ms reduced{near}")
            for workers in args.workers:
                rate = loader_rate(folder, args.size, args.crop, args.batch, workers, args.seconds, clock)
                found["loader"][f"{side}, {workers} workers"] = rate
                print(f"{side}x{side}, {workers} workers: {rate:.0f} {unit}, "
                      f"{rate / found['trainer']:.1f} times the trainer")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except NextscaleError as error:
        sys.exit(f"loader_speed: {error}")
