"""One FlexVAR, many schedules: does drawing in fewer or more steps than it was trained with cost anything?

    python experiments/flexvar_steps.py --model runs/side-by-side/flexvar/model --test cifar10/test.parquet \\
        --judge resnet20.safetensors

Draws the same number of pictures by every schedule with two seeds each, and measures the Fréchet distance to test
pictures and how often the judge finds the label that was asked for. The two seeds' difference is the noise.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

import nextscale
from nextscale import hub
from nextscale.data import open_dataset
from nextscale.evaluation.distances import Statistics, frechet_distance
from nextscale.evaluation.features import open_extractor
from nextscale.plan import parse_grids

SCHEDULES = ("1,2,4,8", "1,2,3,5,8", "1,2,3,4,6,8", "1,2,3,4,5,6,7,8", "1,1x2,2,2x3,3,4,5,6,7,8",
             "1,1x2,2,2x3,3,3x4,4,4x5,5,5x6,6,7,8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a FlexVAR whose latent is 8x8")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--count", type=int, default=1000, help="pictures a schedule and seed")
    parser.add_argument("--out", type=Path, default=Path("runs/flexvar-steps.json"))
    given = parser.parse_args()
    system, judge = nextscale.load(given.model), open_extractor(f"resnet20:{given.judge}")
    test = open_dataset(given.test, system.tokenizer.picture_size, "all")
    pixels = torch.cat([torch.from_numpy(test.read(range(at, min(at + 500, len(test))))[0])
                        for at in range(0, len(test), 500)])
    real = torch.cat([judge(part.float() / 127.5 - 1).features_BD for part in pixels.split(500)])
    reference = Statistics.of(real, judge.name)
    classes = system.config.classes[0]
    labels = [i % classes for i in range(given.count)]
    print("| steps | schedule | Fréchet distance, two seeds | agreement, two seeds |\n| ---: | --- | --- | --- |")
    found = {}
    for text in SCHEDULES:
        grids, figures = parse_grids(text), []
        for seed in (0, 10**6):
            pictures = system.generate(labels, seed=seed, schedule=grids, batch_size=100, output="torch").images
            parts = [judge(part) for part in pictures.split(500)]
            features = torch.cat([part.features_BD for part in parts])
            logits = torch.cat([part.logits[0] for part in parts])
            agreed = float((logits.argmax(1) == torch.tensor(labels)).float().mean())
            figures.append((frechet_distance(Statistics.of(features, judge.name), reference), agreed))
        found[text] = figures
        distances, agreements = (" ".join(f"{one[i]:.3g}" for one in figures) for i in (0, 1))
        print(f"| {len(grids)} | {text} | {distances} | {agreements} |", flush=True)
    hub.save_json(found, given.out)


if __name__ == "__main__":
    main()
