"""``nextscale convert``: published weights to a folder of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextscale.cli import options
from nextscale.errors import DataError, InputError, WeightsError, did_you_mean


def convert(
    model: Annotated[str, typer.Argument(help="A published size, such as var-d16; `nextscale models` lists them.")],
    weights: Annotated[
        str, typer.Option("--weights", help="Published transformer: a file, a folder of shards, or owner/name/file.")
    ],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Published tokenizer: a file, or owner/name/file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
    control: Annotated[
        str | None, typer.Option("--control", help="Published control of a car size: a file, or owner/name/file.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option("--drafter", help="Published drafter of a code pair: a file, or owner/name/file.")
    ] = None,
    dtype: options.FileFormatOption = options.FileFormat.fp32,
) -> None:
    """Turn published .pth files into a folder of safetensors that --model and nextscale.load read.

    \b
    Examples:
      nextscale convert var-d16 --tokenizer vae_ch160v4096z32.pth --weights var_d16.pth --out var-d16/
      nextscale generate --model var-d16/ --label 207 --out out/retriever.png
    """
    import torch

    from nextscale import hub
    from nextscale.data.pictures_out import check_writable, writing_folder
    from nextscale.registry import models
    from nextscale.systems import folders

    published = [name for name in models() if options.needs_weights(name)]
    if model not in published:
        hint = did_you_mean(model, published)
        raise InputError(f"{model!r} is not a published size{hint}; there are {', '.join(published)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and not an empty folder; choose another")
    check_writable(out, folder=True)
    # Damaged files are told before a large model is built.
    given = {"tokenizer": tokenizer, "generator": weights, "control": control, "drafter": drafter}
    files = {part: where for part, where in given.items() if where is not None}
    tensors = {part: hub.read_tensors(where) for part, where in files.items()}
    system = folders.open_model(model, filled=True)
    for part, names in zip(folders.files_of(system), system.published_names(), strict=True):
        if names and part not in tensors:
            raise WeightsError(f"{model} has published weights of its {part}, too; give --{part}")
    for part, found in tensors.items():
        try:
            folders.load_published(system, **{part: found})
        except WeightsError as error:
            raise WeightsError(f"{files[part]}, read as {model}'s {part}: {error}") from None
    with writing_folder(out) as temporary:
        folders.save(system, temporary, torch.float32 if dtype is options.FileFormat.fp32 else torch.bfloat16)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    typer.echo(f"{out}: {model} in {dtype.value}, {size:,.0f} MB")

