"""Memory and speed of fine-tuning the published sizes: all weights, or low-rank adapters on frozen bf16 weights.

    python benchmarks/finetune_memory.py [--most-gb N] [--steps N] [--device cuda] [--json OUT]

Random weights of the published sizes, random tokens, batches of 1 and 8; nothing is downloaded. Each case runs in a
process of its own. Measured: the peak of the resident set while training, less what the process takes after a step of
a model of one small block (on a GPU the peak of allocated memory), and steps a second, of the processor's time of that
process (on a GPU of the clock on the wall). Cases that a formula puts above ``--most-gb`` are not run but computed:

    peak = weights + optimiser + max(gradients, activations)
    activations = first + depth x a block's

First and block's activations are the bytes that autograd keeps in the forward pass of models one and two blocks deep,
of the size's own width; gradients come as activations go, so the larger of the two counts. The formula stands beside
measured cases too, to be judged by them.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.generators.var import VARGeneratorConfig
from nextscale.systems import var
from nextscale.training.adapters import AdapterConfig, attach, network
from nextscale.training.finetune import choose_trained

RANK = 8
GB = 1e9
METHODS = ("lora", "full-adafactor", "full-adamw")


@dataclass(frozen=True)
class Case:
    """One row of the table. depth: None for the published size's."""

    model: str
    method: str
    batch: int
    depth: int | None = None


def build(case: Case, device: str) -> var.VAR:
    """The system of a case, every weight filled, nothing held twice."""
    config = var.preset_config(case.model)
    if case.depth is not None:
        config = replace(config, generator=replace(config.generator, depth=case.depth))
    with torch.device("meta"):
        system = var.VAR(config)
    if case.method == "lora":
        for part in network(system).values():
            part.to(torch.bfloat16)
    system.to_empty(device=device)
    block = 0.02 * torch.randn(1 << 20, device=device)
    with torch.no_grad():
        for tensor in [*system.parameters(), *system.buffers()]:
            for piece in tensor.view(-1).split(len(block)):
                piece.copy_(block[:len(piece)])
    if case.method == "lora":
        attach(system, AdapterConfig(RANK))
        system.to(device)
    choose_trained(system, case.method == "lora", also=("labels",) if case.method == "lora" else ())
    system.tokenizer.requires_grad_(False).eval()
    return system


