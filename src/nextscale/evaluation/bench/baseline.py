"""The published loop as a contestant: with a model's own weights and random numbers."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.errors import InputError
from nextscale.evaluation.bench.published_loop import PublishedLoop, Sizes
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.systems.var import VAR
from nextscale.tokenizers.multiscale_vq import phi_table


def sizes_of(system: Any) -> Sizes:
    """The baseline's sizes for a model. Raises InputError for one that the published loop doesn't draw."""
    if type(system) is not VAR:
        raise InputError(f"--compare baseline: the baseline is VAR's published loop, the model is a "
                         f"{system.config.slug}; leave it out")
    tokenizer, generator = system.config.tokenizer, system.config.generator
    auto = tokenizer.autoencoder
    plain = (generator.l2_attention and generator.mlp_ratio == 4 and tokenizer.kind == "vq"
             and tokenizer.phi_ratio == 0.5 and auto.attention in ("level", "middle") and auto.latent_kernel == 3
             and auto.features == auto.latent_width and all(h == w for h, w in tokenizer.grids)
             and len(tokenizer.grids) > 1)
    if not plain:
        raise InputError("--compare baseline: the baseline has the published models' parts (l2 attention, MLPs of "
                         "four times the width, residual codes, square scales), this model has others; leave it out")
    return Sizes(tuple(h for h, _ in tokenizer.grids), generator.depth, generator.width, generator.heads,
                 tuple(system.config.classes), tokenizer.vocabulary, auto.latent_width,
                 phi_table(len(tokenizer.grids), tokenizer.phi_count), auto.width, auto.multipliers,
                 auto.decoder_blocks, auto.groups, auto.attention == "level", generator.shared_modulation)


def check_settings(used: Any) -> None:
    """Raises InputError for sampling settings that the published loop doesn't have."""
    if used.guidance_schedule != "ramp" or used.smooth:
        raise InputError("--compare baseline: the published loop has a guidance ramp and draws codes; leave other "
                         "settings out")


def baseline_of(system: VAR) -> PublishedLoop:
    """The baseline with the same weights (shared where their memory layout is the default one)."""
    baseline = PublishedLoop(sizes_of(system)).eval()
    own = baseline.state_dict()
    theirs = {name: tensor.contiguous() for name, tensor in system.state_dict().items() if name in own}
    baseline.load_state_dict(theirs, assign=True)
    return baseline


def uniforms_of(plan: Plan, seeds: list[int], device: torch.device | str = "cpu") -> list[Tensor]:
    """The numbers that the library draws codes with, (B, L_k) a step."""
    noise = Keyed.from_seeds(seeds, device)
    step, cells = plan.step_of_row[None].to(device), plan.cells[None].to(device)
    spans = [plan.span(k, k + 1) for k in range(len(plan))]
    return [noise.uniform("token", step[:, span], 0, cells[:, span])[..., 0] for span in spans]


@torch.no_grad()
def liven(system: Any) -> Any:
    """Random weights under which no part of a VAR is negligible and the distributions over codes are not flat.

    Fresh weights have gates near 0 and a head near 0: tokens would hardly depend on the blocks.
    """
    if isinstance(system, VAR):
        for name, tensor in system.named_parameters():
            if name.startswith("generator.blocks") and name.endswith("modulation.weight"):
                tensor.mul_(0.5)
        system.head.weight.mul_(4)
        for table in system.labels.tables:
            table.get_parameter("weight").mul_(0.5)
    return system
