"""``nextscale data``: build, look at and ask about pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nextscale.errors import InputError

if TYPE_CHECKING:
    from nextscale.data.crops import Crop

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
    spec: Annotated[
        str,
        typer.Argument(help="emoji; a folder of images, parquet files or tar shards; one such file; or hf:owner/name."),
    ],
    size: Annotated[int, typer.Option("--size", min=1, help="Side in pixels to which pictures are fitted.")] = 64,
    split: Annotated[str, typer.Option("--split", help="train, validation, all, or one that the set names.")] = "all",
    crop: Annotated[
        str, typer.Option("--crop", help="How pictures are cut: center, pad, adm, random or random-resized.")
    ] = "center",
    largest_ratio: Annotated[
        float, typer.Option("--largest-ratio", min=1, help="Of aspect-ratio buckets, longer to shorter side.")
    ] = 1.0,
    bucket_multiple: Annotated[
        int, typer.Option("--bucket-multiple", min=1, help="Sides of buckets are multiples of it, in pixels.")
    ] = 32,
    captions: Annotated[bool, typer.Option("--captions", help="Show some; fail where pictures have none.")] = False,
    caption_field: Annotated[
        str | None,
        typer.Option("--caption-field", help="Column or field of the captions.", show_default="text, caption, prompt"),
    ] = None,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="PNG to write, a picture of every class.")] = None,
) -> None:
    """Say what a data set holds: pictures, classes, captions, and which files cannot be read.

    \b
    Examples:
      nextscale data show emoji --split concept-test --sheet out/emoji.png
      nextscale data show photos/ --size 256 --largest-ratio 2
      nextscale data show "shards/train-{000..011}.tar" --captions
    """
    from nextscale.data import aspect_buckets, open_dataset, pictures_out
    from nextscale.data.datasets import terminal_report
    from nextscale.data.sheets import board

    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise InputError(f"{sheet}: the sheet is a PNG; end in .png")
        if largest_ratio > 1:
            raise InputError("a sheet's pictures have one size; leave --largest-ratio or --sheet out")
        pictures_out.check_writable(sheet)
    buckets = aspect_buckets(size, largest_ratio, bucket_multiple) if largest_ratio > 1 else None
    dataset = open_dataset(
        spec, size, split, report=terminal_report, crop=cast("Crop", crop), buckets=buckets, captions=captions,
        caption_field=caption_field,
    )  # fmt: skip
    typer.echo(dataset.summary())
    if dataset.left_right_matters:
        typer.echo("  left and right matter: nothing is mirrored")
    for names, counts in zip(dataset.class_names, dataset.label_counts, strict=True):
        width = max(len(name) for name in names)
        for name, number in zip(names, counts, strict=True):
            typer.echo(f"  {name:{width}s} {number:7,}")
    if dataset.empty_classes:
        typer.echo(f"without pictures: {len(dataset.empty_classes):,} classes, such as {dataset.empty_classes[0]!r}")
    for name, number in dataset.bucket_counts().items():
        typer.echo(f"  bucket {name:9s} {number:7,}")
    for place in range(0, len(dataset), max(1, len(dataset) // 3)) if captions else ():
        typer.echo(f"  {' | '.join(dataset.captions(place))}")
    for title, reason in dataset.skipped:
        typer.echo(f"skipped {title}: {reason}")
    if sheet is not None:
        chosen = _one_of_each(dataset.labels[:, 0].tolist() if dataset.class_names else list(range(len(dataset))))
        pixels = dataset.read(chosen)[0][:, :3].transpose(0, 2, 3, 1)
        about = {"data": Path(spec).name, "split": split, "size": size, "crop": crop}
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
