"""``nextscale bench``: one model, drawn by contestants that take turns, counted, and held against the machine."""
from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Hook
from nextscale.devices import choose_device
from nextscale.errors import InputError
from nextscale.evaluation.bench import machine
from nextscale.evaluation.bench.baseline import baseline_of, check_settings, sizes_of, uniforms_of
from nextscale.evaluation.bench.clock import Clock, CudaPeaks, now_of, wait_for
from nextscale.evaluation.bench.drawing import (
    Drawing,
    Settings,
    config_of,
    count_plan,
    count_run,
    has_random_weights,
    open_model,
)
from nextscale.evaluation.bench.recorder import TRANSFORMER, Recorder, recorded, recorded_baseline, recorded_outside
from nextscale.evaluation.bench.work import Work, alone
from nextscale.sampling.generation import Progress
from nextscale.sampling.graphs import CapturedSteps
from nextscale.systems import folders


@dataclass
class Contestant:
    """Who takes part: draws under a recorder, and gives tokens and pictures."""

    name: str
    dtype: str
    draw: Callable[[Recorder | None], tuple[list[Tensor], Tensor]]
    looks_inside: bool = True
    tokens: list[Tensor] = field(default_factory=list)
    pictures: Tensor | None = None
    first: float = 0.0
    totals: list[float] = field(default_factory=list)
    clocked: list[dict[str, float]] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)


# Contestants

def ours(name: str, dtype: str, system: Any, drawing: Drawing, hooks: Sequence[Hook] = ()) -> Contestant:
    """The library itself, nothing switched on or off for the benchmark."""
    def draw(recorder: Recorder | None) -> tuple[list[Tensor], Tensor]:
        if recorder is None:
            return drawing(system, hooks)
        with recorded(system, recorder), recorder.phase("other"):
            return drawing(system, hooks)

    return Contestant(name, dtype, draw)


def opaque(name: str, dtype: str, system: Any, drawing: Drawing, hooks: Sequence[Hook] = ()) -> Contestant:
    """The library with steps whose inner phases can't be told apart, as they are captured or compiled."""
    def draw(recorder: Recorder | None) -> tuple[list[Tensor], Tensor]:
        if recorder is None:
            return drawing(system, hooks)
        with recorded_outside(system, recorder):
            return drawing(system, hooks)

    return Contestant(name, dtype, draw, looks_inside=False)


def compiled(system: Any) -> Any:
    """The same with the network and the decoder compiled."""
    twin = copy.deepcopy(system, {id(p): p for p in (*system.parameters(), *system.buffers())})
    twin.compile_networks()
    return twin


def published(name: str, system: Any, drawing: Drawing) -> Contestant:
    """The published loop in float32, or with ``baseline-bf16`` under autocast, with the same weights and numbers."""
    baseline, used = baseline_of(system), system.settings_for(drawing.given.purpose, drawing.given.settings)
    check_settings(used)
    device, labels = system.device, torch.tensor(drawing.labels, device=system.device)
    uniforms = uniforms_of(system.plan, drawing.seeds, device)

    def draw(recorder: Recorder | None) -> tuple[list[Tensor], Tensor]:
        cast = torch.autocast(device.type, torch.bfloat16) if name.endswith("bf16") else nullcontext()
        with cast, ExitStack() as stack:
            told = {} if recorder is None else {"phase": recorder.phase}
            if recorder is not None:
                stack.enter_context(recorded_baseline(baseline, recorder))
            pictures, tokens = baseline.sample(labels, uniforms, used.guidance_scale - 1, used.top_k, used.top_p,
                                               used.temperature, **told)
            return tokens, pictures.float()

    return Contestant(name, "bf16" if name.endswith("bf16") else "fp32", draw)


def contestants(given: Settings, system: Any, drawing: Drawing, hooks: Sequence[Hook]
                ) -> tuple[list[Contestant], dict[str, Any]]:
    """Who takes turns, the one that the others are compared with first; and the models by number format."""
    wanted = list(dict.fromkeys(given.dtypes))
    found = [published(name, system, drawing) for name in given.compare if name != "plain"]
    # The float32 weights are copied only where somebody still needs them.
    models = {dtype: system if dtype == "fp32" else
              (copy.deepcopy(system) if found or len(wanted) > 1 else system).to_precision(dtype) for dtype in wanted}
    for dtype, model in models.items():
        if "plain" in given.compare:
            found.append(ours(f"plain {dtype}", dtype, model, drawing))
        found.append(ours(f"{'hooks' if hooks else 'nextscale'} {dtype}", dtype, model, drawing, hooks))
        if given.graphs:
            found.append(opaque(f"captured {dtype}", dtype, model, drawing, [*hooks, CapturedSteps()]))
        if given.compile:
            twin = compiled(model)
            found.append(opaque(f"compiled {dtype}", dtype, twin, drawing, hooks))
            if given.graphs:
                found.append(opaque(f"compiled-captured {dtype}", dtype, twin, drawing, [*hooks, CapturedSteps()]))
    return found, models


# Measuring

