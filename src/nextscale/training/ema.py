"""Exponential moving averages of weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average:
    """A copy of a module whose weights follow those of the original slowly; always fp32, in evaluation mode.

    ``average <- d * average + (1 - d) * weight`` with ``d = min(decay, (1 + t) / (10 + t))`` after ``t`` updates: the
    ramp keeps the random first weights from lingering in short runs. Buffers (codebook statistics, masks) are copied.

    Args:
        module: the original; it is read at every update and never changed.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._original = module
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    def decay_now(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the original's weights as they are now."""
        weight = 1.0 - self.decay_now()
        averages = [_own(parameter) for parameter in self.module.parameters()]
        originals = [_own(parameter).float() for parameter in self._original.parameters()]
        if averages:
            torch._foreach_lerp_(averages, originals, weight)
        for average, original in zip(self.module.buffers(), self._original.buffers(), strict=True):
            average.copy_(original)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Weights of the average."""
        return self.module.state_dict()


def _own(parameter: nn.Parameter) -> Tensor:
    """The values of a parameter, of a sharded one those that are here; the average is sharded alike. A change of them
    counts as one of the parameter's, which layers that keep another form of it (``layers.kept``) ask for."""
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data
