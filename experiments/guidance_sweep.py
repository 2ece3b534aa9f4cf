"""How strong, and by which schedule? A model's guidance swept: distance, agreement with the label, diversity.

    python experiments/guidance_sweep.py --model runs/side-by-side/srdd/model --test cifar10/test.parquet \\
        --judge resnet20.safetensors --scales 1 2 4 6 --schedules ramp constant cosine

Draws the same number of pictures a line with two seeds, whose difference is the noise; everything else as the model's
folder has it. A scale of 1 is without guidance, whatever the schedule. Recall and coverage are against as many test
pictures (3 and 5 neighbours, features of the judge); apart is the distance between pictures of one class, in grey
levels. ``--hook`` adds a line with a hook at every scale, under the first schedule.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from behaviour import Judged

import nextscale
from nextscale import hub
from nextscale.cli.options import make_hooks
from nextscale.evaluation.copies import pixel_rmse
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.measure import overlap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a class-conditional model of 32 pixels")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--schedules", nargs="+", default=["ramp", "constant", "cosine"])
    parser.add_argument("--hook", action="append", default=[])
    parser.add_argument("--count", type=int, default=1000, help="pictures a line and seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/guidance-sweep.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    system, judged = nextscale.load(given.model), Judged(given.test, given.judge, given.count)
    labels = [i % 10 for i in range(given.count)]
    lines = [(scale, schedule, "") for scale in given.scales
             for schedule in (given.schedules if scale != 1 else given.schedules[:1])]
    lines += [(scale, given.schedules[0], hook) for hook in given.hook for scale in given.scales if scale != 1]
    print("| scale | schedule | Fréchet distance | agreement, % | recall | coverage | apart |\n"
          "| ---: | --- | --- | --- | --- | --- | --- |")
    real, found = judged.features(judged.pictures), []
    for scale, schedule, hook in lines:
        figures: dict[str, list[float]] = {}
        for seed in (0, 10**6):
            pictures = system.generate(labels, seed=seed, batch_size=100, output="torch", guidance_scale=scale,
                                       guidance_schedule=schedule, hooks=make_hooks([hook] if hook else [])).images
            reach = overlap(real, judged.features(pictures))
            apart = torch.tensor(pairwise_distance(pictures, torch.tensor(labels)[:, None]).mean)
            for name, value in (("frechet", judged.distance(pictures)), ("recall", reach["recall"]),
                                ("agreement", 100 * judged.agreement(pictures, labels)),
                                ("coverage", reach["coverage"]), ("apart", float(pixel_rmse(apart, pictures)))):
                figures.setdefault(name, []).append(value)
        found.append({"scale": scale, "schedule": schedule, "hook": hook, **figures})
        cells = " | ".join(" ".join(f"{value:.3g}" for value in figures[name])
                           for name in ("frechet", "agreement", "recall", "coverage", "apart"))
        print(f"| {scale:g} | {schedule if scale != 1 else 'none'}{hook and f', `{hook}`'} | {cells} |", flush=True)
    hub.save_json(found, given.out)


if __name__ == "__main__":
    main()
