"""Which of a network's blocks an address belongs to: for hooks that treat blocks apart."""
from __future__ import annotations

from typing import Any


def depth_of(network: Any) -> int | None:
    """How many blocks a network has, by its configuration; None where that doesn't say."""
    depth = getattr(getattr(network, "config", None), "depth", None)
    if isinstance(depth, tuple):
        return sum(depth)
    return depth if isinstance(depth, int) else None


def block_of(network: Any, address: str) -> int | None:
    """The number of a network's block by its address, ``name.i``, or its attention's, ``name.i.kv``; None for what is
    none of the network's, such as a control tower's."""
    name, _, number = address.removesuffix(".kv").rpartition(".")
    return int(number) if name == network.name and number.isdecimal() else None
