"""Hold the library against recorded outputs of a published implementation.

    python tests/parity/run.py tests/parity/var_tiny.json

The JSON names the published constructor arguments, the tensors' names and shapes, and what was run; the safetensors
file beside it holds inputs and outputs. Weights are made by a rule from the published names (see ``fill``) and loaded
through the code path that loads published checkpoints. One line a tensor; exit status 1 on a miss.
"""
from __future__ import annotations

import fnmatch
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Hook
from nextscale.errors import NextscaleError
from nextscale.sampling.score import hidden_states
from nextscale.systems.var import VAR, load_published, published_config
from nextscale.tokenizers import pyramid


def fill(golden: dict) -> dict[str, dict[str, Tensor]]:
    """Weights by rule, by module tag: a standard normal from the name's checksum, scaled by fan-in, through float16."""
    filled: dict[str, dict[str, Tensor]] = {}
    buffers = set(golden.get("buffers", ())) - set(golden.get("filled_buffers", ()))
    for full, shape in golden["state_dict"].items():
        if full in buffers:
            continue
        tag, bare = full.split(".", 1)
        seed = zlib.crc32((golden["hash_prefix"][tag] + bare).encode()) & 0xFFFFFFFF
        n = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            value = n / np.sqrt(np.prod(shape[1:]))
        else:
            value = 1 + 0.1 * n if bare.endswith("weight") else 0.1 * n
        value = value.astype(np.float16).astype(np.float32)
        for pattern, change in golden.get("after_fill", {}).items():
            if fnmatch.fnmatchcase(full, pattern):
                value = value * np.float32(change.get("multiply", 1)) + np.float32(change.get("add", 0))
        filled.setdefault(tag, {})[bare] = torch.from_numpy(np.ascontiguousarray(value))
    return filled


class Checks:
    """Compares tensors, printing a line for each."""

    def __init__(self, golden: dict, recorded: dict[str, Tensor]):
        self.tolerance, self.recorded = golden.get("tolerance", {}), recorded
        self.failed = 0

    def close(self, name: str, ours: Tensor) -> None:
        wanted = self.recorded[name]
        limit = self.tolerance.get(name, self.tolerance.get("default", 2e-4))
        if ours.shape != wanted.shape:
            return self._say(name, f"shape {tuple(ours.shape)} instead of {tuple(wanted.shape)}", False)
        difference = float((ours.float() - wanted.float()).abs().max())
        self._say(name, f"max difference {difference:.2e} (at most {float(limit):.0e})", difference <= float(limit))

    def tokens(self, name: str, ours: Tensor, margin: Tensor | None = None) -> bool:
        """Equal; a mismatch is allowed only where ``margin`` says both candidates lie within 1e-3."""
        wrong = ours.flatten() != self.recorded[name].flatten()
        excused = wrong & (margin.flatten() < 1e-3) if margin is not None else torch.zeros_like(wrong)
        ok = not bool((wrong & ~excused).any())
        self._say(name, f"{int(wrong.sum())} of {wrong.numel()} differ, {int(excused.sum())} of them near-ties", ok)
        return not bool(wrong.any())

    def _say(self, name: str, what: str, ok: bool) -> None:
        self.failed += not ok
        print(f"{'ok  ' if ok else 'MISS'} {name:28s} {what}")


class Margins(Hook):
    """How far the recorded token's guided logit lies below the best one, at every step."""

    def __init__(self, tokens: list[Tensor]):
        self.wanted, self.found = tokens, []

    def logits(self, logits: Tensor, at) -> Tensor:
        chosen = logits.gather(-1, self.wanted[at.step].view(*logits.shape[:2], 1))[..., 0]
        self.found.append(logits.amax(-1) - chosen)
        return logits


def check_var(golden: dict, recorded: dict[str, Tensor]) -> int:
    """Encoder, tokens, teacher-forcing inputs, reconstruction, teacher-forced logits, sampling."""
    checks, run = Checks(golden, recorded), golden["run"]
    torch.manual_seed(0)
    system = VAR(published_config(golden["constructor"]["vae"], golden["constructor"]["var"])).eval()
    weights = fill(golden)
    load_published(system, weights["vae"], weights["var"])
    steps = len(system.plan)
    with torch.no_grad():
        image = recorded["image"]
        checks.close("encoder_features", system.tokenizer.latent(image))
        found = system.tokenizer.encode(image)
        for k in range(steps):
            checks.tokens(f"tokens.{k}", found.tokens[k])
        given = [recorded[f"tokens.{k}"].long() for k in range(steps)]
        canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, len(image))
        replayed = pyramid.replay(given, canvas)
        checks.close("var_input", torch.cat([r for r in replayed.reads if r is not None], 1))
        checks.close("reconstruction", system.tokenizer.decode(replayed.canvas))
        labels = recorded["labels"] if "labels" in recorded else torch.tensor(run["labels"])
        condition = ClassCondition(system.labels, labels.view(-1, 1))
        hidden = hidden_states(system, system.plan, replayed.reads, condition, ("conditional",))
        checks.close("teacher_forced_logits", system.head(hidden))
        margins = Margins([recorded[f"greedy_tokens.{k}"].long() for k in range(steps)])
        drawn = system.generate(run["labels"], hooks=[margins], output="torch", progress=False,
                                guidance_scale=1 + run["cfg"], guidance_schedule="ramp",
                                top_k=run["top_k"] or None, top_p=run.get("top_p") or None, smooth=False)
        equal = True
        for k in range(steps):
            # Behind a near-tie that fell the other way the two runs draw different pictures.
            equal = equal and checks.tokens(f"greedy_tokens.{k}", drawn.tokens[k], margins.found[k])
        if equal:
            checks.close("greedy_image", (drawn.images + 1) / 2)
    return checks.failed


CHECKS = {"var": check_var}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    path = Path(arguments[0])
    golden = json.loads(path.read_text())
    if golden["system"] not in CHECKS:
        print(f"{path}: no check for system {golden['system']!r} yet; there are {', '.join(CHECKS)}")
        return 2
    try:
        failed = CHECKS[golden["system"]](golden, load_file(path.with_suffix(".safetensors")))
    except NextscaleError as error:
        print(f"MISS {path}: {error}")
        return 1
    print(f"{path.name}: {failed} missed" if failed else f"{path.name}: everything agrees")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
