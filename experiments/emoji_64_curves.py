"""The training curves of docs/emoji-64.md, from the runs' metrics.

    python experiments/emoji_64_curves.py runs/emoji-64-tokenizer runs/emoji-64-decoder runs/emoji-64-generator

Needs matplotlib (extra `eval`). Writes curves.png into docs/emoji-64/.
"""
from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nextscale.training.journal import read_metrics

OUT = Path(__file__).resolve().parents[1] / "docs" / "emoji-64" / "curves.png"


def series(run: Path, name: str, before: int = 0) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; steps count on from ``before``."""
    found = [(before + record["step"], record[name]) for record in read_metrics(run) if name in record]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    tokenizer, decoder, generator = (Path(argument) for argument in sys.argv[1:])
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    end = max(record["step"] for record in read_metrics(tokenizer))
    axes[0].plot(*series(tokenizer, "psnr"), color="C0", label="training batches", linewidth=1)
    axes[0].plot(*series(decoder, "psnr", end), color="C0", linewidth=1)
    axes[0].plot(*series(tokenizer, "held_out/psnr"), "o-", color="C1", label="held-out concepts", markersize=3)
    axes[0].plot(*series(decoder, "held_out/psnr", end), "o-", color="C1", markersize=3)
    axes[0].axvline(end, color="grey", linewidth=1, linestyle=":", label="from here the decoder alone")
    axes[0].set(title="tokenizer: PSNR, dB", xlabel="step")
    axes[1].plot(*series(generator, "main/loss"), label="training batches", linewidth=1)
    axes[1].plot(*series(generator, "held_out/nats_per_token"), "o-", label="held-out concepts", markersize=3)
    axes[1].set(title="generator: nats a token", xlabel="step")
    for k in range(6):
        axes[2].plot(*series(generator, f"nats_{k}"), label=f"scale {k}", linewidth=1)
    axes[2].set(title="generator: nats a token by scale", xlabel="step")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=80)
    print(OUT)


if __name__ == "__main__":
    main()
