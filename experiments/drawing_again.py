"""Does drawing tokens of a scale again pay? HMAR's mask module and SRDD's resampling, on the side-by-side models.

    python experiments/drawing_again.py --side-by-side runs/side-by-side --test cifar10/test.parquet \\
        --judge resnet20.safetensors --minutes 8

First trains HMAR's mask module (``--minutes`` of the processor, resumed where it stopped) on the next-scale module of
experiments/side_by_side.py. Then: cross-entropy of a random half of held-out tokens, by the next-scale module and by
the mask module, which sees the other half; Fréchet distance to the test pictures of samples by several schedules of
rounds and of resampling, two seeds each, whose difference is the noise; and of test pictures whose right half was drawn
anew, in sight of the known tokens of the same scale or not, with the error of that half.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from behaviour import Judged
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.data.token_dataset import TokenDataset
from nextscale.systems.hmar import HMAR
from nextscale.training.generator_recipe import train_generator

ROUNDS: dict[str, tuple[tuple[int, ...], ...]] = {
    "every scale at once": (),
    "2x2 in 2, 3x3 in 3": ((1,), (1, 3), (1, 3, 5), (16,), (36,), (64,)),
    "and 4x4 in 2": ((1,), (1, 3), (1, 3, 5), (5, 11), (36,), (64,)),
    "and 6x6 and 8x8 in 2": ((1,), (1, 3), (1, 3, 5), (5, 11), (12, 24), (20, 44)),
}
RESAMPLING: dict[str, dict[str, Any]] = {
    "once": {"resample": 0}, "all again, once": {"resample": 1}, "all again, three times": {"resample": 3},
    "below 0.05 again, once": {"resample": 1, "resample_below": 0.05},
}


def trained(base: Path, out: Path, minutes: float) -> Path:
    """The folder of HMAR with a trained mask module."""
    recipe = {"system": "hmar", "part": "mask", "start": str(base / "hmar" / "model"),
              "tokens": str(base / "tokens" / "residual"), "threads": torch.get_num_threads(),
              "data": {"spec": str(next(base.glob("first-*.parquet"))), "size": 32, "flip": True, "held_out": 500},
              "settings": {"guidance_scale": 4.0, "temperature": 0.8},
              "train": {"steps": 10**6, "minutes": minutes, "clock": "processor", "batch_size": 32,
                        "learning_rate": 1e-3, "warmup_steps": 50, "final_learning_rate_ratio": 0.02,
                        "ema_decay": 0.998, "sample_every": 0, "checkpoint_every": 200, "keep_checkpoints": 1}}
    train_generator(recipe, out, resume=True)
    return out / "model"


@torch.no_grad()
def entropies(system: HMAR, tokens: TokenDataset, draws: int = 4) -> dict[str, list[float]]:
    """Nats a token of a random half of every scale but the first, by either module."""
    given, labels = tokens.read(range(len(tokens))).long().split([step.rows for step in system.plan], 1), tokens.labels
    following = system.eval().loss(given, labels, 0.0)[1]
    masked = []
    for seed in range(draws):
        torch.manual_seed(seed)
        masked.append(system.mask_loss(given, labels, 0.0, share=0.5)[1])
    return {"next-scale module": following[1:].tolist(), "mask module": torch.stack(masked).mean(0)[1:].tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side-by-side", type=Path, default=Path("runs/side-by-side"))
    parser.add_argument("--out", type=Path, default=Path("runs/drawing-again"))
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--count", type=int, default=1000, help="pictures a line and seed")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hmar = nextscale.load(str(trained(given.side_by_side, given.out / "hmar", given.minutes)))
    srdd = nextscale.load(str(given.side_by_side / "srdd" / "model"))
    assert isinstance(hmar, HMAR)
    judged = Judged(given.test, given.judge, given.count)
    found: dict[str, Any] = {"entropies": entropies(
        hmar, TokenDataset(given.side_by_side / "tokens" / "residual" / "validation"))}
    for name, values in found["entropies"].items():
        print(f"{name}: nats a token of scales 2 on: {' '.join(f'{value:.3f}' for value in values)}", flush=True)
    labels = [i % 10 for i in range(given.count)]
    lines: dict[str, Callable[[int], Tensor]] = {
        **{f"hmar, {name}": lambda seed, rounds=rounds: hmar.generate(
            labels, seed=seed, batch_size=100, output="torch", rounds=rounds).images
           for name, rounds in ROUNDS.items()},
        **{f"srdd, {name}": lambda seed, more=more: srdd.generate(
            labels, seed=seed, batch_size=100, output="torch", **more).images for name, more in RESAMPLING.items()}}
    print("| | Fréchet distance, two seeds |\n| --- | --- |")
    for name, draw in lines.items():
        found[name] = [judged.distance(draw(seed)) for seed in (0, 10**6)]
        print(f"| {name} | {' '.join(f'{value:.2f}' for value in found[name])} |", flush=True)
    real, of_real = judged.pictures, judged.labels.tolist()
    redraw = torch.zeros(given.count, *real.shape[2:], dtype=torch.bool)
    redraw[:, :, redraw.shape[2] // 2:] = True
    print("| right half drawn anew | Fréchet distance | error of that half, of 255 |\n| --- | --- | --- |")
    for name, sighted in (("in sight of what is known", True), ("by coarser scales alone", False)):
        drawn = torch.cat([hmar.edit(real[at:at + 100], redraw[at:at + 100], of_real[at:at + 100], sighted=sighted,
                                     rounds=ROUNDS["2x2 in 2, 3x3 in 3"], output="torch", progress=False).images
                           for at in range(0, given.count, 100)])
        error = (drawn - real).masked_select(redraw[:, None]).square().mean().sqrt() * 127.5
        found[name] = {"frechet": judged.distance(drawn), "error": float(error)}
        print(f"| {name} | {found[name]['frechet']:.2f} | {float(error):.1f} |", flush=True)
    hub.save_json(found, given.out / "figures.json")


if __name__ == "__main__":
    main()
