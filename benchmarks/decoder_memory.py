"""What the decoder holds at once and computes: a whole picture, and in strips.

    python benchmarks/decoder_memory.py [--model var-d16] [--dtype bf16] [--sides 256 512 1024] [--rows 32]

Counted on tensors that have a shape and no values, so the figures hang on neither machine nor time: most bytes alive
at once beyond the weights, for one picture, and the arithmetic of convolutions and attention. A kernel's workspace is
not in them.
"""
from __future__ import annotations

import argparse

import torch

from nextscale.evaluation.cost import LiveBytes
from nextscale.evaluation.flops import counted_flops
from nextscale.sampling.memory_plan import decoder_bytes
from nextscale.systems import folders
from nextscale.tokenizers.autoencoder import Decoder
from nextscale.tokenizers.strips import ROWS, decode_in_strips


def measure(decoder: Decoder, features: torch.Tensor, rows: int | None) -> tuple[int, int]:
    """Most bytes alive at once, and operations."""
    with torch.no_grad(), counted_flops() as flops, LiveBytes() as live:
        _ = decoder(features) if rows is None else decode_in_strips(decoder, features, rows)
    return live.peak, flops.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d16")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rows", type=int, default=ROWS)
    given = parser.parse_args()
    config = folders.model_config(given.model)
    assert config is not None
    sizes, dtype = config.tokenizer.autoencoder, torch.bfloat16 if given.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        decoder = Decoder(sizes).to(dtype).eval()
    print("| pixels | whole: MB | planned | TFLOP | strips: MB | planned | TFLOP | memory saved |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side in given.sides:
        grid = side // sizes.factor, side // sizes.factor
        features = torch.empty(1, sizes.features, *grid, dtype=dtype, device="meta")
        cells = [str(side)]
        peaks = []
        for rows in (None, given.rows):
            peak, operations = measure(decoder, features, rows)
            planned = decoder_bytes(sizes, grid, dtype.itemsize, rows)
            cells += [f"{peak / 1e6:,.0f}", f"{planned / 1e6:,.0f}", f"{operations / 1e12:.3f}"]
            peaks.append(peak)
        print(f"| {' | '.join(cells)} | {peaks[0] / peaks[1]:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
