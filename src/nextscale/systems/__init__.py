"""Systems: published methods under their published names, each composed of shared parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(name: str, precision: str = "fp32", device: str = "auto", tokenizer: Any = None,
               generator: Any = None) -> Any:
    """See ``nextscale.load``."""
    from nextscale.devices import choose_device
    from nextscale.errors import InputError
    from nextscale.registry import resolve
    from nextscale.systems import var

    target = choose_device(device)
    if Path(name).is_dir():
        system = var.load(Path(name))
    else:
        make = resolve(name)
        if not callable(make):
            raise InputError(f"{name!r} is not a model; `nextscale models` lists them")
        system = make(name)
    if tokenizer is not None or generator is not None:
        var.load_published(system, tokenizer, generator)
    return system.to(target).to_precision(precision)
