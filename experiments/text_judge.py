"""Trains the judge of pictures and phrases on the emoji set, and measures it on real pictures that it never saw.

    python experiments/text_judge.py                  # about 15 minutes of one free CPU core; goes on where it stopped
    python experiments/text_judge.py --measure-only   # only the figures, of the weights that are there

Of each split it prints how often the picture's own phrase ("red apple, flat style") is among the 5 best of 100 phrases
of that style, and how often its style is the best of five: on pictures as they are, and as the emoji tokenizer gives
them back.
The judge learns from the pictures of the split "train" alone; nothing is ever trained against it.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor, nn

import nextscale
from nextscale import hub
from nextscale.data import Loader, PictureDataset, ShuffledOrder, open_dataset
from nextscale.data.emoji_captions import STYLE_WORDS
from nextscale.data.emoji_set import STYLES, emoji_set_path
from nextscale.evaluation.classifier import whole_set
from nextscale.evaluation.text_agreement import draw_others, rank_phrases
from nextscale.evaluation.text_judge import (
    TextJudge,
    TextJudgeConfig,
    contrastive_loss,
    load_text_judge,
    save_text_judge,
)
from nextscale.tokenizers.features import load_classifier
from nextscale.training import TrainConfig, Trainer
from nextscale.training.classifier import Augmentation
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups

ROOT = Path(__file__).resolve().parents[1]
OTHERS = 384  # phrases of other pictures, beside a batch's own


@dataclass(frozen=True)
class Captions:
    """What is known in words of every row of the set: its concept (index into names and keywords) and its style."""

    concept: Tensor
    style: Tensor
    names: list[str]
    keywords: list[list[str]]
    trained: Tensor  # concepts with pictures in the split "train"

    @classmethod
    def read(cls, path: Path) -> Captions:
        """From the set's own columns."""
        table = pyarrow.parquet.read_table(path, columns=["codepoints", "name", "keywords", "style", "concept_split"])
        rows = table.to_pylist()
        index = {code: i for i, code in enumerate(dict.fromkeys(row["codepoints"] for row in rows))}
        first = {row["codepoints"]: row for row in reversed(rows)}
        concept = torch.tensor([index[row["codepoints"]] for row in rows])
        known = torch.tensor([row["concept_split"] == "train" for row in rows])
        keywords = [[word for word in first[code]["keywords"] if word != first[code]["name"].lower()] for code in index]
        return cls(concept, torch.tensor([STYLES.index(row["style"]) for row in rows]),
                   [first[code]["name"] for code in index], keywords, concept[known].unique())

    def phrase(self, concept: int, style: int) -> str:
        """As samples are asked for: ``<name>, <style> style``."""
        return f"{self.names[concept]}, {STYLE_WORDS[STYLES[style]][0]} style"

    def varied(self, concept: int, style: int | None, draw: list[float]) -> str:
        """The same said in other words, by 5 numbers in [0, 1): search words added or in the name's place."""
        keywords, words = self.keywords[concept], [self.names[concept]]
        if keywords and draw[0] < 0.4:
            start, count = int(draw[1] * len(keywords)), 1 + int(draw[2] * 3)
            words += (keywords + keywords)[start:start + min(count, len(keywords))]
            if len(words) == 4 and draw[3] < 0.3:
                words = words[1:]
        said = ", ".join(words)
        if style is None:
            return said if draw[4] < 0.5 else f"a drawing of a {said}"
        word, other = STYLE_WORDS[STYLES[style]]
        forms = (f"{said}, {word} style", f"{said}, {word} style", f"{said}, {other} style",
                 f"a {word} drawing of a {said}", f"{word} {said} emoji")
        return forms[int(draw[4] * len(forms))]


def phrases_of_batch(captions: Captions, rows: Tensor) -> tuple[list[str], Tensor]:
    """Phrases for N rows of the set: their own, the same in another style, and ``OTHERS`` of any trained concept; and
    which fit which row (N, M). A style that isn't said fits all."""
    concept_N, style_N = captions.concept[rows], captions.style[rows]
    swapped_N = (style_N + torch.randint(1, len(STYLES), style_N.shape)) % len(STYLES)
    other_O = captions.trained[torch.randint(len(captions.trained), (OTHERS,))]
    concept_M = torch.cat([concept_N, concept_N, other_O])
    style_M = torch.cat([style_N, swapped_N, torch.randint(len(STYLES), (OTHERS,))])
    said_M = torch.rand(len(concept_M)) < 0.75
    said_M[len(rows):2 * len(rows)] = True
    draws = torch.rand(len(concept_M), 5).tolist()
    phrases = [captions.varied(concept, style if said else None, draw) for concept, style, said, draw in
               zip(concept_M.tolist(), style_M.tolist(), said_M.tolist(), draws, strict=True)]
    return phrases, (concept_N[:, None] == concept_M) & ((style_N[:, None] == style_M) | ~said_M)


