"""The optimisers that a training's configuration names."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nextscale.training.config import TrainConfig


def make_optimiser(config: TrainConfig, groups: Iterable[dict[str, Any]], names: Mapping[Tensor, str],
                   device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of parameter groups; names: of all their parameters."""
    if config.optimiser == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    fused = device.type in ("cuda", "cpu")
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)
    split = []
    for group in groups:
        for hidden in (True, False):
            chosen = [p for p in group["params"] if (p.ndim == 2 and ".blocks." in names[p]) == hidden]
            if chosen:
                split.append({**group, "params": chosen, "hidden": hidden})
    return MuonAndAdamW(split, config.learning_rate, config.betas, fused)


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan, 2024) for the matrices inside of blocks, AdamW for all else: embeddings, heads, vectors.

    Muon's step is the momentum's nearest semi-orthogonal matrix, scaled to the size that AdamW's steps have (Liu et
    al., arXiv 2502.16982), so that one learning rate and one weight decay serve both. groups: with ``hidden``, True for
    Muon's. Both work on the groups and states of this one, which is saved and restored like any optimiser.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], fused: bool):
        super().__init__(groups, {"lr": learning_rate})
        self.kinds: dict[bool, torch.optim.Optimizer] = {}
        for hidden in (True, False):
            own = [group for group in self.param_groups if group["hidden"] == hidden]
            if own:
                self.kinds[hidden] = (
                    torch.optim.Muon(own, lr=learning_rate, adjust_lr_fn="match_rms_adamw") if hidden
                    else torch.optim.AdamW(own, lr=learning_rate, betas=betas, fused=fused))
        self._share()

    def _share(self) -> None:
        for hidden, kind in self.kinds.items():
            kind.param_groups = [group for group in self.param_groups if group["hidden"] == hidden]
            kind.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for kind in self.kinds.values():
            kind.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
