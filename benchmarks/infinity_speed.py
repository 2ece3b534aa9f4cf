"""Infinity at full width and a few blocks: seconds a picture of 1024 pixels, carried on to all blocks.

    python benchmarks/infinity_speed.py --model infinity-2b --depths 1 2 --threads 2
    python benchmarks/infinity_speed.py --threads 2 --hook "fastvar ratio=[0.4,0.5,1,1] full_blocks=[0,0]" \\
        --hook "scalekv share=0.1"
    python benchmarks/infinity_speed.py --device cuda --depths 8 16

Random weights in bfloat16, one picture, guidance on, 32 tokens of made-up text, the published schedule. Two depths give
the seconds of a block and of all that isn't one; all blocks take that many times the first and once the second. Every
--hook is a contestant of its own beside the run without, which goes first; all go through one depth, then the other.
``heads=halves`` in a hook stands for a table in which every other head is contextual, since networks of a few blocks
have none of their own. ``--clock cpu`` takes the processor's time in the place of the wall's, where other work runs
beside; on a ``--device`` of its own, pictures are drawn twice, once to warm up, and the clock is read when its queue is
empty. The decoder is timed by itself, in strips.
"""
from __future__ import annotations

import argparse
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nextscale.cli.options import make_hooks
from nextscale.devices import choose_device
from nextscale.errors import InputError
from nextscale.evaluation.bench.baseline import liven
from nextscale.evaluation.bench.clock import now_of, waited
from nextscale.evaluation.bench.drawing import asked
from nextscale.hub import WithoutInitialisation, save_json
from nextscale.noise import Keyed
from nextscale.systems import folders
from nextscale.systems.infinity import preset_config


def with_halves(hook: str, system: Any) -> str:
    """A hook's text with a file of heads, every other one contextual, in the place of ``heads=halves``."""
    if "heads=halves" not in hook:
        return hook
    config = system.config.generator
    path = Path(tempfile.mkdtemp()) / "heads.json"
    save_json({"contextual": [[head % 2 == 0 for head in range(config.heads)]] * config.depth}, path)
    return hook.replace("heads=halves", f"heads={path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="infinity-2b")
    parser.add_argument("--depths", type=int, nargs=2, default=(1, 2))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decode", action="store_true", help="time the decoder, too")
    parser.add_argument("--hook", action="append", default=[])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    if given.clock == "cpu" and device.type != "cpu":
        raise InputError("--clock cpu counts the processor's time; on another device use --clock wall")
    clock = waited(now_of(given.clock, 1), device)
    config = preset_config(given.model)
    names = ["", *given.hook]
    seconds: dict[tuple[str, int], float] = {}
    labels = asked(config, 1)
    for depth in given.depths:
        small = replace(config, generator=replace(config.generator, depth=depth))
        torch.manual_seed(0)
        with WithoutInitialisation(), device:
            system = folders.build_system(small)
        liven(system)
        system.to_precision("bf16")
        used = system.settings_for("pictures", {})
        guidance = system.guidance(used)
        for name in names:
            hooks = make_hooks([with_halves(name, system)]) if name else []
            for _ in range(1 if device.type == "cpu" else 2):  # kernels are compiled and chosen at their first use
                began = clock()
                with torch.no_grad():
                    noise = Keyed.from_seeds([0], device)
                    begun = system.start(system.label_rows(labels), guidance, noise, system.plan)
                    run = list(system.sampled(begun, guidance, used, hooks))[-1]
            seconds[name, depth] = clock() - began
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
        began = clock()
        with torch.no_grad():
            system.tokenizer.decode(latent, 32)
        print(f"decoder, in strips of 32 rows: {clock() - began:.1f} s")
    print(f"most memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
