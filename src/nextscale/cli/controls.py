"""``--control`` and ``--control-kind``: the maps that steer what is drawn, one or a mix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.cli.options import fit_picture, needs_weights
from nextscale.errors import InputError, WeightsError


@dataclass(frozen=True)
class Given:
    """One ``--control``: its file; its kind, None where the model's only one is meant; its weight in a mix; made: the
    file is no map but a picture that one is made of."""

    path: Path
    kind: str | None = None
    weight: float | None = None
    made: bool = False


def read(texts: list[str] | None, made: list[str] | None, model: str, weights: str | None) -> list[Given]:
    """What was given, before a model is opened: ``FILE``, ``KIND=FILE`` or ``KIND=FILE:WEIGHT``; made: kinds of maps to
    make of the pictures.

    Raises:
        InputError: several of which one has no kind or the same, a weight that is none, a kind to make of no picture.
        WeightsError: a published size without its control's weights.
    """
    found = [_read(text) for text in texts or []]
    if made and not found:
        raise InputError("--control-kind was given without --control; name a picture")
    if found and needs_weights(model) and weights is None:
        raise WeightsError(
            f"{model} comes without weights of its control; give --control-weights, or a folder as --model"
        )
    if len(found) == 1 and found[0].kind is None and made and len(made) == 1:
        return [Given(found[0].path, made[0], made=True)]
    kinds = [one.kind for one in found]
    for one in found:
        if len(found) > 1 and one.kind is None:
            raise InputError(f"--control {one.path}: of several, each must say its kind, as in canny={one.path}")
        if kinds.count(one.kind) > 1:
            raise InputError(f"--control: {one.kind} is given twice")
        if len(found) == 1 and one.weight is not None:
            raise InputError(f"--control {one.kind}: a weight is for a mix of several; leave it out")
    for kind in made or []:
        if kind not in kinds:
            raise InputError(f"--control-kind {kind}: no --control {kind}=FILE is there to make it of")
    return [Given(one.path, one.kind, one.weight, one.kind in (made or [])) for one in found]


def _read(text: str) -> Given:
    kind, equals, place = text.partition("=")
    if not equals or Path(text).is_file():
        return Given(Path(text))
    path, _, weight = place.rpartition(":")
    if path and not Path(place).is_file():
        try:
            return Given(Path(path), kind, float(weight))
        except ValueError:
            if Path(path).is_file():
                raise InputError(f"--control {text}: the weight {weight!r} is no number") from None
    return Given(Path(place), kind)


def maps(given: list[Given], system: Any) -> dict[str, Any]:
    """What ``generate`` and ``edit`` take of controls: maps by kind, fitted to the model's size, and their weights;
    nothing where nothing was given.

    Raises:
        InputError: the model takes none, a file is no picture, or a kind is missing, unknown or not the model's.
    """
    if not given:
        return {}
    import numpy as np
    import torch

    from nextscale.data.controls import make_controls
    from nextscale.data.images import open_image

    config = getattr(system.config, "control", None)
    if config is None:
        raise InputError(f"--control: no picture steers a {system.config.slug}; use a car or scalar model")
    known, found = ", ".join(config.kinds), {}
    for one in given:
        if one.kind is None and len(config.kinds) > 1:
            raise InputError(f"--control {one.path}: this model takes {known}; say which, as in "
                             f"{config.kinds[0]}={one.path}")
        kind = one.kind or config.kinds[0]
        if kind not in config.kinds:
            raise InputError(f"--control of {kind!r}: this model takes {known}")
        image = fit_picture(open_image(one.path), str(one.path), system.tokenizer.picture_size, True)
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]
        found[kind] = torch.from_numpy(make_controls(pixels, [kind]) if one.made else pixels.copy())
    weights = {one.kind: 1.0 if one.weight is None else one.weight for one in given}
    return {"control": found, **({"control_options": {"weights": weights}} if len(given) > 1 else {})}


def told(given: list[Given]) -> dict[str, Any]:
    """For the metadata of what is drawn."""
    return {"controls": [{**vars(one), "path": one.path.name} for one in given]} if given else {}
