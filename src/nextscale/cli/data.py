"""``nextscale data``: build, look at and ask about pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from nextscale.errors import InputError

app = typer.Typer(help="Build the emoji set, look at a data set, read a picture's settings.", rich_markup_mode=None)


@app.command("build-emoji")
def build_emoji(
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")] = Path("out/emoji.parquet"),
    size: Annotated[int, typer.Option("--size", help="Side of the pictures in pixels, 8 to 1024.")] = 64,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Also the variants with skin tones.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Keep every pixel (three times the bytes).")] = False,
) -> None:
    """Build the emoji set: five styles, classes, masks and splits. Needs npm, and pip's nextscale[data].

    \b
    Example: nextscale data build-emoji --size 128 --skin-tones --out out/emoji-128.parquet
    """
    from nextscale.data.emoji_set import build_emoji_set
    from nextscale.data.pictures_out import check_writable

    check_writable(out)
    build_emoji_set(out, size=size, skin_tones=skin_tones, exact=exact)


@app.command("show")
def show(
    spec: Annotated[str, typer.Argument(help="emoji, a folder of images, or a parquet file.")],
    size: Annotated[int, typer.Option("--size", min=1, help="Side in pixels to which pictures are fitted.")] = 64,
    split: Annotated[str, typer.Option("--split", help="train, validation, all, or one that the set names.")] = "all",
    sheet: Annotated[Path | None, typer.Option("--sheet", help="PNG to write, a picture of every class.")] = None,
) -> None:
    """Say what a data set holds: pictures, classes, and which files cannot be read.

    \b
    Example: nextscale data show emoji --split concept-test --sheet out/emoji.png
    """
    from nextscale.data import open_dataset, pictures_out
    from nextscale.data.datasets import terminal_report
    from nextscale.data.sheets import board

    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise InputError(f"{sheet}: the sheet is a PNG; end in .png")
        pictures_out.check_writable(sheet)
    dataset = open_dataset(spec, size, split, report=terminal_report)
    typer.echo(dataset.summary())
    for names, counts in zip(dataset.class_names, dataset.label_counts, strict=True):
        width = max(len(name) for name in names)
        for name, number in zip(names, counts, strict=True):
            typer.echo(f"  {name:{width}s} {number:7,}")
    for title, reason in dataset.skipped:
        typer.echo(f"skipped {title}: {reason}")
    if sheet is not None:
        chosen = _one_of_each(dataset.labels[:, 0].tolist() if dataset.class_names else list(range(len(dataset))))
        pixels = dataset.read(chosen)[0][:, :3].transpose(0, 2, 3, 1)
        about = {"data": Path(spec).name, "split": split, "size": size}
        pictures_out.write_png(board(pixels, 10), sheet, about)
        typer.echo(f"{sheet}: {len(chosen)} pictures")


def _one_of_each(classes: list[int], most: int = 100) -> list[int]:
    """The first position of every class."""
    first: dict[int, int] = {}
    for position, name in enumerate(classes):
        first.setdefault(name, position)
    return [first[name] for name in sorted(first)][:most]


@app.command("settings")
def settings(file: Annotated[Path, typer.Argument(help="A .png, .gif, .webp or .npz that nextscale wrote.")]) -> None:
    """Print the settings, labels and seeds that a file was made with, as JSON.

    \b
    Example: nextscale data settings out/sample.png
    """
    from nextscale.data.pictures_out import read_settings

    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in read_settings(file).items()]
    typer.echo("{" + ",\n ".join(lines) + "}")
