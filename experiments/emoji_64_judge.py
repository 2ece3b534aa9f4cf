"""Trains the two classifiers that ship: the judge of the emoji model, and the features of the perceptual distance.

    python experiments/emoji_64_judge.py judge      # about 15 minutes of one free CPU core
    python experiments/emoji_64_judge.py features
    python experiments/emoji_64_judge.py judge --measure-only

Each goes to ``src/nextscale/weights/emoji-<name>``, its accuracy on held-out pictures beside it in ``accuracy.json``.
The judge differs from the features in size, seed and data order, and nothing is ever trained against it.
"""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nextscale import hub
from nextscale.data import ClassBalancedOrder, Loader, open_dataset
from nextscale.evaluation.classifier import accuracy, whole_set
from nextscale.tokenizers.features import ClassifierConfig, PictureClassifier, load_classifier, save_classifier
from nextscale.training import TrainConfig, Trainer
from nextscale.training.classifier import ClassifierRecipe, ClassifierTask

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Choice:
    """What the two differ in: a cheap network for the judge; finer maps for the features, where pixels still count."""

    patch: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    seed: int
    batch_size: int
    steps: int


CHOICES = {"judge": Choice(4, (48, 96, 112), (0, 1, 1), 2, 32, 6000),
           "features": Choice(2, (32, 64, 80, 96), (0, 1, 2, 1), 1, 64, 1000)}


def train(name: str, steps: int | None, minutes: float, out: Path) -> None:
    """Train one of the two, from where an earlier training stopped if there was one, and write its averaged weights."""
    choice = CHOICES[name]
    torch.manual_seed(choice.seed)
    pictures = open_dataset("emoji", 64, "train")
    names = tuple(tuple(kind) for kind in pictures.class_names)
    recipe = ClassifierRecipe(
        ClassifierConfig(choice.patch, choice.widths, choice.blocks, tuple(map(len, names)), names))
    held_out = whole_set(open_dataset("emoji", 64, "concept-test"))
    task = ClassifierTask(recipe, (held_out.pictures, held_out.labels))
    loader = Loader(pictures, ClassBalancedOrder(pictures.labels[:, 0], choice.seed), choice.batch_size)
    config = TrainConfig(steps=steps or choice.steps, batch_size=choice.batch_size, learning_rate=2e-3,
                         warmup_steps=50, weight_decay=0.05, ema_decay=0.995, final_learning_rate_ratio=0.01,
                         seed=choice.seed, log_every=50, sample_every=400, checkpoint_every=400, keep_checkpoints=1,
                         minutes=minutes)
    trainer = Trainer(task, loader, config, ROOT / "runs" / f"emoji-{name}", resume=True)
    print(trainer.train(), flush=True)
    averaged = trainer.averaged_modules()["classifier"]
    assert isinstance(averaged, PictureClassifier)
    save_classifier(averaged, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CHOICES)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after this wall time, schedule and all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure-only", action="store_true", help="measure the weights that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = ROOT / "src" / "nextscale" / "weights" / f"emoji-{options.name}"
    if not options.measure_only:
        train(options.name, options.steps, options.minutes, folder)
    classifier = load_classifier(folder)
    found = {split: accuracy(classifier, whole_set(open_dataset("emoji", 64, split)))
             for split in ("concept-test", "style-test")}
    print(json.dumps(found, indent=1))
    hub.save_json(found, folder / "accuracy.json")


if __name__ == "__main__":
    main()
