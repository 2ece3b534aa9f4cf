"""``nextscale reconstruct``: what a tokenizer keeps of pictures, scale by scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import DataError, InputError
from nextscale.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def reconstruct(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("out/reconstruction.png"),
    model: options.Model = DEFAULT_MODEL,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many pictures.")] = 16,
    resize: options.Resize = False,
    precision: options.PrecisionOption = options.Precision.fp32,
    device: options.Device = "auto",
    threads: options.Threads = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
) -> None:
    """Send pictures through the tokenizer: a sheet of the original and of every scale's preview, a row a picture.

    The last column is the full reconstruction; its PSNR against the original is printed.

    \b
    Examples:
      nextscale reconstruct cat.png dog.png --out out/both.png
      nextscale reconstruct photos/ --resize --limit 8 --out out/photos.png
    """
    import torch

    from nextscale.data import pictures_out
    from nextscale.data.images import to_tensor
    from nextscale.data.sheets import board
    from nextscale.objectives.reconstruction import psnr
    from nextscale.sampling.generation import Progress, convert

    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: reconstruct writes a PNG; end in .png")
    pictures_out.check_writable(out)
    read = _read(pictures, limit)
    system = options.open_model(model, precision, device, weights, tokenizer_weights)
    size = system.tokenizer.picture_size
    fitted = [(name, options.fit_picture(image, name, size, resize)) for name, image in read]
    rows, values = [], []
    with Progress(len(fitted), "reconstructing", None) as bar:
        for name, image in fitted:
            original = to_tensor(image)[None]
            rows.append(torch.cat([original, *_previews(system, original)]))
            values.append(float(psnr(original, rows[-1][-1:])))
            typer.echo(f"{name}: {values[-1]:.2f} dB")
            bar.advance()
    if len(values) > 1:
        typer.echo(f"mean of {len(values)}: {sum(values) / len(values):.2f} dB")
    about = options.provenance(model, {"pictures": [Path(name).name for name, _ in fitted], "psnr_db": values}, [], [])
    pixels = convert(torch.cat(rows), "numpy")
    pictures_out.write_png(board(pixels, len(system.plan) + 1), out, about)
    typer.echo(f"{out}: original, then scale after scale")


def _previews(system: Any, original_1CHW: Tensor) -> list[Tensor]:
    from nextscale.layers.resize import resize

    tokens = system.encode(original_1CHW)
    previews = [system.decode(tokens[: k + 1]).cpu() for k in range(len(tokens))]
    height, width = previews[-1].shape[-2:]
    # Drafts that have a size of their own are shown as large as the last.
    return [resize(preview, (height, width), "nearest") for preview in previews]


def _read(places: list[Path], limit: int) -> list[tuple[str, Image.Image]]:
    """Pictures by name: files as they are asked for; of folders those that can be read, the rest counted and named."""
    from nextscale.data.images import open_image
    from nextscale.data.sources import FolderSource

    found: list[tuple[str, Image.Image]] = []
    skipped: list[str] = []
    for place in places:
        if not place.is_dir():
            found.append((str(place), open_image(place)))
            continue
        source = FolderSource(place)
        for position in range(len(source)):
            if len(found) >= limit:
                break
            try:
                found.append((source.title(position), source.read(position)[0]))
            except InputError as error:
                skipped.append(str(error))
    for reason in skipped:
        typer.echo(f"skipped: {reason}", err=True)
    if not found:
        raise DataError(f"no readable picture in {', '.join(map(str, places))} ({len(skipped)} skipped)")
    return found[:limit]
