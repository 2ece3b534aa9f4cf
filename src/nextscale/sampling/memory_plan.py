"""What a generation will hold, counted before it starts, and how many pictures may be drawn and decoded at once.

Counted are weights, what the run remembers, what a step works on and the decoder's maps. A kernel's own workspace is
not, hence ``SHARE``.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nextscale.errors import InputError
from nextscale.layers import quantised
from nextscale.layers.bf16_training import has_blocked_products
from nextscale.layers.linear import Linear
from nextscale.layers.winograd import Convolution3x3
from nextscale.plan import Plan
from nextscale.tokenizers.autoencoder import AutoencoderConfig, Upsample
from nextscale.tokenizers.strips import ROWS

SHARE = 0.9
"""Of the memory that is free, what is planned with."""


class Needs(NamedTuple):
    """Bytes: of the weights; and a picture, all branches: remembered by the run, worked on in its largest step, and
    held by the decoder, whole or in strips. Where several networks draw in turn, each gives up what it remembers before
    the next begins: memory and step are those of the one that needs most."""

    weights: int
    memory: int
    step: int
    decoder: int
    strips: int

    @property
    def drawing(self) -> int:
        """A picture's bytes while it is drawn."""
        return self.memory + self.step


@dataclass(frozen=True)
class Batches:
    """How many pictures are drawn at once, how many of these are decoded at once, in strips of how many rows (None:
    whole), and what to tell where that isn't what was asked for."""

    drawn: int
    decoded: int
    strips: int | None = None
    note: str | None = None


def needs(system: Any, plan: Plan, branches: int, used: Any = None) -> Needs:
    """What a system needs for pictures of a plan under some settings (None: the model's own). system: what has
    ``networks`` and ``tokenizer``. Hooks are not asked: those that shrink memory make the plan a careful one.

    Raises InputError for a generator that doesn't tell (``memory_bytes``, ``rows_at_once``, ``live_widths``).
    """
    found, vocabulary = [], system.tokenizer.config.vocabulary
    for model, steps in system.networks(plan, used):
        generator = model.generator
        if not hasattr(generator, "memory_bytes"):
            raise InputError(f"memory: {type(generator).__name__} doesn't tell what it holds; leave the limit out")
        element = next(generator.parameters()).element_size()
        row = branches * generator.config.width * generator.live_widths * element
        # Logits in float32, a branch; guided, filtered, sorted with their places, summed up.
        predicted = vocabulary * 4 * (branches + 8)
        walked = replace(plan, steps=plan.steps[:steps.stop])
        step = generator.rows_at_once(walked) * (row + predicted)
        if steps.start:  # in the first call the steps before it, too
            step = max(step, plan.starts[steps.start + 1] * row + plan.steps[steps.start].rows * predicted)
        found.append((generator.memory_bytes(walked, branches), step))
    sizes, held = system.tokenizer.config.autoencoder, system.tokenizer.decoder.output.weight.element_size()
    return Needs(weight_bytes(system), *max(found, key=sum), decoder_bytes(sizes, plan.grid, held),
                 decoder_bytes(sizes, plan.grid, held, ROWS))


def weight_bytes(system: nn.Module) -> int:
    """Of all parameters and buffers, and of what a CPU keeps beside them: the copies in blocks of products in bfloat16
    and the kernels of maps that are doubled."""
    total = quantised.weight_bytes(system)
    for layer in system.modules():
        if isinstance(layer, Upsample) and layer.conv.weight.device.type == "cpu":
            total += layer.conv.weight.nbytes * 16 // 9
        if isinstance(layer, Convolution3x3):
            total += layer.kept_bytes()
        weight = layer.weight if isinstance(layer, Linear) else None
        if weight is not None and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" \
                and has_blocked_products():
            total += weight.nbytes
    return total


def decoder_bytes(config: AutoencoderConfig, grid: tuple[int, int], element: int, rows: int | None = None) -> int:
    """Most that the decoder holds at once for one picture, in maps of ``element`` bytes a value; rows: in strips."""
    widths, peak, last = config.widths, 0, len(config.widths) - 1
    for i in range(last, -1, -1):
        height, across = grid[0] << (last - i), grid[1] << (last - i)
        cells, before, after = height * across, widths[min(i + 1, last)], widths[i]
        strip = None if rows is None or i == last else min(1.0, (rows + 4) / height)
        blocks = [(before, after), *[(after, after)] * (config.decoder_blocks - 1)]
        for wide, narrow in blocks:
            if strip is None:
                peak = max(peak, element * cells * max(2 * wide + narrow, wide + (3 if wide != narrow else 2) * narrow))
            else:
                # The map, the one it becomes where widths differ, and of a strip: rows seen, in float32, and between.
                kept = wide + (narrow if wide != narrow else 0)
                peak = max(peak, int(cells * (element * kept + strip * max(wide, narrow) * (3 * element + 8))))
        if i == last and config.attention != "none":
            peak = max(peak, element * cells * 8 * after)
        if i:  # every cell four times, through a convolution
            doubled = 1.25 if rows is not None else 2.25
            peak = max(peak, int(element * 4 * cells * after * doubled))
        if i == 0:
            whole = 2 if strip is None else 1 + strip * (2 + 8 / element)
            peak = max(peak, int(cells * (element * after * whole + 3 * (element + 8))))
    return peak


def plan_batches(asked: int, need: Needs, limit: int | None, free: int | None) -> Batches:
    """How to draw pictures of which ``asked`` are wanted at once.

    limit: bytes that the user allows, weights included; free: bytes that the device has left, None where unknown. The
    note says what was changed. Raises InputError where not even one picture fits the user's limit.
    """
    if limit is None and free is None:
        return Batches(asked, asked)
    known = limit is not None
    room = limit - need.weights if limit is not None else int((free or 0) * SHARE)
    drawn = min(asked, room // max(need.drawing, 1))
    decoded = min(drawn, room // max(need.decoder, 1))
    strips = ROWS if decoded < 1 else None
    if known and (drawn < 1 or (strips and need.strips > room)):
        least = need.weights + max(need.drawing, min(need.decoder, need.strips))
        raise InputError(f"memory_limit is {size(limit or 0)}, but one picture takes {size(least)}, "
                         f"{size(need.weights)} of it weights; allow more")
    drawn, decoded = max(drawn, 1), max(decoded, 1)
    said = []
    if drawn < asked:
        said.append(f"{drawn} of {asked} pictures are drawn at once ({size(need.drawing)} each)")
    if strips:
        said.append(f"decoded one by one in strips ({size(need.strips)})")
    elif decoded < drawn:
        said.append(f"{decoded} decoded at once ({size(need.decoder)} each)")
    room_text = f"memory for {size(max(room, 0))} beside the weights: " if said else ""
    return Batches(drawn, decoded, strips, room_text + ", ".join(said) if said else None)


def size(count: int) -> str:
    """A number of bytes as people read it."""
    power = min((len(str(count)) - 1) // 3, 3)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"
