"""One training loop for every task: tokenizers, generators, classifiers.

The loop knows a :class:`Task` and nothing of what it trains; :mod:`nextscale.training.distributed` knows how several
processes share it. Everything random in step ``n`` hangs on (seed, n) alone, so that a run that was killed and resumed
has the very losses of one that never stopped, on any number of processes.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextscale import parallel
from nextscale.data.orders import mix
from nextscale.devices import choose_device
from nextscale.errors import DataError, InputError, NextscaleError, WeightsError
from nextscale.training.checkpoint import (
    Checkpoint,
    clear_leftovers,
    latest,
    load_optimiser,
    read_checkpoint,
    save_optimiser,
    write_checkpoint,
)
from nextscale.training.config import TrainConfig
from nextscale.training.distributed import own_rows, settle, spread
from nextscale.training.ema import Average
from nextscale.training.journal import Journal, Silence
from nextscale.training.optimisers import make_optimiser
from nextscale.training.schedules import learning_rate_scale
from nextscale.training.task import Batch, BatchSource, Task, TrainingStep

_STEP_DRAWS = 0x57E9


class DivergedError(NextscaleError):
    """The loss or its gradient is not a number any more."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: steps done, why it stopped, seconds spent over all its lives, its last logged metrics."""

    step: int
    stopped: Literal["finished", "time", "signal"]
    seconds: float
    metrics: dict[str, float]


