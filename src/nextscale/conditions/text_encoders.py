"""Text encoders by name::

    words                  the small one that is trained with the model and needs no download (the default)
    bytes                  the same over the bytes of the text
    t5:PLACE               T5's encoder through transformers, any Flan-T5 such as t5:google/flan-t5-xl
    clip:PLACE             CLIP's text tower, such as clip:stabilityai/stable-diffusion-2-1
    minilm                 all-MiniLM-L6-v2 from its Python package, or minilm:PLACE
    package.module:name    a function of yours that gives a ``TextEncoder``

PLACE is a folder or a hub name.
"""
from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch

from nextscale.conditions.text_features import TextEncoder
from nextscale.conditions.text_pretrained import (
    CLIPTextEncoder,
    MiniLMEncoder,
    Offload,
    PretrainedTextEncoder,
    T5Encoder,
)
from nextscale.conditions.text_words import WordConfig, WordEncoder
from nextscale.errors import InputError, did_you_mean

BYTES = WordConfig(kind="bytes", max_tokens=192)
"""``bytes``: as long a text as ``words`` reads."""

_PRETRAINED: dict[str, tuple[type[PretrainedTextEncoder], str]] = {
    "t5": (T5Encoder, "google/flan-t5-xl"),
    "clip": (CLIPTextEncoder, "stabilityai/stable-diffusion-2-1"),
    "minilm": (MiniLMEncoder, ""),
}
NAMES = ("words", "bytes", *_PRETRAINED)


def open_text_encoder(spec: str = "words", *, max_tokens: int | None = None, dtype: torch.dtype = torch.float32,
                      device: torch.device | str = "cpu", offload: Offload = "none") -> TextEncoder:
    """A text encoder by name, see this file's head.

    Args:
        spec: the name.
        max_tokens: how much of a prompt is read; None for the encoder's own limit.
        device: where features land.
        dtype, offload: of pretrained encoders, see :class:`PretrainedTextEncoder`; ``words`` and ``bytes`` are small
            and take both from the model that they are trained with.

    Raises:
        InputError: an unknown name, or settings that the encoder can't have.
        MissingExtraError: its package isn't installed.
        WeightsError: its weights are missing, damaged or another model's.
    """
    kind, _, place = spec.partition(":")
    if spec in ("words", "bytes"):
        config = WordConfig() if spec == "words" else BYTES
        if max_tokens is not None:
            config = WordConfig(kind=config.kind, max_tokens=max_tokens)
        return WordEncoder(config).to(device)
    if kind in _PRETRAINED:
        made, example = _PRETRAINED[kind]
        if not place and example:
            raise InputError(f"text encoder {kind!r} needs its weights; write {kind}:{example} or {kind}:FOLDER")
        return made(cast(Any, place or None), max_tokens, dtype, device, offload)
    if kind and place and ("." in kind or importlib.util.find_spec(kind) is not None):
        return _of_user(spec)
    hint = did_you_mean(kind, NAMES, "; use words, bytes, t5:PLACE, clip:PLACE, minilm or package.module:name")
    raise InputError(f"unknown text encoder {spec!r}{hint}")


def _of_user(spec: str) -> TextEncoder:
    from nextscale.registry import import_target

    made: Any = import_target(spec)
    found = made() if isinstance(made, type) or not hasattr(made, "encode") else made
    lacking = [name for name in ("name", "width", "pooled_width", "encode") if not hasattr(found, name)]
    if lacking:
        raise InputError(f"text encoder {spec!r} gave {type(found).__name__}, which lacks {', '.join(lacking)}; see "
                         "nextscale.conditions.text_features.TextEncoder")
    return cast(TextEncoder, found)
