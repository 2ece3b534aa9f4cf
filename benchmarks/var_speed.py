"""How fast VAR draws one picture here, against the published loop and against the machine.

    python benchmarks/var_speed.py [--model var-d16] [--threads N] [--repeats N] [--json OUT]

Random weights of the published size, one 256x256 picture, guidance on, top-k 900, top-p 0.96. The baseline
(``published_loop.py``, float32) and the library in float32 and bfloat16 take turns in one process; figures are medians.
Seconds are those of the clock on the wall, or with ``--clock cpu`` the time that the process was given (divided by the
threads), for a machine that others use too.
"""
from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from published_loop import PublishedLoop, Sizes

from nextscale.errors import NextscaleError
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Run
from nextscale.systems.var import VAR, preset_config
from nextscale.tokenizers.multiscale_vq import phi_table

PHASES = ("transformer", "sampling", "canvas", "decode", "other")
GUIDANCE_SCALE, TOP_K, TOP_P, LABEL, SEED = 2.5, 900, 0.96, 7, 0


# The two contestants

def sizes_of(system: VAR) -> Sizes:
    """The baseline's sizes for a library model with one kind of label and square scales."""
    tokenizer, generator = system.config.tokenizer, system.config.generator
    auto = tokenizer.autoencoder
    if generator.shared_modulation or not generator.l2_attention or generator.mlp_ratio != 4:
        raise NextscaleError("the baseline covers the 256-pixel models: l2 attention, adaLN in every block")
    return Sizes(tuple(step.grid[0] for step in system.plan), generator.depth, generator.width, generator.heads,
                 system.config.classes[0], tokenizer.vocabulary, auto.latent_width,
                 phi_table(len(system.plan), tokenizer.phi_count), auto.width, auto.multipliers, auto.decoder_blocks,
                 auto.groups, auto.attention == "level")


def baseline_of(system: VAR) -> PublishedLoop:
    """The baseline with the same weights (shared where their memory layout is the default one)."""
    baseline = PublishedLoop(sizes_of(system)).eval()
    own = baseline.state_dict()
    theirs = {name: tensor.contiguous() for name, tensor in system.state_dict().items() if name in own}
    baseline.load_state_dict(theirs, assign=True)
    return baseline


def liven(system: VAR) -> VAR:
    """Weights under which no part of the network is negligible and the distributions over codes are not flat.

    The published initialisation starts with gates near 0 and a head near 0: tokens would hardly depend on the blocks.
    """
    with torch.no_grad():
        for name, tensor in system.named_parameters():
            if name.startswith("generator.blocks") and name.endswith("modulation.weight"):
                tensor.mul_(0.5)
        system.head.weight.mul_(4)
        for table in system.labels.tables:
            table.weight.mul_(0.5)
    return system


def uniforms_of(plan: Plan, seed: int) -> list[Tensor]:
    """The numbers that the library draws codes with, (1, L_k) a step."""
    noise = Keyed.from_seeds([seed])
    spans = [plan.span(k, k + 1) for k in range(len(plan))]
    return [noise.uniform("token", plan.step_of_row[s][None], 0, plan.cells[None, s])[..., 0] for s in spans]


# Clocks

@dataclass
class Clock:
    """Seconds by phase; time inside an inner phase is not counted in the outer one."""

    now: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _inner: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        began = self.now()
        try:
            yield
        finally:
            spent = self.now() - began
            self.seconds[name] += spent - self._inner.pop()
            self._inner[-1] += spent

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def clocked(system: VAR, clock: Clock) -> Iterator[None]:
    """The library's phases, timed from outside: the library itself has no clocks."""
    parts = ((system.generator, "call", "transformer"), (system.generator, "forward", "transformer"),
             (system.head, "forward", "transformer"), (system.head, "sample", "sampling"), (Run, "write", "canvas"),
             (system.tokenizer, "decode", "decode"))
    with ExitStack() as stack:
        for owner, name, phase in parts:
            stack.enter_context(mock.patch.object(owner, name, clock.around(phase, getattr(owner, name))))
        yield


def draw_baseline(baseline: PublishedLoop, uniforms: list[Tensor], clock: Clock) -> list[Tensor]:
    with clock.phase("other"):
        return baseline.sample(torch.tensor([LABEL]), uniforms, GUIDANCE_SCALE - 1, TOP_K, TOP_P, clock.phase)[1]


