"""Figures of a benchmark as text."""
from __future__ import annotations

from typing import Any

from nextscale.evaluation.bench.recorder import PHASES


def report(result: dict[str, Any]) -> str:
    """What ``measure`` or ``count`` found, as tables."""
    lines = [_head(result)]
    if "contestants" in result:
        lines += ["", *_seconds(result), *_comparison(result)]
    for dtype, works in result["work"].items():
        for name, work in works.items():
            lines += ["", *_work(result, dtype, name, work)]
        if len(works) > 1:
            lines += ["", _hooks_ratio(dtype, works)]
    return "\n".join(lines)


def _head(result: dict[str, Any]) -> str:
    grids = ",".join(str(h) if h == w else f"{h}x{w}" for h, w in result["schedule"])
    weights = "random weights" if result["random_weights"] else "its weights"
    text = f"{result['model']}, {weights}, {result['batch']} picture(s), scales {grids}"
    text += "".join(f", --hook '{hook}'" for hook in result["hooks"])
    if "machine" not in result:
        return text
    found = result["machine"]
    where = found["gpu"] if "gpu" in found else (
        f"{found['cpu']}, {found['capability']}, AMX {'yes' if found['amx'] else 'no'}, {found['threads']} threads")
    return (f"{text}\n{where}, torch {found['torch']}, {result['clock']} clock, median of {result['repeats']}, "
            f"load {found['load']:.1f}")


def _seconds(result: dict[str, Any]) -> list[str]:
    taking_part = result["contestants"]
    wide = max(map(len, taking_part)) + 1
    shown = [name for name in PHASES if any(name in one.get("phases", {}) for one in taking_part.values())]
    lines = [f"{'seconds':{wide}s}" + "".join(f"{name:>10s}" for name in (*shown, "total", "faster")) + "  spread"]
    for name, one in taking_part.items():
        phases = one.get("phases")
        cells = [f"{phases.get(phase, 0.0):10.3f}" if phases else f"{'':10s}" for phase in shown]
        lowest, highest = one["spread"]
        lines.append(f"{name:{wide}s}" + "".join(cells) + f"{one['seconds']:10.3f}{one['faster']:9.2f}x"
                     f"  {lowest:.3f} to {highest:.3f}, first {one['first_seconds']:.3f}")
    clocks = [one["overhead"] for one in taking_part.values() if "overhead" in one]
    if clocks:
        lines.append(f"totals are of draws without a clock; the clocks inside add {max(clocks):+.1%} at most")
    for name, one in taking_part.items():
        line = (f"{name}: {one['pictures_per_second']:.2f} pictures a second, {one['loop'] * 1e3:,.1f} ms before the "
                "decoder")
        share = result["floor"]["shares"].get(name)
        if share is not None:
            line += (f"; the {share['of']} takes {share['seconds'] * 1e3:,.1f} ms, {share['share']:.1%} of the rate of "
                     "large products")
        lines.append(line)
    for name, one in taking_part.items():
        if "peak_bytes" in one:
            peaks = ", ".join(f"{phase} {size / 1e6:,.0f}" for phase, size in one["peak_bytes"].items())
            lines.append(f"peak MB on the device, {name}: {peaks}")
    return lines


def _comparison(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, one in result["contestants"].items():
        if "against" not in one:
            continue
        other = one["against"]
        tokens, psnr = other["tokens"], other["psnr"]
        share = f"{tokens['equal']:,} of {tokens['of']:,} tokens equal"
        if tokens["first_step"] is not None:
            share += f", the first that differs is in step {tokens['first_step'] + 1}"
        lines.append(f"{name} against {other['name']}: {other['faster']:.2f} times as fast; {share}; "
                     + ("equal pictures" if psnr is None else f"PSNR {psnr:.1f} dB"))
    return ["", *lines] if lines else []


def _work(result: dict[str, Any], dtype: str, name: str, work: dict[str, Any]) -> list[str]:
    contestant = next((c for c in result.get("floor", {}).get("seconds", {})
                       if c.endswith(f" {dtype}") and (c.startswith("hooks") == (name == "hooks"))), None)
    floors = result["floor"]["seconds"][contestant] if contestant else {}
    by_itself = any("alone" in floor for floor in floors.values())
    head = f"{'work ' + name + ' ' + dtype:20s}{'GFLOP':>12s}{'GB':>10s}"
    if floors:
        head += f"{'arithmetic':>12s}{'bandwidth':>12s}{'floor s':>10s}{'time/floor':>12s}"
        head += f"{'alone s':>10s}" if by_itself else ""
    alive = work["alive"]
    lines = [head + f"{'MB alive':>10s}"]
    for phase in [phase for phase in PHASES if phase in work["flops"] or phase in alive] + ["total"]:
        line = f"{phase:20s}{work['flops'].get(phase, 0) / 1e9:12.2f}{work['bytes'].get(phase, 0) / 1e9:10.3f}"
        if floors:
            floor = floors.get(phase)
            line += (f"{floor['arithmetic']:12.4f}{floor['bandwidth']:12.4f}{floor['floor']:10.4f}"
                     f"{floor['ratio']:12.2f}" if floor else f"{'':46s}")
            line += f"{floor['alone'] if floor else 0.0:10.4f}" if by_itself else ""
        most = max(alive.values(), default=0) if phase == "total" else alive.get(phase, 0)
        lines.append(line + f"{most / 1e6:10.1f}")
    before = max((size for phase, size in alive.items() if phase != "decode"), default=0)
    rows = ", ".join(f"{kind} {rows:,}" for kind, rows in work["rows"].items())
    lines.append(f"token-layer evaluations: {rows}; visible pairs: {work['pairs']:,}"
                 + (f" of {work['computed_pairs']:,} computed" if work["computed_pairs"] != work["pairs"] else "")
                 + f"; memory: {work['memory'] / 1e6:,.1f} MB; weights: {work['weights'] / 1e6:,.1f} MB; most alive "
                   f"beside them before decoding: {before / 1e6:,.1f} MB")
    if floors:
        rates = result["floor"]["rates"]
        lines.append("rates: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {kind}" for kind, rate in rates.items())
                     + f", {result['floor']['bandwidth'] / 1e9:.1f} GB/s")
    return lines


def _hooks_ratio(dtype: str, works: dict[str, Any]) -> str:
    plain, hooks = works["plain"], works["hooks"]

    def ratio(of: Any) -> str:
        return f"{of(hooks) / of(plain):.3f}" if of(plain) else "-"

    def network(work: dict[str, Any]) -> float:
        return float(sum(work["flops"].get(phase, 0) for phase in ("attention", "scan", "mlp", "network")))

    return (f"hooks over plain, {dtype}: FLOPs {ratio(lambda w: w['flops']['total'])} (network {ratio(network)}), "
            f"token-layer evaluations {ratio(lambda w: sum(w['rows'].values()))}, "
            f"visible pairs {ratio(lambda w: w['pairs'])}, memory {ratio(lambda w: w['memory'])}, "
            f"most alive {ratio(lambda w: max(w['alive'].values(), default=0))}")
