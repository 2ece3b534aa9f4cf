"""Cold start: what a fresh process takes to import the library and to draw its first picture."""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from nextscale.errors import InputError
from nextscale.sampling.generation import Progress
from nextscale.systems import folders

_SCRIPT = """
import json, sys, time
now = time.process_time if sys.argv[3] == "cpu" else time.perf_counter
marks = [now()]
import nextscale
marks.append(now())
import torch
marks.append(now())
system = nextscale.load(sys.argv[1], device=sys.argv[2])
marks.append(now())
system.generate(count=1, seed=0, progress=False, output="numpy")
marks.append(now())
parts = [after - before for before, after in zip(marks, marks[1:])]
print(json.dumps({**dict(zip(("import", "torch", "model", "draw"), parts)), "first_picture": sum(parts)}))
"""


def measure_cold(model: str, device: str, threads: int | None, repeats: int, clock: str = "wall") -> dict[str, Any]:
    """Seconds in a fresh process, medians: ``import`` of nextscale; then ``torch``, ``model`` and ``draw``, one
    picture; ``first_picture``, all of these together. clock: ``wall`` or ``cpu``, the processor's time of all threads,
    for a machine that others use. Raises InputError where there is no such model, or the process fails.
    """
    folders.model_config(model)
    found = []
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with Progress(repeats, "starting", None) as bar:
        for _ in range(repeats):
            done = subprocess.run([sys.executable, "-c", _SCRIPT, model, device, clock], capture_output=True, text=True,
                                  check=False, env=environment)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise InputError(f"--cold: the process that draws with {model!r} failed ({reason})")
            found.append(json.loads(done.stdout.splitlines()[-1]))
            bar.advance()
    return {"model": model, "device": device, "threads": threads, "repeats": repeats, "clock": clock,
            "load": os.getloadavg()[0],
            "seconds": {name: statistics.median(one[name] for one in found) for name in found[0]}}


def report_cold(result: dict[str, Any]) -> str:
    """The figures as text."""
    s = result["seconds"]
    return "\n".join([
        f"{result['model']} in a fresh process, median of {result['repeats']}, {result['clock']} clock, load "
        f"{result['load']:.1f}",
        f"import nextscale  {s['import']:7.2f} s",
        f"first picture     {s['first_picture']:7.2f} s: torch {s['torch']:.2f}, the model {s['model']:.2f}, drawing "
        f"{s['draw']:.2f}"])
