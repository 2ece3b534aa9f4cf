"""A tokenizer on some of its own scales, with the weights that it has."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nextscale.hub import WithoutInitialisation
from nextscale.tokenizers.multiscale_vq import phi_table
from nextscale.tokenizers.tokenizer import Tokenizer

A_SCALE = ("usage_KV", "ones_KC", "seen_K")
"""The records that hold a row a scale."""


def on_steps(tokenizer: Tokenizer, steps: Sequence[int]) -> Tokenizer:
    """A copy whose schedule has some of the scales alone, by number, coarse to fine.

    A code means what it meant at its grid: which phi a scale passes through hangs on its place in the schedule, so
    where another schedule would give it another one, the copy has one phi a scale, each the one that its grid had. What
    the dropped scales coded is left to the next one, for which neither codebook nor phi were trained.
    """
    config, kind = tokenizer.config, tokenizer.config.kind
    table = phi_table(len(config.grids), config.phi_count)
    chosen, found = [table[k] for k in steps], tokenizer.state_dict()
    tensors: dict[str, Tensor] = {name: value[list(steps)] if name.endswith(A_SCALE) else value
                                  for name, value in found.items()}
    own = kind == "vq" and chosen != list(phi_table(len(steps), config.phi_count))
    if own or (kind == "vq" and config.phi_count == 0):
        tensors = {name: value for name, value in tensors.items() if not name.startswith("quantiser.phis.")}
        for j, phi in enumerate(chosen):
            for last in ("weight", "bias"):
                tensors[f"quantiser.phis.{j}.{last}"] = found[f"quantiser.phis.{phi}.{last}"]
    with WithoutInitialisation():
        shorter = Tokenizer(replace(config, grids=tuple(config.grids[k] for k in steps),
                                    phi_count=0 if own else config.phi_count))
    shorter.load_state_dict(tensors)
    return shorter.to(next(tokenizer.parameters()).device).eval()
