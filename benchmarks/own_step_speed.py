"""What attention inside a scale saves: training steps of HMAR, SRDD and M-VAR beside VAR's, at one width and depth.

A step is teacher forcing on random tokens, backward pass and AdamW. Contestants take turns in one process, and figures
are ratios within a turn. VAR runs twice: under a dense mask, which computes hidden pairs too, and scale by scale, each
scale's rows attending to the rows up to its end, which computes none. HMAR's is its next-scale module's step, whose
network SRDD's is, number by number (tests/test_srdd.py): that both differ is the measurement's noise. M-VAR's blocks
have a Mamba-2 layer more, so it has more parameters at the same depth.

    python benchmarks/own_step_speed.py                                   # 256 pixels' schedule, width 256, depth 4
    python benchmarks/own_step_speed.py --side 512 --pictures 1 --repeats 5
    python benchmarks/own_step_speed.py --attention --side 512 --pictures 1  # attention alone, forward and backward
    python benchmarks/own_step_speed.py --pairs                           # visible pairs by schedule; measures nothing

Weights and tokens are random; nothing is read or downloaded. On CUDA, M-VAR uses the kernel of mamba_ssm where that is
installed and the precision is bf16.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.context import Context, Hook
from nextscale.errors import InputError, NextscaleError
from nextscale.generators.hmar import HMARGeneratorConfig
from nextscale.generators.srdd import SRDDGeneratorConfig
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers.attention import attention
from nextscale.objectives.teacher_forcing import teacher_forcing_call
from nextscale.plan import OWN_STEP, Plan
from nextscale.run import Rows
from nextscale.systems.class_conditional import ClassConditionalSystem
from nextscale.systems.hmar import HMAR, HMARConfig
from nextscale.systems.m_var import MVAR, MVARConfig
from nextscale.systems.srdd import SRDD, SRDDConfig
from nextscale.systems.var import PLANS, VAR, VARConfig, squares
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.utilisation import MatrixProduct, training_flops

BASE = "VAR, dense mask"


class PrefixSlices(Hook):
    """VAR's attention scale by scale: a scale's rows over the rows up to its end, without a mask."""

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Any) -> Tensor:
        assert k is not None and v is not None and rows.spans is not None
        return torch.cat([attention(q[:, :, s.lo:s.hi], k[:, :, :s.hi], v[:, :, :s.hi], None, ctx.scale(address))
                          for s in rows.spans], 2)


class Trained:
    """A system and its optimiser; calling it does a step."""

    def __init__(self, system: ClassConditionalSystem, pictures: int, device: torch.device, dtype: torch.dtype,
                 hooks: Sequence[Hook] = ()):
        system.tokenizer.encoder = system.tokenizer.decoder = nn.Identity()  # type: ignore[assignment]
        self.system, self.hooks, self.dtype = system.initialise().to(device).train(), hooks, dtype
        parts = [system.generator, system.head, system.labels]
        self.parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-5)
        draws = torch.Generator().manual_seed(0)
        self.tokens = [torch.randint(system.config.tokenizer.vocabulary, (pictures, step.rows), generator=draws)
                       .to(device) for step in system.plan]
        with torch.no_grad():
            canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, pictures, device)
            self.reads = pyramid.replay(self.tokens, canvas).reads
        self.labels = torch.zeros(pictures, 1, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        system = self.system
        with torch.autocast(self.labels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            call = teacher_forcing_call(system.generator, system.plan, self.reads, system.labels(self.labels))
            hidden = system.generator(call, Context(None, self.hooks))
            entropy, _ = system.head.loss(hidden, torch.cat(self.tokens, 1))
        entropy.mean().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def contestants(side: int, depth: int, width: int, pictures: int, device: torch.device,
                dtype: torch.dtype) -> dict[str, Trained]:
    tokenizer, heads = TokenizerConfig(grids=squares(PLANS[side])), max(1, width // 64)
    var = VARConfig(tokenizer, VARGeneratorConfig(depth, width, heads))
    # The mask module of HMAR's last block is not trained with the next-scale module, nor counted here.
    hmar = HMAR(HMARConfig(tokenizer, HMARGeneratorConfig(depth, width, heads, mask_blocks=1)))
    hmar.train_part("next")
    systems: dict[str, tuple[ClassConditionalSystem, Sequence[Hook]]] = {
        BASE: (VAR(var), ()), "VAR, by prefix slices": (VAR(var), (PrefixSlices(),)),
        "HMAR, next-scale": (hmar, ()),
        "SRDD": (SRDD(SRDDConfig(tokenizer, SRDDGeneratorConfig(depth, width, heads))), ()),
        "SRDD, window 1": (SRDD(SRDDConfig(tokenizer, SRDDGeneratorConfig(depth, width, heads, window=1))), ()),
        "M-VAR": (MVAR(MVARConfig(tokenizer, VARGeneratorConfig(depth, width, heads))), ())}
    return {name: Trained(system, pictures, device, dtype, hooks) for name, (system, hooks) in systems.items()}


def attentions(side: int, width: int, pictures: int, device: torch.device, dtype: torch.dtype
               ) -> dict[str, Callable[[], None]]:
    """Forward and backward of a layer's attention alone: VAR's in both ways, and within scales."""
    plan, heads = Plan.scales(PLANS[side]), max(1, width // 64)
    q, k, v = (torch.randn(pictures, heads, plan.length, 64, device=device, dtype=dtype, requires_grad=True)
               for _ in range(3))
    mask, spans = plan.mask().to(device), plan.spans(0, len(plan))

    def sliced(first: Callable[[Any], int]) -> Callable[[], Tensor]:
        return lambda: torch.cat([attention(q[:, :, s.lo:s.hi], k[:, :, first(s):s.hi], v[:, :, first(s):s.hi], None,
                                            0.125) for s in spans], 2)

    forms: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: attention(q, k, v, mask, 0.125), "VAR, by prefix slices": sliced(lambda s: 0),
        "HMAR, SRDD: own scale": sliced(lambda s: s.lo)}

    def both_ways(form: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: form().sum().backward()

    return {name: both_ways(form) for name, form in forms.items()}


def measure(steps: Mapping[str, Callable[[], None]], repeats: int, clock: str, device: torch.device
            ) -> dict[str, list[float]]:
    """Seconds of every step in every turn."""
    now = (lambda: time.process_time() / torch.get_num_threads()) if clock == "cpu" else time.perf_counter

    def timed(f: Callable[[], None]) -> float:
        began = now()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - began

    for step in steps.values():
        timed(step)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    return seconds


def pairs_table() -> str:
    """Visible (query, key) pairs a layer and head, by schedule, as a Markdown table."""
    lines = ["| schedule | rows | dense | VAR | own scale | VAR / own | dense / own |", "|---|---|---|---|---|---|---|"]
    for side, sides in PLANS.items():
        var, own = Plan.scales(sides), Plan.scales(sides, OWN_STEP)
        lines.append(f"| {side} px | {own.length} | {own.length**2:,} | {var.pairs:,} | {own.pairs:,} | "
                     f"{var.pairs / own.pairs:.2f} | {own.length**2 / own.pairs:.2f} |")
    return "\n".join(lines)


def ratios_of(seconds: dict[str, list[float]], name: str) -> str:
    """Median seconds of a contestant and how often it fits into the base's, with the span over turns."""
    ratios = [b / t for b, t in zip(seconds[BASE], seconds[name], strict=True)]
    return (f"{statistics.median(seconds[name]):10.3f}{statistics.median(ratios):9.2f}x  "
            f"{min(ratios):.2f} - {max(ratios):.2f}")


