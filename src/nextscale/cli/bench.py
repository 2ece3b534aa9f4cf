"""``nextscale bench``: how fast a model draws and what it costs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import InputError
from nextscale.registry import DEFAULT_MODEL


class Compare(str, Enum):
    """What stands beside the run."""

    baseline = "baseline"
    baseline_bf16 = "baseline-bf16"
    plain = "plain"


class ClockKind(str, Enum):
    """Whose seconds."""

    wall = "wall"
    cpu = "cpu"


def bench(
    model: options.Model = DEFAULT_MODEL,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn at once.")] = 1,
    dtype: Annotated[
        list[options.Precision] | None,
        typer.Option("--dtype", help="fp32, bf16 or int8. May be repeated.", show_default="fp32"),
    ] = None,
    schedule: options.Grids = None,
    hook: options.Hooks = None,
    compare: Annotated[
        list[Compare] | None,
        typer.Option(
            "--compare",
            help="baseline: VAR's published loop in fp32, baseline-bf16: under autocast, both with the same weights; "
            "plain: without the hooks. May be repeated.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Processor threads.", show_default="torch's own")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; figures are medians.")] = 5,
    clock: Annotated[
        ClockKind, typer.Option("--clock", help="cpu: time that the process was given, on a machine that others use.")
    ] = ClockKind.wall,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also draw with the network and the decoder compiled.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Also draw with steps captured as CUDA graphs; with --compile both, too.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Also time every product by itself at its own shape.")
    ] = False,
    count: Annotated[
        bool, typer.Option("--count", help="Count FLOPs, bytes and memory and measure no time; needs no weights.")
    ] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Time a fresh process instead: the import, and the first picture.")
    ] = False,
    purpose: options.PurposeOption = options.Purpose.pictures,
    guidance_scale: options.GuidanceScale = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Measure how fast a model draws, phase by phase, beside what its arithmetic and bytes take on this machine.

    Published sizes get random weights unless files are given. With --compare, contestants take turns in one process
    on the same weights and random numbers; the ratio is the median of the rounds'.

    \b
    Examples:
      nextscale bench --model var-d16 --dtype fp32 --dtype bf16 --compare baseline
      nextscale bench --model emoji-text-64 --batch 8 --hook 'fastvar ratio=0.5' --compare plain
      nextscale bench --model var-d16 --dtype bf16 --compare baseline-bf16 --graphs --compile --device cuda
      nextscale bench --model var-d30 --schedule 1,2,4,8,16,32,64 --count
      nextscale bench --cold
    """
    from nextscale import hub
    from nextscale.data.pictures_out import check_writable
    from nextscale.devices import choose_device
    from nextscale.evaluation.bench import measure as benchmark
    from nextscale.evaluation.bench.drawing import Settings
    from nextscale.evaluation.bench.report import report
    from nextscale.plan import parse_grids

    if json is not None:
        check_writable(json)
    chosen = choose_device(device)
    if count and (compare or compile_ or graphs or alone):
        raise InputError("--count measures no time: leave --compare, --compile, --graphs and --alone out")
    if cold:
        from nextscale.evaluation.bench.cold import measure_cold, report_cold

        found = measure_cold(model, str(chosen), threads, repeats, clock.value)
        text = report_cold(found)
    else:
        if (weights is None) != (tokenizer_weights is None):
            raise InputError("give --weights and --tokenizer-weights both, or neither for random weights")
        changes: dict[str, Any] = options.sampling_changes(guidance_scale, None, None, top_k, top_p, None)
        given = Settings(
            model=model,
            batch=batch,
            schedule=None if schedule is None else parse_grids(schedule),
            dtypes=tuple(one.value for one in dtype or [options.Precision.fp32]),
            device=str(chosen),
            threads=threads,
            hooks=tuple(hook or ()),
            compare=tuple(one.value for one in compare or ()),
            repeats=repeats,
            clock=clock.value,
            compile=compile_,
            graphs=graphs,
            alone=alone,
            purpose=purpose.value,
            settings=changes,
            tokenizer=tokenizer_weights,
            generator=weights,
        )
        hooks = options.make_hooks(hook)
        found = benchmark.count(given, hooks) if count else benchmark.measure(given, hooks)
        text = report(found)
    typer.echo(text)
    if json is not None:
        typer.echo(f"{hub.save_json(found, json)}: all figures")
