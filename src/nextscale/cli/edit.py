"""``nextscale edit``: redraw a region of a picture, draw around it, or vary it from a scale on."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import controls, options, prompted
from nextscale.errors import InputError
from nextscale.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from PIL import Image


class Rule(str, Enum):
    tokens = "tokens"
    latent = "latent"


def edit(
    picture: Annotated[Path, typer.Option("--picture", help="The picture to edit.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw, of a model that text steers.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("out/edited.png"),
    mask: Annotated[
        Path | None, typer.Option("--mask", help="A picture of the same size; white is drawn anew.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", help="Pixels to draw anew: left,top,right,bottom (the last two not in).")
    ] = None,
    outpaint: Annotated[
        float | None,
        typer.Option("--outpaint", help="Shrink the picture to about this share of the side; draw the border around."),
    ] = None,
    keep_scales: Annotated[
        int | None,
        typer.Option("--keep-scales", min=1, help="Keep so many of the picture's coarsest scales, draw the others."),
    ] = None,
    label: options.Labels = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="A prompt for what the picture is led away from.")
    ] = None,
    ratio: options.Ratio = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Variants; more than one make a sheet.")] = 1,
    model: options.Model = DEFAULT_MODEL,
    paste: Annotated[
        bool, typer.Option("--paste/--no-paste", help="Put the picture's own pixels back outside the region.")
    ] = True,
    resize: options.Resize = False,
    rule: Annotated[
        Rule, typer.Option("--rule", help="Keep the known region's tokens at every scale, or its latent (CoDe's).")
    ] = Rule.tokens,
    seed: options.Seed = 0,
    guidance_scale: options.GuidanceScale = None,
    guidance_schedule: options.Schedule = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = None,
    set_: options.OwnSettings = None,
    hook: options.Hooks = None,
    precision: options.PrecisionOption = options.Precision.fp32,
    device: options.Device = "auto",
    control: options.Controls = None,
    control_kind: options.ControlKinds = None,
    threads: options.Threads = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    control_weights: options.ControlWeights = None,
    drafter_weights: options.DrafterWeights = None,
) -> None:
    """Draw a region of a picture anew, the world around it, or its details, without any training.

    Say where with one of --mask, --box, --outpaint and --keep-scales, and what with --label, or a prompt where text
    steers. Cells of the latent that the region does not touch keep their codes; outside the region the picture's own
    pixels are put back.

    \b
    Examples:
      nextscale edit "a sleeping dog" --picture cat.png --box 32,0,64,64 --out out/dog.png
      nextscale edit "a red hat" --picture cat.png --mask hat.png --count 4 --out out/hats.png
      nextscale edit --picture cat.png --outpaint 0.5 --out out/around.png
      nextscale edit --picture cat.png --keep-scales 4 --count 4 --out out/variants.png
      nextscale edit --picture cat.png --box 32,0,64,64 --label plant/noto --model runs/emoji-64 --out out/half.png
    """
    import torch

    from nextscale.data import pictures_out
    from nextscale.data.images import open_image, to_tensor
    from nextscale.data.sheets import board

    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: edit writes a PNG; end in .png")
    if sum(given is not None for given in (mask, box, outpaint, keep_scales)) != 1:
        raise InputError("say what to draw anew with exactly one of --mask, --box, --outpaint and --keep-scales")
    if keep_scales is not None and rule is Rule.latent:
        raise InputError("--rule latent is of a region; with --keep-scales leave it out")
    if label and len(label) > 1:
        raise InputError(f"--label was given {len(label)} times; edit takes one")
    if outpaint is not None and not 0 < outpaint < 1:
        raise InputError(f"--outpaint is {outpaint}; it must lie between 0 and 1, the share of the side to shrink to")
    pictures_out.check_writable(out)
    hooks = options.make_hooks(hook)
    image = open_image(picture)
    region = _region(image, mask, box)
    given_maps = controls.read(control, control_kind, model, control_weights)
    system = options.open_model(model, precision, device, weights, tokenizer_weights, control_weights, drafter_weights)
    steered = controls.maps(given_maps, system)
    if prompted.check(system, model, label, bool(prompt or negative or ratio)):
        what: Any = system.prompts(prompt, negative, count)
    else:
        what = [options.read_label(label[0], system) if label else None] * count
    schedule = prompted.schedule_of(system, ratio)
    size = system.size_of(schedule)
    image = options.fit_picture(image, str(picture), size, resize)
    if outpaint is not None:
        image, region = surround(image, outpaint, system.plan_of(schedule).grid)
    sampling: dict[str, Any] = {
        "seed": seed,
        "output": "numpy",
        "hooks": hooks,
        "schedule": schedule,
        **steered,
        **options.sampling_changes(guidance_scale, guidance_schedule, temperature, top_k, top_p, smooth),
        **options.own_settings(set_, system),
    }
    pictures = torch.stack([to_tensor(image)] * count)
    if region is None:
        redraw = torch.ones(size, dtype=torch.bool)
        drawn = system.enlarge(pictures, what, scales=keep_scales, **sampling)
    else:
        region = options.fit_picture(region, "the mask", size, resize)
        redraw = to_tensor(region.convert("RGB"))[0] > 0
        if not redraw.any():
            raise InputError("nothing to draw anew: the mask has no white pixel, or the box lies outside what is kept")
        if rule is not Rule.tokens:
            sampling["rule"] = rule.value
        drawn = system.edit(pictures, torch.stack([redraw] * count), what, **sampling)
    import numpy as np
    from PIL import Image

    results = drawn.images
    if paste:
        results = np.where(redraw.numpy()[None, :, :, None], results, np.asarray(image)[None])
    region_given = {"box": box, "mask": mask and mask.name, "outpaint": outpaint, "keep_scales": keep_scales}
    settings: dict[str, Any] = {"edited": picture.name, **region_given, "paste": paste, "rule": rule.value}
    settings |= {"precision": precision.value, **asdict(drawn.settings), **({"hooks": hook} if hook else {})}
    settings |= controls.told(given_maps)
    if negative:
        settings |= {"negatives": [negative] * count}
    about = options.provenance(model, settings, drawn.labels, drawn.seeds)
    written = Image.fromarray(results[0]) if count == 1 else board(results, min(count, 8))
    pictures_out.write_png(written, out, about)
    typer.echo(f"{out}: {count} of {picture.name} in {drawn.seconds:.1f} s")


def _region(image: Image.Image, mask: Path | None, box: str | None) -> Image.Image | None:
    """The region to draw anew in white, of the picture's own size; None where neither was given."""
    from PIL import Image

    from nextscale.data.images import open_image

    if mask is not None:
        region = open_image(mask).convert("L")
        if region.size != image.size:
            raise InputError(
                f"{mask} is {region.width}x{region.height} pixels, the picture {image.width}x{image.height}; "
                "a mask must be of the picture's size"
            )
        return region
    if box is None:
        return None
    numbers = options.read_numbers(box, "--box")
    if len(numbers) != 4:
        raise InputError(f"--box is {box!r}; give four numbers: left,top,right,bottom")
    left, top, right, bottom = numbers
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise InputError(f"--box {box} does not lie inside the picture, which is {image.width}x{image.height} pixels")
    region = Image.new("L", image.size, 0)
    region.paste(255, (left, top, right, bottom))
    return region


def surround(image: Image.Image, share: float, grid: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The picture shrunk into the middle of a white frame of its size, and the border in white.

    The inner side is snapped to whole cells of the latent (as many left as right), since a cell that the border
    touches is drawn anew.

    Args:
        image: of the size that is drawn.
        share: of the side that the picture keeps, in (0, 1).
        grid: height and width of the latent.
    """
    from PIL import Image

    inner, offset = [], []
    for side, cells in zip((image.height, image.width), grid, strict=True):
        border = min(max(round(cells * (1 - share) / 2), 1), (cells - 1) // 2)
        offset.append(side // cells * border)
        inner.append(side - 2 * offset[-1])
    small = image.resize((inner[1], inner[0]), Image.Resampling.LANCZOS)
    frame = Image.new("RGB", image.size, (255, 255, 255))
    region = Image.new("L", image.size, 255)
    frame.paste(small, (offset[1], offset[0]))
    region.paste(0, (offset[1], offset[0], offset[1] + inner[1], offset[0] + inner[0]))
    return frame, region
