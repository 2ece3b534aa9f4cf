"""Every figure and sheet of docs/emoji-text-64.md, and the comparison by which its parts were chosen.

    python experiments/emoji_text_64_report.py                                   # of the model that ships
    python experiments/emoji_text_64_report.py --compare star=runs/a/model infinity=runs/b/model
    python experiments/emoji_text_64_report.py --sweep --count 1                 # of sampling settings, on seen pairs

Phrases are canonical ("red apple, flat style"). ``style-test``: concepts seen in training, in a style they were never
seen in; ``concept-test``: concepts never seen. The judge of picture and phrase (experiments/text_judge.py) ranks the
asked phrase among 100 of the same style, and the asked style among five; it learned from the real pictures of the split
``train`` alone. Fréchet distances are in the features of ``emoji-judge``, between samples and the real pictures of the
same phrases. The report writes figures.json and the sheets into docs/emoji-text-64/.
"""
from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from text_judge import Captions, pictures_of, rates
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.data.emoji_captions import STYLE_WORDS
from nextscale.data.emoji_set import STYLES, emoji_set_path
from nextscale.data.sheets import save_image, sheet
from nextscale.evaluation.classifier import judge as classify
from nextscale.evaluation.copies import coverage, nearest, pixel_rmse
from nextscale.evaluation.distances import Statistics, frechet_distance
from nextscale.evaluation.reconstruction import psnr, reconstruct, summary
from nextscale.evaluation.text_agreement import phrase_diversity
from nextscale.evaluation.text_judge import open_text_judge
from nextscale.tokenizers.features import load_classifier

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("style-test", "concept-test")
NEIGHBOURS = 3

#: guidance scale, temperature, top-p
SWEEP: tuple[tuple[float, float, float | None], ...] = (
    (1.0, 1.0, None), (2.0, 0.7, None), (3.0, 0.55, None), (3.0, 0.7, None), (3.0, 0.85, None), (5.0, 0.7, None),
    (5.0, 0.85, None))

#: Phrases of sheets: concepts in all styles, and free ones.
IN_ALL_STYLES = ("red apple", "grinning face", "red heart", "dog face", "sunflower", "house", "automobile",
                 "soccer ball", "flag: France", "crown")
FREE = ("a blue heart", "a green apple", "a smiling cat with sunglasses", "purple flower", "a red car in flat style",
        "golden star", "a fish", "a slice of pizza, 3d style", "a sad face", "a snowy mountain", "a pink balloon",
        "tree with red leaves")


