"""What a training tells while it runs: a metrics file, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nextscale.errors import DataError

METRICS = "metrics.jsonl"
THOUSAND = 1000  # parts of a bar


class _Bar(Protocol):
    def show(self, step: int, progress: float, line: str) -> None: ...

    def close(self) -> None: ...


class Silence:
    """The journal of a process that has nothing to tell, since rank 0 does."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, step: int, progress: float, metrics: Mapping[str, float]) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class Journal(Silence):
    """Appends one line of metrics a log interval to ``metrics.jsonl`` and shows it.

    Args:
        out: the training's folder.
        step: steps done already; later lines of an earlier life of this run are removed.
        progress: share of the training done already, in [0, 1]; steps or time count, whichever is ahead.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, out: Path, step: int, progress: float) -> None:
        self.path = out / METRICS
        try:
            _truncate(self.path, step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}); choose another folder") from None
        self._board = _open_board(out / "tensorboard", step)
        self._bar: _Bar = _RichBar(progress) if sys.stdout.isatty() else _Lines(progress)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one record. Raises DataError when the disk is full."""
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}); free some space, then resume") from None
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def show(self, step: int, progress: float, metrics: Mapping[str, float]) -> None:
        """Shows metrics to whoever watches; those of single scales (``nats_3``) stay in the file, a line is short."""
        whole = {name: value for name, value in metrics.items() if not name.rpartition("_")[2].isdigit()}
        self._bar.show(step, progress, "  ".join(f"{name} {value:.4g}" for name, value in whole.items()))

    def say(self, line: str) -> None:
        """One line for whoever watches."""
        print(line, flush=True)

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _truncate(path: Path, step: int) -> None:
    """Keeps the whole lines up to ``step``; a kill may have left half a line, and later steps will be done again."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl`` (or of the training folder that holds one), broken lines left out."""
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _open_board(folder: Path, step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed (pip install 'nextscale[train]'): curves only in metrics.jsonl", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step or None)


class _Lines:
    """One line a log interval, with the share done and the time left, for files and pipes."""

    def __init__(self, progress: float) -> None:
        self._start, self._since = progress, time.monotonic()

    def show(self, step: int, progress: float, line: str) -> None:
        done = progress - self._start
        left = (time.monotonic() - self._since) / done * (1.0 - progress) if done > 0 else math.inf
        print(f"step {step}  {progress:.1%}  {line}  left {_clock(left)}", flush=True)

    def close(self) -> None:
        pass


class _RichBar:
    """A live bar for terminals, the metrics scrolling above it."""

    def __init__(self, progress: float) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._task = self._progress.add_task("", total=THOUSAND, completed=round(THOUSAND * progress))
        self._progress.start()

    def show(self, step: int, progress: float, line: str) -> None:
        self._progress.update(self._task, completed=THOUSAND * progress)
        self._progress.console.print(f"step {step}  {line}", markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
