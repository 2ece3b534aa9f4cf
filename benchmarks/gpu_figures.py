"""Every figure of docs/speed.md that wants a GPU, by one command that can be stopped and goes on.

    python benchmarks/gpu_figures.py --out runs/gpu [--minutes 9] [--only tests bench-d16 ...] [--list]

Runs the commands below one after the other, the most wanted first, each as a process of its own whose output goes to
``NAME.log``; a command that ended well leaves ``NAME.done`` and is skipped the next time. With ``--minutes`` none
begins that late, and one that is under way then is stopped. Raises nothing: what failed is told at the end, with the
status 1.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCH = [sys.executable, "-m", "nextscale", "bench", "--purpose", "fid", "--device", "cuda"]
SCRIPTS = Path(__file__).parent

COMMANDS: dict[str, list[str]] = {
    "tests": [sys.executable, "-m", "pytest", "-q", "-n", "0", str(SCRIPTS.parent / "tests" / "test_cuda.py")],
    "var-d16": [*BENCH, "--model", "var-d16", "--dtype", "bf16", "--compare", "baseline-bf16", "--graphs"],
    "var-d30": [*BENCH, "--model", "var-d30", "--dtype", "bf16", "--graphs"],
    "var-d16-batch-64": [*BENCH, "--model", "var-d16", "--dtype", "bf16", "--batch", "64", "--graphs"],
    "var-d16-compiled": [*BENCH, "--model", "var-d16", "--dtype", "bf16", "--graphs", "--compile"],
    "var-d16-batch-64-compiled": [*BENCH, "--model", "var-d16", "--dtype", "bf16", "--batch", "64", "--compile"],
    "var-d30-batch-64": [*BENCH, "--model", "var-d30", "--dtype", "bf16", "--batch", "64", "--graphs"],
    "code": [sys.executable, str(SCRIPTS / "code_speed.py"), "--device", "cuda", "--batch", "64"],
    "code-batch-1": [sys.executable, str(SCRIPTS / "code_speed.py"), "--device", "cuda", "--batch", "1"],
    "infinity": [sys.executable, str(SCRIPTS / "infinity_speed.py"), "--device", "cuda", "--depths", "8", "16",
                 "--hook", "fastvar ratio=[0.4,0.5,1,1] full_blocks=[0,0]", "--hook", "scalekv share=0.1",
                 "--hook", "hack heads=halves compression=0.7", "--hook", "litevar window=0.5", "--hook", "softcfg"],
    "raster": [sys.executable, str(SCRIPTS / "var_against_raster.py"), "--device", "cuda", "--dtype", "bf16",
               "--batch", "8"],
    "training": [sys.executable, str(SCRIPTS / "training_speed.py"), "--device", "cuda"],
}
"""By name, the most wanted first; what the compiler may take minutes for stands by itself."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="to end in")
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), help="these alone")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    given = parser.parse_args(arguments)
    chosen = {name: COMMANDS[name] for name in given.only or COMMANDS}
    if given.list:
        print("\n".join(f"{name}: {' '.join(command)}" for name, command in chosen.items()))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * given.minutes, []
    for name, command in chosen.items():
        done, left = given.out / f"{name}.done", end - time.monotonic()
        if done.is_file():
            print(f"{name}: done before", flush=True)
            continue
        if left <= 0:
            print(f"{name}: no time left; run the same command to go on", flush=True)
            continue
        began = time.monotonic()
        with open(given.out / f"{name}.log", "w", encoding="utf-8") as log:
            try:
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False,
                                        timeout=None if left == float("inf") else left).returncode
            except subprocess.TimeoutExpired:
                status = -1
        print(f"{name}: {'done' if status == 0 else 'failed'} after {time.monotonic() - began:.0f} s, see "
              f"{log.name}", flush=True)
        if status:
            failed.append(name)
        else:
            done.touch()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
