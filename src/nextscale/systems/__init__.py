"""Systems: published methods under their published names, each composed of shared parts."""

from __future__ import annotations

from typing import Any


def load_model(name: str, precision: str = "fp32", device: str = "auto", tokenizer: Any = None,
               generator: Any = None, control: Any = None) -> Any:
    """See ``nextscale.load``."""
    from nextscale.devices import choose_device
    from nextscale.errors import WeightsError
    from nextscale.systems.folders import load_published, open_model

    target = choose_device(device)
    system = open_model(name)
    if any(given is not None for given in (tokenizer, generator, control)):
        load_published(system, tokenizer, generator, control=control)
        if generator is not None and control is None and getattr(system, "control_names", tuple)():
            raise WeightsError(f"{name} has published weights of its control, too; give control, or load its base")
    return system.to(target).to_precision(precision)
