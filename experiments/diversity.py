"""What guidance and diversity methods do to emoji-64: how varied its samples are, and how often right.

    python experiments/diversity.py diversevar      # settings of DiverseVAR beside warmer sampling
    python experiments/diversity.py guidance        # SoftCFG, its ablation, and schedules of guidance
    python experiments/diversity.py cost            # multiplications that the methods add
    python experiments/diversity.py gap             # what guidance has left to do, scale by scale, and with SoftCFG

The first two draw ``--count`` pictures of each of the 255 pairs of class and style, with the same seeds for every row.
Pairwise distance is that of pictures of one label; recall and coverage are against as many held-out pictures (3 and 5
neighbours, features of the judge); agreement is the share whose class the judge names, in per cent.
"""
from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.cli.options import make_hooks
from nextscale.context import Hook
from nextscale.data import open_dataset
from nextscale.evaluation.classifier import PictureSet, agreement, judge, load_classifier, whole_set
from nextscale.evaluation.copies import pixel_rmse
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.measure import overlap
from nextscale.run import At, Run, Sample
from nextscale.sampling.diversevar import DiverseVAR
from nextscale.sampling.guidance import ClassifierFree

Row = tuple[str, dict[str, Any], str]  # what it is called, settings, hook

DIVERSEVAR: list[Row] = [
    ("as recommended", {}, ""),
    ("temperature 0.7", {"temperature": 0.7}, ""),
    ("temperature 0.85", {"temperature": 0.85}, ""),
    *((f"suppression {s}, amplification {a}", {}, f"diversevar suppression={s} amplification={a}")
      for s, a in ((0.05, 0.05), (0.1, 0.0), (0.1, 0.1), (0.5, 0.0), (0.5, 0.5))),
    ("0.1, 0.1 at the sides 4 and 6", {}, "diversevar suppression=0.1 amplification=0.1 at_steps=[3,4]"),
    ("0.1, 0.1 around the whole network", {}, "diversevar suppression=0.1 amplification=0.1 mode=model"),
]
GUIDANCE: list[Row] = [
    ("as recommended (guidance 2)", {}, ""),
    ("SoftCFG", {}, "softcfg"),
    ("SoftCFG, not normalised", {}, "softcfg normalised=false"),
    ("guidance 3", {"guidance_scale": 3.0}, ""),
    ("guidance 3, interval:0:0.6", {"guidance_scale": 3.0, "guidance_schedule": "interval:0:0.6"}, ""),
    ("guidance 3, interval:0.4:1", {"guidance_scale": 3.0, "guidance_schedule": "interval:0.4:1"}, ""),
    ("guidance 3, power-cosine:1.5", {"guidance_scale": 3.0, "guidance_schedule": "power-cosine:1.5"}, ""),
]


def hooks_of(text: str) -> list[Hook]:
    return make_hooks([text] if text else [])


