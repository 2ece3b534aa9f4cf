"""``nextscale train``: a tokenizer, then a generator on its codes; fine-tuning of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import DataError, InputError

if TYPE_CHECKING:
    from nextscale.training.trainer import TrainResult

app = typer.Typer(
    help="Train a tokenizer, then a generator on its codes; or fine-tune a trained model.", rich_markup_mode=None
)

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
    recipe: Recipe = "own-64-tokenizer",
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

    _train(train_tokenizer, read_recipe(recipe), _changes(data, set_, {}), out, resume, out / "tokenizer")


@app.command("generator")
def generator(
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="A recipe of the package, or your own .toml or .yaml file.",
            show_default="own-64-SYSTEM where there is one, else own-64-generator",
        ),
    ] = None,
    data: Data = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="Which: var, car, ... (`nextscale systems`).", show_default="the recipe's"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Folder of a trained tokenizer, or of a model.", show_default="the recipe's"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Folder that tokenize wrote; pictures are not needed then.", show_default=False),
    ] = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Train a system on a tokenizer's codes; OUT/model/ is a model for generate, edit and load.

    \b
    Example:
      nextscale train generator --data photos/ --tokenizer runs/tokenizer/tokenizer --out runs/generator
      nextscale train generator --tokens runs/tokens --tokenizer runs/tokenizer/tokenizer --out runs/generator
      nextscale generate --model runs/generator/model --out out/mine.png
    """
    from nextscale.training.generator_recipe import train_generator
    from nextscale.training.recipes import read_recipe, recipe_of

    changes = _changes(data, set_, {"system": system, "tokenizer": tokenizer, "tokens": tokens})
    _train(train_generator, read_recipe(recipe or recipe_of(system)), changes, out, resume, out / "model")


@app.command("finetune")
def finetune(
    model: options.Model,
    out: Out,
    recipe: Recipe = "finetune-lora",
    data: Data = None,
    lora_rank: Annotated[
        int | None,
        typer.Option("--lora-rank", help="Rank of the adapters; 0 trains all weights.", show_default="the recipe's"),
    ] = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    control_weights: options.ControlWeights = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Fine-tune a trained model on your own pictures; OUT/model/ is the result, OUT/adapters/ what was learned.

    \b
    Examples:
      nextscale train finetune --model runs/generator/model --data photos/ --out runs/mine
      nextscale train finetune --model var-d16/ --data photos/ --lora-rank 32 --out runs/mine
      nextscale train finetune --model var-d16/ --data photos/ --recipe finetune-full --out runs/mine
    """
    from nextscale.training.finetune_recipe import train_finetune
    from nextscale.training.recipes import read_recipe

    changes = _changes(data, set_, {
        "model": model, "weights": weights, "tokenizer_weights": tokenizer_weights,
        "control_weights": control_weights, "lora.rank": lora_rank})
    _train(train_finetune, read_recipe(recipe), changes, out, resume, out / "model")


@app.command("retarget")
def retarget(
    model: options.Model,
    out: Out,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="The new text encoder: words, minilm, t5:PLACE, ...",
                     show_default="the recipe's"),
    ] = None,
    recipe: Recipe = "retarget",
    data: Data = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Make a trained text-to-picture model read another text encoder, by distillation; OUT/model/ is the result.

    \b
    Example:
      nextscale train retarget --model infinity-2b/ --encoder t5:google/flan-t5-base --data photos/ --out runs/base
      nextscale generate "a lighthouse at dawn" --model runs/base/model --out out/lighthouse.png
    """
    from nextscale.training.recipes import read_recipe
    from nextscale.training.retarget_recipe import train_retarget

    changes = _changes(data, set_, {
        "model": model, "weights": weights, "tokenizer_weights": tokenizer_weights, "text.encoder": encoder})
    _train(train_retarget, read_recipe(recipe), changes, out, resume, out / "model")


@app.command("distill")
def distill(
    out: Out,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="The trained model: folder or name.", show_default="the recipe's"),
    ] = None,
    grids: Annotated[
        str | None,
        typer.Option("--grids", help="The scales to keep, as in 1,3,4,8; the last is the teacher's.",
                     show_default="the recipe's"),
    ] = None,
    recipe: Recipe = "distill",
    data: Data = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="OUT/tokens of an earlier run to these grids, in place of pictures.",
                     show_default=False),
    ] = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    resume: Resume = False,
    set_: Overrides = None,
) -> None:
    """Distil a trained SRDD or HMAR into fewer scales; OUT/model/ is the result, and may be the next run's teacher.

    \b
    Example:
      nextscale train distill --teacher runs/srdd/model --grids 1,3,4,8 --data photos/ --out runs/short
      nextscale generate --model runs/short/model --out out/short.png
    """
    from nextscale.training.distill_recipe import train_distill
    from nextscale.training.recipes import read_recipe

    changes = _changes(data, set_, {
        "teacher": teacher, "grids": grids, "tokens": tokens, "weights": weights,
        "tokenizer_weights": tokenizer_weights})
    _train(train_distill, read_recipe(recipe), changes, out, resume, out / "model")


