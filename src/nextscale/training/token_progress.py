"""How far the making of a token cache is: a bar on terminals, plain lines elsewhere."""
from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

_LINE_SECONDS = 10.0


class TokenProgress:
    """A report for :func:`nextscale.training.tokens.tokenize` with rate and time left; used as a context manager.

    name: what is tokenized, for the line; show: False in the processes of a launch that keep silent.
    """

    def __init__(self, name: str, show: bool = True) -> None:
        self.name, self.show = name, show
        self._bar: Any = None
        self._task: Any = None
        self._began = self._told = time.monotonic()

    def __enter__(self) -> TokenProgress:
        self._began = self._told = time.monotonic()
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(f"tokens of {self.name}", total=None, rate="")
            self._bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        """Pictures done and to do."""
        now = time.monotonic()
        rate = done / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:,.1f} pictures/s")
        elif self.show and (now - self._told >= _LINE_SECONDS or done == total):
            self._told = now
            left = timedelta(seconds=int((total - done) / rate))
            line = f"tokens of {self.name}: {done:,}/{total:,} pictures, {rate:,.1f} pictures/s, {left} left"
            print(line, flush=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
