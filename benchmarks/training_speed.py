"""Times a generator's training step and says what share of the machine's matrix products it uses.

A step is what the trainer does: teacher forcing on tokens, backward pass, gradient clipping, AdamW, average of the
weights. Contestants take turns in one process: on a CPU the plain passes of autograd and this library's own (in
bfloat16), on CUDA the network eager and compiled. Beside them the step's matrix products alone are timed at their own
shapes, each on contiguous operands, forward and both gradients: their time over the step's time is the share.

    python benchmarks/training_speed.py                               # sizes of the recipe emoji-64-generator
    python benchmarks/training_speed.py --model var-d16 --pictures 1  # the published size at 256x256
    python benchmarks/training_speed.py --model var-d16 --device cuda --pictures 32 --peak 989

Weights and tokens are random; nothing is read or downloaded.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.configuration import build
from nextscale.errors import NextscaleError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers import bf16_training
from nextscale.systems.var import VAR, VARConfig, preset_config
from nextscale.training.ema import Average
from nextscale.training.generator import GeneratorTask
from nextscale.training.generator_recipe import GeneratorTraining
from nextscale.training.recipes import read_recipe
from nextscale.training.task import TrainingStep
from nextscale.training.tokenizer_recipe import TokenizerTraining
from nextscale.training.utilisation import MatrixProduct, products_seconds, training_flops

EMOJI = "emoji-64"


def system_of(model: str) -> tuple[VAR, float]:
    """A fresh VAR of a published size, or of the recipes that emoji-64 was made by; and the initial gate."""
    if model != EMOJI:
        system = VAR(preset_config(model))
        system.tokenizer.encoder = system.tokenizer.decoder = nn.Identity()  # training on tokens needs neither
        return system, 1e-3
    generator = build(GeneratorTraining, read_recipe("emoji-64-generator"), "emoji-64-generator")
    tokenizer = build(TokenizerTraining, read_recipe("emoji-64-tokenizer"), "emoji-64-tokenizer")
    network = build(VARGeneratorConfig, generator.generator, "emoji-64-generator")
    return VAR(VARConfig(tokenizer.tokenizer.model, network, (51, 5))), generator.gate


class Trained:
    """A system under training; calling it does a step."""

    def __init__(self, system: VAR, pictures: int, device: torch.device, dtype: torch.dtype, compile: bool = False):
        self.system, self.device, self.dtype = system.to(device), device, dtype
        self.task = GeneratorTask(system, compile="on" if compile else "off")
        self.task._count = lambda pictures, scales: None  # type: ignore[method-assign]  # measured outside the steps
        for module in self.task.modules.values():
            module.train()
        groups = self.task.parameter_groups("main", 0.05)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
        self.averages = [Average(module, 0.999) for module in self.task.modules.values()]
        draws = torch.Generator().manual_seed(0)
        vocabulary = system.config.tokenizer.vocabulary
        self.batch = {"tokens": torch.randint(vocabulary, (pictures, system.plan.length), generator=draws).to(device),
                      "labels": torch.zeros(pictures, len(system.config.classes), dtype=torch.int64, device=device)}

    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, _ = self.task.loss("main", self.batch, TrainingStep(0, 1, 0.0, 0, 0))
        assert loss is not None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update()
        return loss


@contextmanager
def plain_passes() -> Iterator[None]:
    """The layers as autograd does them."""
    known = bf16_training.has_blocked_products
    bf16_training.has_blocked_products = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        bf16_training.has_blocked_products = known


def contestants(trained: Trained, compiled: Trained | None) -> dict[str, Callable[[], Any]]:
    """Steps by name; the last is the library's best."""
    def plain() -> Any:
        with plain_passes():
            return trained()

    if trained.device.type == "cpu" and trained.dtype == torch.bfloat16:
        found: dict[str, Callable[[], Any]] = {"plain autograd": plain, "nextscale": trained}
    else:
        found = {"eager": trained}
    return {**found, "compiled": compiled} if compiled is not None else found


def measure(model: str, pictures: int, repeats: int, device: torch.device, dtype: torch.dtype, clock: str,
            compile: bool) -> dict[str, Any]:
    """All figures; seconds are medians over rounds in which contestants take turns, shares are of the same round."""
    threads = torch.get_num_threads()
    now = (lambda: time.process_time() / threads) if clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    system, gate = system_of(model)
    trained = Trained(system.initialise(gate), pictures, device, dtype)
    compiled = Trained(system_of(model)[0].initialise(gate), pictures, device, dtype, True) if compile else None
    steps = contestants(trained, compiled)
    products = [MatrixProduct(*p) for p in system.products(pictures)]

    def timed(f: Callable[[], Any]) -> float:
        began = now()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - began

    for f in steps.values():
        timed(f), timed(f)
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, "products alone")}
    for _ in range(repeats):
        for name, f in steps.items():
            seconds[name].append(timed(f))
        seconds["products alone"].append(products_seconds(products, device, dtype, clock=now))
    alone, flops = seconds["products alone"], training_flops(products)
    return {"model": model, "pictures": pictures, "rows": system.plan.length, "device": str(device),
            "dtype": str(dtype).removeprefix("torch."), "threads": threads, "clock": clock, "repeats": repeats,
            "torch": torch.__version__, "parameters": sum(p.numel() for p in trained.parameters), "flops": flops,
            "products alone": statistics.median(alone), "rate": flops / statistics.median(alone),
            "steps": {name: {"seconds": statistics.median(taken), "lowest": min(taken), "highest": max(taken),
                             "share": statistics.median(a / t for a, t in zip(alone, taken, strict=True)),
                             "faster": statistics.median(b / t for b, t in zip(seconds[next(iter(steps))], taken,
                                                                               strict=True))}
                      for name, taken in seconds.items() if name in steps}}


def report(result: dict[str, Any], peak: float | None) -> str:
    """The figures as a table."""
    pictures, tokens = result["pictures"], result["pictures"] * result["rows"]
    lines = [f"{result['model']}: {result['parameters'] / 1e6:.1f} M parameters, {pictures} pictures of "
             f"{result['rows']} tokens a step; {result['device']}, {result['dtype']}, {result['threads']} threads, "
             f"torch {result['torch']}, {result['clock']} clock, median of {result['repeats']}",
             f"arithmetic of a step: {result['flops'] / 1e9:.0f} GFLOP; its products alone: "
             f"{result['products alone']:.3f} s, {result['rate'] / 1e9:.0f} GFLOP/s", "",
             f"{'step':16s}{'seconds':>9s}{'pictures/s':>12s}{'tokens/s':>10s}{'GFLOP/s':>10s}{'share':>8s}"
             f"{'faster':>9s}  seconds from - to" + ("" if peak is None else "   MFU")]
    for name, step in result["steps"].items():
        s = step["seconds"]
        lines.append(f"{name:16s}{s:9.3f}{pictures / s:12.1f}{tokens / s:10.0f}{result['flops'] / s / 1e9:10.0f}"
                     f"{step['share']:8.1%}{step['faster']:8.2f}x  {step['lowest']:.3f} - {step['highest']:.3f}"
                     + ("" if peak is None else f"{result['flops'] / s / 1e12 / peak:8.1%}"))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI, help="emoji-64 (its recipe's sizes) or a published size, var-d16")
    parser.add_argument("--pictures", type=int, default=16, help="a step")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; figures are medians")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on CUDA")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device's data sheet, to print MFU against it")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    compile = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    try:
        result = measure(options.model, max(1, options.pictures), max(1, options.repeats), device,
                         torch.bfloat16 if options.precision == "bf16" else torch.float32, options.clock, compile)
    except NextscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result, options.peak))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
