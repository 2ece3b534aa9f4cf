"""``nextscale models`` and ``nextscale systems``: what there is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from nextscale.systems.system import Config
    from nextscale.tokenizers.config import TokenizerConfig


SIZES = Path(__file__).with_name("sizes.json")
"""Written by ``python -m nextscale.cli.models``."""


def list_models(
    name: Annotated[str | None, typer.Argument(help="Show one: a name or a model's folder.")] = None,
) -> None:
    """List the models that --model and nextscale.load take, or show one: schedule, settings, classes or prompts.

    \b
    Examples:
      nextscale models
      nextscale models emoji-text-64
    """
    from nextscale.registry import models

    if name is not None:
        _show(name)
        return
    rows = [("model", "parameters", "pictures", "weights"), *(_row(name) for name in models())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        typer.echo("  ".join([*(f"{cell:{width}s}" for cell, width in zip(row, widths, strict=False)), row[3]]))


def _row(name: str) -> tuple[str, str, str, str]:
    from nextscale.errors import WeightsError
    from nextscale.registry import models, weights_of

    kind = weights_of(name)
    if kind == "unknown":
        return name, "", "", f"another package's ({models()[name]})"
    try:
        size, pictures = _sizes().get(name) or size_of(name)
    except WeightsError:
        return name, "", "", "not in this installation"
    return name, size, pictures, {"published": "published files: --weights, --tokenizer-weights, or convert",
                                  "base": "published files of the base; none of the control",
                                  "shipped": "come with the package", "none": "none: for training and tests"}[kind]


@cache
def _sizes() -> dict[str, list[str]]:
    """``size_of`` the sizes that come without weights, which never change: building them all takes ten seconds."""
    from nextscale.hub import read_json

    return read_json(SIZES)


def size_of(name: str) -> list[str]:
    """How many parameters a model has, and how large its pictures are."""
    from nextscale.systems.folders import model_config

    config = model_config(name)
    side = config.tokenizer.factor
    height, width = (side * n for n in config.tokenizer.grids[-1])
    return [_millions(config), f"{width}x{height}"]


def count_sizes() -> dict[str, list[str]]:
    """What ``SIZES`` is to hold."""
    from nextscale.registry import models, weights_of

    return {name: size_of(name) for name in models() if weights_of(name) in ("published", "base", "none")}


def _show(name: str) -> None:
    from dataclasses import asdict

    from nextscale.systems.folders import model_config

    config = model_config(name)
    if config is None:
        raise InputError(f"{name!r} comes from another package, which tells about it")
    typer.echo(f"parameters  {_millions(config)}")
    of = "vectors" if config.tokenizer.continuous else f"tokens of {config.tokenizer.vocabulary} codes"
    typer.echo(f"schedule    {', '.join(f'{h}x{w}' for h, w in config.tokenizer.grids)}"
               f" ({config.tokenizer.plan.length} {of})")
    for purpose, settings in config.settings.items():
        typer.echo(f"{purpose:11s} {', '.join(f'{k}={v}' for k, v in asdict(settings).items())}")
    if hasattr(config, "words"):
        typer.echo(f"prompts     {config.encoder}" if config.words is None else
                   f"prompts     read by an encoder of its own, {config.words.max_tokens} tokens at most")
    for kind, size in enumerate(getattr(config, "classes", ())):
        names = config.class_names[kind] if kind < len(config.class_names) else ()
        typer.echo(f"label {kind}     {', '.join(names) if names else f'an index from 0 to {size - 1}'}")


def _millions(config: Config) -> str:
    import torch

    from nextscale.hub import WithoutInitialisation
    from nextscale.systems.folders import build_system

    # Most models share a tokenizer, which is most of the work: counted once, and the system is built with a narrow one.
    auto = config.tokenizer.autoencoder
    narrow = replace(auto, width=auto.groups, encoder_blocks=1, decoder_blocks=1)
    with torch.device("meta"), WithoutInitialisation():
        system = build_system(replace(config, tokenizer=replace(config.tokenizer, autoencoder=narrow)))
    of_narrow = sum(p.numel() for p in system.tokenizer.parameters())
    rest = sum(p.numel() for p in system.parameters()) - of_narrow
    return f"{rest / 1e6:,.0f}M + {_tokenizer_size(config.tokenizer) / 1e6:,.0f}M tokenizer"


@cache
def _tokenizer_size(config: TokenizerConfig) -> int:
    import torch

    from nextscale.hub import WithoutInitialisation
    from nextscale.tokenizers.tokenizer import Tokenizer

    with torch.device("meta"), WithoutInitialisation():
        return sum(p.numel() for p in Tokenizer(config).parameters())


def list_hooks(
    name: Annotated[str | None, typer.Argument(help="Show one, with its settings.")] = None,
) -> None:
    """List what --hook and nextscale.hook take, or show one: what it does and its settings.

    \b
    Examples:
      nextscale hooks
      nextscale hooks fastvar
    """
    from dataclasses import MISSING, fields
    from inspect import cleandoc

    from nextscale.registry import hooks, import_target

    known = hooks()
    if name is None:
        width = max(map(len, known), default=0)
        for slug in sorted(known):
            typer.echo(f"{slug:{width}s}  {cleandoc(import_target(known[slug]).__doc__ or '').splitlines()[0]}")
        return
    if name not in known:
        raise InputError(f"unknown hook {name!r}{did_you_mean(name, known, '; `nextscale hooks` lists them')}")
    kind: Any = import_target(known[name])
    typer.echo(f"{cleandoc(kind.__doc__ or '')}\n")
    for field in fields(kind):
        default = "" if field.default is MISSING else f" = {field.default!r}"
        typer.echo(f"{field.name}: {field.type}{default}")


def list_systems(
    name: Annotated[str | None, typer.Argument(help="Show one: its slug or published name.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="Only those planned, built or shown.")] = None,
) -> None:
    """List every published system that this library has or will have, by family and status, or show one and how to
    cite it.

    The licence is that of the published code, not of this library.

    \b
    Examples:
      nextscale systems
      nextscale systems --status built
      nextscale systems var
    """
    from nextscale.registry import STATUSES, system_entry, systems

    if name is not None:
        entry = system_entry(name)
        for title in ("slug", "name", "title", "authors", "paper", "licence", "family", "status", "where", "command",
                      "check"):
            value = getattr(entry, title)
            link = f" (https://arxiv.org/abs/{value})" if title == "paper" and value else ""
            typer.echo(f"{title:8s} {value or '-'}{link}")
        if citation := entry.citation():
            typer.echo(f"\n{citation}")
        return
    if status is not None and status not in STATUSES:
        raise InputError(f"--status {status!r} is unknown{did_you_mean(status, STATUSES)}; use {', '.join(STATUSES)}")
    entries = [entry for entry in systems().values() if status in (None, entry.status)]
    width = max((len(entry.slug) for entry in entries), default=0)
    for family in dict.fromkeys(entry.family for entry in entries):
        members = [entry for entry in entries if entry.family == family]
        # What runs first: most rows are plans.
        members.sort(key=lambda entry: -STATUSES.index(entry.status))
        typer.echo(f"\n{family} ({len(members)})")
        for entry in members:
            licence = f"; licence: {entry.licence}" if entry.licence else ""
            typer.echo(f"  {entry.status:8s} {entry.slug:{width}s}  {entry.paper:10s}  {entry.name}{licence}")
    counts = ", ".join(f"{sum(entry.status == one for entry in entries)} {one}" for one in STATUSES)
    typer.echo(f"\n{len(entries)} systems: {counts}")


if __name__ == "__main__":
    import json

    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(size)}" for name, size in count_sizes().items())
    SIZES.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
