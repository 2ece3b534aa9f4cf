"""``nextscale tokenize``: pictures to cached tokens, which a generator trains on without the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import DataError, InputError

if TYPE_CHECKING:
    from nextscale.data import PictureDataset


class Crop(str, Enum):
    """How pictures are cut."""

    middle = "center"
    pad = "pad"
    adm = "adm"
    random = "random"
    random_resized = "random-resized"


def tokenize(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tokens, one folder a split in it.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of a trained tokenizer, or of a model.")],
    data: Annotated[
        str, typer.Option("--data", help="A folder of images (subfolders are classes), a parquet file, or emoji.")
    ] = "emoji",
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            help="A split, may be repeated; the first is trained on, the others are held out.",
            show_default="train, and the set's held-out one",
        ),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Mirrored versions too, of the first split.")] = False,
    crop: Annotated[
        Crop, typer.Option("--crop", help="How pictures are cut to the tokenizer's size; random: the first split only.")
    ] = Crop.middle,
    crops: Annotated[int, typer.Option("--crops", min=1, help="Random crops of each picture.")] = 1,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", help="Control maps to keep with the tokens: canny, lines, ...; repeatable."),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Keep the pictures' captions with the tokens, class names without any.")
    ] = False,
    caption_field: options.CaptionField = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Keep what the encoder gave, for self-correction of bits.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="Make part i of n, counted from 0, as in 0/4.", show_default="torchrun's"),
    ] = None,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Pictures a file.")] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures encoded at a time.")] = 64,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Threads that decode pictures.")] = 2,
    device: options.Device = "auto",
    threads: options.Threads = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="Which the tokens are for, where that matters: himar, several shapes.", show_default="any"
        ),
    ] = None,
    largest_ratio: Annotated[
        float,
        typer.Option(
            "--largest-ratio", min=1, help="Shapes up to this ratio of sides, the first split only; needs --system."
        ),
    ] = 1.0,
    bucket_multiple: Annotated[
        int, typer.Option("--bucket-multiple", min=1, help="Sides of shapes are multiples of it; infinity has its own.")
    ] = 32,
) -> None:
    """Turn pictures into tokens once, for `nextscale train generator --tokens`. Killed, it goes on where it was.

    \b
    Examples:
      nextscale tokenize --data photos/ --tokenizer runs/tokenizer/tokenizer --flips --out runs/tokens
      nextscale tokenize --data photos/ --tokenizer runs/tokenizer/tokenizer --crop random --crops 8 --out runs/tokens
      nextscale tokenize --data photos/ --tokenizer runs/tokenizer/tokenizer --captions --out runs/tokens
      nextscale tokenize --data photos/ --tokenizer runs/tokenizer/tokenizer --shard 0/4 --out runs/tokens
      nextscale tokenize --data photos/ --tokenizer runs/bits/tokenizer --captions --latents --system infinity \
        --largest-ratio 2 --out runs/tokens
    """
    from nextscale.data.pictures_out import check_writable
    from nextscale.devices import choose_device
    from nextscale.systems import folders
    from nextscale.training import tokens
    from nextscale.training.token_progress import TokenProgress
    from nextscale.training.tokenizer_recipe import load_tokenizer

    if caption_field is not None and not captions:
        raise InputError("--caption-field says where captions are; ask for them with --captions")
    if largest_ratio > 1 and system is None:
        raise InputError("--largest-ratio: which schedule a shape has, the system says; name it with --system")
    check_writable(out, folder=True)
    rank, world = tokens.world_from_environment() if shard is None else read_shard(shard)
    coder, schedules = load_tokenizer(tokenizer), None
    if system is not None:
        coder = folders.system_type(system).fitted(coder)
        if largest_ratio > 1:
            schedules = folders.system_type(system).schedules(coder.config, largest_ratio, bucket_multiple)
    coder.to(choose_device(tokens.own_device(device)))

    def make(dataset: PictureDataset, crops: int, flips: bool) -> None:
        folder = out / dataset.split
        show = rank == 0 or shard is not None
        if show:
            typer.echo(dataset.summary())
        with TokenProgress(dataset.split, show) as report:
            complete = tokens.tokenize(
                coder, dataset, folder, crops, flips, shard_size, batch_size, workers, rank, world, report,
                control or (), captions, latents, schedules if dataset.buckets else None,
            )
        if complete:
            cache = tokens.TokenDataset(folder)
            typer.echo(cache.summary())
            for title, reason in cache.skipped[:20]:
                typer.echo(f"  skipped {title}: {reason}")
        else:
            typer.echo(f"{folder}: part {rank} of {world} is done; the tokens are complete when the others are")

    trained, *others = split or ["train"]
    dataset = open_pictures(data, coder.picture_size, trained, crop.value, caption_field, schedules)
    # Held-out figures must not hang on chance.
    fixed = "center" if crop in (Crop.random, Crop.random_resized) else crop.value
    held_out = [open_pictures(data, coder.picture_size, name, fixed, caption_field) for name in others]
    if split is None:
        held_out = open_held_out(dataset, data, coder.picture_size, fixed, caption_field)
    make(dataset, crops, flips)
    for pictures in held_out:
        make(pictures, 1, False)


def open_held_out(
    dataset: PictureDataset, data: str, size: tuple[int, int], crop: Any, caption_field: str | None = None
) -> list[PictureDataset]:
    """The split that a data set holds out from training; none where a small folder has nothing in it."""
    name = "concept-test" if "concept-test" in dataset.source.named_splits() else "validation"
    try:
        return [open_pictures(data, size, name, crop, caption_field)]
    except DataError as error:
        typer.echo(f"no held-out tokens: {error}")
        return []


def open_pictures(
    data: str, size: tuple[int, int], split: str, crop: Any, caption_field: str | None = None,
    buckets: Iterable[tuple[int, int]] | None = None,
) -> PictureDataset:
    """A split's pictures, decoded when they are read: of several processes, each decodes its own."""
    from nextscale.data import open_dataset

    return open_dataset(data, size, split, crop=crop, memory_bytes=0, buckets=buckets, caption_field=caption_field)


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of ``i/n``. Raises InputError for others."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise InputError(f"--shard is {text!r}; give part and number of parts, counted from 0, as in 0/4")
    return int(first), int(last)
