"""nextscale: visual autoregressive generation as one vocabulary of parts.

    import nextscale
    system = nextscale.load("emoji-text-64")
    system.generate("red apple, flat style", count=4, seed=1).images[0].save("picture.png")

Shape letters, used as suffixes of tensor names (`tokens_BL`, `canvas_BCHW`): B pictures, L rows (positions),
C width, V vocabulary, H and W latent height and width, K steps, D condition width, R branches x pictures, N keys.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "hook", "list_hooks", "list_models", "list_systems", "load"]


def load(name: str, **options: Any) -> Any:
    """A model by name (``emoji-text-64``, ``var-d16``, ...) or from a folder of ``nextscale train`` or ``convert``.

    options: ``precision`` (``fp32``, ``bf16`` or ``int8``), ``device`` (``auto``, ``cpu``, ``cuda``, ``mps``), and for
    published sizes ``tokenizer``, ``generator`` and, where a picture steers, ``control``, of a pair ``drafter``:
    weights by local path or hub file. Raises InputError on unknown names, WeightsError on weights that don't fit and on
    parts that a model hasn't, DeviceError on a device that isn't there.
    """
    from nextscale.systems import load_model

    return load_model(name, **options)


def hook(name: str, **settings: Any) -> Any:
    """A hook by name (``fastvar``, ...), for the ``hooks`` of ``generate``, ``stream`` and ``log_prob``.

    settings: those of the hook's class. Raises InputError on unknown names and settings.
    """
    from nextscale.context import make_hook

    return make_hook(name, settings)


def list_hooks() -> list[str]:
    """Names that ``hook`` takes."""
    from nextscale.registry import hooks

    return sorted(hooks())


def list_models() -> list[str]:
    """Names that ``load`` takes."""
    from nextscale.registry import models

    return sorted(models())


def list_systems() -> list[str]:
    """Slugs of all systems, planned ones too."""
    from nextscale.registry import systems

    return list(systems())
