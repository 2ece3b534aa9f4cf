"""VAR's headline claim beside its baseline: next-scale against next-token in raster order, with the same blocks.

    python benchmarks/var_against_raster.py [--model var-d16] [--depth N] [--batch B] [--dtype fp32|bf16] [--json OUT]

The same transformer blocks (random weights of a published size) draw the tokens of a 16x16 latent twice: by VAR's plan
(10 passes, 680 rows) and one token after the other (256 passes of one row), both with keys and values in memory, both
guidance branches, output layer and draw. Left out: the tokenizer's decoder, which is the same for both, and top-k and
top-p, which would weigh too much where ``--depth`` takes blocks away. The two take turns in one process; the ratio is
the median of the rounds' ratios. ``--clock cpu`` counts the time that the process was given (divided by the threads),
for a machine that others use too.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.canvas import Codec
from nextscale.conditions.class_label import ClassCondition, ClassTable
from nextscale.devices import choose_device
from nextscale.errors import NextscaleError
from nextscale.evaluation.bench.machine import cpu_name, median_time
from nextscale.generators.var import Block, VARGenerator
from nextscale.heads.categorical import CategoricalHead
from nextscale.layers.resize import ResizeRule, resize
from nextscale.noise import Keyed
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import Run
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps
from nextscale.systems.var import VARConfig, preset_config
from nextscale.tokenizers.multiscale_vq import MultiScaleQuantiser

GUIDANCE = ClassifierFree(2.5)
NAMES = ("raster", "var")


# The two contestants

class LastToken(nn.Module):
    """The codec of a raster model: its canvas holds the last token's code alone, which the next step reads."""

    read_rule: ResizeRule = "nearest"

    def __init__(self, vocabulary: int, latent_width: int):
        super().__init__()
        self.latent_width = latent_width
        self.codebook = nn.Embedding(vocabulary, latent_width)

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens.float() if tokens.is_floating_point() else self.codebook.weight[tokens]

    def contribution(self, step: int, steps: int, codes_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        return codes_BCHW

    def accumulate(self, value: Tensor, contribution: Tensor) -> Tensor:
        return contribution

    def resize(self, map_BCHW: Tensor, grid: tuple[int, int], rule: ResizeRule) -> Tensor:
        return resize(map_BCHW, grid, rule)


class TokenModel(nn.Module):
    """A plan, its codec, and VAR's transformer over them: what draws tokens, without a picture's encoder or decoder.

    order: the cell of every row, (1, L, 3), where the plan doesn't say it.
    """

    def __init__(self, config: VARConfig, plan: Plan, codec: Codec, order: Tensor | None = None):
        super().__init__()
        self.config, self.plan, self.codec, self.order = config, plan, codec, order
        self.generator = VARGenerator(config.generator, plan, codec.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    @torch.no_grad()
    def draw(self, pictures: int, seed: int = 0, until: int | None = None) -> Run:
        """The run after all steps of the plan, or after the first ``until``; picture i is of class i."""
        device = self.head.weight.device
        condition = ClassCondition(self.labels, torch.arange(pictures, device=device)[:, None] % self.config.classes[0])
        noise = Keyed.from_seeds(range(seed, seed + pictures), device)
        run = Run.start(self.plan, self.codec, condition, GUIDANCE.branches, noise, pictures, device)
        if self.order is not None:
            run.order = self.order.to(device)
        for _ in sample_steps(self, run, GUIDANCE, until=until):
            pass
        return run


def contestants(config: VARConfig) -> dict[str, TokenModel]:
    """The raster model and VAR; blocks, output layer and labels are the very same modules.

    The raster plan has a step of one row for every cell of VAR's last grid; what is its own are positions, start and
    the layer that embeds codes.
    """
    plan, latent_width = config.tokenizer.plan, config.tokenizer.autoencoder.latent_width
    var = TokenModel(config, plan, MultiScaleQuantiser(config.tokenizer))
    cells, codec = grid_cells(Step(plan.grid)), LastToken(config.tokenizer.vocabulary, latent_width)
    raster = TokenModel(config, Plan.scales([1] * len(cells)), codec, cells[None])
    for name in ("blocks", "head_modulation", "shared_modulation"):
        setattr(raster.generator, name, getattr(var.generator, name))
    raster.head, raster.labels = var.head, var.labels
    return {"raster": raster.eval(), "var": var.eval()}


# What they have to do

def weights(model: TokenModel) -> int:
    """Weights that every row is multiplied with: the blocks' and the output layer's, not adaLN's."""
    c, depth = model.config.generator.width, model.config.generator.depth
    inner = round(c * model.config.generator.mlp_ratio)
    return depth * (4 * c * c + 2 * c * inner) + c * model.config.tokenizer.vocabulary


def flops(model: TokenModel, pictures: int) -> float:
    """Floating-point operations of the products, counted from the plan (a multiply-add is two), both branches."""
    c, depth, copies = model.config.generator.width, model.config.generator.depth, 2 * pictures
    parts = 6 if model.config.generator.shared_modulation else 6 * depth
    once = copies * (parts + 2) * c * c
    embedding = pictures * (model.plan.length - model.plan.steps[0].rows) * model.codec.latent_width * c
    attention = copies * 2 * model.plan.pairs * c * depth
    return 2.0 * (copies * model.plan.length * weights(model) + once + embedding + attention)


@torch.no_grad()
def products_alone(model: TokenModel, pictures: int, now: Callable[[], float]) -> float:
    """Seconds of the products with the blocks' and the output layer's weights alone, at every step's shape."""
    weight = model.head.weight
    total = 0.0
    for rows, times in Counter(step.rows for step in model.plan).items():
        x = torch.randn(2 * pictures, rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        wide = torch.randn(2 * pictures, rows, round(weight.shape[1] * model.config.generator.mlp_ratio),
                           dtype=weight.dtype, device=weight.device)

        def once(x: Tensor = x, wide: Tensor = wide) -> float:
            for block in model.generator.blocks:
                assert isinstance(block, Block)
                block.attention.qkv(x, block.mlp.contract.bias.repeat(3))
                block.attention.projection(x)
                block.mlp.expand(x)
                block.mlp.contract(wide)
            return float(nn.Linear.forward(model.head, x).sum())  # a number here: the device has finished

        total += times * median_time(once, now, 3)
    return total


# The comparison

def measure(config: VARConfig, pictures: int, dtype: str, threads: int, repeats: int, cpu_clock: bool = False,
            device: torch.device | str = "cpu") -> dict[str, Any]:
    """All figures as a dictionary; seconds are of one picture, medians over ``repeats`` rounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    now = (lambda: time.process_time() / threads) if cpu_clock else time.perf_counter
    models = contestants(config)
    for model in models.values():
        model.to(device)
        for part in (model.generator, model.head, model.labels):  # codes stay in float32, as in the library
            part.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        model.draw(pictures, until=4)
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            began = now()
            torch.cat(model.draw(pictures).tokens, 1).cpu()  # the copy waits for the device
            taken[name].append((now() - began) / pictures)
    size, width = config.generator, 2 if dtype == "bf16" else 4
    return {
        "depth": size.depth, "width": size.width, "grid": models["var"].plan.grid, "batch": pictures, "dtype": dtype,
        "threads": threads, "repeats": repeats, "clock": "cpu" if cpu_clock else "wall", "torch": torch.__version__,
        "device": device_name(torch.device(device)), "load": os.getloadavg()[0],
        "passes": {name: len(model.plan) for name, model in models.items()},
        "rows": {name: model.plan.length for name, model in models.items()},
        "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "spread": {name: [min(times), max(times)] for name, times in taken.items()},
        "products_alone": {name: products_alone(model, pictures, now) / pictures for name, model in models.items()},
        "flops": {name: flops(model, pictures) / pictures for name, model in models.items()},
        "weight_bytes": {name: len(model.plan) * weights(model) * width / pictures for name, model in models.items()},
        "ratio": statistics.median(a / b for a, b in zip(*(taken[name] for name in NAMES), strict=True))}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def report(result: dict[str, Any]) -> str:
    """The figures as a table."""
    h, w = result["grid"]
    lines = [f"{result['depth']} blocks of width {result['width']}, {h}x{w} latent, batch {result['batch']}, guidance, "
             f"{result['dtype']}; {result['device']}, {result['threads']} threads, torch {result['torch']}, "
             f"{result['clock']} clock, median of {result['repeats']}, load {result['load']:.1f}", "",
             f"{'a picture':10s}{'passes':>8s}{'rows':>6s}{'GFLOP':>8s}{'GB of weights':>15s}{'products alone':>16s}"
             f"{'seconds':>9s}  spread"]
    for name in NAMES:
        lowest, highest = result["spread"][name]
        lines.append(f"{name:10s}{result['passes'][name]:8d}{result['rows'][name]:6d}"
                     f"{result['flops'][name] / 1e9:8.1f}{result['weight_bytes'][name] / 1e9:15.2f}"
                     f"{result['products_alone'][name]:14.3f} s{result['seconds'][name]:9.3f}"
                     f"  {lowest:.3f} to {highest:.3f}")
    passes, work = ([result[key][name] for name in NAMES] for key in ("passes", "flops"))
    lines += ["", f"raster against var: {passes[0] / passes[1]:.1f} times the passes, {work[0] / work[1]:.2f} times "
                  f"the arithmetic, {result['ratio']:.2f} times the time"]
    return "\n".join(lines)


def configuration(model: str, depth: int | None) -> VARConfig:
    """A published size, or fewer of its blocks."""
    config = preset_config(model)
    if depth is None:
        return config
    if depth < 1:
        raise NextscaleError(f"--depth is {depth}; it must be at least 1")
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, depth=depth))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d16", help="a published size: var-d16, var-d20, var-d24, var-d30")
    parser.add_argument("--depth", type=int, help="fewer blocks of the same width, for a quick look")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn together (default 1)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, or auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; figures are medians (default 3)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    try:
        result = measure(configuration(options.model, options.depth), max(1, options.batch), options.dtype,
                         max(1, options.threads), max(1, options.repeats), options.clock == "cpu",
                         choose_device(options.device))
    except NextscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
