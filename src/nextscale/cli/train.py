"""``nextscale train``: a tokenizer, then a generator on its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.errors import InputError

if TYPE_CHECKING:
    from nextscale.training.trainer import TrainResult

app = typer.Typer(help="Train a tokenizer, then a generator on its codes.", rich_markup_mode=None)

Recipe = Annotated[str, typer.Option("--recipe", help="A recipe of the package, or your own .toml or .yaml file.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="A folder of images (subfolders are classes), a parquet file, or emoji.",
        show_default="the recipe's",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for checkpoints, logs, samples and the result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of the recipe, as in train.steps=2000. May be repeated."),
]


@app.command("tokenizer")
def tokenizer(
    out: Out,
    recipe: Recipe = "emoji-64-tokenizer",
    data: Data = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Train a multi-scale tokenizer on pictures; OUT/tokenizer/ is what the generator's training needs.

    \b
    Examples:
      nextscale train tokenizer --data photos/ --out runs/tokenizer
      nextscale train tokenizer --data photos/ --out runs/tokenizer --resume
      nextscale train tokenizer --recipe mine.toml --set train.steps=2000 --out runs/short
    """
    from nextscale.training.recipes import read_recipe
    from nextscale.training.tokenizer_recipe import train_tokenizer

    _train(train_tokenizer, read_recipe(recipe), _changes(data, set_), out, resume, out / "tokenizer")


@app.command("generator")
def generator(
    out: Out,
    recipe: Recipe = "emoji-64-generator",
    data: Data = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Folder of a trained tokenizer, or of a model.", show_default="the recipe's"),
    ] = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Train a class-conditional VAR on a tokenizer's codes; OUT/model/ is a model for generate, edit and load.

    \b
    Example:
      nextscale train generator --data photos/ --tokenizer runs/tokenizer/tokenizer --out runs/generator
      nextscale generate --model runs/generator/model --out out/mine.png
    """
    from nextscale.training.generator_recipe import train_generator
    from nextscale.training.recipes import read_recipe

    changes = _changes(data, set_)
    if tokenizer is not None:
        changes["tokenizer"] = tokenizer
    _train(train_generator, read_recipe(recipe), changes, out, resume, out / "model")


def _train(
    run: Callable[[Mapping[str, Any], Path, bool], TrainResult],
    recipe: dict[str, Any],
    changes: Mapping[str, Any],
    out: Path,
    resume: bool,
    result: Path,
) -> None:
    from nextscale.data.pictures_out import check_writable

    check_writable(out, folder=True)
    for key, value in changes.items():
        override(recipe, key, value)
    run(recipe, out, resume)
    typer.echo(f"{result}: done")


def _changes(data: str | None, given: list[str] | None) -> dict[str, Any]:
    changes = dict(read_override(text) for text in given or [])
    if data is not None:
        changes["data.spec"] = data
    return changes


def read_override(text: str) -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is read as TOML where it is that, else as text.

    Raises:
        InputError: not of that form.
    """
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"--set {text!r} is not of the form key=value, as in train.steps=2000")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def override(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Change one value of nested tables, in place, by a key with dots.

    Raises:
        InputError: a part of the key names a value and not a table.
    """
    *tables, last = key.split(".")
    place = recipe
    for table in tables:
        inner = place.setdefault(table, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {key}: {table!r} is a value in the recipe, not a table")
        place = inner
    place[last] = value
