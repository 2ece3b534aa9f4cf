"""Tensors that are made from a layer's weight once and kept until the weight changes."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class KeepsForm(nn.Module):
    """A layer that keeps another form of a weight: made at first use, it lives beside the weight until that changes (in
    place or by a move), and is no part of the state."""

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def kept(self, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(weight)``, made anew only where the weight isn't the one that it was made from; not for weights of
        inference mode, whose changes nobody counts."""
        made_of = (weight._version, weight.data_ptr())
        if self._packed is None or self._packed[0] != made_of:
            self._packed = made_of, make(weight.detach())
        return self._packed[1]

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsForm:
        self._packed = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}
