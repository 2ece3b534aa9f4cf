"""A training small enough to be killed many times: drawn pictures, a few convolutions, noise from torch's generator.

Run as a script it trains into the folder named by its first argument, resuming what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from nextscale.data import ClassBalancedOrder, Loader, open_dataset
from nextscale.parallel import rand_pictures
from nextscale.training import TrainConfig, Trainer, TrainingStep, decay_groups


def draw_pictures(folder: Path, classes: int = 3, each: int = 8, size: int = 16) -> Path:
    """Discs, boxes and lines of random place and colour, a subfolder a class; class k has ``each + 2 k`` pictures."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(each + 2 * label):
            image = Image.new("RGB", (size, size), "white")
            x, y = sorted(int(v) for v in generator.integers(0, size, 2))
            colour = tuple(int(v) for v in generator.integers(0, 255, 3))
            pen = ImageDraw.Draw(image)
            (pen.ellipse, pen.rectangle, pen.line)[label % 3]((x, x, y + 1, y + 1), fill=colour)
            image.save(folder / f"class{label}" / f"{i:03d}.png")
    return folder


class AutoencoderTask:
    """One phase: denoise pictures through a bottleneck with dropout and a batch-statistics buffer."""

    phases: tuple[str, ...] = ("main",)

    def __init__(self, dropout: float = 0.1, noise: float = 0.1) -> None:
        torch.manual_seed(1)
        self.noise = noise
        self.modules: dict[str, nn.Module] = {
            "autoencoder": nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(dropout),
                nn.ConvTranspose2d(8, 3, 4, 2, 1),
            )
        }  # fmt: skip
        self.calls = 0

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups([self.modules["autoencoder"]], weight_decay)

    def averaged(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.modules["autoencoder"]}

    def loss(self, phase: str, batch: dict[str, Tensor], at: TrainingStep) -> tuple[Tensor | None, dict[str, Any]]:
        picture = batch["picture"]
        noise = 2 * rand_pictures(*picture.shape) - 1
        out = self.modules["autoencoder"](picture + self.noise * noise)
        error = (out.float() - picture).square().mean()
        return error, {"error": error, "mean": float(out.detach().float().mean())}

    def after_step(self, at: TrainingStep) -> dict[str, float]:
        self.calls += 1
        return {"calls": float(self.calls)}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> dict[str, Any]:
        torch.randn(7)  # must not disturb the training's own draws
        (out / f"{at.step:06d}.txt").write_text(f"{averaged['autoencoder'].training}")
        return {"held_out/white": averaged["autoencoder"](torch.ones(1, 3, 16, 16)).mean()}

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {"calls": self.calls, "shape": torch.tensor([3, 16, 16])}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        assert state["shape"].tolist() == [3, 16, 16]
        self.calls = int(state["calls"])


class AdversarialTask(AutoencoderTask):
    """Two phases over the same batch; the second begins after two steps."""

    phases = ("main", "discriminator")

    def __init__(self) -> None:
        super().__init__()
        self.modules["discriminator"] = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(128, 1)
        )

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        if phase == "main":
            return super().parameter_groups(phase, weight_decay)
        return [{"params": self.modules["discriminator"].parameters(), "learning_rate_scale": 0.5}]

    def loss(self, phase: str, batch: dict[str, Tensor], at: TrainingStep) -> tuple[Tensor | None, dict[str, Any]]:
        judge, maker = self.modules["discriminator"], self.modules["autoencoder"]
        trained = {name for name, module in self.modules.items() if next(module.parameters()).requires_grad}
        assert trained == {"autoencoder" if phase == "main" else "discriminator"}
        if phase == "main":
            loss, metrics = super().loss(phase, batch, at)
            assert loss is not None
            return loss - 0.01 * judge(maker(batch["picture"])).mean(), metrics
        if at.step < 2:
            return None, {}
        with torch.no_grad():
            made = maker(batch["picture"])
        return (judge(made) - judge(batch["picture"])).mean().float(), {"judged": judge(made).mean()}


def config(**changes: Any) -> TrainConfig:
    """Short and plain: 12 steps of 8 pictures in fp32, a checkpoint every 5."""
    plain: dict[str, Any] = {
        "steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3, "precision": "fp32", "device": "cpu",
        "log_every": 1, "checkpoint_every": 5, "sample_every": 5, "ema_decay": 0.9,
    }  # fmt: skip
    return TrainConfig(**{**plain, **changes})


def make_trainer(
    pictures: Path, out: Path, task: Any = None, resume: bool = False, **changes: Any
) -> Trainer:
    """A trainer of the small task on drawn pictures."""
    settings = config(**changes)
    dataset = open_dataset(pictures, 16, split="all")
    order = ClassBalancedOrder(dataset.labels[:, 0], settings.seed)
    loader = Loader(dataset, order, settings.batch_size, flip=True, seed=settings.seed)
    return Trainer(task or AutoencoderTask(), loader, settings, out, resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = {"steps": int(sys.argv[3]), "log_every": 2, "checkpoint_every": 7}
    make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), resume=True, **settings).train()
