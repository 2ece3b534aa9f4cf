"""What memory policies and FastVAR hold over the schedule of 1024 pixels, beside a run that remembers everything.

    python benchmarks/cache_bytes.py [--layers 32] [--width 32] [--heads 2] [--peak] [--only WORD]

A VAR of tiny width draws by Infinity's 13 scales up to 64x64, 10,521 rows; widths and batches multiply all bytes alike.
Counted are the bytes of keys and values in memory before the last scale and behind it, those of the buffers that they
lie in (the most of any step's end), and the pairs of a query and a key that attention scores. With --peak also the most
bytes alive at once beyond the weights, which makes it slow; with --only the policies whose name has a word.
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
def measure(system: VAR, hooks: list[Hook], peak: bool) -> tuple[int, int, int, int, int]:
    """Bytes of keys and values before and behind the last scale that is walked, of buffers, pairs, and the most bytes
    alive (0 where not asked for)."""
    pairs, held, room = Pairs(), [], 0
    guidance, used = Unguided(), system.settings_for("pictures", {})
    live: Any = LiveBytes() if peak else nullcontext()
    with live:
        begun = system.start(torch.zeros(1, 1, dtype=torch.int64), guidance, Keyed.from_seeds([0]))
        for run in system.loop(begun, guidance, used, [pairs, *hooks], None):
            groups = [group for groups in run.memory.groups.values() for group in groups]
            held.append(run.memory.bytes() - sum(state.nbytes for state in run.memory.state.values()))
            room = max(room, sum(t.untyped_storage().nbytes() for group in groups for t in (group.k, group.v)))
    return held[-2], held[-1], room, pairs.count, live.peak if peak else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--peak", action="store_true")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.manual_seed(0)
    system = VAR(VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 1), 1, 1, 8, 32, "middle"), squares(SCALES), 64, 1),
        VARGeneratorConfig(given.layers, given.width, given.heads, shared_modulation=True), (1,))).initialise().eval()
    classes = [[head < given.heads / 2 for head in range(given.heads)]] * given.layers
    full = (0, 0, 0, 0, 0)
    pruned = {"preset": "infinity-1m"} if given.layers == 32 else {"ratio": (0.4, 0.5, 1.0, 1.0), "full_blocks": (0, 0)}
    print("| policy | before the last scale | behind it | buffers | pairs scored | most alive |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, hooks in (
            ("none", []),
            ("scalekv, published 10% budgets" if given.layers == 32 else "scalekv share=0.1 drafters=[0]",
             [nextscale.hook("scalekv", **({"budgets": "infinity-2b"} if given.layers == 32
                                           else {"share": 0.1, "drafters": [0]}))]),
            ("snapkv share=0.1", [nextscale.hook("snapkv")]),
            ("sliding-window share=0.1", [nextscale.hook("sliding-window")]),
            ("hack compression=0.7", [nextscale.hook("hack", heads={"contextual": classes}, merge=False)]),
            ("hack compression=0.7 stored=0.9", [nextscale.hook("hack", heads={"contextual": classes}, stored=0.9,
                                                                merge=False)]),
            ("fastvar " + " ".join(f"{name}={value}" for name, value in pruned.items()),
             [nextscale.hook("fastvar", **pruned)])):
        if name != "none" and given.only not in name:
            continue
        found = measure(system, hooks, given.peak)
        full = full if any(full) else found
        print(f"| {name} | " + " | ".join(f"{n / 1e6:,.1f} M ({n / all_:.3f})" if all_ else "" for n, all_ in
                                          zip(found, full, strict=True)) + " |", flush=True)


if __name__ == "__main__":
    main()
