"""``nextscale scaling``: how loss falls with size, compute and data, from a family of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import InputError

if TYPE_CHECKING:
    from nextscale.evaluation.scaling import ScalingReport, ScalingRun


def scaling(
    out: Annotated[Path, typer.Option("--out", help="Folder for scaling.json, scaling.png and the runs.")],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs to read instead of training: folders with a scaling.json, or a JSON list of runs."),
    ] = None,
    depths: Annotated[
        str | None, typer.Option("--depths", help="Train these sizes, as in 2,3,4,6; width and heads follow.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="The generator's recipe that all sizes share.")
    ] = "own-64-generator",
    data: Annotated[
        str | None, typer.Option("--data", help="Pictures, as for train.", show_default="the recipe's")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Folder of a trained tokenizer.", show_default="the recipe's")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe, as in train.steps=2000.")
    ] = None,
    width_a_head: Annotated[
        int, typer.Option("--width-a-head", min=2, help="Width over depth; 64 as published, less for a small family.")
    ] = 64,
    seeds: Annotated[str, typer.Option("--seeds", help="Train every size with each of these seeds.")] = "0",
    held_out: Annotated[
        int, typer.Option("--held-out", min=0, help="Forecast so many of the largest sizes from the smaller ones.")
    ] = 1,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Draws behind the intervals.")] = 400,
) -> None:
    """Fit scaling laws: train a family of sizes, or read one that is trained.

    A family that was stopped goes on where it was.

    \b
    Examples:
      nextscale scaling --depths 2,3,4,6,8 --data photos/ --tokenizer runs/tokenizer/tokenizer --out runs/family
      nextscale scaling runs/family/runs/* --out out/scaling
    """
    from nextscale.data.pictures_out import check_writable
    from nextscale.evaluation.scaling import analyse
    from nextscale.evaluation.scaling_plot import check_plots

    check_writable(out, folder=True)
    check_plots()
    if bool(runs) == (depths is not None):
        raise InputError("give runs to read, or --depths to train, and not both")
    found = read(runs) if runs else train(out, depths or "", recipe, data, tokenizer, set_, width_a_head, seeds)
    report = analyse(found, held_out, bootstrap)
    write(report, out)
    for line in table(report):
        typer.echo(line)
    typer.echo(f"{out / 'scaling.json'}, {out / 'scaling.png'}: done")


def read(places: list[Path]) -> list[ScalingRun]:
    """Runs of folders and files. Raises DataError where one isn't of this kind."""
    from nextscale.evaluation.scaling import read_run, read_runs

    return [run for place in places for run in ([read_run(place)] if place.is_dir() else read_runs(place))]


def train(
    out: Path,
    depths: str,
    recipe: str,
    data: str | None,
    tokenizer: str | None,
    set_: list[str] | None,
    width_a_head: int,
    seeds: str,
) -> list[ScalingRun]:
    """Train what is not there yet."""
    from nextscale.cli.train import override, read_override
    from nextscale.evaluation.scaling import read_run
    from nextscale.training.family import members, train_member
    from nextscale.training.recipes import read_recipe

    values: dict[str, Any] = dict(read_override(text) for text in set_ or [])
    values |= {key: value for key, value in (("data.spec", data), ("tokenizer", tokenizer)) if value is not None}
    shared = read_recipe(recipe)
    for key, value in values.items():
        override(shared, key, value)
    family = members(
        shared, options.read_numbers(depths, "--depths"), out, width_a_head, options.read_numbers(seeds, "--seeds")
    )
    found = []
    for member in family:
        typer.echo(f"{member.name}: {member.out}")
        train_member(member)
        found.append(read_run(member.out))
    return found


def write(report: ScalingReport, out: Path) -> None:
    """``scaling.json`` and ``scaling.png``."""
    from nextscale import hub
    from nextscale.evaluation.scaling_plot import draw

    hub.save_json(report.describe(), out / "scaling.json")
    draw(report, out / "scaling.png")


def table(report: ScalingReport) -> list[str]:
    """The laws a line each, what could not be fitted, and the forecast."""
    lines = []
    for name, law in report.laws.items():
        floor = f"{law.floor:.4g} + " if law.floor else ""
        low, high = law.intervals.get("exponent", (float("nan"), float("nan")))
        lines.append(
            f"{name} = {floor}({law.scale:.3g} / x)^{law.exponent:.4f} "
            f"[{low:.4f}, {high:.4f}], r {law.correlation:.4f}, {law.points} points"
        )
    lines += [f"{name}: not fitted, {reason}" for name, reason in report.missing.items()]
    for found in report.forecast.get("held_out", []):
        lines.append(
            f"forecast for {found['parameters']:,} parameters: {found['predicted']:.4f}, "
            f"measured {found['measured']:.4f} ({found['relative_error']:+.2%})"
        )
    if "note" in report.forecast:
        lines.append(f"forecast: {report.forecast['note']}")
    return lines
