"""A family of runs for a scaling law: one recipe, many sizes by depth, each measured on the same held-out tokens.

Sizes follow the published rule of VAR (arXiv 2404.02905, section 4.1): width = 64 depth and as many heads as blocks;
another width a head makes small families.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nextscale import hub
from nextscale.configuration import build
from nextscale.data.token_buckets import BUCKETS
from nextscale.errors import InputError
from nextscale.systems import folders
from nextscale.systems.system import System
from nextscale.training.generator_recipe import GeneratorTraining, train_generator, whole_batch
from nextscale.training.journal import read_metrics
from nextscale.training.token_recipe import training_tokens
from nextscale.training.tokenizer_recipe import load_tokenizer

HELD_OUT_LOSS = "held_out/nats_per_token"
TABLES = ("start", "position")


class Member(NamedTuple):
    """One size of a family: its name, folder and recipe."""

    name: str
    out: Path
    recipe: dict[str, Any]


def members(recipe: Mapping[str, Any], depths: Sequence[int], out: Path, width_a_head: int = 64,
            seeds: Sequence[int] = (0,)) -> list[Member]:
    """The runs of a family. Raises InputError for depths that repeat or aren't positive."""
    if len(set(depths)) != len(depths) or min(depths, default=0) < 1:
        raise InputError(f"depths are {list(depths)}; give different ones, each at least 1")
    found = []
    for depth in depths:
        for seed in seeds:
            one: dict[str, Any] = copy.deepcopy(dict(recipe))
            one["generator"] = {**one.get("generator", {}), "depth": depth, "width": width_a_head * depth,
                                "heads": depth, "drop_path": 0.1 * depth / 24}
            one["train"] = {**one.get("train", {}), "seed": seed}
            name = f"depth-{depth}" if len(seeds) == 1 else f"depth-{depth}-seed-{seed}"
            found.append(Member(name, out / "runs" / name, one))
    return found


def train_member(member: Member) -> dict[str, Any]:
    """Train one size, going on from where it was stopped, measure it, and write ``scaling.json`` beside it.

    Returns what that file holds: name, parameters (N without embeddings), tokens_a_step, dataset_tokens, seed, the
    held-out curve, and of the finished model, on all held-out pictures: loss and error (share of wrong guesses) over
    all scales and over the last.

    Raises InputError where there are no held-out pictures, or none was measured on the way, and where a signal stopped
    the training: half a run must not be measured as a whole one, nor the next be begun.
    """
    path = member.out / "scaling.json"
    if path.is_file():
        return hub.read_json(path)
    wanted = build(GeneratorTraining, member.recipe, "recipe")
    if wanted.data.largest_ratio > 1 or (wanted.tokens and Path(wanted.tokens, wanted.data.split, BUCKETS).is_file()):
        raise InputError("recipe: a scaling law counts the tokens of pictures of one shape; leave data.largest_ratio "
                         "at 1, and name tokens without buckets")
    done = train_generator(member.recipe, member.out, resume=True)
    if done.stopped == "signal":
        raise InputError(f"{member.name} was stopped after step {done.step}; run the same command to go on")
    system = folders.load(member.out / "model")
    curve = [(record["step"], record[HELD_OUT_LOSS]) for record in read_metrics(member.out) if HELD_OUT_LOSS in record]
    takes: dict[str, Any] = dict(system.takes(system.config))
    dataset, held_out = training_tokens(wanted, load_tokenizer(Path(wanted.tokenizer)), member.out, **takes)
    if held_out is None or not curve:
        raise InputError(f"{member.name}: nothing held out was measured; scaling needs held-out pictures "
                         "(data.held_out_split) and train.sample_every above 0")
    batch = whole_batch(held_out, captions=takes["captions"])
    found = {"name": member.name, "parameters": non_embedding_parameters(system.generator),
             "tokens_a_step": wanted.train.batch_size * system.plan.length,
             "dataset_tokens": len(dataset) * system.plan.length, "seed": wanted.train.seed, "curve": curve,
             "measured": measure(system, batch["tokens"], system.training_rows(batch))}
    hub.save_json(found, path)
    return found


def non_embedding_parameters(generator: nn.Module) -> int:
    """N of a transformer: all its parameters but lookup tables, learned positions, and what only embeds or predicts.

    Counted are the blocks with their modulation, and the modulation before the head. C = 6 N E therefore counts
    modulation as if it were applied to every row, as the published sizes do, though it acts once a picture.
    """
    left_out = {id(p) for module in generator.modules() if isinstance(module, nn.Embedding)
                for p in module.parameters()}
    left_out |= {id(p) for name, p in generator.named_parameters()
                 if name.split(".")[-1] in TABLES or name.startswith("word.")}
    return sum(p.numel() for p in generator.parameters() if id(p) not in left_out)


@torch.no_grad()
def measure(system: System, tokens_NL: Tensor, rows: Any, batch: int = 64) -> dict[str, float]:
    """Held-out nats a token and share of wrong guesses, over all scales and at the last one (VAR's L and Err).

    rows: label rows (N, n), or captions.
    """
    rows_K = torch.tensor([step.rows for step in system.plan], dtype=torch.float64)
    nats_K = torch.zeros(len(rows_K), dtype=torch.float64)
    right_K = torch.zeros(len(rows_K), dtype=torch.float64)
    system.eval()
    for start in range(0, len(tokens_NL), batch):
        part = tokens_NL[start:start + batch].to(system.device)
        asked = rows[start:start + batch]
        if isinstance(asked, Tensor):
            asked = asked.to(system.device)
        _, by_step_K, guessed_K = system.loss(system.training_tokens(part), asked, 0.0, 0.0)
        if guessed_K is None:
            raise InputError(f"{type(system).__name__} guesses no tokens; scaling laws of error need a system of codes")
        nats_K += by_step_K.double().cpu() * (len(part) * system.nats_of_loss)
        right_K += guessed_K.double().cpu() * len(part)
    nats_K, wrong_K = nats_K / len(tokens_NL), 1 - right_K / len(tokens_NL)
    return {"loss": float((nats_K * rows_K).sum() / rows_K.sum()), "loss_last_scale": float(nats_K[-1]),
            "error": float((wrong_K * rows_K).sum() / rows_K.sum()), "error_last_scale": float(wrong_K[-1])}
