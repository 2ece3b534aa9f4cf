"""Generation as a user sees it: settings in, pictures out, with everything needed to draw them again."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nextscale.context import Hook, overrides
from nextscale.data.images import to_pil
from nextscale.errors import InputError, did_you_mean
from nextscale.run import At, Run

if TYPE_CHECKING:
    from typing_extensions import Self

OutputKind = Literal["pil", "numpy", "torch"]


@dataclass(frozen=True)
class GuidedSettings:
    """What all systems have to set.

    guidance_scale: u + scale (c - u) at the schedule's strongest step, 1 for none; guidance_schedule: ``ramp`` (VAR's:
    nothing at the first step, full at the last), ``linear`` (MAR's: the share of tokens drawn behind the step),
    ``constant``, ``cosine`` (a ramp that is slow at both ends), ``power-cosine:1.5`` (RAR's: the larger its power, the
    later it rises), ``interval:0.2:0.8`` (constant within these shares of the steps, nothing outside), or a number for
    every step, its share of what guidance adds; temperature.
    """

    guidance_scale: float = 1.0
    guidance_schedule: str | tuple[float, ...] = "ramp"
    temperature: float = 1.0

    def changed(self, changes: dict[str, Any]) -> Self:
        """These settings with others; raises InputError on unknown names."""
        known = asdict(self)
        for name in changes:
            if name not in known:
                raise InputError(f"unknown sampling setting {name!r}{did_you_mean(name, known)}")
        return replace(self, **changes)


@dataclass(frozen=True)
class Settings(GuidedSettings):
    """How codes are chosen: guidance and temperature, and

    top_k, top_p: None keeps all, and top_k may be a number for every step; smooth: VAR's smooth mode, which writes a
    soft mixture of codes (prettier, less varied; not for measuring); temperatures: for every step a factor of the
    temperature; temperature_last: divide by it behind top_k and top_p, as CoDe does, instead of before.
    """

    top_k: int | tuple[int, ...] | None = None
    top_p: float | None = None
    smooth: bool = False
    temperatures: tuple[float, ...] = ()
    temperature_last: bool = False


@dataclass
class Generation:
    """Pictures and how they came about: tokens of every step, (B, L_k) or vectors (B, L_k, C), their log-probability
    (B,) in nats (None where the system knows none), one seed a picture, the settings, and the seconds it took."""

    images: Any
    tokens: list[Tensor]
    log_prob: Tensor | None
    seeds: list[int]
    labels: list[Any]
    settings: GuidedSettings
    seconds: float
    stopped: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def describe(self, index: int) -> dict[str, Any]:
        """What is needed to draw one of the pictures again, for its metadata."""
        return {"seed": self.seeds[index], "label": self.labels[index], **asdict(self.settings), **self.extra}


@dataclass(frozen=True)
class Request:
    """One picture that is wanted: label and seed; its size in pixels (height, width), or its schedule, else the model's
    own. Raises InputError where both are given."""

    label: Any = None
    seed: int = 0
    size: tuple[int, int] | None = None
    schedule: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.schedule is not None:
            raise InputError(f"request: both size {self.size} and a schedule are given; give one")


def check_requests(hooks: Sequence[Hook]) -> None:
    """Raises InputError for a hook that holds something a picture: requests are drawn in an order of their own."""
    for hook in hooks:
        if overrides(hook, "part"):
            raise InputError(f"requests: {type(hook).__name__} was made for pictures in their order; use `generate`")


def apart(drawn: Generation) -> list[Generation]:
    """A generation picture by picture."""
    return [Generation(drawn.images[i:i + 1], [tokens[i:i + 1] for tokens in drawn.tokens],
                       None if drawn.log_prob is None else drawn.log_prob[i:i + 1], [seed], [label], drawn.settings,
                       drawn.seconds / len(drawn.seeds), drawn.stopped, drawn.extra)
            for i, (seed, label) in enumerate(zip(drawn.seeds, drawn.labels, strict=True))]


def joined(parts: Sequence[Generation], kind: OutputKind, seconds: float) -> Generation:
    """Several batches as one. One that was stopped has fewer steps than those before it: tokens are those of the steps
    that all have."""
    log_probs = [part.log_prob for part in parts if part.log_prob is not None]
    return Generation(join_images([part.images for part in parts], kind),
                      [torch.cat(step) for step in zip(*(part.tokens for part in parts), strict=False)],
                      torch.cat(log_probs) if log_probs else None, [seed for part in parts for seed in part.seeds],
                      [label for part in parts for label in part.labels], parts[0].settings, seconds, parts[-1].stopped)


@dataclass(frozen=True)
class Preview:
    """What a stream yields after every step: pictures so far, and the run itself."""

    step: int
    steps: int
    images: Any
    run: Run


def check_output(kind: str) -> None:
    """Raises InputError where ``convert`` would, before any work is done."""
    if kind not in ("pil", "numpy", "torch"):
        raise InputError(f"output {kind!r} is unknown; use pil, numpy or torch")


def convert(pictures: Tensor, kind: OutputKind) -> Any:
    """Pictures (B, 3, S, S') in [-1, 1] as a list of PIL images, as uint8 numpy (B, S, S', 3), or as they are."""
    if kind == "torch":
        return pictures
    if kind == "pil":
        return [to_pil(picture) for picture in pictures]
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture_seeds(count: int, seed: int, seeds: Sequence[int] | None) -> list[int]:
    """One seed a picture: given ones, or ``seed``, ``seed + 1``, ...; picture i never depends on the batch size."""
    if seeds is None:
        return [seed + i for i in range(count)]
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds were given for {count} pictures; give one each")
    return [int(s) for s in seeds]


def smooth_codes(codebook_VC: Tensor) -> Callable[[Tensor, At, Run], Tensor]:
    """VAR's smooth mode: a Gumbel softmax over the filtered logits, sharper step by step, mixes the codes.

    h = softmax((logits (1 + r) + gumbel) / tau) codebook, r = k / (K - 1), tau = max(0.27 (1 - 0.95 r), 0.005).
    """
    def soft(logits: Tensor, at: At, run: Run) -> Tensor:
        u = run.uniform("gumbel", width=logits.shape[-1])
        tau = max(0.27 * (1 - 0.95 * at.progress), 0.005)
        gumbel = -torch.log(-torch.log(u))
        return F.softmax((logits * (1 + at.progress) + gumbel) / tau, -1) @ codebook_VC.float()

    return soft


class Progress:
    """A progress line with rate and time left, on terminals or when asked for; used as a context manager."""

    def __init__(self, total: int, what: str, show: bool | None):
        import sys

        self.total, self.what = total, what
        self.bar: Any = None
        if show or (show is None and sys.stderr.isatty()):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=Console(stderr=True))

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, rate="")
        return self

    def advance(self, steps: int = 1) -> None:
        if self.bar is not None:
            done = self.bar.tasks[0].completed + steps
            rate = done / max(time.monotonic() - self.began, 1e-9)
            self.bar.update(self.task, advance=steps, rate=f"{rate:.1f} steps/s")

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count``."""
    if size < 1:
        raise InputError(f"batch_size is {size}; it must be at least 1")
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def join_images(parts: list[Any], kind: OutputKind) -> Any:
    """The images of several batches as one."""
    if kind == "pil":
        joined: list[Image.Image] = [image for part in parts for image in part]
        return joined
    return np.concatenate(parts) if kind == "numpy" else torch.cat(parts)