@app.command("targets")
def targets(model: options.Model) -> None:
    """List the layers of a model that adapters can go to, by the names that lora.targets takes; * marks the default.

    \b
    Example: nextscale train targets --model var-d16
    """
    from nextscale.training.finetune_recipe import model_targets

    rows = model_targets(model)
    width = max(len(name) for name, *_ in rows)
    for name, count, shape, default in rows:
        typer.echo(f"{'*' if default else ' '} {name:{width}s}  {count:3d} x  {shape}")


@app.command("merge")
def merge(
    model: options.Model,
    adapters: Annotated[Path, typer.Option("--adapters", help="The folder that finetune wrote as OUT/adapters.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    control_weights: options.ControlWeights = None,
    dtype: options.FileFormatOption = options.FileFormat.bf16,
) -> None:
    """Write adapters into the model that they were trained on, as a model for generate, edit and load.

    \b
    Example: nextscale train merge --model var-d16/ --adapters runs/mine/adapters --out runs/merged
    """
    from nextscale.training.finetune_recipe import merge_adapters

    _check_new(out)
    merge_adapters(model, adapters, out, dtype.value, weights, tokenizer_weights, control_weights)
    typer.echo(f"{out}: done")


@app.command("pair")
def pair(
    drafter: Annotated[str, typer.Option("--drafter", help="The model that draws the first scales: folder or name.")],
    refiner: Annotated[str, typer.Option("--refiner", help="The model that draws the others: folder or name.")],
    draft_steps: Annotated[int, typer.Option("--draft-steps", help="How many scales are drafted.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
    dtype: options.FileFormatOption = options.FileFormat.bf16,
) -> None:
    """Write two trained VARs as one model that draws by both (CoDe), without training.

    \b
    Example: nextscale train pair --drafter var-d24/ --refiner var-d16/ --draft-steps 8 --out pair/
    """
    import torch

    from nextscale.data.pictures_out import writing_folder
    from nextscale.systems import folders
    from nextscale.systems.code_decoding import pair as paired

    _check_new(out)
    system = paired(options.open_model(drafter), options.open_model(refiner), draft_steps)
    with writing_folder(out) as temporary:
        folders.save(system, temporary, torch.float32 if dtype is options.FileFormat.fp32 else torch.bfloat16)
    typer.echo(f"{out}: done")


@app.command("assemble")
def assemble(
    model: Annotated[Path, typer.Option("--model", help="Folder of a trained model.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of a tokenizer that makes the same codes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new or empty.")],
) -> None:
    """Write a model with another tokenizer of the same codes, one whose decoder was trained on with codes_of.

    \b
    Example: nextscale train assemble --model runs/generator/model --tokenizer runs/decoder/tokenizer --out runs/both
    """
    from nextscale.training.tokenizer_recipe import replace_tokenizer

    _check_new(out)
    replace_tokenizer(model, tokenizer, out)
    typer.echo(f"{out}: done")


def _check_new(out: Path) -> None:
    from nextscale.data.pictures_out import check_writable

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is there already and not an empty folder; choose another")
    check_writable(out, folder=True)


def _train(
    run: Callable[[Mapping[str, Any], Path, bool], TrainResult],
    recipe: dict[str, Any],
    changes: Mapping[str, Any],
    out: Path,
    resume: bool,
    result: Path,
) -> None:
    from nextscale.data.pictures_out import check_writable
    from nextscale.parallel import processes

    check_writable(out, folder=True)
    for key, value in changes.items():
        override(recipe, key, value)
    with processes():
        stopped = run(recipe, out, resume).stopped == "signal"
        typer.echo(f"{result}: as far as it came; --resume goes on" if stopped else f"{result}: done")


def _changes(data: str | None, given: list[str] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """What a command line changes in a recipe: its KEY=VALUEs, and above them the options named by the key that they
    set, None where one is not given."""
    changes = dict(read_override(text) for text in given or [])
    return changes | {key: value for key, value in {"data.spec": data, **named}.items() if value is not None}


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
        raise InputError(f"{text!r} is not of the form key=value, as in train.steps=2000")
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
