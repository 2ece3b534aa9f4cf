"""CoDe at published sizes: seconds a picture of pairs, beside the drafter and the refiner alone.

    python benchmarks/code_speed.py --threads 1 --clock cpu [--drafter var-d30] [--refiner var-d16] [--draft-steps 9 8]
    python benchmarks/code_speed.py --device cuda --batch 64

Random weights in bfloat16, one picture of 256 pixels, guidance on, the published sampling settings. All draw by turns
in one process, after one each to warm up; the clock is read when the device has done all that it was given. A pair of
all ten scales is the drafter alone, of none the refiner. Figures are medians over the rounds, ratios the medians of the
rounds' ratios, with the least and the greatest. The arithmetic is that of the linear layers as counted from the plan,
as a share of the drafter's.
"""
from __future__ import annotations

import argparse
import statistics

import torch

from nextscale.acceleration.code_decoding import relative_cost
from nextscale.devices import choose_device
from nextscale.errors import InputError
from nextscale.evaluation.bench.baseline import liven
from nextscale.evaluation.bench.clock import now_of, waited
from nextscale.noise import Keyed
from nextscale.systems import folders
from nextscale.systems.code_decoding import pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", default="var-d30")
    parser.add_argument("--refiner", default="var-d16")
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[9, 8, 7, 6])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = choose_device(given.device)
    if given.clock == "cpu" and device.type != "cpu":
        raise InputError("--clock cpu counts the processor's time; on another device use --clock wall")
    clock = waited(now_of(given.clock, 1), device)
    torch.manual_seed(0)
    with device:
        drafter, refiner = (liven(folders.build_system(folders.model_config(name))).to_precision("bf16").eval()
                            for name in (given.drafter, given.refiner))
    drafter.tokenizer = refiner.tokenizer  # random ones differ
    both = pair(drafter, refiner, given.draft_steps[0]).to(device)
    sizes = [(one.config.generator.depth, one.config.generator.width) for one in (drafter, refiner)]
    lines = [len(both.plan), *given.draft_steps, 0]
    labels, seeds = [i % 1000 for i in range(given.batch)], list(range(given.batch))
    seconds: dict[int, list[float]] = {steps: [] for steps in lines}
    decoding: list[float] = []
    for turn in range(given.repeats + 1):
        for steps in lines:
            used = both.settings_for("pictures", {"draft_steps": steps})
            guidance = both.guidance(used)
            with torch.inference_mode():
                began = clock()
                begun = both.start(both.label_rows(labels), guidance, Keyed.from_seeds(seeds, device), both.plan)
                run = list(both.sampled(begun, guidance, used))[-1]
                drawn = clock()
                both.tokenizer.decode(run.canvas)
            if turn:
                seconds[steps].append(drawn - began)
                decoding.append(clock() - drawn)
            print(f"round {turn}, {steps} scales drafted: {drawn - began:.2f} s", flush=True)
    decode = statistics.median(decoding)
    print(f"| drafted | arithmetic | seconds | times as fast | with the decoder's {decode:.2f} s |\n"
          "| ---: | ---: | ---: | ---: | ---: |")
    whole = seconds[lines[0]]
    for steps in lines:
        share = relative_cost(both.plan, *sizes, steps).flops
        ratios, ended = ([(one + more) / (mine + more) for one, mine in zip(whole, seconds[steps], strict=True)]
                         for more in (0.0, decode))
        print(f"| {steps} | {share:.3f} | {statistics.median(seconds[steps]):.2f} | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
              f"{statistics.median(ended):.2f} |")


if __name__ == "__main__":
    main()
