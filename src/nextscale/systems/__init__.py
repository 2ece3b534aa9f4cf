"""Systems: published methods under their published names, each composed of shared parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(name: str, precision: str = "fp32", device: str = "auto", tokenizer: Any = None,
               generator: Any = None) -> Any:
    """See ``nextscale.load``."""
    from nextscale.devices import choose_device
    from nextscale.errors import InputError, did_you_mean
    from nextscale.registry import import_target, models
    from nextscale.systems import var, var_published

    target = choose_device(device)
    if Path(name).is_dir():
        system = var.load(Path(name))
    else:
        # The models' table alone: a system's slug is a class without a size, and "module:name" would call anything.
        known = models()
        if name not in known:
            hint = did_you_mean(name, known, "; `nextscale models` lists them")
            raise InputError(f"no model or folder {name!r}{hint}")
        system = import_target(known[name])(name)  # type: ignore[operator]
    if tokenizer is not None or generator is not None:
        var_published.load_published(system, tokenizer, generator)
    return system.to(target).to_precision(precision)
