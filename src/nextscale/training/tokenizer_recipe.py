"""Training a tokenizer by a recipe, into a folder of its own that a generator's training reads."""
from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nextscale import hub, parallel
from nextscale.configuration import build
from nextscale.data import PictureDataset
from nextscale.data.pictures_out import writing_folder
from nextscale.errors import InputError
from nextscale.objectives.reconstruction import FeatureDistance, lpips_distance
from nextscale.systems import folders
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.config import TrainConfig
from nextscale.training.recipes import DataRecipe, check_size, open_splits, train_on
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask
from nextscale.training.tokens import tokenizer_hash
from nextscale.training.trainer import TrainResult


@dataclass(frozen=True)
class TokenizerTraining:
    """A tokenizer's recipe. codes_of: folder of a trained tokenizer whose codes stay while its decoder alone is trained
    on (its configuration takes the place of ``tokenizer.model``); start: folder of a trained tokenizer to begin with,
    whatever of its weights has the same name and shape; perceptual: ``emoji`` for the shipped classifier's
    features, ``lpips`` for the published one (extra ``eval-published``), or ``none``; threads: of the processor, 0 for
    all."""

    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    train: TrainConfig = field(default_factory=TrainConfig)
    codes_of: str = ""
    start: str = ""
    perceptual: Literal["emoji", "lpips", "none"] = "none"
    threads: int = 0


def train_tokenizer(recipe: Mapping[str, Any], out: Path, resume: bool = False) -> TrainResult:
    """Train a tokenizer into ``out`` and write ``out/tokenizer/``. Raises InputError on wrong keys and values."""
    wanted = build(TokenizerTraining, recipe, "recipe")
    codes_of = load_tokenizer(Path(wanted.codes_of)) if wanted.codes_of else None
    if codes_of is not None:
        wanted = replace(wanted, tokenizer=replace(wanted.tokenizer, model=codes_of.config))
    check_size(wanted.tokenizer.model, wanted.data)
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    dataset, held_out = open_splits(wanted.data)
    perceptual = _perceptual(wanted.perceptual)
    examples = None if held_out is None else _pictures(held_out, wanted.data.held_out)
    torch.manual_seed(wanted.train.seed)
    task = TokenizerTask(wanted.tokenizer, perceptual, examples, codes_of)
    if wanted.start:
        begin_with(task.tokenizer, load_tokenizer(Path(wanted.start)))
    trainer, result = train_on(task, dataset, wanted.data, wanted.train, out, resume)
    tokenizer = trainer.averaged_modules()["tokenizer"]
    assert isinstance(tokenizer, Tokenizer)
    parallel.on_main(lambda: save_tokenizer(tokenizer, out / "tokenizer"))
    return result


def begin_with(tokenizer: Tokenizer, trained: Tokenizer) -> None:
    """Take over the weights of another tokenizer that have the same name and shape, such as encoder and decoder where
    only the codes are others. Raises InputError where the decoder's input differs already."""
    own = tokenizer.state_dict()
    found = {name: tensor for name, tensor in trained.state_dict().items()
             if name in own and own[name].shape == tensor.shape}
    if "decoder.output.weight" not in found:
        raise InputError("recipe: start holds a tokenizer of other sizes; give the same autoencoder.width")
    tokenizer.load_state_dict(found, strict=False)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's configuration and weights (float32) into a folder. A latent's scale that was measured becomes
    the configuration's."""
    tensors, config = tokenizer.state_dict(), tokenizer.config
    if "quantiser.scale" in tensors:
        config = replace(config, latent_scale=round(float(tensors.pop("quantiser.scale")), 6))
    hub.save_tensors(tensors, folder / "tokenizer.safetensors")
    hub.save_json(asdict(config), folder / "config.json")


def load_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer that ``save_tokenizer`` wrote, or a model's. Raises WeightsError where there is none."""
    config = hub.read_json(folder / "config.json")
    tokenizer = Tokenizer(build(TokenizerConfig, config.get("tokenizer", config), str(folder / "config.json")))
    path = folder / "tokenizer.safetensors"
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in hub.read_tensors(path).items()}
    hub.load_published(tokenizer, tensors, ((r"(.*)", r"\1"),), str(path))
    return tokenizer.eval()


def replace_tokenizer(model: Path, tokenizer: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of a folder with another tokenizer of the same codes: one whose decoder was trained on.

    Raises WeightsError where a folder holds none, InputError where the tokenizer's codes are others than the model's.
    """
    system, other = folders.load(model), load_tokenizer(tokenizer)
    own, given = (tokenizer_hash(deepcopy(t).to(torch.bfloat16)) for t in (system.tokenizer, other))
    if own != given:
        raise InputError(f"{tokenizer} makes other codes than the tokenizer of {model}; train on that one's decoder "
                         "(codes_of in a tokenizer's recipe), or a generator on the codes of this one")
    system.tokenizer.load_state_dict(other.state_dict())
    with writing_folder(out) as temporary:
        folders.save(system, temporary, dtype)


def _perceptual(name: str) -> torch.nn.Module | None:
    if name == "none":
        return None
    if name == "lpips":
        return lpips_distance()
    from nextscale.tokenizers.features import load_features

    return FeatureDistance(load_features())


def _pictures(dataset: PictureDataset, count: int) -> torch.Tensor:
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.stack([dataset[i].picture for i in places]).float() / 127.5 - 1