def draw_ours(system: VAR, clock: Clock) -> list[Tensor]:
    with clocked(system, clock), clock.phase("other"):
        return system.generate(LABEL, 1, seed=SEED, guidance_scale=GUIDANCE_SCALE, guidance_schedule="ramp",
                               top_k=TOP_K, top_p=TOP_P, output="torch", progress=False).tokens


# The machine

def transformer_layers(system: VAR) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how often) of every matrix product with weights, two branches, from the plan."""
    c, depth = system.config.generator.width, system.config.generator.depth
    inner = round(c * system.config.generator.mlp_ratio)
    shapes: list[tuple[int, int, int, int]] = [(2, c, 6 * c, depth), (2, c, 2 * c, 1)]
    for step in system.plan:
        rows = 2 * step.rows
        shapes += [(rows, c, 3 * c, depth), (rows, c, c, depth), (rows, c, inner, depth), (rows, inner, c, depth),
                   (rows, c, system.config.tokenizer.vocabulary, 1)]
    return shapes


def decoder_convolutions(system: VAR) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
    """(input shape, weight shape) of the decoder's convolutions and how often each comes."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = defaultdict(int)
    decoder = copy.deepcopy(system.tokenizer.decoder).to("meta")

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        found[tuple(args[0].shape), tuple(module.weight.shape)] += 1

    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    width, dtype = system.config.tokenizer.autoencoder.latent_width, decoder.input.weight.dtype
    with torch.no_grad():
        decoder(torch.empty(1, width, *system.plan.grid, device="meta", dtype=dtype))
    return dict(found)


def flops(system: VAR) -> dict[str, float]:
    """Floating-point operations of one picture with guidance (a multiply-add is two)."""
    linear = sum(2.0 * rows * i * o * n for rows, i, o, n in transformer_layers(system))
    # q k^T and weights times v: two products of 2 C operations a visible pair, in each branch.
    attention = 2 * system.plan.pairs * 4.0 * system.config.generator.width * system.config.generator.depth
    decode = sum(2.0 * n * x[2] * x[3] * math.prod(w) for (x, w), n in decoder_convolutions(system).items())
    return {"transformer": linear + attention, "decode": decode}


def median_time(f: Callable[[], Any], now: Callable[[], float], repeats: int) -> float:
    f()
    times = []
    for _ in range(repeats):
        began = now()
        f()
        times.append(now() - began)
    return statistics.median(times)


def matmul_rate(dtype: torch.dtype, now: Callable[[], float], side: int = 2048) -> float:
    """Operations a second of a large square product: the best this machine and torch do."""
    a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    return 2.0 * side**3 / median_time(lambda: a @ b, now, 5)


def products_alone(system: VAR, dtype: torch.dtype, now: Callable[[], float], repeats: int = 3) -> dict[str, float]:
    """Seconds of a picture's weight products and convolutions alone, torch's plain kernels, the same shapes."""
    linear = decode = 0.0
    for rows, i, o, n in transformer_layers(system):
        x, weight = torch.randn(rows, i, dtype=dtype), torch.randn(o, i, dtype=dtype)
        linear += n * median_time(lambda x=x, w=weight: F.linear(x, w), now, repeats)  # type: ignore[misc]
    for (shape, kernel), n in decoder_convolutions(system).items():
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(kernel, dtype=dtype).contiguous(memory_format=torch.channels_last)
        decode += n * median_time(
            lambda x=x, w=weight: F.conv2d(x, w, padding=w.shape[-1] // 2), now, repeats)  # type: ignore[misc]
    return {"transformer": linear, "decode": decode}


# The comparison

def agreement(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """How many tokens are equal, and where the first differs: behind it the two draw different pictures."""
    equal = sum(int((a == b).sum()) for a, b in zip(ours, theirs, strict=True))
    total = sum(t.numel() for t in theirs)
    first = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)), None)
    if first is None:
        return f"all {total} equal"
    return (f"{equal} of {total} equal, the first {int((ours[first] != theirs[first]).sum())} that differ are in "
            f"step {first + 1} of {len(theirs)}")


