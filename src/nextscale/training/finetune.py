"""Fine-tuning a trained generator: which weights train, and a task that keeps, averages and saves those alone."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.errors import InputError, WeightsError
from nextscale.training.adapters import is_adapter, select, target_names
from nextscale.training.classes import ClassChange, translate
from nextscale.training.generator import NO_DECAY, GeneratorTask
from nextscale.training.task import Batch, Metrics, TrainingStep


def check_names(system: nn.Module, targets: Sequence[str] | None, frozen: Sequence[str], also: Sequence[str]) -> None:
    """Raises InputError for a pattern that names nothing; the system's weights don't matter. targets: None for no
    adapters."""
    if targets is not None:
        target_names(system, targets)
    choose_trained(system, False, frozen)
    beside = (*also, *class_tables(system))
    if beside:  # without any, adapters alone train, which are not there yet
        choose_trained(system, targets is not None, also=beside)


def class_tables(system: nn.Module) -> tuple[str, ...]:
    """What trains beside adapters in any case, as a pattern: the class tables, which text systems don't have."""
    return ("labels",) if hasattr(system, "labels") else ()


def choose_trained(system: nn.Module, adapters: bool, frozen: Sequence[str] = (), also: Sequence[str] = ()) -> None:
    """Set which parameters train, in place: the adapters and those named by ``also``, or without adapters all but the
    tokenizer's; of these not the ones named by ``frozen``. Patterns as ``adapters.select`` takes them.

    Raises InputError for a pattern that names no parameter, and where nothing is left to train.
    """
    own = dict(system.named_parameters())
    names = [name for name in own if not name.startswith("tokenizer.") and not is_adapter(name)]
    plain = [name.replace(".base_layer.", ".") for name in names]
    real = dict(zip(plain, names, strict=True))
    trained = {real[name] for name in (select(also, plain, "train_also") if adapters else plain)}
    trained -= {real[name] for name in select(frozen, plain, "freeze")}
    for name, parameter in own.items():
        parameter.requires_grad_(name in trained or (is_adapter(name) and adapters))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not any(parameter.requires_grad for parameter in own.values()):
        raise InputError("freeze leaves nothing to train; freeze less")


def train_new_rows(system: Any, new: Sequence[Tensor]) -> None:
    """Of class tables that train, train the new rows alone: gradients of others are zero, so they keep every bit."""
    for table, rows in zip(system.labels.tables, new, strict=True):
        table.weight.requires_grad_(table.weight.requires_grad and bool(rows.any()))
        if table.weight.requires_grad:
            kept = ~rows[:, None]
            table.weight.register_hook(lambda gradient, kept=kept: gradient.masked_fill(kept.to(gradient.device), 0))


class Trained(nn.Module):
    """The parameters of a network that train, under their names, without the rest: what a checkpoint keeps and an
    average copies. The parameters are shared with the network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                *path, last = name.split(".")
                place: nn.Module = self
                for part in path:
                    if part not in place._modules:
                        place.add_module(part, nn.Module())
                    place = place.get_submodule(part)
                place.register_parameter(last, parameter)


class PartTask(GeneratorTask):
    """``GeneratorTask`` on the trainable part of a system: that alone is kept, averaged and saved.

    base: fingerprint of the weights that the training began with, which a resumed one must begin with too; average:
    whether an average of the trained weights is kept.
    """

    def __init__(self, system: Any, base: str, average: bool = True, **settings: Any):
        trained = [parameter for parameter in system.parameters() if parameter.requires_grad]
        super().__init__(system, **settings)  # stops all of the tokenizer's gradients
        self.base, self.average = base, average
        self.modules = {"trained": Trained(system)}
        assert len(list(self.modules["trained"].parameters())) == len(trained)

    def parameter_groups(self, phase: str, weight_decay: float) -> list[dict[str, Any]]:
        modules = [module for part in self.parts.values() for module in part.modules()]
        embeddings = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.modules["trained"].named_parameters():
            plain = parameter.ndim < 2 or id(parameter) in embeddings or name.split(".")[-1] in NO_DECAY
            groups[not plain].append(parameter)
        return [{"params": found, "weight_decay": weight_decay if decays else 0.0}
                for decays, found in groups.items() if found]

    def averaged(self) -> dict[str, nn.Module]:
        return dict(self.modules) if self.average else {}

    def samples(self, out: Path, at: TrainingStep, averaged: dict[str, nn.Module]) -> Metrics | None:
        # Where the base is held in bf16 and some layers train in float32, only autocast makes them meet.
        mixed = len({p.dtype for part in self.parts.values() for p in part.parameters()}) > 1
        device = self.system.device.type
        with torch.autocast(device, torch.bfloat16) if mixed else nullcontext():
            return super().samples(out, at, averaged)

    @contextmanager
    def _using(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The system with other values in its trained parameters."""
        pairs = list(zip(self.modules["trained"].parameters(), modules["trained"].parameters(), strict=True))
        own = [mine.data for mine, _ in pairs]
        for mine, other in pairs:
            mine.data = other.data
        try:
            yield
        finally:
            for (mine, _), values in zip(pairs, own, strict=True):
                mine.data = values

    @torch.no_grad()
    def adopt(self, modules: Mapping[str, nn.Module]) -> None:
        """Take over the values of an average, for good."""
        for mine, other in zip(self.modules["trained"].parameters(), modules["trained"].parameters(), strict=True):
            mine.copy_(other)

    def extra_state(self) -> dict[str, Tensor | float | str]:
        return {"base": self.base}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state.get("base") != self.base:
            raise WeightsError(f"this run was begun on another model (fingerprint {str(state.get('base'))[:8]}, now "
                               f"{self.base[:8]}); resume it with the same --model")


class FinetuneTask(PartTask):
    """``PartTask`` whose data's labels become labels of the model. change: what became of its classes, None where text
    steers."""

    def __init__(self, system: Any, change: ClassChange | None, base: str, average: bool = True, **settings: Any):
        super().__init__(system, base, average, **settings)
        self.change = change

    def loss(self, phase: str, batch: Batch, at: TrainingStep) -> tuple[Tensor | None, Metrics]:
        for part in self.parts.values():
            part.train()
        if self.change is not None:
            batch = {**batch, "labels": translate(batch["labels"], self.change, self.system.config.classes)}
        return super().loss(phase, batch, at)
