"""How fast a token cache is written, verified and read, at the sizes of VAR's 256 pixels; pictures play no part.

Seconds are of the processor (one core), so the disk and other programs don't count.

    python benchmarks/token_cache_speed.py --pictures 50000
"""
from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from nextscale.data import ShuffledOrder
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.data.token_shards import TokenJob, begin, finish, write_shard

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
BATCH, STEPS = 64, 200


def memory_of_process() -> float | None:
    """Megabytes that the process holds beside mapped files; None where the system doesn't tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":") for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=50_000)
    count = parser.parse_args().pictures
    grids = tuple((side, side) for side in SIDES)
    job = TokenJob("none", grids, 4096, (256, 256), "random", "train", count, "none", (("one",),), flips=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.process_time()
        begin(folder, job)
        for shard in range(job.shards):
            covered = job.range_of(shard)
            tokens = torch.randint(4096, (len(covered), job.versions, job.length), dtype=torch.int16)
            write_shard(folder, job, shard, tokens, torch.zeros(len(covered), 1), torch.tensor(covered))
        finish(folder, job)
        del tokens
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        written = time.process_time() - began
        print(f"{count:,} pictures in {job.versions} versions of {job.length} tokens: {size:,.1f} MB, "
              f"{size * 1e6 / count:,.0f} bytes a picture, {job.shards} shards")
        print(f"write  {size / written:8,.0f} MB/s (random tokens, checksums and flushing included)")
        before, began = memory_of_process(), time.process_time()
        cache = TokenDataset(folder)
        spent = time.process_time() - began
        print(f"verify {size / spent:8,.0f} MB/s")
        batches = TokenLoader(cache, ShuffledOrder(len(cache)), BATCH).batches(0)
        next(batches)
        began = time.process_time()
        for _ in range(STEPS):
            next(batches)
        print(f"read   {BATCH * STEPS / (time.process_time() - began):8,.0f} pictures/s in random batches of {BATCH}")
        after = memory_of_process()
        if before is not None and after is not None:
            print(f"memory {after - before:8,.1f} MB more than before opening")


if __name__ == "__main__":
    main()