def measure(model: str, threads: int, repeats: int, cpu_clock: bool, floor: bool = True) -> dict[str, Any]:
    """All figures as a dictionary; seconds are medians over ``repeats`` rounds in which the contestants take turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    now = (lambda: time.process_time() / threads) if cpu_clock else time.perf_counter
    fp32 = liven(VAR(preset_config(model)).eval()).to_precision("fp32")
    baseline, bf16 = baseline_of(fp32), copy.deepcopy(fp32).to_precision("bf16")
    for system in (fp32, bf16):
        system.tokenizer.encoder = nn.Identity()  # sampling needs no encoder, and others may need the memory
    uniforms = uniforms_of(fp32.plan, SEED)
    contestants: dict[str, Callable[[Clock], list[Tensor]]] = {
        "baseline fp32": lambda clock: draw_baseline(baseline, uniforms, clock),
        "nextscale fp32": lambda clock: draw_ours(fp32, clock),
        "nextscale bf16": lambda clock: draw_ours(bf16, clock)}
    tokens = {name: draw(Clock(now)) for name, draw in contestants.items()}  # also warms up
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, draw in contestants.items():
            gc.collect()
            clock = Clock(now)
            draw(clock)
            rounds[name].append({**clock.seconds, "total": sum(clock.seconds.values())})
    figures = {name: {key: statistics.median(r.get(key, 0.0) for r in taken) for key in (*PHASES, "total")}
               for name, taken in rounds.items()}
    result: dict[str, Any] = {
        "model": model, "threads": threads, "repeats": repeats, "clock": "cpu" if cpu_clock else "wall",
        "torch": torch.__version__, "cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(), "load": os.getloadavg()[0], "seconds": figures,
        "spread": {name: [min(r["total"] for r in taken), max(r["total"] for r in taken)]
                   for name, taken in rounds.items()},
        "faster": {name: statistics.median(b["total"] / o["total"] for b, o in
                                           zip(rounds["baseline fp32"], taken, strict=True))
                   for name, taken in rounds.items()},
        "tokens": {name: agreement(tokens[name], tokens["baseline fp32"]) for name in list(contestants)[1:]},
        "flops": flops(fp32)}
    if floor:
        result["floor"] = {name: {"rate": (rate := matmul_rate(dtype, now)),
                                  "seconds": {part: n / rate for part, n in result["flops"].items()},
                                  "alone": products_alone(fp32, dtype, now)}
                           for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return result


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(result: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [f"{result['model']}, one 256x256 picture with guidance; {result['cpu']}, {result['capability']}, AMX "
             f"{'yes' if result['amx'] else 'no'}, {result['threads']} threads, torch {result['torch']}, "
             f"{result['clock']} clock, median of {result['repeats']}, load {result['load']:.1f}", "",
             f"{'seconds':16s}" + "".join(f"{name:>13s}" for name in (*PHASES, "total")) + f"{'faster':>10s}  spread"]
    for name, seconds in result["seconds"].items():
        lowest, highest = result["spread"][name]
        lines.append(f"{name:16s}" + "".join(f"{seconds[key]:13.3f}" for key in (*PHASES, "total"))
                     + f"{result['faster'][name]:9.2f}x  {lowest:.2f} to {highest:.2f}")
    work = result["flops"]
    lines += ["", f"arithmetic of a picture: transformer {work['transformer'] / 1e9:.0f} GFLOP, "
                  f"decoder {work['decode'] / 1e9:.0f} GFLOP"]
    for name, floor in result.get("floor", {}).items():
        best, alone = floor["seconds"], floor["alone"]
        lines += [f"floor {name}: {sum(best.values()):.3f} s at {floor['rate'] / 1e9:.0f} GFLOP/s (a 2048 product): "
                  f"transformer {best['transformer']:.3f}, decode {best['decode']:.3f}",
                  f"      {name}: {sum(alone.values()):.3f} s for the products alone at their own shapes: "
                  f"transformer {alone['transformer']:.3f}, decode {alone['decode']:.3f}"]
    lines += ["", *(f"tokens of {name} against the baseline's: {words}" for name, words in result["tokens"].items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-d16", help="a published size: var-d16, var-d20, var-d24, var-d30")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; figures are medians (default 5)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that others use")
    parser.add_argument("--no-floor", action="store_true", help="leave the machine's own speed out")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    try:
        result = measure(options.model, max(1, options.threads), max(1, options.repeats), options.clock == "cpu",
                         floor=not options.no_floor)
    except NextscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
