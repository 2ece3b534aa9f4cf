"""The bitwise head beside a categorical one: memory, time of a step's logits, and of a training step.

    python benchmarks/bitwise_head.py --bits 32 --codes 65536 --width 2048 --rows 512

A head of b bits has 2b outputs and covers 2^b codes; a categorical head has an output a code (Infinity, arXiv
2412.04431, section 3.2). Times are medians of alternating rounds in one process, in bfloat16 unless said otherwise.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from nextscale.heads.bitwise import BitwiseHead
from nextscale.heads.categorical import CategoricalHead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--codes", type=int, default=65536)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=512, help="of a training step, and of the last scale of a picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    dtype = torch.float32 if given.dtype == "fp32" else torch.bfloat16
    heads = {f"{given.bits} bits": BitwiseHead(given.width, given.bits).to(dtype),
             f"{given.codes} codes": CategoricalHead(given.width, given.codes).to(dtype)}
    targets = {f"{given.bits} bits": torch.rand(1, given.rows, given.bits) < 0.5,
               f"{given.codes} codes": torch.randint(given.codes, (1, given.rows))}
    hidden = torch.randn(1, given.rows, given.width, dtype=dtype)

    def logits(name: str) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad():
                heads[name](hidden)
        return work

    def training(name: str) -> Callable[[], None]:
        def work() -> None:
            x = hidden.clone().requires_grad_()
            heads[name].loss(x, targets[name])[0].mean().backward()
        return work

    print(f"width {given.width}, {given.rows} rows, {given.dtype}, {given.threads} threads")
    print("| head | parameters | weights MB | logits of a step MB | logits ms | training step ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    taken: dict[str, list[float]] = {}
    for _ in range(given.rounds + 1):
        for name in heads:
            for what, work in (("logits", logits(name)), ("training", training(name))):
                began = time.perf_counter()
                work()
                taken.setdefault(f"{name} {what}", []).append(time.perf_counter() - began)
    for name, head in heads.items():
        parameters = sum(p.numel() for p in head.parameters())
        outputs = given.rows * head.out_features * 4
        times = [1000 * statistics.median(taken[f"{name} {what}"][1:]) for what in ("logits", "training")]
        print(f"| {name} | {parameters:,} | {parameters * hidden.element_size() / 1e6:.2f} | {outputs / 1e6:.1f} | "
              f"{times[0]:.1f} | {times[1]:.1f} |")
    whole = 2**given.bits * (given.width + 1)
    print(f"a categorical head over all 2^{given.bits} codes would have {whole:.3g} parameters, "
          f"{whole / (2 * given.bits * (given.width + 1)):.3g} times as many")


if __name__ == "__main__":
    main()