def compare(rows: Sequence[Row], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of every row, printed as they come."""
    system = nextscale.load("runs/emoji-64", precision=options.precision)
    classifier, held_out = load_classifier("emoji-judge"), whole_set(open_dataset("emoji", 64, "concept-test"))
    real = judge(classifier, held_out.pictures).features_ND
    labels = list(itertools.product(*map(range, system.config.classes))) * options.count
    asked, found = torch.tensor(labels), []
    print(f"{len(labels)} pictures a row, {options.precision}\n{'':36s} pixels  features  recall  coverage  agreement")
    for name, settings, hook in rows:
        pictures = system.generate(labels, seed=options.seed, output="torch", hooks=hooks_of(hook), batch_size=64,
                                   progress=False, **settings).images
        opinion = judge(classifier, pictures)
        grey = float(pixel_rmse(torch.tensor(pairwise_distance(pictures, asked).mean), pictures))
        reach = overlap(real, opinion.features_ND)
        of = {"name": name, "settings": settings, "hook": hook, "pixels": grey,
              "features": pairwise_distance(opinion.features_ND, asked).mean, "recall": reach["recall"],
              "coverage": reach["coverage"], "precision": reach["precision"],
              **agreement(opinion, asked, held_out.class_names)}
        print(f"{name:36s} {grey:6.1f}  {of['features']:8.3f}  {of['recall']:6.3f}  {of['coverage']:8.3f}  "
              f"{100 * of['class_plain']:9.1f}", flush=True)
        found.append(of)
    return found


class Watch(Hook):
    """Keeps, of every step, how far the branches' logits are apart on average, and the entropy of the guided ones."""

    def __init__(self, scale: float):
        self.guidance = ClassifierFree(scale)
        self.gap: dict[int, list[float]] = {}
        self.entropy: dict[int, list[float]] = {}

    def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
        c, u = (outputs[name].log_softmax(-1) for name in ("conditional", "unconditional"))
        log_p = self.guidance(outputs, at).log_softmax(-1)
        self.gap.setdefault(at.step, []).append(float((c - u).abs().mean()))
        self.entropy.setdefault(at.step, []).append(float(-(log_p.exp() * log_p).sum(-1).mean()))
        return outputs


class Forced(Hook):
    """The tokens of real pictures in the place of those that were drawn, so that all rows see the same."""

    def __init__(self, tokens: Sequence[Tensor]):
        self.given = tokens

    def tokens(self, run: Run, sample: Sample) -> Sample:
        return replace(sample, tokens=self.given[run.cursor])


def gap(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean |z_cond - z_uncond| (log-probabilities) and entropy of the guided distribution, step by step."""
    system = nextscale.load("runs/emoji-64", precision=options.precision)
    held_out: PictureSet = whole_set(open_dataset("emoji", 64, "concept-test"))
    some = held_out.part(torch.arange(0, len(held_out), max(1, len(held_out) // options.pictures))[:options.pictures])
    scale, found = system.config.settings["pictures"].guidance_scale, []
    tokens = system.encode(some.pictures)
    for name, hook in (("guidance", ""), ("SoftCFG", "softcfg"),
                       ("SoftCFG, not normalised", "softcfg normalised=false")):
        watch = Watch(scale)
        for start in track(range(0, len(some), 64), name):
            part = slice(start, start + 64)
            system.generate([tuple(row) for row in some.labels[part].tolist()], output="torch", progress=False,
                            hooks=[Forced([t[part] for t in tokens]), *hooks_of(hook), watch], batch_size=64)
        of = {key: [sum(v) / len(v) for _, v in sorted(getattr(watch, key).items())] for key in ("gap", "entropy")}
        print(f"{name:26s} gap " + " ".join(f"{v:6.3f}" for v in of["gap"])
              + "   entropy " + " ".join(f"{v:5.2f}" for v in of["entropy"]), flush=True)
        found.append({"name": name, **of})
    return found


def costs() -> dict[str, Any]:
    """Arithmetic that the methods add to a guided picture of emoji-64 (additions and multiplications), and
    its share of the network's own."""
    system = nextscale.load("runs/emoji-64")
    plan, config = system.plan, system.config.generator
    branches, own, scaled, spectral = 2, 0.0, 0, 0
    for n, k, m, many, batch, share in system.products(1):
        own += 2.0 * branches * n * k * m * many * batch * share
    for step in range(2, len(plan)):  # what SoftCFG reads of memory and of the step itself, a multiplication a value
        scaled += branches * config.depth * config.width * plan.starts[step + 1]
    for step in DiverseVAR().at_steps:
        small, large = sorted((plan.steps[step].rows, config.width))
        # The Gram matrix, its filter and the product with the rows; its eigenvectors, about 9 small^3.
        spectral += branches * config.depth * 2 * (4 * small * small * large + 2 * small**3 + 9 * small**3)
    return {"network": own, "softcfg": scaled, "diversevar": spectral, "softcfg_share": scaled / own,
            "diversevar_share": spectral / own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("diversevar", "guidance", "gap", "cost"))
    parser.add_argument("--count", type=int, default=2, help="pictures of each label; two at least")
    parser.add_argument("--pictures", type=int, default=256, help="held-out pictures that gap looks at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [r for r in (DIVERSEVAR if options.what == "diversevar" else GUIDANCE) if (options.only or "") in r[0]]
    if options.what == "cost":
        found: Any = costs()
    else:
        found = gap(options) if options.what == "gap" else compare(rows, options)
    if options.what == "cost":
        print(json.dumps(found, indent=1))
    if options.out is not None:
        hub.save_json(found, options.out)


if __name__ == "__main__":
    main()
