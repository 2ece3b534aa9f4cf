"""Recipes that come with the package are ones: every key and value is known, and what belongs together fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextscale.configuration import build
from nextscale.systems import folders
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.distill_recipe import DistillTraining
from nextscale.training.finetune_recipe import FinetuneTraining
from nextscale.training.generator_recipe import GeneratorTraining, system_config
from nextscale.training.recipes import check_size, named_recipes, read_recipe, recipe_of
from nextscale.training.retarget_recipe import RetargetTraining
from nextscale.training.tokenizer_recipe import TokenizerTraining

OTHERS: dict[str, type[Any]] = {"distill": DistillTraining, "retarget": RetargetTraining,
                                "finetune-full": FinetuneTraining, "finetune-lora": FinetuneTraining,
                                "emoji-64-decoder": TokenizerTraining}  # fmt: skip


@pytest.mark.parametrize("name", named_recipes())
def test_a_shipped_recipe_is_complete(name: str) -> None:
    kind = OTHERS.get(name, TokenizerTraining if name.endswith("-tokenizer") else GeneratorTraining)
    asked = {"model": "named-on-the-command-line"} if kind is FinetuneTraining else {}
    wanted = build(kind, {**read_recipe(name), **asked}, name)
    if name.endswith("-tokenizer"):
        check_size(wanted.tokenizer.model, wanted.data)
        with torch.device("meta"):
            Tokenizer(wanted.tokenizer.model)


@pytest.mark.parametrize("system, tokenizer", [("flexvar", "drafts"), ("nfig", "bands"), ("flowar", "kl")])
def test_a_family_s_tokenizer_is_one_that_its_system_takes(system: str, tokenizer: str) -> None:
    model = build(TokenizerTraining, read_recipe(f"own-64-{tokenizer}-tokenizer"), tokenizer).tokenizer.model
    wanted = build(GeneratorTraining, {**read_recipe(recipe_of(system)), "system": system}, system)
    with torch.device("meta"):
        built = folders.system_type(system)(system_config(wanted, model, (("a", "b", "c"),)))
    assert built.plan.grid == (8, 8)
