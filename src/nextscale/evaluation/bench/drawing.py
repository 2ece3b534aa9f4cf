"""What a benchmark draws: a model by name, one batch of it, and what that batch asks of a machine."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import nextscale
from nextscale.conditions.text_features import TextFeatures
from nextscale.context import Hook
from nextscale.devices import choose_device
from nextscale.errors import InputError
from nextscale.evaluation.bench.baseline import liven
from nextscale.evaluation.bench.work import Ledger, Numbers, Work, counted, planned, weight_bytes
from nextscale.registry import DEFAULT_MODEL, weights_of
from nextscale.run import Run
from nextscale.sampling.generation import Progress
from nextscale.systems import folders

Compare = Literal["baseline", "baseline-bf16", "plain"]
Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    model: a name or a folder; published sizes get random weights unless ``tokenizer`` and ``generator`` name files.
    schedule: other grids: of a model with random weights any, of another what its system can follow. compare: see
    ``measure``. compile: also draw with the network and the decoder compiled. graphs: also draw with captured
    steps, and where both are asked for with the compiled network captured. alone: also time every product by itself.
    clock: ``wall``, or ``cpu`` for a machine that others use. settings: of sampling, by name.

    Raises InputError on values that don't fit each other.
    """

    model: str = DEFAULT_MODEL
    batch: int = 1
    schedule: Grids | None = None
    dtypes: tuple[str, ...] = ("fp32",)
    device: str = "cpu"
    threads: int | None = None
    hooks: tuple[str, ...] = ()
    compare: tuple[Compare, ...] = ()
    repeats: int = 5
    clock: str = "wall"
    compile: bool = False
    graphs: bool = False
    alone: bool = False
    purpose: str = "pictures"
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    generator: str | None = None

    def __post_init__(self) -> None:
        if "plain" in self.compare and not self.hooks:
            raise InputError("--compare plain: it compares hooks with a run without them, and no --hook was given")
        if self.clock == "cpu" and choose_device(self.device).type != "cpu":
            raise InputError("--clock cpu counts the processor's time; on another device use --clock wall")
        if self.graphs and choose_device(self.device).type != "cuda":
            raise InputError("--graphs: steps are captured as CUDA graphs; leave it out, or use --device cuda")
        if min(self.batch, self.repeats, self.threads or 1) < 1:
            raise InputError("batch, repeats and threads must be at least 1")


# The model

def has_random_weights(given: Settings) -> bool:
    """Whether a model is a size alone, whose weights are made up."""
    return not Path(given.model).is_dir() and given.generator is None and weights_of(given.model) in (
        "published", "base", "none")


def config_of(given: Settings) -> Any:
    """The configuration of the model, with the schedule in it where its weights are made up; None where another
    package keeps it to itself."""
    config = folders.model_config(given.model)
    if config is None or given.schedule is None or not has_random_weights(given):
        return config
    # Rounds are for the schedule that they were published with.
    settings = {purpose: replace(used, rounds=()) if hasattr(used, "rounds") else used
                for purpose, used in config.settings.items()}
    return replace(config, tokenizer=replace(config.tokenizer, grids=given.schedule), settings=settings)


def open_model(given: Settings) -> Any:
    """The model in float32 on its device, without the encoder, which sampling doesn't need."""
    device = choose_device(given.device)
    if has_random_weights(given):
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            system = liven(folders.build_system(config_of(given)).to_precision("fp32"))
    else:
        system = nextscale.load(given.model, device=given.device, tokenizer=given.tokenizer, generator=given.generator)
    system.tokenizer.encoder, system.tokenizer.to_latent = nn.Identity(), nn.Identity()
    return system


PROMPT_TOKENS = 32
"""Of the prompts of a model that text steers, whose features are made up."""


def asked(config: Any, pictures: int) -> Any:
    """What pictures are of, as ``generate`` takes it: classes one after the other, or features of prompts."""
    if hasattr(config, "classes"):
        return [tuple(i % size for size in config.classes) for i in range(pictures)]
    draws, width = torch.Generator().manual_seed(0), config.generator.text_width
    length = min(PROMPT_TOKENS, config.generator.longest_text)
    return TextFeatures.pack([torch.randn(length, width, generator=draws) for _ in range(pictures)])


def on_meta(labels: Any, system: Any) -> Any:
    """The rows that labels mean, on the meta device."""
    return system.label_rows(labels.to("meta") if isinstance(labels, TextFeatures) else labels)


class Drawing:
    """How a batch is drawn: labels, seeds and settings, the same for all contestants."""

    def __init__(self, given: Settings, config: Any):
        self.given = given
        self.seeds = list(range(given.batch))
        self.labels = asked(config, given.batch)
        self.schedule = None if has_random_weights(given) else given.schedule
        self.extra: dict[str, Any] = {}
        if getattr(config, "control", None) is not None:  # steered by an empty map
            side = config.tokenizer.factor
            height, width = (side * n for n in config.tokenizer.grids[-1])
            self.extra["control"] = torch.zeros(3, height, width, dtype=torch.uint8)

    def __call__(self, system: Any, hooks: Sequence[Hook] = (), keep: list[Run] | None = None,
                 progress: bool | None = False) -> tuple[list[Tensor], Tensor]:
        """Tokens of every step, and pictures in [-1, 1]. keep: where the run goes when it has ended; progress: whether
        to show a line, None on terminals."""
        def each(step: int, run: Run) -> None:
            if keep is not None:
                keep[:] = [run]

        drawn = system.generate(self.labels, seeds=self.seeds, purpose=self.given.purpose, hooks=hooks, output="torch",
                                batch_size=self.given.batch, progress=progress, schedule=self.schedule, callback=each,
                                **self.extra, **self.given.settings)
        return drawn.tokens, drawn.images

    def on_shapes(self, system: Any, pictures: int) -> Run:
        """The same on the meta device."""
        used = system.settings_for(self.given.purpose, self.given.settings)
        plan, guidance = system.plan_for(used, self.schedule), system.guidance(used)
        begun: Run = system.start(on_meta(asked(system.config, pictures), system), guidance, Numbers(pictures), plan)
        with Progress(len(plan), "counting", None) as bar:
            for run in system.sampled(begun, guidance, used):
                begun = run
                bar.advance()
        system.tokenizer.decode(begun.canvas)
        return begun


# Counting

def count_plan(given: Settings, config: Any, drawing: Drawing, dtype: str) -> Work | None:
    """What a batch takes by the plan alone, without weights; None where the plan doesn't say it: the system looks at
    values, or a control or another package's code goes along."""
    if config is None or drawing.extra:
        return None
    with torch.device("meta"):
        system = folders.build_system(config)
    try:
        return planned(system.to_precision(dtype), given.batch, drawing.on_shapes)
    except NotImplementedError:
        return None


def count_run(system: Any, drawing: Drawing, hooks: Sequence[Hook]) -> Work:
    """What a batch takes, counted from what ran."""
    ledger = Ledger()
    ended: list[Run] = []
    with torch.no_grad(), counted(system, ledger) as work:
        drawing(system, hooks, ended, progress=None)
    work.memory, work.weights = ended[0].memory.bytes(), weight_bytes(system)
    return work