class Measure:
    """The judges, the pictures of the splits, and what they say of samples."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.judge: Any = open_text_judge(options.judge)
        self.classifier = load_classifier("emoji-judge")
        self.captions = Captions.read(Path(emoji_set_path()))
        self.real: dict[str, tuple[Tensor, Tensor]] = {}
        for split in SPLITS:
            pictures, rows = pictures_of(split)
            some = torch.linspace(0, len(rows) - 1, min(options.most, len(rows))).long()
            self.real[split] = pictures[some], rows[some]
        self.chosen = {name: value for name in ("guidance_scale", "temperature", "top_k", "top_p")
                       if (value := getattr(options, name)) is not None}

    def phrases(self, rows: Tensor) -> list[str]:
        return [self.captions.phrase(c, s) for c, s in
                zip(self.captions.concept[rows].tolist(), self.captions.style[rows].tolist(), strict=True)]

    def draw(self, system: Any, phrases: list[str], **settings: Any) -> Tensor:
        """A picture a phrase, (N, 3, S, S) in [-1, 1]; seeds count through."""
        parts = []
        for start in track(range(0, len(phrases), 64), "drawing", transient=True):
            part = phrases[start:start + 64]
            seeds = [self.options.seed + start + i for i in range(len(part))]
            parts.append(system.generate(part, seeds=seeds, output="torch", batch_size=64, progress=False,
                                         **{**self.chosen, **settings}).images.float().cpu())
        return torch.cat(parts)

    def agreement(self, pictures: Tensor, rows: Tensor) -> dict[str, Any]:
        """Ranks of phrases and styles, and the Fréchet distance to the real pictures where these are known."""
        ranks, styles = rates(self.judge, self.captions, pictures, rows)
        return {"phrases": ranks, "styles": styles}

    def distance(self, pictures: Tensor, real: Tensor) -> float:
        found = [Statistics.of(classify(self.classifier, part).features_ND, "emoji-judge") for part in (pictures, real)]
        return frechet_distance(*found)

    @torch.no_grad()
    def accuracy(self, system: Any, split: str, most: int = 256) -> dict[str, Any]:
        """Of held-out real pictures' tokens, given the true ones before: nats and the share guessed, scale by scale. A
        token of d bits counts as its d nats together, and its accuracy is that of bits."""
        pictures, rows = self.real[split]
        pictures, rows = pictures[:most], rows[:most]
        nats, right = [], []
        for start in range(0, len(pictures), 64):
            tokens = system.encode(pictures[start:start + 64])
            _, by_step_K, right_K = system.eval().loss(tokens, self.phrases(rows[start:start + 64]), 0.0)
            nats.append(by_step_K * system.nats_of_loss)
            right.append(right_K)
        nats_K, lengths_K = torch.stack(nats).mean(0), torch.tensor([step.rows for step in system.plan])
        return {"nats_a_token": float((nats_K * lengths_K).sum() / lengths_K.sum()),
                "bits_a_picture": float((nats_K * lengths_K).sum() / math.log(2)),
                "nats_a_token_by_step": nats_K.tolist(), "right_by_step": torch.stack(right).mean(0).tolist()}


def shown(name: str, of: dict[str, Any]) -> str:
    ranks, style = of["phrases"], of["styles"]["top_1"]
    five = ranks["top_5"]
    return (f"{name:28s} top 1 {100 * ranks['top_1']['rate']:5.1f}%  top 5 {100 * five['rate']:5.1f}% "
            f"({100 * five['low']:.1f} to {100 * five['high']:.1f})  style {100 * style['rate']:5.1f}%")


def compare(measure: Measure, models: dict[str, str]) -> dict[str, Any]:
    """Trained models side by side, on the phrases of both splits."""
    found: dict[str, Any] = {}
    for split, (pictures, rows) in measure.real.items():
        found[f"real, {split}"] = measure.agreement(pictures, rows)
        print(shown(f"real, {split}", found[f"real, {split}"]), flush=True)
    for name, model in models.items():
        system: Any = nextscale.load(model, precision=measure.options.precision)
        for split in SPLITS:
            pictures, rows = measure.real[split]
            rows = rows.repeat(measure.options.count)
            began = time.perf_counter()
            drawn = measure.draw(system, measure.phrases(rows))
            seconds = (time.perf_counter() - began) / len(drawn)
            of = measure.agreement(drawn, rows) | {
                "distance": measure.distance(drawn, pictures), "accuracy": measure.accuracy(system, split),
                "through_tokenizer": summary(psnr(pictures, reconstruct(system, pictures).pictures)),
                "seconds_a_picture": seconds}
            found[f"{name}, {split}"] = of
            held_out = of["accuracy"]
            print(shown(f"{name}, {split}", of), f"distance {of['distance']:.2f}",
                  f"bits {held_out['bits_a_picture']:.0f}",
                  f"last scale right {100 * held_out['right_by_step'][-1]:.1f}%",
                  f"tokenizer {of['through_tokenizer']['mean']:.2f} dB", sep="  ", flush=True)
    return found


def sweep(measure: Measure, model: str) -> list[dict[str, Any]]:
    """Settings by the phrases of pictures that training saw, so that the splits stay unseen by any choice."""
    system: Any = nextscale.load(model, precision=measure.options.precision)
    pictures, rows = pictures_of("train")
    chosen = torch.arange(0, len(rows), len(rows) // 250)[:250].repeat(measure.options.count)
    found = []
    for scale, temperature, top_p in SWEEP:
        settings = {"guidance_scale": scale, "temperature": temperature, "top_p": top_p}
        drawn = measure.draw(system, measure.phrases(rows[chosen]), **settings)
        of = measure.agreement(drawn, rows[chosen]) | {"distance": measure.distance(drawn, pictures[chosen])}
        found.append({**settings, **of})
        print(shown(f"{scale} {temperature} {top_p}", of) + f"  distance {of['distance']:.2f}", flush=True)
    return found


def report(measure: Measure, model: str, out: Path) -> dict[str, Any]:
    """The figures of one model, and its sheets."""
    system: Any = nextscale.load(model, precision=measure.options.precision)
    train, train_rows = pictures_of("train")
    figures: dict[str, Any] = {"settings": asdict(system.settings_for("pictures", measure.chosen)), "splits": {}}
    for split, (pictures, rows) in measure.real.items():
        again = reconstruct(system, pictures).pictures
        asked = rows.repeat(measure.options.count)
        phrases = measure.phrases(asked)
        drawn = measure.draw(system, phrases)
        near = {name: nearest(of, train, 1).distance_Nk[:, 0] for name, of in (("drawn", drawn), ("real", pictures))}
        features = {name: classify(measure.classifier, of).features_ND
                    for name, of in (("drawn", drawn[:len(rows)]), ("real", pictures))}
        vectors = measure.judge.pictures(drawn)
        figures["splits"][split] = {
            "real": measure.agreement(pictures, rows), "reconstructed": measure.agreement(again, rows),
            "drawn": measure.agreement(drawn, asked), "distance": measure.distance(drawn, pictures),
            "distance_of_reconstructed": measure.distance(again, pictures),
            "psnr": summary(psnr(pictures, again)), "accuracy": measure.accuracy(system, split),
            "diversity": phrase_diversity(drawn, vectors, phrases),
            "nearest_training_picture": {name: summary(pixel_rmse(of, drawn)) for name, of in near.items()},
            "coverage": coverage(features["real"], features["drawn"], NEIGHBOURS)._asdict()}
        for name in ("real", "reconstructed", "drawn"):
            print(shown(f"{split}, {name}", figures["splits"][split][name]), flush=True)
        split_sheets(measure, split, drawn, asked, out)
    figures["accuracy_on_training"] = training_accuracy(measure, system, train, train_rows)
    draw_sheets(measure, system, out)
    return figures


def training_accuracy(measure: Measure, system: Any, pictures: Tensor, rows: Tensor) -> dict[str, Any]:
    some = torch.arange(0, len(rows), len(rows) // 256)[:256]
    measure.real["train"] = pictures[some], rows[some]
    return measure.accuracy(system, "train")


def split_sheets(measure: Measure, split: str, drawn: Tensor, rows: Tensor, out: Path) -> None:
    """Real picture and two samples of phrases spread over a split; then those that the judge ranks lowest."""
    pictures, own = measure.real[split]
    count = len(own)
    some = torch.linspace(0, count - 1, 24).long()
    trios = torch.stack([pictures[some], drawn[some], drawn[count + some] if len(drawn) > count else drawn[some]], 1)
    write(out, split, trios.flatten(0, 1), 12)
    vectors, phrases = measure.judge.pictures(drawn[:count]), measure.phrases(own)
    cosine = (vectors * measure.judge.phrases(phrases)).sum(1)
    worst = cosine.argsort()[:12]
    write(out, f"{split}-failures", torch.stack([pictures[worst], drawn[worst]], 1).flatten(0, 1), 12)
    hub.save_json({"sheet": [phrases[i] for i in some], "failures": [phrases[i] for i in worst]},
                  out / f"{split}-phrases.json")


def draw_sheets(measure: Measure, system: Any, out: Path) -> None:
    """Concepts in all styles, free phrases, and pictures after every scale."""
    words = [STYLE_WORDS[style][0] for style in STYLES]
    phrases = [f"{name}, {word} style" for name in IN_ALL_STYLES for word in words]
    write(out, "styles", measure.draw(system, phrases), 2 * len(words))
    write(out, "free", measure.draw(system, [phrase for phrase in FREE for _ in range(2)]), 8)
    asked = phrases[::7][:8]
    pictures = [preview.images.float().cpu()
                for preview in system.stream(asked, seed=3, output="torch", **measure.chosen)]
    write(out, "coarse-to-fine", torch.stack(pictures, 1).flatten(0, 1), 2 * len(pictures))


def write(out: Path, name: str, pictures: Tensor, columns: int) -> None:
    save_image(sheet(pictures, columns), out / f"{name}.webp", quality=60, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-text-64", help="name or folder")
    parser.add_argument("--judge", default="emoji-text-judge", help="name or folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "emoji-text-64")
    parser.add_argument("--count", type=int, default=2, help="samples a phrase")
    parser.add_argument("--most", type=int, default=1000, help="phrases of a split; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compare", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    measure = Measure(options)
    if options.compare:
        models = dict(one.split("=", 1) for one in options.compare)
        hub.save_json(compare(measure, models), options.out / "compare.json")
    elif options.sweep:
        hub.save_json({"rows": sweep(measure, options.model)}, options.out / "sweep.json")
    else:
        figures = report(measure, options.model, options.out)
        hub.save_json(figures, options.out / "figures.json")
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
