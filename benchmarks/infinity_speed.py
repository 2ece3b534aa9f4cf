"""Infinity at full width and a few blocks: seconds a picture of 1024 pixels, carried on to all blocks.

    python benchmarks/infinity_speed.py --model infinity-2b --depths 1 2 --threads 2

Random weights in bfloat16, one picture, guidance on, 32 tokens of made-up text, the published schedule. Two depths give
the seconds of a block and of all that isn't one; all blocks take that many times the first and once the second. The
decoder is timed by itself, in strips.
"""
from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace

import torch

from nextscale.evaluation.bench.baseline import liven
from nextscale.evaluation.bench.drawing import asked
from nextscale.hub import WithoutInitialisation
from nextscale.noise import Keyed
from nextscale.systems import folders
from nextscale.systems.infinity import preset_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="infinity-2b")
    parser.add_argument("--depths", type=int, nargs=2, default=(1, 2))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decode", action="store_true", help="time the decoder, too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = preset_config(given.model)
    seconds: dict[int, float] = {}
    labels = asked(config, 1)
    for depth in given.depths:
        small = replace(config, generator=replace(config.generator, depth=depth))
        torch.manual_seed(0)
        with WithoutInitialisation():
            system = folders.build_system(small)
        liven(system)
        system.to_precision("bf16")
        used = system.settings_for("pictures", {})
        guidance = system.guidance(used)
        began = time.perf_counter()
        with torch.no_grad():
            begun = system.start(system.label_rows(labels), guidance, Keyed.from_seeds([0]), system.plan)
            for run in system.sampled(begun, guidance, used):
                if run.cursor in (len(system.plan) - 1, len(system.plan)):
                    print(f"{depth} block(s), {run.cursor} scales: {time.perf_counter() - began:.1f} s", flush=True)
        seconds[depth] = time.perf_counter() - began
    low, high = sorted(seconds)
    block = (seconds[high] - seconds[low]) / (high - low)
    rest = seconds[low] - low * block
    whole = rest + config.generator.depth * block
    rows = config.tokenizer.plan.length
    print(f"a block {block:.2f} s, the rest {rest:.2f} s: {whole:.0f} s for {config.generator.depth} blocks, "
          f"{rows / whole:.1f} tokens a second of {rows:,}")
    if given.decode:
        latent = run.canvas.map()
        began = time.perf_counter()
        with torch.no_grad():
            system.tokenizer.decode(latent, 32)
        print(f"decoder, in strips of 32 rows: {time.perf_counter() - began:.1f} s")
    print(f"most memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
