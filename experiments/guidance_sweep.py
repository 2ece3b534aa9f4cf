"""How strong, and by which schedule? A model's guidance swept: Fréchet distance and agreement with the label.

    python experiments/guidance_sweep.py --model runs/side-by-side/srdd/model --test cifar10/test.parquet \\
        --judge resnet20.safetensors --scales 1 2 4 6 --schedules ramp constant cosine

Draws the same number of pictures a line with two seeds, whose difference is the noise; everything else as the model's
folder has it. A scale of 1 is without guidance, whatever the schedule.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from behaviour import Judged

import nextscale
from nextscale import hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a class-conditional model of 32 pixels")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--schedules", nargs="+", default=["ramp", "constant", "cosine"])
    parser.add_argument("--count", type=int, default=1000, help="pictures a line and seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/guidance-sweep.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    system, judged = nextscale.load(given.model), Judged(given.test, given.judge, given.count)
    labels = [i % 10 for i in range(given.count)]
    lines = [(scale, schedule) for scale in given.scales
             for schedule in (given.schedules if scale != 1 else given.schedules[:1])]
    print("| scale | schedule | Fréchet distance, two seeds | agreement, two seeds |\n| ---: | --- | --- | --- |")
    found = []
    for scale, schedule in lines:
        figures = []
        for seed in (0, 10**6):
            pictures = system.generate(labels, seed=seed, batch_size=100, output="torch", guidance_scale=scale,
                                       guidance_schedule=schedule).images
            figures.append((judged.distance(pictures), judged.agreement(pictures, labels)))
        found.append({"scale": scale, "schedule": schedule, "figures": figures})
        distances = " ".join(f"{distance:.2f}" for distance, _ in figures)
        agreements = " ".join(f"{agreed:.1%}" for _, agreed in figures)
        print(f"| {scale:g} | {schedule if scale != 1 else 'none'} | {distances} | {agreements} |", flush=True)
    hub.save_json(found, given.out)


if __name__ == "__main__":
    main()
