"""Infinity at full width and a few blocks: seconds a picture of 1024 pixels, carried on to all blocks.

    python benchmarks/infinity_speed.py --model infinity-2b --depths 1 2 --threads 2
    python benchmarks/infinity_speed.py --threads 2 --hook "fastvar ratio=[0.4,0.5,1,1] full_blocks=[0,0]" \\
        --hook "scalekv share=0.1"

Random weights in bfloat16, one picture, guidance on, 32 tokens of made-up text, the published schedule. Two depths give
the seconds of a block and of all that isn't one; all blocks take that many times the first and once the second. Every
--hook is a contestant of its own beside the run without, which goes first; all go through one depth, then the other.
The decoder is timed by itself, in strips.
"""
from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace

import torch

from nextscale.cli.options import make_hooks
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
    parser.add_argument("--hook", action="append", default=[])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = preset_config(given.model)
    names = ["", *given.hook]
    seconds: dict[tuple[str, int], float] = {}
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
        for name in names:
            hooks = make_hooks([name]) if name else []
            began = time.perf_counter()
            with torch.no_grad():
                begun = system.start(system.label_rows(labels), guidance, Keyed.from_seeds([0]), system.plan)
                run = list(system.sampled(begun, guidance, used, hooks))[-1]
            seconds[name, depth] = time.perf_counter() - began
            print(f"{depth} block(s), {name or 'no hooks'}: {seconds[name, depth]:.1f} s, "
                  f"memory {run.memory.bytes() / 1e6:.0f} MB", flush=True)
    low, high = sorted(given.depths)
    rows = config.tokenizer.plan.length
    for name in names:
        block = (seconds[name, high] - seconds[name, low]) / (high - low)
        rest = seconds[name, low] - low * block
        whole = rest + config.generator.depth * block
        print(f"{name or 'no hooks'}: a block {block:.2f} s, the rest {rest:.2f} s: {whole:.0f} s for "
              f"{config.generator.depth} blocks, {rows / whole:.1f} tokens a second of {rows:,}")
    if given.decode:
        latent = run.canvas.map()
        began = time.perf_counter()
        with torch.no_grad():
            system.tokenizer.decode(latent, 32)
        print(f"decoder, in strips of 32 rows: {time.perf_counter() - began:.1f} s")
    print(f"most memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