def optimiser_of(case: Case, system: var.VAR) -> torch.optim.Optimizer:
    trained = [p for p in system.parameters() if p.requires_grad]
    if case.method == "full-adafactor":
        return torch.optim.Adafactor(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def batch_of(case: Case, system: var.VAR) -> tuple[list[Tensor], Tensor]:
    make = torch.Generator().manual_seed(0)
    tokens = [torch.randint(4096, (case.batch, step.rows), generator=make).to(system.device) for step in system.plan]
    return tokens, torch.randint(1000, (case.batch, 1), generator=make).to(system.device)


def loss_of(system: var.VAR, batch: tuple[list[Tensor], Tensor]) -> Tensor:
    system.train()
    with torch.autocast(system.device.type, torch.bfloat16):
        return system.loss(*batch)[0]


# The formula

@contextmanager
def kept_bytes(system: var.VAR) -> Iterator[list[int]]:
    """Bytes that autograd keeps for the backward pass beside the weights themselves."""
    own = {p.untyped_storage().data_ptr() for p in [*system.parameters(), *system.buffers()]}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    total = [0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total[0] = sum(seen.values())


def activations(case: Case, depth: int, device: str) -> int:
    system = build(replace(case, depth=depth), device)
    with kept_bytes(system) as total:
        loss_of(system, batch_of(case, system))
    return total[0]


def computed(case: Case, device: str) -> dict[str, float]:
    """Bytes of weights, optimiser, gradients and activations, and their peak by the formula."""
    with torch.device("meta"):
        system = build_counts(case)
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in [*system.parameters(), *system.buffers()])
    one, two = (activations(case, depth, device) for depth in (1, 2))
    found = {"weights": weights, "gradients": 4 * trained,
             "optimiser": 0 if case.method == "full-adafactor" else 8 * trained,
             "activations": one + (system.config.generator.depth - 1) * (two - one), "trained": trained}
    return {**found, "peak": found["weights"] + found["optimiser"] + max(found["gradients"], found["activations"])}


def build_counts(case: Case) -> var.VAR:
    """The system's parameters without their memory."""
    system = var.VAR(var.preset_config(case.model))
    if case.method == "lora":
        for part in network(system).values():
            part.to(torch.bfloat16)
        attach(system, AdapterConfig(RANK))
    choose_trained(system, case.method == "lora", also=("labels",) if case.method == "lora" else ())
    system.tokenizer.requires_grad_(False)
    return system


# Measuring

def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def warm_up(case: Case, device: str) -> None:
    """A step of the smallest model, so that what libraries take once is not counted as the model's."""
    small = replace(var.preset_config("var-d16"), generator=VARGeneratorConfig.of_depth(1))
    system = var.VAR(small).to(device)
    if case.method == "lora":
        attach(system, AdapterConfig(1))
    batch = batch_of(replace(case, batch=1), system)
    loss_of(system, batch).backward()
    optimiser_of(case, system).step()
    del system, batch
    gc.collect()


def measure(case: Case, steps: int, device: str) -> dict[str, Any]:
    """Peak memory and seconds a step of a case, in this process."""
    cuda = device.startswith("cuda")
    warm_up(case, device)
    before = 0 if cuda else resident("VmRSS")
    system = build(case, device)
    optimiser, batch = optimiser_of(case, system), batch_of(case, system)
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    times, walls, losses = [], [], []
    for _ in range(steps):
        processor, wall = time.process_time(), time.perf_counter()
        loss = loss_of(system, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if cuda:
            torch.cuda.synchronize()
        times.append(time.process_time() - processor)
        walls.append(time.perf_counter() - wall)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    # The first step warms up caches; it counts where it is the only one.
    return {"peak": peak, "seconds": min(walls if cuda else times), "wall": min(walls), "losses": losses}


def in_process(name: str, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """A case in a process of its own, which ends with all its memory."""
    done = subprocess.run([sys.executable, __file__, "--run", name, "--case", json.dumps(asdict(case)), "--device",
                           arguments.device, "--steps", str(arguments.steps)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(case: Case, rough: dict[str, float], found: dict[str, Any] | None) -> str:
    parts = [case.model, case.method, str(case.batch), f"{rough['trained'] / 1e6:.1f} M",
             *(f"{rough[name] / GB:.2f}" for name in ("weights", "optimiser", "gradients", "activations", "peak"))]
    parts += ["not run", ""] if found is None else [f"{found['peak'] / GB:.2f}", f"{1 / found['seconds']:.3f}"]
    return "| " + " | ".join(parts) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["var-d16", "var-d30"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--most-gb", type=float, default=10.0, help="run no case that the formula puts above this")
    parser.add_argument("--steps", type=int, default=2, help="at least 2, so that the optimiser's state is there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=["computed", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        case = Case(**json.loads(arguments.case))
        found = computed(case, arguments.device) if arguments.run == "computed" else measure(
            case, arguments.steps, arguments.device)
        print(json.dumps(found))
        return
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else \
        f"{torch.get_num_threads()} thread(s) of a CPU, bf16"
    print(f"{where}, torch {torch.__version__}, adapters of rank {RANK}; GB are 10^9 bytes\n")
    print("| model | method | batch | trained | weights | optimiser | gradients | activations | peak, computed | "
          "peak, measured | steps a second |\n" + "| --- " * 11 + "|")
    table = []
    for model in arguments.models:
        for method in arguments.methods:
            for batch in arguments.batches:
                case = Case(model, method, batch)
                rough = in_process("computed", case, arguments)
                runs = rough["peak"] <= arguments.most_gb * GB
                found = in_process("measure", case, arguments) if runs else None
                print(row(case, rough, found), flush=True)
                table.append({**asdict(case), "computed": rough, "measured": found})
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
