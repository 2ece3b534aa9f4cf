"""Which part of its work a generation is at, told from outside: the code under test has no clocks and no counters."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn

from nextscale.context import Context
from nextscale.heads.categorical import LogitsHead
from nextscale.run import Run

PHASES = ("embedding", "attention", "scan", "mlp", "network", "head", "sampling", "canvas", "decode", "other")
"""embedding: step inputs to rows. attention, scan, mlp: residual branches with their norms and projections. network:
the rest of it, such as modulations, residual sums and hooks that act inside. head: the output layer, or the network
that a head has of its own. sampling: guidance, filters and the draw. canvas: writing tokens and reading the next
input. decode: latent to picture. other: the loop itself, and hooks that act between steps."""

TRANSFORMER = ("attention", "scan", "mlp", "network")
"""Of these, what the network's body takes."""


class Recorder:
    """Follows the phases of a generation; ``switch`` is called where one ends, while the stack still names it."""

    def __init__(self) -> None:
        self.stack = ["other"]

    def switch(self) -> None:
        """The phase on top of the stack ends here, or goes on behind an inner one."""

    def rows(self, kind: str, x: Tensor) -> None:
        """Rows x (R, L, C) go through a residual branch of a kind."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to the phase, but for what inner phases take."""
        self.switch()
        self.stack.append(name)
        try:
            yield
        finally:
            self.switch()
            self.stack.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose work belongs to a phase."""
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return inside


@contextmanager
def recorded(system: Any, recorder: Recorder) -> Iterator[None]:
    """Let a recorder follow what a system draws inside."""
    head: nn.Module = system.head
    parts: list[tuple[Any, str, str]] = [
        (system.generator, "call", "embedding"), (system.generator, "forward", "network"), (Run, "write", "canvas"),
        (system.tokenizer, "decode", "decode")]
    parts += [(module, "forward", "head") for module in head_networks(head)]
    parts += [(module, name, "sampling") for module in head.modules() for name in ("sample", "draw")
              if hasattr(module, name)]
    plain = Context.residual

    def residual(ctx: Context, address: str, kind: str, x: Tensor, f: Callable[..., Tensor], rows: Any,
                 gate: Tensor | None = None) -> Tensor:
        def counted(x: Tensor, rows: Any) -> Tensor:
            recorder.rows(kind, x)
            with recorder.phase(kind):
                return f(x, rows)

        return plain(ctx, address, kind, x, counted, rows, gate)

    with ExitStack() as stack:
        for owner, name, phase in parts:
            stack.enter_context(mock.patch.object(owner, name, recorder.around(phase, getattr(owner, name))))
        stack.enter_context(mock.patch.object(Context, "residual", residual))
        yield


@contextmanager
def recorded_outside(system: Any, recorder: Recorder) -> Iterator[None]:
    """The same of what can't be looked into, such as captured steps: ``decode``, and ``other`` before it."""
    with mock.patch.object(system.tokenizer, "decode", recorder.around("decode", system.tokenizer.decode)):
        yield


@contextmanager
def recorded_baseline(baseline: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The same inside of the published loop's blocks; it tells its other phases by itself."""
    generator: Any = baseline.generator
    with ExitStack() as stack:
        for block in generator.blocks:
            for name in ("attention", "mlp"):
                module = getattr(block, name)
                stack.enter_context(mock.patch.object(module, "forward", recorder.around(name, module.forward)))
        yield


def head_networks(head: nn.Module) -> list[nn.Module]:
    """The output layers of a head, or the networks that it has of its own (a flow, a diffusion), called ``network``."""
    found = [module for name, module in head.named_modules()
             if isinstance(module, LogitsHead) or name.split(".")[-1] == "network"]
    return found or [head]
