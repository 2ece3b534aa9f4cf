"""``nextscale models`` and ``nextscale systems``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from nextscale.errors import InputError, did_you_mean


def list_models() -> None:
    """List the models that --model and nextscale.load take, with size, pictures and where their weights come from.

    \b
    Example: nextscale models
    """
    from nextscale.registry import models

    rows = [("model", "parameters", "pictures", "weights"), *(_row(name) for name in sorted(models()))]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        typer.echo("  ".join([*(f"{cell:{width}s}" for cell, width in zip(row, widths, strict=False)), row[3]]))


def _row(name: str) -> tuple[str, str, str, str]:
    import torch

    from nextscale.cli.options import needs_weights
    from nextscale.registry import import_target, models

    if models()[name] == "nextscale.systems.var:shipped":
        return _shipped_row(name)
    if not needs_weights(name):
        return name, "", "", f"another package's ({models()[name]})"
    with torch.device("meta"):
        system = import_target(models()[name])(name)  # type: ignore[operator]
    height, width = system.tokenizer.picture_size
    return name, _millions(system), f"{width}x{height}", "published files: --weights, --tokenizer-weights, or convert"


def _shipped_row(name: str) -> tuple[str, str, str, str]:
    from importlib.resources import files
    from pathlib import Path

    import torch

    from nextscale import hub
    from nextscale.configuration import build
    from nextscale.systems.var import VAR, VARConfig

    path = Path(str(files("nextscale"))) / "weights" / name / "config.json"
    if not path.is_file():
        return name, "", "", "not in this installation"
    config = hub.read_json(path)
    config.pop("system", None)
    with torch.device("meta"):
        system = VAR(build(VARConfig, config, str(path)))
    height, width = system.tokenizer.picture_size
    return name, _millions(system), f"{width}x{height}", "come with the package"


def _millions(system: object) -> str:
    parameters = sum(p.numel() for p in system.parameters())  # type: ignore[attr-defined]
    tokenizer = sum(p.numel() for p in system.tokenizer.parameters())  # type: ignore[attr-defined]
    return f"{(parameters - tokenizer) / 1e6:,.0f}M + {tokenizer / 1e6:,.0f}M tokenizer"


def list_systems(
    name: Annotated[str | None, typer.Argument(help="Show one: its slug or published name.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="Only those planned, built or shown.")] = None,
) -> None:
    """List every published system that this library has or will have, by family and status, or show one.

    \b
    Examples:
      nextscale systems
      nextscale systems --status built
      nextscale systems var
    """
    from nextscale.registry import STATUSES, system_entry, systems

    if name is not None:
        entry = system_entry(name)
        for title in ("slug", "name", "title", "paper", "family", "status", "where", "command", "check"):
            value = getattr(entry, title)
            link = f" (https://arxiv.org/abs/{value})" if title == "paper" and value else ""
            typer.echo(f"{title:8s} {value or '-'}{link}")
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
            typer.echo(f"  {entry.status:8s} {entry.slug:{width}s}  {entry.name}")
    counts = ", ".join(f"{sum(entry.status == one for entry in entries)} {one}" for one in STATUSES)
    typer.echo(f"\n{len(entries)} systems: {counts}")
