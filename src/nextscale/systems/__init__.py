"""Systems: published methods under their published names, each composed of shared parts."""

from __future__ import annotations

from typing import Any


def load_model(name: str, precision: str = "fp32", device: str = "auto", tokenizer: Any = None,
               generator: Any = None, **further: Any) -> Any:
    """See ``nextscale.load``."""
    from nextscale.devices import choose_device
    from nextscale.errors import WeightsError
    from nextscale.systems.folders import load_published, open_model

    target = choose_device(device)
    system = open_model(name, filled=tokenizer is not None and generator is not None)
    if any(given is not None for given in (tokenizer, generator, *further.values())):
        load_published(system, tokenizer, generator, **further)
        for part, names in zip(system.further, system.published_names()[2:], strict=True):
            if generator is not None and names and further.get(part) is None:
                raise WeightsError(f"{name} has published weights of its {part}, too; give {part}, or load its base")
    return system.to(target).to_precision(precision)