def report(steps: dict[str, Trained], seconds: dict[str, list[float]], pictures: int) -> str:
    lines = [f"{'step':24s}{'parameters':>12s}{'GFLOP':>8s}{'seconds':>10s}{'VAR / it':>10s}  from - to"]
    for name, step in steps.items():
        products = [MatrixProduct(*p) for p in step.system.products(pictures)]
        lines.append(f"{name:24s}{sum(p.numel() for p in step.parameters) / 1e6:10.2f} M"
                     f"{training_flops(products) / 1e9:8.1f}{ratios_of(seconds, name)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="print visible pairs by schedule and stop")
    parser.add_argument("--attention", action="store_true", help="of one layer, forward and backward, and nothing else")
    parser.add_argument("--side", type=int, default=256, choices=sorted(PLANS), help="pixels: which schedule")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=2, help="a step")
    parser.add_argument("--repeats", type=int, default=7, help="turns; figures are medians")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use")
    options = parser.parse_args(arguments)
    if options.pairs:
        print(pairs_table())
        return 0
    device, dtype = torch.device(options.device), torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    try:
        if options.width % 64:
            raise InputError(f"width is {options.width}; it must be a multiple of 64, the width of a head")
        pictures = max(1, options.pictures)
        steps: Mapping[str, Any] = (
            attentions(options.side, options.width, pictures, device, dtype) if options.attention else
            contestants(options.side, options.depth, options.width, pictures, device, dtype))
        seconds = measure(steps, max(1, options.repeats), options.clock, device)
    except NextscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.side} px, depth {options.depth}, width {options.width}, {options.pictures} pictures, "
          f"{options.precision}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{options.clock} clock, {options.repeats} turns\n")
    if options.attention:
        print("\n".join(f"{name:24s}{ratios_of(seconds, name)}" for name in seconds))
    else:
        print(report(dict(steps), seconds, options.pictures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
