"""What a tokenizer loses on a shorter schedule than it was trained for: it codes pictures on some of its grids alone.

    python experiments/shorter_schedules.py --model FOLDER --data cifar10/test.parquet --count 128 \\
        --grids 1,3,6,8 1,3,4,8 1,2,4,8 2,4,8 1,4,8 1,8

Prints the mean PSNR of reconstructions in dB and the share of the latents' energy that the codes leave over.
"""
from __future__ import annotations

import argparse

import torch

import nextscale
from nextscale.data import open_dataset
from nextscale.objectives.reconstruction import psnr
from nextscale.plan import parse_grids
from nextscale.tokenizers.shorter import on_steps
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.scale_distillation import kept_steps


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: torch.Tensor) -> tuple[float, float]:
    """Mean PSNR in dB, and what is left over of the latents' energy."""
    ratios, left, energy = [], 0.0, 0.0
    for part in pictures.split(64):
        latent, canvas = tokenizer.latent(part), tokenizer.encode(part).canvas
        ratios.append(psnr(tokenizer.decode(canvas).clamp(-1, 1), part))
        left += float((latent - canvas.value).square().sum())
        energy += float(latent.square().sum())
    return float(torch.cat(ratios).mean()), left / energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of the model whose tokenizer is measured")
    parser.add_argument("--data", default="emoji", help="pictures to code")
    parser.add_argument("--split", default="all")
    parser.add_argument("--grids", nargs="+", default=["1,2,4,8", "2,4,8", "1,4,8"], help="shorter schedules")
    parser.add_argument("--count", type=int, default=128, help="pictures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = nextscale.load(given.model).tokenizer
    data = open_dataset(given.data, tokenizer.picture_size[0], given.split)
    places = torch.linspace(0, len(data) - 1, given.count).long().tolist()
    pictures = torch.stack([data[i].picture for i in places]).float() / 127.5 - 1
    grids = tokenizer.config.grids
    for shorter in [grids, *map(parse_grids, given.grids)]:
        found, left = measure(on_steps(tokenizer, kept_steps(grids, shorter)), pictures)
        print(f"{','.join(str(h) for h, _ in shorter)}: {found:.2f} dB, {left:.1%} left over", flush=True)


if __name__ == "__main__":
    main()
