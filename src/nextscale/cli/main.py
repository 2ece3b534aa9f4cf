"""``nextscale``: the entry point, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from nextscale import __version__
from nextscale.cli import (
    bench,
    calibrate,
    convert,
    data,
    edit,
    evaluate,
    generate,
    limits,
    models,
    reconstruct,
    scaling,
    tokenize,
    train,
)
from nextscale.errors import NextscaleError

USAGE_EXIT, INTERRUPTED_EXIT = 2, 130

app = typer.Typer(name="nextscale", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nextscale {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Visual autoregressive generation: draw, edit and train pictures step by step, coarse to fine.

    \b
    Example: nextscale generate "red apple, flat style" --out out/sample.png
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("generate")(generate.generate)
app.command("edit")(edit.edit)
app.command("reconstruct")(reconstruct.reconstruct)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("scaling")(scaling.scaling)
app.command("calibrate")(calibrate.calibrate)
app.command("limits")(limits.limits)
app.command("tokenize")(tokenize.tokenize)
app.add_typer(train.app, name="train")
app.add_typer(data.app, name="data")
app.command("models")(models.list_models)
app.command("hooks")(models.list_hooks)
app.command("systems")(models.list_systems)
app.command("convert")(convert.convert)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    try:
        code = app(None if arguments is None else list(arguments), prog_name="nextscale", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except NextscaleError as error:
        # Of several processes the one that met the error tells it.
        return USAGE_EXIT if type(error).__name__ == "ElsewhereError" else _fail(str(error))
    except typer.Abort:
        return INTERRUPTED_EXIT
    except Exception as error:
        # Typer carries its own copy of click in new versions, and uses the package in old ones: go by the method.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "nextscale"
            return _fail(f"{error.format_message().rstrip('.')}; `{command} --help` shows what is known")
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _fail("out of memory; lower --batch-size or --count, or choose another --device")
        raise


def _fail(message: str) -> int:
    typer.echo(f"nextscale: {' '.join(message.split())}", err=True)
    return USAGE_EXIT


def main() -> None:
    """The console script."""
    code = run()
    if "RANK" in os.environ:
        from nextscale import parallel  # loads torch, which a command outside a job may do without

        parallel.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