class ContrastiveTask:
    """Trains a :class:`TextJudge`: every picture against its own phrase, the same in another style, and others'."""

    phases: tuple[str, ...] = ("main",)

    def __init__(self, judge: TextJudge, captions: Captions, held_out: dict[str, tuple[Tensor, Tensor]]):
        self.judge, self.captions, self.held_out = judge, captions, held_out
        self.augmentation = Augmentation()
        self.modules: dict[str, nn.Module] = {"judge": judge}

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups([self.judge], weight_decay)

    def averaged(self) -> dict[str, nn.Module]:
        return {"judge": self.judge}

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        phrases, fits_NM = phrases_of_batch(self.captions, batch["id"])
        pictures_ND = self.judge.picture_vectors(self.augmentation(batch["picture"]))
        phrases_MD = self.judge.phrase_vectors(self.judge.bags(phrases))
        loss = contrastive_loss(pictures_ND, phrases_MD, fits_NM, self.judge.scale)
        best_N = (pictures_ND.detach() @ phrases_MD.detach().T).argmax(1)
        right = fits_NM[torch.arange(len(best_N)), best_N].float().mean()
        return loss, {"accuracy": right, "scale": self.judge.scale.detach()}

    def after_step(self, at: TrainingStep) -> Metrics:
        return {}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        judge, found = averaged["judge"], {}
        assert isinstance(judge, TextJudge)
        for split, (pictures, rows) in self.held_out.items():
            ranks, styles = rates(judge, self.captions, pictures, rows)
            found |= {f"{split}/top_5": ranks["top_5"]["rate"], f"{split}/style": styles["top_1"]["rate"]}
        return found

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


def rates(judge: TextJudge, captions: Captions, pictures: Tensor,
          rows: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well pictures are told by their phrases and styles."""
    concepts, styles = captions.concept[rows].tolist(), captions.style[rows].tolist()
    asked = [captions.phrase(c, s) for c, s in zip(concepts, styles, strict=True)]
    drawn = draw_others(concepts, range(len(captions.names)))
    others = [[captions.phrase(c, s) for c in row] for row, s in zip(drawn, styles, strict=True)]
    variants = [[captions.phrase(c, other) for other in range(len(STYLES)) if other != s]
                for c, s in zip(concepts, styles, strict=True)]
    vectors = judge.pictures(pictures)
    return (rank_phrases(judge, vectors, asked, others).figures(),
            rank_phrases(judge, vectors, asked, variants).figures())


def pictures_of(split: str) -> tuple[Tensor, Tensor]:
    """All pictures of a split and their rows in the set."""
    dataset: PictureDataset = open_dataset("emoji", 64, split)
    return whole_set(dataset).pictures, torch.from_numpy(dataset.rows)


def train(options: argparse.Namespace) -> bool:
    """Train from where an earlier training stopped if there was one, and write the averaged weights; False where it was
    told to stop before its end."""
    torch.manual_seed(options.seed)
    judge = TextJudge(TextJudgeConfig())
    if not options.from_scratch:
        warm_start(judge)
    pictures = open_dataset("emoji", 64, "train")
    held_out = {split: pictures_of(split) for split in ("style-test",)}
    task = ContrastiveTask(judge, Captions.read(Path(emoji_set_path())), held_out)
    loader = Loader(pictures, ShuffledOrder(len(pictures), options.seed), options.batch_size)
    config = TrainConfig(steps=options.steps, batch_size=options.batch_size, learning_rate=2e-3, warmup_steps=100,
                         weight_decay=0.05, ema_decay=0.995, final_learning_rate_ratio=0.01, seed=options.seed,
                         log_every=50, sample_every=500, checkpoint_every=250, keep_checkpoints=1,
                         minutes=options.minutes, clock="processor")
    trainer = Trainer(task, loader, config, options.runs, resume=True)
    result = trainer.train()
    print(result, flush=True)
    averaged = trainer.averaged_modules()["judge"]
    assert isinstance(averaged, TextJudge)
    save_text_judge(averaged, options.out)
    return result.stopped != "signal"


def warm_start(judge: TextJudge) -> None:
    """The body's weights from the classifier ``emoji-judge``, which learned from the same split, where they fit."""
    known = load_classifier("emoji-judge").state_dict()
    own = judge.body.state_dict()
    judge.body.load_state_dict({name: known[name] if name in known and known[name].shape == tensor.shape else tensor
                                for name, tensor in own.items()})


def measure(folder: Path, splits: list[str]) -> dict[str, Any]:
    """Rates of real pictures, as they are and through the tokenizer of emoji-64."""
    judge, captions = load_text_judge(folder), Captions.read(Path(emoji_set_path()))
    tokenizer = nextscale.load("runs/emoji-64")
    found: dict[str, Any] = {}
    for split in splits:
        pictures, rows = pictures_of(split)
        if split == "train":
            chosen = torch.arange(0, len(rows), max(1, len(rows) // 1000))
            pictures, rows = pictures[chosen], rows[chosen]
        again = torch.cat([tokenizer.decode(tokenizer.encode(part)).cpu() for part in pictures.split(64)])
        for way, shown in (("real", pictures), ("reconstructed", again)):
            ranks, styles = rates(judge, captions, shown, rows)
            found[f"{split}, {way}"] = {"phrases": ranks, "styles": styles}
            print(f"{split:13s} {way:14s} {ranks['pictures']:5d} pictures  "
                  + "  ".join(f"{name} {100 * of['rate']:5.1f}% ({100 * of['low']:.1f} to {100 * of['high']:.1f})"
                              for name, of in (("top 1", ranks["top_1"]), ("top 5", ranks["top_5"]),
                                               ("style", styles["top_1"])))
                  + f"  cosine {ranks['cosine']:.3f}, of others {ranks['cosine_of_others']:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=15.0, help="of processor time, over all its lives")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--from-scratch", action="store_true", help="not from the body of emoji-judge")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "text-judge", help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "text-judge" / "emoji-text-judge")
    parser.add_argument("--splits", nargs="+", default=["style-test", "concept-test", "train"])
    parser.add_argument("--measure-only", action="store_true", help="measure the weights that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.measure_only and not train(options):
        return
    found = measure(options.out, options.splits)
    hub.save_json(found, options.out / "accuracy.json")
    print(json.dumps({way: of["phrases"]["top_5"] for way, of in found.items()}))


if __name__ == "__main__":
    main()
