"""What memory policies hold over the schedule of 1024 pixels, beside a run that remembers everything.

    python benchmarks/cache_bytes.py [--layers 32] [--width 32] [--heads 2] [--peak]

A VAR of tiny width draws by Infinity's 13 scales up to 64x64, 10,521 rows; widths and batches multiply all bytes alike.
Counted are the bytes of keys and values in memory before the last scale and behind it, and the pairs of a query and a
key that attention scores. With --peak also the most bytes alive at once beyond the weights, which makes it slow.
"""
from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale.context import Context, Hook
from nextscale.evaluation.cost import LiveBytes
from nextscale.generators.var import VARGeneratorConfig
from nextscale.noise import Keyed
from nextscale.run import Rows
from nextscale.sampling.guidance import Unguided
from nextscale.systems.var import VAR, VARConfig, squares
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig

SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


class Pairs(Hook):
    """Innermost: counts the pairs that attention scores, a head."""

    def __init__(self) -> None:
        self.count = 0

    def attend(self, ctx: Context, address: str, q: Tensor, k: Any, v: Any, rows: Rows, inner: Any) -> Tensor:
        own = 0 if k is None else k.shape[2]
        held = [(group.rows + own, group.k.shape[1]) for group in ctx.remembered("pairs").groups.get(address, ())]
        self.count += q.shape[2] * sum(n * heads for n, heads in held or [(own, q.shape[1])])
        return inner(q, k, v, rows)


@torch.inference_mode()
def measure(system: VAR, hooks: list[Hook], peak: bool) -> tuple[int, int, int, int]:
    """Bytes in memory before and behind the last scale, pairs, and the most bytes alive (0 where not asked for)."""
    pairs, held = Pairs(), []
    guidance, used = Unguided(), system.settings_for("pictures", {})
    live: Any = LiveBytes() if peak else nullcontext()
    with live:
        begun = system.start(torch.zeros(1, 1, dtype=torch.int64), guidance, Keyed.from_seeds([0]))
        for run in system.loop(begun, guidance, used, [pairs, *hooks], None):
            held.append(run.memory.bytes())
    return held[-2], held[-1], pairs.count, live.peak if peak else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--peak", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    system = VAR(VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 1), 1, 1, 8, 32, "middle"), squares(SCALES), 64, 1),
        VARGeneratorConfig(given.layers, given.width, given.heads, shared_modulation=True), (1,))).initialise().eval()
    classes = [[head < given.heads / 2 for head in range(given.heads)]] * given.layers
    full = (0, 0, 0, 0)
    print("| policy | before the last scale | behind it | pairs scored | most alive |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, hooks in (
            ("none", []),
            ("scalekv, published 10% budgets" if given.layers == 32 else "scalekv share=0.1 drafters=[0]",
             [nextscale.hook("scalekv", **({"budgets": "infinity-2b"} if given.layers == 32
                                           else {"share": 0.1, "drafters": [0]}))]),
            ("snapkv share=0.1", [nextscale.hook("snapkv")]),
            ("sliding-window share=0.1", [nextscale.hook("sliding-window")]),
            ("hack compression=0.7", [nextscale.hook("hack", heads={"contextual": classes}, merge=False)]),
            ("hack compression=0.7 stored=0.9", [nextscale.hook("hack", heads={"contextual": classes}, stored=0.9,
                                                                merge=False)])):
        found = measure(system, hooks, given.peak)
        full = full if any(full) else found
        print(f"| {name} | " + " | ".join(f"{n / 1e6:,.1f} M ({n / all_:.3f})" if all_ else "" for n, all_ in
                                          zip(found, full, strict=True)) + " |", flush=True)


if __name__ == "__main__":
    main()
