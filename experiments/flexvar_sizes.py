"""FlexVAR at sizes that it never saw: larger pictures and rectangles from weights that were trained on squares.

    python experiments/flexvar_sizes.py --model runs/side-by-side/flexvar/model --test cifar10/test.parquet \\
        --judge resnet20.safetensors --out runs/flexvar-sizes

Draws with the model's own settings, two seeds a schedule. The judge knows pictures of 32 pixels: of every picture it
gets all of it, resized, and its middle 32x32 pixels. It compares with test pictures that were enlarged and cut to the
same size and shown alike. Beside it: what the model draws at its own size, enlarged and cut in the same way, which is
what one would do without a model that knows the size. Writes a sheet a schedule.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from behaviour import Judged
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.data.sheets import save_image, sheet
from nextscale.layers.resize import resize
from nextscale.plan import parse_grids

SCHEDULES = {"32x32, as trained": "1,2,3,4,6,8", "40x40": "1,2,3,4,6,8,10", "64x64": "1,2,3,4,6,8,10,13,16",
             "32x48": "1,2,3,4x5,6x8,8x12", "48x32": "1,2,3,5x4,8x6,12x8", "32x64": "1,1x2,2x4,3x6,4x8,6x12,8x16"}
SIDE, SEEDS = 32, (0, 10**6)


def covering(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of pictures at a size (height, width), resized so that they just cover it."""
    scale = max(wanted / given for wanted, given in zip(size, pictures.shape[-2:], strict=True))
    height, width = (max(wanted, round(given * scale))
                     for wanted, given in zip(size, pictures.shape[-2:], strict=True))
    pictures = resize(pictures, (height, width), "bilinear" if scale > 1 else "area")
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pictures[..., top:top + size[0], left:left + size[1]]


def views(pictures: Tensor) -> dict[str, Tensor]:
    """What the judge, who knows 32x32 pixels, gets to see of pictures of any size."""
    height, width = pictures.shape[-2:]
    cut = pictures[..., (height - SIDE) // 2:(height + SIDE) // 2, (width - SIDE) // 2:(width + SIDE) // 2]
    return {"whole": resize(pictures, (SIDE, SIDE), "area"), "middle": cut}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a FlexVAR whose latent is 8x8")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--count", type=int, default=500, help="pictures a schedule and seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/flexvar-sizes"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    system, judged = nextscale.load(given.model), Judged(given.test, given.judge, 2000)
    labels = [i % 10 for i in range(given.count)]
    print("| pictures | tokens | whole | middle | enlarged, whole | middle |\n| --- | ---: | --- | --- | --- | --- |")
    found: dict[str, dict[str, list[float]]] = {}
    own = [system.generate(labels, seed=seed, batch_size=100, output="torch").images for seed in SEEDS]
    for name, text in SCHEDULES.items():
        grids, figures = parse_grids(text), {}
        for i, seed in enumerate(SEEDS):
            drawn = system.generate(labels, seed=seed, batch_size=50, output="torch", schedule=grids,
                                    greedy_unlisted=False).images
            size = drawn.shape[-2], drawn.shape[-1]
            real = {view: judged.statistics(shown) for view, shown in views(covering(judged.pictures, size)).items()}
            for what, pictures in (("drawn", drawn), ("enlarged", covering(own[i], size))):
                for view, shown in views(pictures).items():
                    figures.setdefault(f"{what} {view}", []).append(judged.distance(shown, real[view]))
        save_image(sheet(drawn[:40], columns=10), given.out / f"{name.split(',')[0]}.png")
        found[name] = figures
        cells = " | ".join(" ".join(f"{value:.1f}" for value in values) for values in figures.values())
        print(f"| {name} | {sum(height * width for height, width in grids)} | {cells} |", flush=True)
    hub.save_json(found, given.out / "figures.json")


if __name__ == "__main__":
    main()
