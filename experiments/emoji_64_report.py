"""Every figure and sheet of docs/emoji-64.md, of the model that its commands make.

    python experiments/emoji_64_report.py                     # all of it, some minutes of one CPU core
    python experiments/emoji_64_report.py --count 5 --out /tmp/report    # a quick look
    python experiments/emoji_64_report.py --sweep             # agreement and copies for a few sampling settings

Writes figures.json and the sheets into docs/emoji-64/.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.data import open_dataset
from nextscale.data.sheets import save_image, sheet
from nextscale.evaluation.classifier import Opinion, PictureSet, agreement, judge, load_classifier, whole_set
from nextscale.evaluation.copies import coverage, nearest, pixel_rmse
from nextscale.evaluation.reconstruction import (
    after_each_scale,
    code_usage,
    psnr,
    reconstruct,
    summary,
    thumbnails,
)

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOURS = 3  # k of recall and coverage
SHEET_BYTES = 400_000

#: guidance scale, temperature, top-k, top-p
SWEEP: tuple[tuple[float, float, int | None, float | None], ...] = (
    (1.0, 1.0, None, None), (2.0, 1.0, None, None), (3.0, 1.0, None, None), (2.0, 0.85, None, None),
    (2.0, 0.6, None, None), (2.0, 0.55, None, None), (3.0, 0.6, None, None), (2.0, 1.0, 600, 0.95))


class Report:
    """The model, the judge, the pictures, and what was found so far."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.out)
        self.figures: dict[str, Any] = {"seconds": {}}
        self.system = nextscale.load(options.model, device=options.device, precision=options.precision)
        self.judge = load_classifier("emoji-judge")
        self.train = whole_set(open_dataset("emoji", 64, "train"))
        self.held_out = whole_set(open_dataset("emoji", 64, "concept-test"))
        generator = torch.Generator().manual_seed(0)
        self.train_part = self.train.part(torch.randperm(len(self.train), generator=generator)[:options.likelihood])
        chosen = {name: getattr(options, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
        self.settings = {name: value for name, value in chosen.items() if value is not None}
        self.train_opinion = self.opinion("judging training pictures", self.train.pictures)
        self.held_out_opinion = self.opinion("judging held-out pictures", self.held_out.pictures)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress line; yields a function that takes how many are done. Seconds are noted under ``what``."""
        began = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        self.figures["seconds"][what] = round(time.perf_counter() - began, 1)

    def opinion(self, what: str, pictures: Tensor) -> Opinion:
        with self.progress(what, len(pictures)) as each:
            return judge(self.judge, pictures, each=each)

    # (a) Reconstruction

    def reconstruction(self) -> None:
        """PSNR of held-out pictures through the tokens, beside thumbnails; usage; error after every scale."""
        held = self.held_out
        with self.progress("reconstructing held-out pictures", len(held)) as each:
            found = reconstruct(self.system, held.pictures, each=each)
        self.reconstructed = found.pictures
        some = torch.arange(0, len(held), max(1, len(held) // 200))
        with self.progress("decoding after every scale", len(some)) as each:
            errors_NK = after_each_scale(self.system, held.pictures[some], [step[some] for step in found.tokens],
                                         each=each)
        vocabulary = self.system.config.tokenizer.vocabulary
        ratios = {name: psnr(held.pictures, other) for name, other in (
            ("tokens", found.pictures), ("thumbnail 8x8", thumbnails(held.pictures, 8)),
            ("thumbnail 16x16", thumbnails(held.pictures, 16)))}
        inside = psnr(held.pictures, found.pictures, held.alpha)
        styles = held.class_names[1]
        self.figures["reconstruction"] = {
            "pictures": len(held),
            "psnr": {name: summary(ratio) for name, ratio in ratios.items()},
            "psnr_of_mean_error": float(10 * torch.log10(4 / (held.pictures - found.pictures).square().mean())),
            "psnr_inside_alpha": {"tokens": summary(inside), **{
                f"thumbnail {side}x{side}": summary(psnr(held.pictures, thumbnails(held.pictures, side), held.alpha))
                for side in (8, 16)}},
            "psnr_by_style": {name: float(ratios["tokens"][held.labels[:, 1] == i].mean())
                              for i, name in enumerate(styles)},
            "psnr_inside_alpha_by_style": {name: float(inside[held.labels[:, 1] == i].mean())
                                           for i, name in enumerate(styles)},
            "tokens": sum(step.shape[1] for step in found.tokens),
            "bits_a_picture": self.system.config.tokenizer.bits,
            "mean_squared_error_after_scale": errors_NK.mean(0).tolist(),
            "psnr_after_scale": (10 * torch.log10(4 / errors_NK.clamp_min(1e-10))).mean(0).tolist(),
            "usage": [asdict(usage) for usage in code_usage(found.tokens, vocabulary)],
        }
        self._reconstruction_sheet(found.tokens)

    def _reconstruction_sheet(self, tokens: list[Tensor]) -> None:
        chosen = _spread(self.held_out, 20)
        columns = [self.held_out.pictures[chosen]]
        columns += [self.system.decode([step[chosen] for step in tokens[:k + 1]]).cpu() for k in range(len(tokens))]
        self.write_sheet("reconstructions", torch.stack(columns, 1).flatten(0, 1), 2 * len(columns))

    # (b) Agreement, (c) copies

    def sample(self, count: int, what: str = "drawing", **settings: Any) -> tuple[PictureSet, list[Tensor]]:
        """``count`` pictures of every class, styles in turn; their tokens."""
        names = self.held_out.class_names
        styles = len(names[1])
        labels = torch.tensor([(c, (c + i) % styles) for c in range(len(names[0])) for i in range(count)])
        steps = len(self.system.plan)
        with self.progress(what, len(labels)) as each:
            calls = itertools.count(1)
            generation = self.system.generate(
                [tuple(row) for row in labels.tolist()], seed=self.options.seed, output="torch", batch_size=64,
                progress=False, callback=lambda step, run: each(min(next(calls) * 64 // steps, len(labels))),
                **{**self.settings, **settings})
        return (PictureSet(generation.images.cpu(), labels, None, names),
                [step.cpu() for step in generation.tokens])

    def agreement_of(self, samples: PictureSet, opinion: Opinion) -> dict[str, float]:
        return agreement(opinion, samples.labels, samples.class_names)

    def samples(self) -> None:
        """Draws, and measures agreement, copies and coverage."""
        drawn, tokens = self.sample(self.options.count)
        opinion = self.opinion("judging samples", drawn.pictures)
        real = self.agreement_of(self.held_out, self.held_out_opinion)
        through_tokens = self.agreement_of(self.held_out, self.opinion("judging reconstructions", self.reconstructed))
        of_samples = self.agreement_of(drawn, opinion)
        self.figures["settings"] = asdict(self.system.settings_for("pictures", self.settings))
        self.figures["agreement"] = {
            "samples": len(drawn), "samples_a_class": self.options.count, "held_out": real,
            "held_out_reconstructed": through_tokens, "drawn": of_samples,
            "ratio": {name: of_samples[name] / max(real[name], 1e-9) for name in of_samples},
        }
        self.figures["copies"], near_pixels = self.copies(drawn, opinion)
        self.figures["coverage"] = self.covered(drawn, opinion)
        self._sample_sheets(drawn, tokens, near_pixels)

    def copies(self, drawn: PictureSet, opinion: Opinion) -> tuple[dict[str, Any], Tensor]:
        """Distance to the nearest training picture, by pixels and by the judge's features.

        Beside samples and held-out pictures: training pictures through the tokenizer, what perfect copies would give.
        """
        part = self.train_part.pictures[:256]
        copied = reconstruct(self.system, part).pictures
        found: dict[str, Any] = {"held_out": {}, "drawn": {}, "training_reconstructed": {}, "ratio": {}}
        near_pixels = torch.empty(0)
        kinds = {"held_out": (self.held_out.pictures, self.held_out_opinion.features_ND),
                 "drawn": (drawn.pictures, opinion.features_ND),
                 "training_reconstructed": (copied, judge(self.judge, copied).features_ND)}
        for name, (pictures, features) in kinds.items():
            with self.progress(f"nearest training pictures: {name.replace('_', ' ')}", len(pictures)) as each:
                by_pixels = nearest(pictures, self.train.pictures, 3, each=each)
            by_features = nearest(features, self.train_opinion.features_ND, 1)
            found[name] = {"pixel_rmse": summary(pixel_rmse(by_pixels.distance_Nk[:, 0], pictures)),
                           "features": summary(by_features.distance_Nk[:, 0])}
            if name == "drawn":
                near_pixels = by_pixels.index_Nk
        for name in ("drawn", "training_reconstructed"):
            found["ratio"][name] = {of: found[name][of]["median"] / found["held_out"][of]["median"]
                                    for of in ("pixel_rmse", "features")}
        return found, near_pixels

    def covered(self, drawn: PictureSet, opinion: Opinion) -> dict[str, Any]:
        """Precision, recall and coverage of held-out pictures in the judge's features.

        Beside the samples: as many training pictures of the same classes and styles, what a perfect sampler would give.
        """
        generator = torch.Generator().manual_seed(1)
        same = []
        for label in drawn.labels:
            members = (self.train.labels == label).all(1).nonzero().flatten()
            if len(members) == 0:
                members = (self.train.labels[:, 0] == label[0]).nonzero().flatten()
            same.append(int(members[torch.randint(len(members), (), generator=generator)]))
        count = min(len(drawn), len(self.held_out))
        part = torch.randperm(len(drawn), generator=generator)[:count]
        held = self.held_out_opinion.features_ND[torch.randperm(len(self.held_out), generator=generator)[:count]]
        training = self.train_opinion.features_ND[torch.tensor(same)]
        return {"pictures_of_each_kind": count, "neighbours": NEIGHBOURS,
                "drawn": coverage(held, opinion.features_ND[part], NEIGHBOURS)._asdict(),
                "training": coverage(held, training[part], NEIGHBOURS)._asdict()}

    def _sample_sheets(self, drawn: PictureSet, tokens: list[Tensor], near_Nk: Tensor) -> None:
        styles = len(drawn.class_names[1])
        # Three classes a row, each in all styles, in the same order.
        order = [next((i for i in range(len(drawn)) if drawn.labels[i].tolist() == [c, s]), None)
                 for c in range(len(drawn.class_names[0])) for s in range(styles)]
        if None not in order:  # fewer samples a class than styles make no such sheet
            self.write_sheet("samples", drawn.pictures[torch.tensor(order)], 3 * styles)
        chosen = torch.linspace(0, len(drawn) - 1, 16).long()  # four to a row, each followed by its neighbours
        rows = torch.cat([drawn.pictures[chosen, None], self.train.pictures[near_Nk[chosen]]], 1)
        self.write_sheet("nearest", rows.flatten(0, 1), 4 * 4)
        previews = [self.system.decode([step[chosen] for step in tokens[:k + 1]]).cpu() for k in range(len(tokens))]
        self.write_sheet("previews", torch.stack(previews, 1).flatten(0, 1), 2 * len(tokens))

    # (d) Likelihood

    def likelihood(self) -> None:
        """Nats a token and bits a dimension, step by step, on held-out and on training pictures.

        Beside them what the codes' frequencies alone give, scale by scale: the entropy of the training set's tokens,
        and the cross-entropy of the held-out tokens under those frequencies (one added to every count).
        """
        generator = torch.Generator().manual_seed(2)
        held = self.held_out.part(torch.randperm(len(self.held_out), generator=generator)[:self.options.likelihood])
        lengths = torch.tensor([len(range(s.lo, s.hi)) for s in self.system.plan.spans(0, len(self.system.plan))])
        counts_KV = self.code_counts(self.train)
        share_KV = counts_KV / counts_KV.sum(1, keepdim=True)
        held_KV = self.code_counts(held)
        smoothed_KV = (counts_KV + 1) / (counts_KV + 1).sum(1, keepdim=True)
        self.figures["likelihood"] = {"unigram": {
            "training_entropy_by_step": (-torch.special.xlogy(share_KV, share_KV).sum(1)).tolist(),
            "held_out_cross_entropy_by_step": (-(held_KV * smoothed_KV.log()).sum(1) / held_KV.sum(1)).tolist()}}
        for name, pictures in (("held_out", held), ("training", self.train_part)):
            found = []
            with self.progress(f"likelihood: {name.replace('_', '-')}", len(pictures)) as each:
                for start in range(0, len(pictures), 32):
                    part = pictures.part(slice(start, start + 32))
                    labels = [tuple(row) for row in part.labels.tolist()]
                    found.append(self.system.log_prob(part.pictures, labels).step.cpu())
                    each(start + len(part))
            nats_K = -torch.cat(found).double().mean(0)
            values = pictures.pictures[0].numel()
            self.figures["likelihood"][name] = {
                "pictures": len(pictures), "nats_a_token": float(nats_K.sum() / lengths.sum()),
                "nats_a_token_by_step": (nats_K / lengths).tolist(),
                "bits_a_dimension": float(nats_K.sum() / math.log(2) / values),
                "bits_a_dimension_by_step": (nats_K / math.log(2) / values).tolist(),
                "bits_a_picture": float(nats_K.sum() / math.log(2)),
            }

    def code_counts(self, pictures: PictureSet) -> Tensor:
        """How often every code stands in every scale's tokens, (K, V)."""
        counts_KV = torch.zeros(len(self.system.plan), self.system.config.tokenizer.vocabulary, dtype=torch.double)
        with self.progress("counting codes", len(pictures)) as each:
            for start in range(0, len(pictures), 64):
                for k, tokens_BL in enumerate(self.system.encode(pictures.pictures[start:start + 64])):
                    counts_KV[k] += tokens_BL.flatten().bincount(minlength=counts_KV.shape[1]).cpu()
                each(min(start + 64, len(pictures)))
        return counts_KV

    # Sweep

    def sweep(self) -> None:
        """A table of settings: agreement, style agreement, median distance ratios, recall."""
        print(f"{'guidance':>8} {'temperature':>11} {'top_k':>6} {'top_p':>6} | {'class':>6} {'ratio':>6} {'style':>6} "
              f"| {'copies px':>9} {'features':>8} | {'precision':>9} {'recall':>6} {'cover':>6}")
        real = self.agreement_of(self.held_out, self.held_out_opinion)
        base = nearest(self.held_out.pictures, self.train.pictures).distance_Nk.median()
        base_features = nearest(self.held_out_opinion.features_ND, self.train_opinion.features_ND).distance_Nk.median()
        rows = []
        for scale, temperature, top_k, top_p in SWEEP:
            settings = {"guidance_scale": scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
            drawn, _ = self.sample(self.options.count, f"guidance {scale}", **settings)
            opinion = judge(self.judge, drawn.pictures)
            agreed, covered = self.agreement_of(drawn, opinion), self.covered(drawn, opinion)["drawn"]
            pixels = nearest(drawn.pictures, self.train.pictures).distance_Nk.median() / base
            features = nearest(opinion.features_ND, self.train_opinion.features_ND).distance_Nk.median() / base_features
            rows.append({**settings, "agreement": agreed, "ratio": agreed["class"] / real["class"], **covered,
                         "pixel_ratio": float(pixels), "feature_ratio": float(features)})
            print(f"{scale:8.1f} {temperature:11.2f} {top_k or 'all':>6} {top_p or 'all':>6} | {agreed['class']:6.3f} "
                  f"{rows[-1]['ratio']:6.3f} {agreed['style']:6.3f} | {pixels:9.3f} {features:8.3f} | "
                  f"{covered['precision']:9.3f} {covered['recall']:6.3f} {covered['coverage']:6.3f}", flush=True)
        hub.save_json({"held_out": real, "samples_a_class": self.options.count, "rows": rows}, self.out / "sweep.json")

    def write_sheet(self, name: str, pictures: Tensor, columns: int) -> None:
        """A sheet as WebP, of less quality where it would be too large for a repository."""
        image = sheet(pictures, columns)
        for quality in (92, 85, 75, 60):
            path = save_image(image, self.out / f"{name}.webp", quality=quality, method=4)
            if path.stat().st_size < SHEET_BYTES:
                break


def _spread(pictures: PictureSet, count: int) -> Tensor:
    """Positions of pictures spread over the classes and styles."""
    order = (pictures.labels[:, 0] * 97 + pictures.labels[:, 1] * 13).argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, count).long()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/emoji-64", help="name or folder")
    parser.add_argument("--out", default=str(ROOT / "docs" / "emoji-64"))
    parser.add_argument("--count", type=int, help="samples a class (15, in a sweep 3); multiples of 5 suit the styles")
    parser.add_argument("--likelihood", type=int, default=400, help="pictures to score, of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sweep", action="store_true", help="compare sampling settings instead of the whole report")
    options = parser.parse_args()
    options.count = options.count or (3 if options.sweep else 15)
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    report = Report(options)
    report.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        report.sweep()
        return
    report.reconstruction()
    report.samples()
    report.likelihood()
    report.figures["seconds"]["all"] = round(time.perf_counter() - began, 1)
    hub.save_json(report.figures, report.out / "figures.json")
    print(json.dumps(report.figures, indent=1))


if __name__ == "__main__":
    main()