def take_turns(taking_part: Sequence[Contestant], given: Settings, device: torch.device) -> None:
    """Rounds in which everybody draws once unwatched, for the seconds, and once with a clock in it, for the phases."""
    now = now_of(given.clock, torch.get_num_threads())
    with Progress(len(taking_part) * (1 + 2 * given.repeats), "measuring", None) as bar:
        for one in taking_part:
            began = now()
            one.tokens, one.pictures = one.draw(None)
            wait_for(device)
            one.first = now() - began
            bar.advance()
        for _ in range(given.repeats):
            for one in taking_part:
                gc.collect()
                wait_for(device)
                began = now()
                one.draw(None)
                wait_for(device)
                one.totals.append(now() - began)
                bar.advance()
            for one in taking_part:
                gc.collect()
                wait_for(device)
                clock = Clock(now, device)
                one.draw(clock)
                one.clocked.append(clock.stop())
                bar.advance()
        for one in taking_part if device.type == "cuda" else ():
            gc.collect()
            peaks = CudaPeaks(device)
            one.draw(peaks)
            peaks.switch()
            one.peaks = dict(peaks.peaks)


def measure(given: Settings, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """All figures as a dictionary; seconds are medians over rounds in which the contestants take turns.

    compare: ``baseline`` is the published loop on the same weights, ``baseline-bf16`` the same under autocast,
    ``plain`` the run without the hooks. Ratios are the medians of the rounds' ratios to the first contestant. hooks:
    those that ``given.hooks`` name. Raises InputError where a model or its hooks can't be drawn so.
    """
    device = choose_device(given.device)
    with threads_set(given.threads):
        config = config_of(given)
        if config is None:
            system = open_model(given)
            config = system.config
            drawing, plans = Drawing(given, config), dict.fromkeys(given.dtypes)
        else:
            drawing = Drawing(given, config)
            if any(name != "plain" for name in given.compare):
                check_baseline(given, config)
            plans = {dtype: None if hooks else count_plan(given, config, drawing, dtype)
                     for dtype in dict.fromkeys(given.dtypes)}
            system = open_model(given)
        taking_part, models = contestants(given, system, drawing, hooks)
        take_turns(taking_part, given, device)
        works = {dtype: _works(models[dtype], plans[dtype], drawing, hooks) for dtype in models}
        result: dict[str, Any] = {
            "model": given.model, "random_weights": has_random_weights(given), "batch": given.batch,
            "schedule": [list(grid) for grid in given.schedule or config.tokenizer.grids],
            "hooks": list(given.hooks), "purpose": given.purpose, "settings": given.settings,
            "repeats": given.repeats, "clock": given.clock,
            "machine": machine.describe(device, torch.get_num_threads()),
            "contestants": {one.name: _figures(one, taking_part) for one in taking_part},
            "work": {dtype: {name: work.describe() for name, work in found.items()} for dtype, found in works.items()}}
        result["floor"] = _floors(given, works, taking_part, device)
        return result


def count(given: Settings, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """The counts of ``measure`` alone, by shapes without weights where that will do: they hang on no machine."""
    config = config_of(given)
    system = open_model(given) if config is None or hooks else None
    config = config or getattr(system, "config", None)
    assert config is not None
    drawing, works = Drawing(given, config), {}
    for dtype in dict.fromkeys(given.dtypes):
        plan = None if hooks else count_plan(given, config, drawing, dtype)
        if plan is None:
            system = system or open_model(given)
            model = copy.deepcopy(system).to_precision(dtype) if len(given.dtypes) > 1 else system.to_precision(dtype)
            works[dtype] = _works(model, plan, drawing, hooks)
        else:
            works[dtype] = {"plain": plan}
    return {"model": given.model, "random_weights": has_random_weights(given), "batch": given.batch,
            "schedule": [list(grid) for grid in given.schedule or config.tokenizer.grids], "hooks": list(given.hooks),
            "work": {dtype: {name: work.describe() for name, work in found.items()} for dtype, found in works.items()}}


def check_baseline(given: Settings, config: Any) -> None:
    """Raises InputError where the published loop doesn't draw a model, before its weights are made."""
    with torch.device("meta"):
        system = folders.build_system(config)
    sizes_of(system)
    check_settings(system.settings_for(given.purpose, given.settings))
    if given.schedule not in (None, tuple(config.tokenizer.grids)):
        raise InputError("--compare baseline: the published loop draws by the model's own schedule; leave "
                         "--schedule out")


def _works(system: Any, plan: Work | None, drawing: Drawing, hooks: Sequence[Hook]) -> dict[str, Work]:
    """By the plan, or counted from a run where it doesn't say; beside hooks both from what really ran."""
    if not hooks and plan is not None:
        return {"plain": plan}
    found = {"plain": count_run(system, drawing, ())}
    return found | {"hooks": count_run(system, drawing, hooks)} if hooks else found


def _figures(one: Contestant, taking_part: Sequence[Contestant]) -> dict[str, Any]:
    """What was measured of a contestant, and how it compares: with the run without hooks of the same format where that
    takes part, else with the first contestant."""
    figures: dict[str, Any] = {
        "dtype": one.dtype, "seconds": statistics.median(one.totals), "spread": [min(one.totals), max(one.totals)],
        "first_seconds": one.first, "faster": _faster(one, taking_part[0]),
        "pictures_per_second": len(one.tokens[0]) / statistics.median(one.totals)}
    loops = [sum(seconds for phase, seconds in taken.items() if phase != "decode") for taken in one.clocked]
    figures["loop"] = statistics.median(loops)
    if one.looks_inside:
        names = dict.fromkeys(name for taken in one.clocked for name in taken)
        figures["phases"] = {name: statistics.median(taken.get(name, 0.0) for taken in one.clocked) for name in names}
        figures["overhead"] = statistics.median(sum(taken.values()) for taken in one.clocked) / figures["seconds"] - 1
    if one.peaks:
        figures["peak_bytes"] = one.peaks
    other = next((c for c in taking_part if c.name == f"plain {one.dtype}" and one.name.startswith("hooks")),
                 taking_part[0])
    if one is not other:
        assert one.pictures is not None and other.pictures is not None
        figures["against"] = {"name": other.name, "faster": _faster(one, other),
                              "tokens": agreement(one.tokens, other.tokens), "psnr": psnr(one.pictures, other.pictures)}
    return figures


def _faster(one: Contestant, other: Contestant) -> float:
    """How many times faster than another: the median of the rounds' ratios."""
    return statistics.median(b / o for b, o in zip(other.totals, one.totals, strict=True))


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    """How many tokens are equal of all that the other has, and the step in which the first differs, None where none
    does. Behind it the two draw different pictures; steps that were left out count as different."""
    equal = [int((a == b).flatten(2).all(-1).sum()) if a.ndim > 2 else int((a == b).sum())
             for a, b in zip(ours, theirs, strict=False)]
    sizes = [t.shape[0] * t.shape[1] for t in theirs]
    equal += [0] * (len(sizes) - len(equal))
    return {"equal": sum(equal), "of": sum(sizes),
            "first_step": next((k for k, (e, n) in enumerate(zip(equal, sizes, strict=True)) if e < n), None)}


def psnr(ours: Tensor, theirs: Tensor) -> float | None:
    """Peak signal to noise of pictures (B, 3, H, W) in [-1, 1] in dB, the mean over the batch; None where all are
    equal."""
    error = (ours.float() - theirs.float()).square().flatten(1).mean(1).double()
    if not bool((error > 0).any()):
        return None
    return float((10 * torch.log10(4 / error.clamp_min(1e-12))).mean())


def _floors(given: Settings, works: dict[str, dict[str, Work]], taking_part: Sequence[Contestant],
            device: torch.device) -> dict[str, Any]:
    """The machine's rates, and for each of our own contestants the floors of its phases."""
    now = now_of(given.clock, torch.get_num_threads())
    dtypes = {dtype for found in works.values() for work in found.values() for dtype in work.dtypes}
    rates = {dtype: machine.matmul_rate(dtype, now, device) for dtype in sorted(dtypes, key=str)}
    moved = machine.bandwidth(now, device)
    floors: dict[str, Any] = {}
    shares: dict[str, Any] = {}
    for one in taking_part:
        kind = one.name.split()[0]
        if kind.startswith("baseline"):
            continue
        work = works[one.dtype]["plain" if kind == "plain" else max(works[one.dtype], key=lambda name: name == "hooks")]
        shares[one.name] = _share(one, work, rates, _figures(one, taking_part))
        if not one.looks_inside:
            continue
        names = {phase: phase for phase in work.phases} | {"total": None}
        found = {name: dict(zip(("arithmetic", "bandwidth", "floor"), work.floor(rates, moved, phase), strict=True))
                 for name, phase in names.items()}
        seconds = _figures(one, taking_part)["phases"] | {"total": statistics.median(one.totals)}
        for name, floor in found.items():
            floor["ratio"] = seconds.get(name, math.nan) / floor["floor"]
        if given.alone:
            with Progress(len(work.products), "products", None) as bar:
                by_itself = alone(work, device, lambda f: machine.median_time(f, now, 3, device), bar.advance)
            for name in found:
                found[name]["alone"] = sum(by_itself.values()) if name == "total" else by_itself.get(name, 0.0)
        floors[one.name] = found
    return {"rates": {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}, "bandwidth": moved,
            "seconds": floors, "shares": shares}


def _share(one: Contestant, work: Work, rates: Mapping[torch.dtype, float], figures: dict[str, Any]) -> dict[str, Any]:
    """Of the machine's rate of products, the share that the transformer reaches: its arithmetic at that rate over its
    seconds. Where it can't be told from the rest of the loop, both are the whole loop's, all but the decoder."""
    phases = [phase for phase in work.phases if (phase in TRANSFORMER if one.looks_inside else phase != "decode")]
    # The bandwidth has no part in this, and any number will do.
    arithmetic = sum(work.floor(rates, 1.0, phase)[0] for phase in phases)
    seconds = sum(figures["phases"].get(phase, 0.0) for phase in TRANSFORMER) if one.looks_inside else figures["loop"]
    return {"of": "transformer" if one.looks_inside else "loop", "seconds": seconds, "share": arithmetic / seconds}


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """With another number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

