"""Window VAR: next-scale prediction that looks back a few scales only, and guides in the middle of a run only.

A method of one's own in one file: a system (VAR with another plan), a hook, and a named size. Nothing of nextscale is
changed; ``pyproject.toml`` says where they are.

The canvas that a scale reads already sums up all scales before it, so most of what attention finds further back is
known: HMAR (arXiv 2506.04421) keeps none of it, this keeps ``previous`` scales. Guidance helps least at the ends of a
run (arXiv 2404.07724): the hook leaves it out there.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nextscale.context import Hook
from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.plan import Plan, Visibility
from nextscale.run import At, Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import Guidance
from nextscale.systems.var import VAR, VARConfig
from nextscale.systems.var import preset_config as var_size

# A hook. It keeps nothing itself, so it may serve any number of runs.


@dataclass(frozen=True)
class GuidanceInterval(Hook):
    """Guidance inside an interval of the run alone: elsewhere both branches are the conditional one.

    since, until: shares of the steps, 0 at the first and 1 at the last, both inside.
    """

    since: float = 0.0
    until: float = 1.0

    def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
        if self.since <= at.progress <= self.until:
            return outputs
        return dict.fromkeys(outputs, outputs["conditional"])


# The configuration: a recipe sets these as generator.previous=2 and settings.guided_until=0.8.


@dataclass(frozen=True)
class WindowSettings(Settings):
    """Settings with the interval in which guidance acts."""

    guided_since: float = 0.0
    guided_until: float = 1.0


@dataclass(frozen=True)
class WindowGeneratorConfig(VARGeneratorConfig):
    """Sizes of the network, and how many earlier scales a row sees beside its own."""

    previous: int = 1


@dataclass(frozen=True)
class WindowVARConfig(VARConfig):
    """The whole system. The slug is the entry point's name."""

    slug: ClassVar[str] = "window_var"

    generator: WindowGeneratorConfig = field(default_factory=WindowGeneratorConfig)
    settings: dict[str, WindowSettings] = field(default_factory=lambda: {  # type: ignore[assignment]
        "pictures": WindowSettings(guidance_scale=4.0, top_k=900, top_p=0.95, guided_until=0.9),
        "fid": WindowSettings(guidance_scale=2.0, top_k=900, top_p=0.96)})


# The system: what differs from VAR. Training, sampling, scoring, saving and the command line follow from it.


class WindowVAR(VAR):
    """VAR whose rows see their own scale and ``previous`` earlier ones."""

    config_type = WindowVARConfig

    @property
    def plan(self) -> Plan:
        return replace(self.tokenizer.plan, visible=Visibility(self.config.generator.previous))

    def loop(self, run: Run, guidance: Guidance, used: WindowSettings,  # type: ignore[override]
             hooks: Sequence[Hook], soft: Any) -> Iterator[Run]:
        interval = GuidanceInterval(used.guided_since, used.guided_until)
        return super().loop(run, guidance, used, [interval, *hooks], soft)


def model(name: str) -> WindowVAR:
    """A small size for trying code, with random weights: what ``nextscale.load`` calls."""
    if name != "window-var-d2-16px":
        raise InputError(f"unknown size {name!r}; there is window-var-d2-16px")
    small = var_size("var-d2-16px")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = WindowGeneratorConfig.of_depth(2)
        assert isinstance(network, WindowGeneratorConfig)
        system = WindowVAR(WindowVARConfig(small.tokenizer, network, small.classes))
        return system.initialise().eval()  # type: ignore[return-value]
