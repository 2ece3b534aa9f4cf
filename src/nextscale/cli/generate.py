"""``nextscale generate``: draw pictures."""

from __future__ import annotations

import math
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import controls, options, prompted
from nextscale.errors import InputError
from nextscale.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np

    from nextscale.run import Run
    from nextscale.sampling.generation import Generation

#: What a sheet without --label shows, where the model knows these classes: one column each, one row a style.
SHOWN_CLASSES = (
    "face-smiling",
    "heart-emotion",
    "animal-mammal",
    "animal-bird",
    "plant",
    "food-fruit-vegetable",
    "drink-dishware",
    "place-building",
    "transport-ground",
    "clothing",
    "sport",
    "flag",
)
RANDOM_PICTURES = 16


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to draw, of a model that text steers: one or several prompts.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="x.png: a sheet; a folder: single PNGs and a sheet; x.gif, x.webp: animation; x.npz: for FID."
        ),
    ] = Path("out/sample.png"),
    model: options.Model = DEFAULT_MODEL,
    label: options.Labels = None,
    prompts: options.Prompts = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="A prompt for what pictures are led away from.")
    ] = None,
    ratio: options.Ratio = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Height x width in pixels, as in 256x384, where the system can.",
                     show_default="the model's"),
    ] = None,
    benchmark: Annotated[
        prompted.Benchmark | None,
        typer.Option("--benchmark", help="Put pictures where this benchmark's evaluator looks; --prompts is its own "
                     "file or folder.", show_default=False),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="Pictures of each label or prompt.", show_default="1, or one a seed"),
    ] = None,
    columns: Annotated[
        int | None, typer.Option("--columns", min=1, help="Columns of the sheet.", show_default="by itself")
    ] = None,
    seed: options.Seed = 0,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="One seed a picture, with commas between, instead of --seed.")
    ] = None,
    guidance_scale: options.GuidanceScale = None,
    guidance_schedule: options.Schedule = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = None,
    set_: options.OwnSettings = None,
    hook: options.Hooks = None,
    purpose: options.PurposeOption = options.Purpose.pictures,
    precision: options.PrecisionOption = options.Precision.fp32,
    device: options.Device = "auto",
    threads: options.Threads = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures drawn at once.")] = 16,
    memory_limit: options.MemoryLimit = None,
    compile_: options.Compile = False,
    graphs: options.Graphs = False,
    schedule: options.Grids = None,
    control: options.Controls = None,
    control_kind: options.ControlKinds = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    control_weights: options.ControlWeights = None,
    drafter_weights: options.DrafterWeights = None,
) -> None:
    """Draw pictures, coarse to fine.

    A model draws classes (--label) or prompts. Without --label: a sheet of many classes in every style where the model
    has these, else classes drawn by the seed. Settings, seeds and labels go into the file; `nextscale data settings
    FILE` prints them.

    \b
    Examples:
      nextscale generate "red apple, flat style" "a grinning face" --count 8 --out out/two.png
      nextscale generate "flag of France" --count 4 --seed 7 --out out/flags.gif
      nextscale generate "a red apple" "a sleeping cat" --ratio 4:3 --out out/two.png
      nextscale generate --benchmark geneval --prompts metadata.jsonl --out out/geneval
      nextscale generate --model runs/emoji-64 --label animal-mammal/noto --label plant --out out/classes.png
      nextscale generate --model runs/car/model --control photo.png --control-kind canny --label 3 --out out/one.png
    """
    from nextscale.data import pictures_out
    from nextscale.data.sheets import board, enlarged
    from nextscale.plan import parse_grids

    kind = pictures_out.out_kind(out)
    pictures_out.check_writable(out, folder=kind == "folder")
    limit = options.read_size(memory_limit, "--memory-limit")
    given_seeds = None if seeds is None else options.read_numbers(seeds, "--seeds")
    given_maps = controls.read(control, control_kind, model, control_weights)
    if sum(given is not None for given in (ratio, size, schedule)) > 1:
        raise InputError("--ratio, --size and --schedule each say which scales; give one")
    if benchmark is not None:
        if prompt or seeds or kind != "folder":
            raise InputError("--benchmark: its pictures go into a folder, each with a prompt of --prompts and a seed "
                             "of its own; leave other prompts and --seeds out, and give --out a name without ending")
        layout, of_benchmark = prompted.read_benchmark(benchmark, prompts, out, model, count)
    system = options.open_model(model, precision, device, weights, tokenizer_weights, control_weights, drafter_weights)
    hooks = options.make_hooks(hook)
    steered = controls.maps(given_maps, system)
    grids = None if schedule is None else parse_grids(schedule)
    if size is not None:
        grids = system.schedule_for(options.read_pixels(size, "--size"))
    steers = prompted.check(system, model, label, bool(prompt or prompts or negative or ratio))

    same: dict[str, Any] = {
        "purpose": purpose.value,
        "batch_size": batch_size,
        "memory_limit": limit,
        **steered,
        **options.sampling_changes(guidance_scale, guidance_schedule, temperature, top_k, top_p, smooth),
        **options.own_settings(set_, system, purpose.value),
    }
    if graphs:
        options.check_graphs(system)
    cold = compile_ or graphs

    def draw(group: prompted.Asked, **more: Any) -> Generation:
        nonlocal hooks, cold
        scales = group.schedule or grids
        if cold:
            hooks = system.warm_up(group.labels[:batch_size], compile=compile_, capture=graphs, hooks=hooks,
                                   seeds=group.seeds[:batch_size], schedule=scales, **same)
            cold = False
        found: Generation = system.generate(
            group.labels, seeds=group.seeds, output="numpy", schedule=scales, hooks=hooks, **more, **same
        )
        return found

    if benchmark is not None:
        drawn_for = prompted.draw_benchmark(layout, of_benchmark, system, negative, ratio, seed, draw)
        typer.echo(f"{out}: pictures of {drawn_for} prompts, {len(of_benchmark) - drawn_for} were there")
        return
    if steers:
        asked = prompted.read(system, prompt or [], prompts, negative, ratio, count, seed, given_seeds)
        wide = _square(len(asked[0])) if (count or 1) == 1 else count or 1
    else:
        labels, wide = choose_labels(system, label or [], count, given_seeds, seed)
        asked = [prompted.Asked(labels, given_seeds or [seed + i for i in range(len(labels))])]
    if len(asked) > 1 and kind != "folder":
        raise InputError(f"{out}: pictures of {len(asked)} aspect ratios don't fit one sheet; name a folder")
    frames: dict[int, list[np.ndarray]] = {}

    def keep_preview(step: int, run: Run) -> None:
        from nextscale.sampling.generation import convert

        frames.setdefault(step, []).append(convert(system.tokenizer.decode(run.canvas), "numpy"))

    def about(drawn: Generation, labels: list[Any], seeds: list[int], negatives: list[str]) -> dict[str, Any]:
        settings = {"purpose": purpose.value, "precision": precision.value, **asdict(drawn.settings)}
        settings |= controls.told(given_maps)
        if hook:
            settings |= {"hooks": hook}
        if any(negatives):
            settings |= {"negatives": negatives}
        return options.provenance(model, settings, labels, seeds)

    def put_away(batch: Generation) -> None:
        each = [about(batch, [name], [drawn_by], [next(away, "")])
                for name, drawn_by in zip(batch.labels, batch.seeds, strict=True)]
        folder.add(batch.images, [_title(name) for name in batch.labels], each)

    opened: AbstractContextManager[Any] = pictures_out.folder_of(out) if kind == "folder" else nullcontext()
    with opened as folder:
        seconds = 0.0
        for group in asked:
            away = iter(group.negatives)
            drawn = draw(
                group,
                on_batch=put_away if kind == "folder" else None,
                callback=keep_preview if kind == "animation" else None,
            )
            seconds += drawn.seconds
        whole = about(drawn, drawn.labels, drawn.seeds, group.negatives)
        wide = min(columns or wide, len(drawn.seeds))
        if kind == "sheet":
            pictures_out.write_png(board(drawn.images, wide), out, whole)
        elif kind == "npz":
            pictures_out.write_npz(drawn.images, out, whole)
        elif kind == "animation":
            import numpy as np

            previews = [enlarged(np.concatenate(parts), drawn.images.shape[1:3]) for parts in frames.values()]
            pictures_out.write_animation(previews, out, wide, whole)
        elif len(asked) == 1:
            folder.sheet(drawn.images, wide, whole)
    typer.echo(f"{out}: {sum(map(len, asked))} pictures in {seconds:.1f} s")


