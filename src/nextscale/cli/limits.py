"""``nextscale limits``: where a model's attention could be computed in almost quadratic time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nextscale.cli import options, prompted
from nextscale.registry import DEFAULT_MODEL


def limits(
    model: options.Model = DEFAULT_MODEL,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Pictures to measure logits on: a folder, a parquet file, or emoji.",
                     show_default="the bounds that the weights give"),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which of them.", show_default="concept-test, or validation")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many pictures.")] = 32,
    caption_field: options.CaptionField = None,
    error: Annotated[float, typer.Option("--error", help="Of an attention weight, relative.")] = 0.01,
    directions: Annotated[
        int | None, typer.Option("--directions", min=1, help="Project queries and keys to so many first; needs --data.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Also write every head and step to this file.")] = None,
    device: options.Device = "auto",
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
) -> None:
    """Tell where a model's logits are small enough for low-rank attention (arXiv 2501.04377).

    For every layer and head: the weights' bound, the largest logit at every step, the polynomial's degree and features.
    Pictures of --data come with their classes, or their captions where text steers.

    \b
    Examples:
      nextscale limits --model emoji-text-64
      nextscale limits --model emoji-text-64 --data emoji --count 64 --error 0.001 --json out/limits.json
    """
    from dataclasses import asdict

    import torch

    from nextscale import hub
    from nextscale.acceleration.var_limits import limits as measure
    from nextscale.acceleration.var_limits import table
    from nextscale.cli.evaluate import open_pictures
    from nextscale.data.pictures_out import check_writable
    from nextscale.evaluation.sets import match_labels

    if out is not None:
        check_writable(out)
    system = options.open_model(model, options.Precision.fp32, device, weights, tokenizer_weights)
    pictures: Any = None
    labels: Any = None
    if data is not None:
        dataset, _ = open_pictures(data, split, None, None, system.tokenizer.picture_size, caption_field)
        assert dataset is not None
        places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
        pictures = torch.from_numpy(dataset.read(places.numpy())[0][:, :3].copy()).float() / 127.5 - 1
        if prompted.takes_prompts(system):
            labels = [dataset.caption(place) for place in places.tolist()]
        else:
            known = match_labels(dataset.class_names, system.config.class_names, system.config.classes)
            labels = [None] * len(pictures) if known is None else [
                tuple(row) for row in known.rows(dataset.labels[places]).tolist()]
    found = measure(system, pictures, labels, error, directions)
    typer.echo(table(found, system.plan))
    if out is not None:
        hub.save_json({"model": model, "error": error, "heads": [asdict(one) for one in found]}, out)
        typer.echo(f"{out}: {len(found)} heads and steps")
