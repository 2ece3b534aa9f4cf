"""Training a next-scale generator: the task that the trainer runs (flow 2 of the design)."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextscale.data.sheets import save_image, sheet
from nextscale.devices import listed
from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.systems.system import System
from nextscale.training.prefix import Prefix
from nextscale.training.task import Batch, Metrics, TrainingStep, decay_groups
from nextscale.training.utilisation import MatrixProduct, Utilisation

# The published training leaves these out of weight decay, beside biases, embeddings and other vectors.
NO_DECAY = ("start", "position", "modulation_offset", "scale_1H11", "bias", "null", "query")


COMPILED = 8
"""Graphs that the compiler may make of a network beside those of training."""


class GeneratorTask:
    """Trains a system's network by teacher forcing on batches of ``tokens`` (B, L) and ``labels`` (B, n).

    What of the system has no gradients stays as it is, in evaluation mode, and out of checkpoints. Batches have what
    else the system wants: ``control`` maps (B, P, H, W) where a picture steers, ``caption`` where text does; and
    ``schedule`` (the same B times) where batches differ in shape: splitting, weights and figures then go by its plan.

    label_dropout: share of pictures trained without labels, part_dropout: share trained without each further kind;
    label_smoothing: share of the target spread over all codes; step_weights: of every scale's rows in the loss (None:
    the system's own, ``row_weights``; ``equal``: scales weigh alike, whatever their rows; ``root``: as the root of
    their rows, Infinity's rule); validation: a batch to measure on at every sample sheet; sheet_labels and
    sheet_control: what the sample sheets draw; prefix: when only the first scales are trained; checkpointing: keep
    blocks' inputs only and compute again in the backward pass; compile: ``auto`` compiles the network on CUDA, ``on``
    everywhere, ``off`` nowhere; backend: what compiles it; plans: those of batches that have a schedule.

    Raises InputError where the step weights are not one a scale, of every plan, or all zero.
    """

    phases: tuple[str, ...] = ("main",)
    uses_all_parameters = True

    def __init__(self, system: System, label_dropout: float = 0.1, part_dropout: float = 0.1,
                 label_smoothing: float = 0.0,
                 step_weights: tuple[float, ...] | Literal["equal", "root"] | None = None,
                 validation: Batch | None = None, sheet_labels: Any = None,
                 sheet_control: Tensor | None = None,
                 prefix: Prefix | None = None, checkpointing: bool = False,
                 compile: Literal["auto", "on", "off"] = "auto", backend: str = "inductor",
                 plans: Sequence[Plan] = ()):
        self.plans = dict.fromkeys((system.plan, *plans))
        for scales in dict.fromkeys(map(len, self.plans)):
            if step_weights is not None and not isinstance(step_weights, str) and (
                    len(step_weights) != scales or min(step_weights) < 0 or not any(step_weights)):
                raise InputError(f"step_weights: {len(step_weights)} are given for {scales} scales; give one a scale, "
                                 "none negative and not all zero")
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        self.system = system
        self.label_dropout, self.part_dropout = label_dropout, part_dropout
        self.label_smoothing, self.step_weights = label_smoothing, step_weights
        self.validation, self.sheet_labels, self.sheet_control = validation, sheet_labels, sheet_control
        self.prefix = prefix or Prefix()
        for plan in self.plans:
            self.prefix.at(0.0, len(plan))
        self.compile, self.backend = compile, backend
        self._utilisation: Utilisation | None = None
        system.tokenizer.requires_grad_(False).eval()
        networks: list[Any] = [module for module in system.modules() if hasattr(module, "checkpointing")]
        for network in networks:
            network.checkpointing = checkpointing
        self.parts: dict[str, nn.Module] = {name: getattr(system, name)
                                            for name in (*system.transformer_parts, *system.further)}
        self.modules = {name: part for name, part in self.parts.items()
                        if any(p.requires_grad for p in part.parameters())}
        for name in self.parts.keys() - self.modules.keys():
            self.parts[name].eval()

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        groups = decay_groups(list(self.modules.values()), 1.0)
        spared = {p for m in self.modules.values() for n, p in m.named_parameters() if n.split(".")[-1] in NO_DECAY}
        spared |= {p for name in self.system.undecayed if name in self.modules for p in self.modules[name].parameters()}
        decayed = [p for group in groups if group["weight_decay"] for p in group["params"] if p not in spared]
        plain = [p for group in reversed(groups) for p in group["params"] if not group["weight_decay"] or p in spared]
        found = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return [group for group in found if group["params"]]

    def averaged(self) -> dict[str, nn.Module]:
        return dict(self.modules)

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        if self._utilisation is None:
            self._begin()
        plan = self.system.training_plan(batch)
        scales, newest = self.prefix.at(at.progress, len(plan))
        self.system.progress = at.progress
        tokens = self.system.training_tokens(batch["tokens"], plan)[:scales]
        self._count(len(tokens[0]), replace(plan, steps=plan.steps[:scales]))
        weights = self._weights(plan)[:scales]
        weights[-1] *= newest
        loss, by_step_K, right_K = self.system.loss(tokens, self.system.training_rows(batch), self.label_dropout,
                                                    self.part_dropout, weights, self.label_smoothing,
                                                    **self.system.training_options(batch))
        metrics = dict(self._figures(by_step_K, right_K, plan))
        if scales < len(plan):
            metrics["scales"] = float(scales)
        return loss, metrics

    def _weights(self, plan: Plan) -> list[float]:
        """What each row of every scale weighs."""
        if isinstance(self.step_weights, str):
            power = {"equal": -1.0, "root": -0.5}[self.step_weights]
            return [step.rows**power for step in plan]
        return list(self.step_weights or self.system.row_weights(plan))

    def _figures(self, by_step_K: Tensor, right_K: Tensor | None, plan: Plan) -> Metrics:
        """Of every scale nats and accuracy where the system has a likelihood, else its loss; over all what there is to
        say of a whole picture. NaN where a scale was not trained: to ask which would make the host wait."""
        if not self.system.likelihood:
            return _by_scale("loss", by_step_K)
        by_step_K = by_step_K * self.system.nats_of_loss
        metrics = _by_scale("nats", by_step_K)
        if right_K is not None:
            metrics |= {**_by_scale("accuracy", right_K), "accuracy": _over_rows(right_K, plan)}
        if len(by_step_K) == len(plan):
            metrics["bits_per_dimension"] = self._bits_per_dimension(by_step_K, plan)
        return metrics

    def _begin(self) -> None:
        """What hangs on the device, which is known when the first batch comes."""
        device = self.system.device
        if self.compile == "on" or (self.compile == "auto" and device.type == "cuda"):
            # Every plan is a graph of its own; beyond its limit the compiler would leave the others as they are.
            graphs = sum(len(plan) if self.prefix.share else 1 for plan in self.plans)
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, COMPILED + graphs)
            self.system.generator.compile(backend=self.backend, dynamic=False)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else next(self.system.head.parameters()).dtype
        self._utilisation = Utilisation(device, dtype)

    def _count(self, pictures: int, plan: Plan) -> None:
        assert self._utilisation is not None
        with torch.random.fork_rng():  # the step's own draws stay what they are
            self._utilisation.add((pictures, plan), lambda: [MatrixProduct(*p) for p in
                                                             self.system.products(pictures, plan)])

    def _bits_per_dimension(self, by_step_K: Tensor, plan: Plan) -> Tensor:
        """Bits a colour value that coding the picture's tokens with this model would take; NaN where not all scales
        were looked at."""
        colours = 3 * plan.grid[0] * plan.grid[1] * self.system.tokenizer.config.factor**2
        bits = _over_rows(by_step_K, plan) * (plan.length / (math.log(2) * colours))
        return bits.masked_fill(by_step_K.isnan().any(), torch.nan)

    def after_step(self, at: TrainingStep) -> Metrics:
        if self._utilisation is not None and at.rested:
            self._utilisation.pause()
        used = None if self._utilisation is None else self._utilisation.step()
        # Utilisation counts the arithmetic of all gradients; frozen weights have none.
        whole = all(p.requires_grad for part in self.parts.values() for p in part.parameters())
        return {"flop_utilisation": used} if used and whole else {}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        """A sheet of samples from the averaged weights, and the loss on held-out pictures."""
        with self._using(averaged):
            self.system.eval()
            if self.sheet_labels is not None:
                steered: dict[str, Any] = {} if self.sheet_control is None else {"control": self.sheet_control}
                drawn = self.system.generate(self.sheet_labels, seed=1, output="torch", progress=False, batch_size=32,
                                             **steered)
                save_image(sheet(drawn.images, columns=8), out / f"samples-{at.step:08d}.png")
                if self.sheet_control is not None:
                    shown = self.sheet_control.expand(-1, 3, -1, -1).float() / 127.5 - 1
                    save_image(sheet(shown, columns=8), out / "control.png")
            return self._validate()

    @contextmanager
    def _using(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The system with other modules in place of those under training."""
        for name, module in modules.items():
            setattr(self.system, name, module)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                setattr(self.system, name, module)

    def _validate(self) -> Metrics | None:
        if self.validation is None:
            return None
        tokens_NL = self.validation["tokens"]
        total_K, right_K = torch.zeros(len(self.system.plan)), torch.zeros(len(self.system.plan))
        guessed_K: Tensor | None = None
        with torch.random.fork_rng():  # times and noise of a flow's loss are the same every time
            torch.manual_seed(0)
            for start in range(0, len(tokens_NL), 64):
                batch = {name: rows[start:start + 64] for name, rows in self.validation.items()}
                batch |= {name: rows.to(self.system.device) for name, rows in batch.items() if isinstance(rows, Tensor)}
                part = self.system.training_tokens(batch["tokens"])
                _, by_step_K, guessed_K = self.system.loss(part, self.system.training_rows(batch), 0.0, 0.0,
                                                           **self.system.training_options(batch))
                share = len(part[0]) / len(tokens_NL)
                total_K += by_step_K.cpu() * share
                if guessed_K is not None:
                    right_K += guessed_K.cpu() * share
        found = dict(self._figures(total_K, None if guessed_K is None else right_K, self.system.plan))
        found["nats_per_token" if self.system.likelihood else "loss"] = (
            _over_rows(total_K, self.system.plan) * (self.system.nats_of_loss if self.system.likelihood else 1))
        return {f"held_out/{name}": float(value) for name, value in found.items() if not math.isnan(value)}

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        return None


def _over_rows(value_K: Tensor, plan: Plan) -> Tensor:
    """The mean over a plan's rows from means over each step's rows; steps that are NaN don't count."""
    rows_K = listed([step.rows for step in plan], value_K.device)[:len(value_K)] * ~value_K.isnan()
    return (value_K.nan_to_num() * rows_K).sum() / rows_K.sum()


def _by_scale(name: str, value_K: Tensor) -> dict[str, Tensor | float]:
    return {f"{name}_{k}": value for k, value in enumerate(value_K)}
