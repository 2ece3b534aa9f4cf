"""Small models and small real pictures that the tests of the core share."""
from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from importlib.resources import files

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor, nn

from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassCondition
from nextscale.generators.var import VARGeneratorConfig
from nextscale.heads.categorical import Filter, Guidance
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig

AUTOENCODER = AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle")
GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
CLASSES = 5
PHRASES = ("red apple, flat style", "grinning face, 3d style", "sunflower", "flag of France", "an owl, noto style",
           "blue car", "house, gradient style", "a soccer ball")
"""What the model that ships is asked for."""


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part of the network matters, unlike those of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)


def tiny_var(grids: tuple[tuple[int, int], ...] = GRIDS, seed: int = 0, classes: tuple[int, ...] = (CLASSES,),
             phi_count: int = 4, vocabulary: int = 32, depth: int = 2, **generator: object) -> VAR:
    """A filled VAR on pictures of four times its last grid (16x16 by default)."""
    config = VARConfig(TokenizerConfig(AUTOENCODER, grids, vocabulary, phi_count),
                       VARGeneratorConfig.of_depth(depth, width=48, heads=3, **generator), classes,
                       settings={"pictures": Settings(guidance_scale=2.0, top_k=20, top_p=0.95)})
    system = VAR(config).eval()
    fill(system, seed)
    return system


@cache
def emoji(count: int = 8, size: int = 16, held_out: bool = False) -> Tensor:
    """Shipped pictures spread over the set, (count, 3, size, size) in [-1, 1]."""
    path = str(files("nextscale").joinpath("data").joinpath("emoji").joinpath("emoji-64.parquet"))
    table = parquet.read_table(path, columns=["image", "concept_split"])
    rows = [i for i, split in enumerate(table["concept_split"].to_pylist()) if (split == "test") == held_out]
    pictures = []
    for i in rows[::max(1, len(rows) // count)][:count]:
        image = Image.open(io.BytesIO(table["image"][i].as_py()["bytes"])).convert("RGB")
        pictures.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def labels(pictures: int) -> Tensor:
    """Different labels, (B, 1)."""
    return (torch.arange(pictures) % CLASSES)[:, None]


def random_tokens(plan: Plan, pictures: int, vocabulary: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (pictures, step.rows), generator=generator) for step in plan]


def start(system: VAR, plan: Plan, guidance: Guidance, pictures: int = 2, seed: int = 0) -> Run:
    """A run at step 0 under any plan of the model's steps."""
    return Run.start(plan, system.tokenizer.quantiser, ClassCondition(system.labels, labels(pictures)),
                     guidance.branches, Keyed.from_seeds(range(seed, seed + pictures)), pictures)


def step_logits(system: VAR, plan: Plan, tokens: list[Tensor], guidance: Guidance, filters: tuple[Filter, ...] = (),
                each: Callable[[Run, Tensor], None] | None = None) -> tuple[Tensor, Run]:
    """Logits of the step loop, with its memory, when it is given tokens to follow: (B, L, V)."""
    from nextscale.sampling.steps import evaluator

    run, found = start(system, plan, guidance, len(tokens[0])), []
    with torch.no_grad():
        for given in tokens:
            call = system.generator.call(run)
            hidden = evaluator(system.generator, run, check=True)(call)
            outputs = system.head.outputs(hidden[:, call.predicts], run.branches)
            found.append(system.head.distribution(outputs, run.at, guidance, filters))
            run.force(given)
    return torch.cat(found, 1), run


def empty_canvas(system: VAR, pictures: int, plan: Plan | None = None) -> Canvas:
    return Canvas.empty(plan or system.plan, system.tokenizer.quantiser, pictures)
