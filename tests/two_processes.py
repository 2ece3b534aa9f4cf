"""What tests/test_distributed.py lets two processes do in one launch, since starting Python takes longer than the work.

``torchrun --nproc_per_node 2 tests/two_processes.py PICTURES OUT`` trains into subfolders of OUT and writes what each
process met to ``OUT/rank-N.json``. The same functions, called in one process, give what it must equal.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from small_task import AdversarialTask, AutoencoderTask, make_trainer

import nextscale.training.checkpoint as checkpoint_module
from nextscale import parallel
from nextscale.data.orders import ShuffledOrder
from nextscale.objectives.reconstruction import ReconstructionWeights
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training import TrainConfig, Trainer, latest
from nextscale.training.generator import GeneratorTask
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask


class CaptionedTask(GeneratorTask):
    """A generator's training that finds each picture's own caption beside it, however batches are divided."""

    def loss(self, phase: str, batch: Any, at: Any) -> Any:
        assert batch["caption"] == [f"picture {number}" for number in batch["id"].tolist()]
        return super().loss(phase, batch, at)


class TokenBatches:
    """Random tokens, with captions; every process gets the whole batch."""

    batch_size = 8

    def __init__(self, system: Any) -> None:
        self.tokens_NL = torch.cat(tiny.random_tokens(system.plan, 20), 1)
        self.order = ShuffledOrder(20)

    def batches(self, start_step: int) -> Iterator[dict[str, Any]]:
        while True:
            rows, epochs = self.order.batch(start_step, self.batch_size)
            yield {
                "tokens": self.tokens_NL[rows], "labels": torch.stack([rows % 5, rows % 3], 1), "id": rows,
                "epoch": epochs, "caption": [f"picture {number}" for number in rows.tolist()],
            }  # fmt: skip
            start_step += 1


def train_generator(out: Path, resume: bool = False, **changes: Any) -> Trainer:
    """Two steps of a tiny VAR with stochastic depth and label dropout; gradients are large enough to be clipped."""
    system = tiny.tiny_var(drop_path=0.3, classes=(5, 3))
    settings: dict[str, Any] = {
        "steps": 2, "batch_size": 8, "accumulate": 2, "precision": "fp32", "device": "cpu", "log_every": 1,
        "sample_every": 0, "checkpoint_every": 1, "keep_checkpoints": 4, "learning_rate": 1e-2, "warmup_steps": 1,
        "ema_decay": 0.9, "gradient_clip": 0.5, "schedule": "constant",
    }  # fmt: skip
    task = CaptionedTask(system, label_dropout=0.3, part_dropout=0.3)
    trainer = Trainer(task, TokenBatches(system), TrainConfig(**{**settings, **changes}), out, resume)
    trainer.train()
    return trainer


def train_tokenizer(pictures: Path, out: Path) -> Trainer:
    """A tiny tokenizer with an EMA codebook, revival and a discriminator whose weight adapts."""
    model = TokenizerConfig(tiny.AUTOENCODER, tiny.GRIDS, vocabulary=32, codebook_update="ema")
    weights = ReconstructionWeights(adversarial=0.5, adversarial_start=0.3)
    torch.manual_seed(0)
    task = TokenizerTask(TokenizerRecipe(model, weights, 2, 0.5, discriminator_width=8))
    trainer = make_trainer(pictures, out, task, steps=4, sample_every=0, checkpoint_every=10)
    trainer.train()
    return trainer


def train_phases(pictures: Path, out: Path, accumulate: int = 1) -> None:
    """Two phases, the second of which begins later."""
    task = AdversarialTask()
    # Masks of nn.Dropout, unlike draws of rand_pictures, hang on how the batch is divided.
    task.modules["autoencoder"][3].p = 0.0  # type: ignore[index]
    make_trainer(pictures, out, task, accumulate=accumulate, steps=5).train()


class NaNHere(AutoencoderTask):
    """Loses its number at step 3, in one process or in all."""

    def __init__(self, here: bool) -> None:
        super().__init__()
        self.here = here

    def loss(self, phase: str, batch: Any, at: Any) -> Any:
        loss, metrics = super().loss(phase, batch, at)
        if at.step == 3:
            assert loss is not None
            self.seen = batch["id"].tolist()
            return loss * math.nan if self.here else loss, metrics
        return loss, metrics


class Asked(AutoencoderTask):
    """The last process is asked to stop in step 3."""

    def after_step(self, at: Any) -> Any:
        if at.step == 3 and parallel.rank() == parallel.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().after_step(at)


def error_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fill_disk(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


def main(pictures: Path, out: Path) -> None:
    met: dict[str, Any] = {}
    train_generator(out / "ddp", parallel="ddp")
    train_generator(out / "fsdp", parallel="fsdp", accumulate=1)
    train_generator(out / "to-fsdp", resume=True, parallel="fsdp", steps=4)
    train_phases(pictures, out / "phases", accumulate=2)
    train_tokenizer(pictures, out / "tokenizer")

    mine = NaNHere(parallel.rank() == 1)
    met["nan"] = error_of(make_trainer(pictures, out / "nan", mine, checkpoint_every=2).train)
    met["seen"] = mine.seen
    result = make_trainer(pictures, out / "signal", Asked()).train()
    met["signal"] = [result.step, result.stopped]
    met["rest"] = error_of(lambda: train_generator(out / "rest", accumulate=8))

    full = parallel.is_main()
    save_file, save = checkpoint_module.save_file, checkpoint_module.HuggingFaceStorageWriter.write_data
    if full:
        checkpoint_module.save_file = fill_disk
    met["full"] = error_of(make_trainer(pictures, out / "full", steps=2).train)
    checkpoint_module.save_file = save_file
    if not full:
        checkpoint_module.HuggingFaceStorageWriter.write_data = fill_disk
    met["full-fsdp"] = error_of(lambda: train_generator(out / "full-fsdp", parallel="fsdp", steps=1))
    checkpoint_module.HuggingFaceStorageWriter.write_data = save
    met["latest"] = [str(latest(out / name)) for name in ("full", "full-fsdp")]
    (out / f"rank-{parallel.rank()}.json").write_text(json.dumps(met))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.processes():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    parallel.leave(0)
