"""A device of pretence: torch's ``meta``, which knows shapes and computes nothing, watched for what makes a host wait.

On a GPU the host only queues work. It waits where it asks for a number (``item``, ``tolist``, a mask as an index) and
at every copy between its own memory and the device's; such a wait within a step can cost more than the step's kernels.
"""
from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nextscale

DEVICE = torch.device("meta")
_SOURCES = Path(nextscale.__file__).parent


@contextlib.contextmanager
def watched() -> Iterator[Counter[str]]:
    """Count how often the device of pretence gets or gives numbers, by the line of the package that asks.

    Raises AssertionError where an operation mixes what lies there and here, which a GPU refuses; torch itself raises
    where a number is asked for.
    """
    copies, autocast = Counter[str](), torch.autocast

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **options: Any):
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **options)

    torch.autocast = Autocast  # type: ignore[misc]
    try:
        with _Made(copies), _Moved(copies):
            yield copies
    finally:
        torch.autocast = autocast  # type: ignore[misc]


class _Made(TorchFunctionMode):
    """Tensors that are made of Python's numbers, and lists as indices."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None \
            and torch.device(kwargs["device"]) == DEVICE
        picked = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta \
            and any(isinstance(one, list) for one in (args[1] if isinstance(args[1], tuple) else (args[1],)))
        if made or picked:
            self.copies[_line()] += 1
        return func(*args, **kwargs)


class _Moved(TorchDispatchMode):
    """Copies between here and there, and operations on both."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in given if not t.is_meta and t.ndim]
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            asked = args[0].device if name == "copy_" else kwargs.get("device") or source.device
            if source.is_meta != (asked == DEVICE):
                self.copies[_line()] += 1
                if source.is_meta:
                    return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif here and any(t.is_meta for t in given):
            raise AssertionError(f"{name} mixes the device's tensors with {[tuple(t.shape) for t in here]}: {_line()}")
        return func(*args, **kwargs)


def _line() -> str:
    """The line of the package that an operation comes from."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(_SOURCES))]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "outside of the package"