class Trainer:
    """Trains a task, keeping checkpoints, metrics and sample pictures in a folder.

    Args:
        task: what is trained.
        loader: batches of ``config.batch_size``.
        config: how.
        out: folder of the run: ``checkpoints/``, ``samples/``, ``tensorboard/``, ``metrics.jsonl``.
        resume: go on from the latest checkpoint in ``out``; from the start where there is none.

    Raises:
        InputError: the loader's batch size is another, or the batch can't be shared by the processes.
        DataError: ``out`` holds a run already and ``resume`` is not set, or not all processes see the same ``out``.
        WeightsError: the checkpoint is damaged or of another model.
        DeviceError: the device is not there.
    """

    def __init__(
        self, task: Task, loader: BatchSource, config: TrainConfig, out: str | Path, resume: bool = False
    ) -> None:
        if loader.batch_size != config.batch_size:
            raise InputError(f"the loader's batches have {loader.batch_size} pictures, the config {config.batch_size}")
        self.task, self.loader, self.config, self.out = task, loader, config, Path(out)
        self.device = choose_device(config.device)
        found = latest(self.out)
        if found is not None and not resume:
            raise DataError(f"{self.out} holds a run already ({found.name}); resume it or choose another folder")
        for module in task.modules.values():
            module.to(self.device)
        self.averages = {name: Average(module, config.ema_decay) for name, module in task.averaged().items()}
        # Before the optimisers, which must see the parameters that are left when weights are sharded.
        self.workers = spread(task, self.averages, config, self.device)
        self._names: dict[Tensor, str] = {
            parameter: f"{name}.{key}"
            for name, module in task.modules.items()
            for key, parameter in module.named_parameters()
        }
        self.optimisers = {phase: self._optimiser(phase) for phase in task.phases}
        self.step = 0
        self.seconds = 0.0
        self._limit = math.inf if config.minutes is None else config.minutes * 60
        self._window: list[dict[str, float | Tensor]] = []
        self._window_seconds = 0.0
        self._asked_to_stop = self._stopping = self._rested = False
        self.resumed_from: Path | None = None
        self._changed: list[str] = []
        steps = parallel.gather(torch.tensor([int(found.name[5:]) if found else -1])).tolist()
        if len(set(steps)) > 1:
            raise DataError(f"{self.out}: the processes see different checkpoints; put it on a disk that they share")
        if found is not None:
            self._restore(found)
        self.workers.begin({phase: self._parameters(phase) for phase in task.phases})

    def _parameters(self, phase: str) -> list[nn.Parameter]:
        return [parameter for group in self.optimisers[phase].param_groups for parameter in group["params"]]

    def _optimiser(self, phase: str) -> torch.optim.Optimizer:
        groups = self.task.parameter_groups(phase, self.config.weight_decay)
        for group in groups:
            group["params"] = list(group["params"])
            group.setdefault("learning_rate_scale", 1.0)
            for parameter in group["params"]:
                if parameter not in self._names:
                    raise InputError(f"phase {phase!r} trains a parameter that is in none of the task's modules")
        return make_optimiser(self.config, groups, self._names, self.device)

    def averaged_modules(self) -> dict[str, nn.Module]:
        """Every module of the task, its average where it has one: what to sample with, and what to ship.

        All processes call it together; where weights are sharded, rank 0 gets whole copies, the others nothing of use.
        """
        return self.workers.whole_modules()

    def train(self) -> TrainResult:
        """Runs to the last step, the time limit or a signal (SIGINT, SIGTERM), whichever is first, and checkpoints.

        Raises:
            DivergedError: a loss or gradient became NaN or infinite; the last good checkpoint stays.
            WeightsError, DataError: the disk is full or went away.
            RankLostError: another process of the job died.
            ElsewhereError: rank 0 raised one of the others.
        """
        journal = parallel.on_main(self._open_journal) or Silence()
        batches = self.loader.batches(self.step)
        if self.resumed_from is not None:
            changed = f"; changed since: {', '.join(self._changed)}" if self._changed else ""
            journal.say(f"going on from {self.resumed_from}{changed}")
        try:
            with self._stopping_on_signals():
                return self._loop(batches, journal)
        except RuntimeError as error:
            if parallel.world() == 1 or not parallel.lost(error):
                raise
            raise parallel.RankLostError(
                f"another process of the job is gone, noticed at step {self.step}; last good checkpoint: "
                f"{latest(self.out) or 'none'}. Start the job again with --resume, on any number of processes"
            ) from error
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
            journal.close()

    def _open_journal(self) -> Journal:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.out} cannot be made ({error.strerror}); choose another folder") from None
        clear_leftovers(self.out)
        return Journal(self.out, self.step, self._at(self.step, 0).progress)

    def _loop(self, batches: Iterator[Batch], journal: Silence) -> TrainResult:
        config = self.config
        last: dict[str, float] = {}
        saved_at = self.step if self.resumed_from else -1
        stopped: Literal["finished", "time", "signal"] = "finished"
        for module in self.task.modules.values():
            module.train()
        while self.step < config.steps:
            with self._clock() as spent:
                at = self._advance(next(batches))
            self._window_seconds += spent[0]
            self._agree()
            if self.step % config.log_every == 0 or self.step == config.steps:
                last = self._log(journal, at)
            if self._stopping:
                stopped = "signal"
                break
            if self.seconds >= self._limit:
                stopped = "time"
                break
            # Samples before the checkpoint: a kill between the two then loses neither, both are done again.
            with self._clock():
                if config.sample_every and self.step % config.sample_every == 0 and self.step < config.steps:
                    self._sample(journal, at)
                if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                    self._save()
                    saved_at = self.step
            self._agree()
        if saved_at != self.step:
            if stopped != "signal":
                self._sample(journal, self._at(self.step, 0))
            self._save()
        parallel.barrier()
        journal.say(f"stopped after step {self.step} ({stopped}), {self.seconds:.0f} s in all; {latest(self.out)}")
        return TrainResult(self.step, stopped, self.seconds, last)

    @contextmanager
    def _clock(self) -> Iterator[list[float]]:
        """Adds to the seconds spent; what is yielded holds those of this block afterwards."""
        spent = [0.0]
        now = time.process_time if self.config.clock == "processor" else time.monotonic
        began = now()
        yield spent
        spent[0] = now() - began
        self.seconds += spent[0]

    def _agree(self) -> None:
        """All processes go by rank 0's clock, and stop in the same step when one of them was asked to."""
        self._stopping = self._asked_to_stop
        if parallel.world() > 1:
            seconds = self.seconds if parallel.is_main() else 0.0
            asked, self.seconds = parallel.total(torch.tensor([self._stopping, seconds], dtype=torch.float64)).tolist()
            self._stopping = asked > 0

    def _at(self, step: int, epoch: int) -> TrainingStep:
        progress = min(1.0, max(step / self.config.steps, self.seconds / self._limit))
        return TrainingStep(step, self.config.steps, progress, epoch, self.config.seed, self._rested)

    def _advance(self, batch: Batch) -> TrainingStep:
        """One optimiser step of every phase."""
        config = self.config
        batch = own_rows(batch, config.batch_size)
        at = self._at(self.step, int(batch["epoch"][0]))
        batch = {name: part.to(self.device, non_blocking=True) if isinstance(part, Tensor) else part
                 for name, part in batch.items()}
        scale = learning_rate_scale(
            config.schedule, self.step, at.progress, config.warmup_steps, config.final_learning_rate_ratio
        )
        metrics: dict[str, float | Tensor] = {"learning_rate": config.learning_rate * scale, "progress": at.progress}
        metrics.update(self._gradients(batch, at))
        # All are checked before any weight is touched, so that no checkpoint can hold a NaN.
        ready = [phase for phase in self.task.phases if f"{phase}/loss" in metrics]
        for phase in ready:
            metrics[f"{phase}/gradient_norm"] = self._checked_norm(phase, batch, metrics[f"{phase}/loss"])
        for phase in ready:
            self._update(phase, scale)
        for average in self.averages.values():
            average.update()
        metrics.update(self.task.after_step(at))
        self._window.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in metrics.items()})
        self.step += 1
        self._rested = False
        return at

    def _gradients(self, batch: Batch, at: TrainingStep) -> dict[str, float | Tensor]:
        """Gradients of all phases, micro-batch by micro-batch; returns the means of their metrics."""
        parts = self.config.accumulate
        size, whole = len(batch["id"]) // parts, self.config.batch_size
        means: dict[str, float | Tensor] = {}
        for part in range(parts):
            micro = {name: rows[part * size : (part + 1) * size] for name, rows in batch.items()}
            # Seeded anew for each, so that a picture's draws don't hang on how the batch was divided.
            torch.manual_seed(int(mix(self.config.seed, _STEP_DRAWS, self.step)) >> 1)
            first = parallel.share(whole).start + part * size
            with parallel.pictures_of_batch(first, size, whole), self.workers.accumulating(part == parts - 1):
                for phase in self.task.phases:
                    self._train_only(phase)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                        loss, metrics = self.workers.loss(phase, micro, at)
                    if loss is None:
                        continue
                    (loss / parts).backward()
                    for name, value in {f"{phase}/loss": loss, **metrics}.items():
                        share = (value.detach().float() if isinstance(value, Tensor) else float(value)) / parts
                        means[name] = means[name] + share if name in means else share
        return means

    def _checked_norm(self, phase: str, batch: Batch, loss: float | Tensor) -> Tensor:
        """Clips a phase's gradient and returns its norm before that, over all processes."""
        norm = self.workers.clip(self._parameters(phase), self.config.gradient_clip)
        # The gradient is everybody's, the loss this process's: all must come to the same decision.
        if not math.isfinite(float(parallel.mean(norm + loss))):
            for optimiser in self.optimisers.values():
                optimiser.zero_grad(set_to_none=True)
            said = self._divergence(phase, batch, float(norm), torch.as_tensor(float(loss), dtype=torch.float64))
            raise DivergedError(said) if parallel.is_main() else parallel.ElsewhereError(said)
        return norm

    def _update(self, phase: str, scale: float) -> None:
        optimiser = self.optimisers[phase]
        for group in optimiser.param_groups:
            group["lr"] = self.config.learning_rate * scale * group["learning_rate_scale"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _divergence(self, phase: str, batch: Batch, norm: float, loss: Tensor) -> str:
        kept = latest(self.out)
        losses = parallel.gather(loss.view(1))
        ids = parallel.gather(batch["id"].cpu()).view(len(losses), -1)
        # Of one process's loss it is known whose pictures gave it; of a gradient, which is everybody's, it isn't.
        wrong = ~losses.isfinite()
        pictures = ids[wrong if wrong.any() else slice(None)].flatten().tolist()
        return (
            f"{phase} loss {float(losses.mean())} with gradient norm {norm} at step {self.step}, pictures {pictures}; "
            f"last good checkpoint: {kept or 'none'}. Lower the learning rate or look at these pictures, then resume"
        )

    def _train_only(self, phase: str) -> None:
        if len(self.optimisers) == 1:
            return
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(name == phase)

    def _means(self) -> dict[str, float]:
        window = self._settled_window()
        names = dict.fromkeys(name for record in window for name in record)
        values = {name: [record[name] for record in window if name in record] for name in names}
        return {name: math.fsum(found) / len(found) for name, found in values.items()}

    def _settled_window(self) -> list[dict[str, float]]:
        settled = settle(self._window)
        self._window = list(settled)  # type: ignore[arg-type]
        return settled

    def _log(self, journal: Silence, at: TrainingStep) -> dict[str, float]:
        means = self._means()
        means["learning_rate"] = float(self._window[-1]["learning_rate"])
        means["progress"] = at.progress
        rate = len(self._window) * self.config.batch_size / max(self._window_seconds, 1e-9)
        record = {**means, "epoch": float(at.epoch), "pictures_per_second": rate, "seconds": self.seconds}
        journal.log(self.step, record)
        hidden = ("learning_rate", "progress")
        shown = {"epoch": float(at.epoch), **{k: v for k, v in means.items() if k not in hidden}, "pictures/s": rate}
        journal.show(self.step, self._at(self.step, 0).progress, shown)
        self._window.clear()
        self._window_seconds = 0.0
        return record

    def _sample(self, journal: Silence, at: TrainingStep) -> None:
        modules = self.averaged_modules()
        parallel.on_main(lambda: self._draw_samples(journal, at, modules))
        for module in self.task.modules.values():
            module.train()
        self._rested = True

    def _draw_samples(self, journal: Silence, at: TrainingStep, modules: dict[str, nn.Module]) -> None:
        folder = self.out / "samples"
        try:
            folder.mkdir(exist_ok=True)
            with torch.no_grad():
                measured = self.task.samples(folder, replace(at, step=self.step), modules)
        except OSError as error:
            raise DataError(f"samples cannot be written to {folder} ({error}); free some space, then resume") from None
        if measured:
            found = {name: float(value) for name, value in measured.items()}
            journal.log(self.step, found)
            journal.show(self.step, self._at(self.step, 0).progress, found)

    def _save(self) -> None:
        extra = self.task.extra_state()
        tensors = {
            "modules": _flatten({name: module.state_dict() for name, module in self.task.modules.items()}),
            "averaged": _flatten({name: average.state_dict() for name, average in self.averages.items()}),
            "extra": {name: value for name, value in extra.items() if isinstance(value, Tensor)},
        }
        for phase, optimiser in self.optimisers.items():
            tensors[f"optimiser-{phase}"] = save_optimiser(optimiser, self._names)
        state = {
            "config": asdict(self.config),
            "seconds": self.seconds,
            "window": self._settled_window(),
            "window_seconds": self._window_seconds,
            "average_updates": {name: average.updates for name, average in self.averages.items()},
            "extra": {name: value for name, value in extra.items() if not isinstance(value, Tensor)},
        }
        write_checkpoint(self.out, Checkpoint(self.step, tensors, state), self.config.keep_checkpoints)

    def _restore(self, path: Path) -> None:
        patterns = {name: parameter for parameter, name in self._names.items()} if self.workers.sharded else None
        saved = read_checkpoint(path, patterns)
        for name, module in self.task.modules.items():
            _load(module, saved.module(name), f"{path}: {name}")
        for name, average in self.averages.items():
            _load(average.module, saved.module(name, averaged=True), f"{path}: averaged {name}")
            average.updates = int(saved.state["average_updates"].get(name, 0))
        for phase, optimiser in self.optimisers.items():
            load_optimiser(optimiser, self._names, saved.group(f"optimiser-{phase}"), str(path))
        self.task.load_extra_state({**saved.state["extra"], **saved.group("extra")})
        self.step, self.seconds = saved.step, float(saved.state["seconds"])
        self._window, self._window_seconds = saved.state["window"], float(saved.state["window_seconds"])
        before = saved.state["config"]
        # Through JSON, which knows no tuples.
        now = json.loads(json.dumps(asdict(self.config)))
        self._changed = [name for name in now if now[name] != before.get(name)]
        self.resumed_from = path

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM finishes the step and checkpoints; a second one acts as usual."""
        self._asked_to_stop = False
        before: dict[int, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked_to_stop = True
            signal.signal(number, before[number])

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:
            # Not in the main thread: whoever runs the threads handles signals.
            before.clear()
        try:
            yield
        finally:
            for caught, handler in before.items():
                signal.signal(caught, handler)


def _flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, group in groups.items() for key, tensor in group.items()}


def _load(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{where} does not fit the model ({reason}); resume with the configuration it was begun with"
        ) from None
