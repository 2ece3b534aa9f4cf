"""``nextscale calibrate``: measure a model's attention on a few pictures and write what a speed-up wants to know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nextscale.cli import options, prompted
from nextscale.errors import InputError, did_you_mean
from nextscale.registry import DEFAULT_MODEL


def calibrate(
    method: Annotated[str, typer.Argument(help="What to calibrate: scalekv, hack, litevar, ...")],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to draw, of a model that text steers: one or several prompts.")
    ] = None,
    model: options.Model = DEFAULT_MODEL,
    label: options.Labels = None,
    prompts: options.Prompts = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Pictures drawn, of each label or prompt.")] = 10,
    seed: options.Seed = 0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Of the calibration, as in share=0.2. May be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures drawn at once.")] = 4,
    precision: options.PrecisionOption = options.Precision.fp32,
    device: options.Device = "auto",
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
) -> None:
    """Draw a few pictures, look at what attention does, and write what --hook reads.

    scalekv: budgets of rows for every layer and step; hack: which heads are contextual; litevar: windows for every
    layer and step, and layers that share. A file can be read, and edited.

    \b
    Examples:
      nextscale calibrate scalekv "a red apple" "a cat" --set share=0.2 --set window=4 --out out/budgets.json
      nextscale generate "a red apple" --hook "scalekv budgets=out/budgets.json" --out out/sample.png
      nextscale calibrate hack "a red apple" "a cat" --count 5 --out out/heads.json
      nextscale calibrate litevar --model runs/emoji-64 --set budget=0.3 --out out/windows.json
    """
    from dataclasses import asdict

    from nextscale import __version__, hub
    from nextscale.cli.generate import choose_labels
    from nextscale.cli.train import read_override
    from nextscale.configuration import build
    from nextscale.data.pictures_out import check_writable
    from nextscale.registry import CALIBRATIONS, import_target

    if method not in CALIBRATIONS:
        known = ", ".join(sorted(CALIBRATIONS))
        raise InputError(f"unknown calibration {method!r}{did_you_mean(method, CALIBRATIONS, f'; known are {known}')}")
    if out.suffix != ".json":
        raise InputError(f"{out}: a calibration is JSON; end in .json")
    check_writable(out)
    kind: Any = import_target(CALIBRATIONS[method])
    calibration = build(kind, dict(read_override(text) for text in set_ or []), f"calibrate {method}")
    system = options.open_model(model, precision, device, weights, tokenizer_weights)
    seeds = None
    if prompted.check(system, model, label, bool(prompt or prompts)):
        asked = prompted.read_one_shape(system, prompt or [], prompts, count, seed, "calibrate")
        labels, seeds = asked.labels, asked.seeds
    else:
        labels, _ = choose_labels(system, label or [], count, None, seed)
    found = calibration.run(system, labels, seed=seed, seeds=seeds, batch_size=batch_size, progress=None)
    about = {"method": method, "version": __version__, "model": Path(model).name, "pictures": len(labels), "seed": seed}
    hub.save_json({**about, "settings": asdict(calibration), **found}, out)
    typer.echo(f"{out}: {method} for {model}, from {len(labels)} pictures")