def choose_labels(
    system: Any, given: list[str], count: int | None, seeds: list[int] | None, seed: int
) -> tuple[list[Any], int]:
    """A label for every picture, and how many columns suit them.

    Raises:
        InputError: unknown labels, or seeds that the labels do not divide.
    """
    if given:
        labels = [options.read_label(text, system) for text in given]
        if count is None and seeds is not None:
            if len(seeds) % len(labels):
                raise InputError(f"--seeds: {len(seeds)} seeds do not go evenly into {len(labels)} labels")
            count = len(seeds) // len(labels)
        each = count or 1
        repeated = [one for one in labels for _ in range(each)]
        return repeated, each if len(labels) > 1 and each > 1 else _square(len(repeated))
    if count is None and seeds is None:
        shown = _show(system)
        if shown:
            return shown
    number = count or (len(seeds) if seeds is not None else RANDOM_PICTURES)
    draw = random.Random(seed)
    return [tuple(draw.randrange(size) for size in system.config.classes) for _ in range(number)], _square(number)


def _show(system: Any) -> tuple[list[Any], int] | None:
    names = system.config.class_names
    shown = [name for name in SHOWN_CLASSES if names and name in names[0]]
    if len(names) != 2 or not shown:
        return None
    return [(name, style) for style in names[1] for name in shown], len(shown)


def _square(number: int) -> int:
    return min(math.ceil(math.sqrt(number)), 16)


def _title(label: Any) -> str:
    parts = label if isinstance(label, tuple) else (label,)
    return "-".join(str(part) for part in parts if part is not None)
