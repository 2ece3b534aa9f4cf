"""What a generator's recipe trains on: a token cache that it names, or one made of its pictures beside the run."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nextscale import parallel
from nextscale.data import BucketOrder, ClassBalancedOrder, ShuffledOrder
from nextscale.data.crops import RANDOM_CROPS
from nextscale.data.orders import Order
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.errors import DataError, InputError
from nextscale.systems.system import System
from nextscale.training.config import TrainConfig
from nextscale.training.recipes import DataRecipe, check_size, open_splits
from nextscale.training.token_progress import TokenProgress
from nextscale.training.tokens import cached_tokens, open_tokens

if TYPE_CHECKING:
    from nextscale.tokenizers.tokenizer import Tokenizer


class TokenRecipe(Protocol):
    """The part of a recipe that is read here; tokens: folder of ``nextscale tokenize``, or nothing."""

    @property
    def tokens(self) -> str: ...

    @property
    def data(self) -> DataRecipe: ...


def training_tokens(recipe: TokenRecipe, tokenizer: Tokenizer, out: Path, control: Sequence[str] = (),
                    captions: bool = False, latents: bool = False, system: type[System] = System
                    ) -> tuple[TokenDataset, TokenDataset | None]:
    """Tokens to train on and held-out ones, None where there are none.

    Without ``recipe.tokens`` the pictures of ``recipe.data`` are tokenized into ``out/tokens/`` first, by all
    processes of the launch together; with it the pictures are not looked at. To have beside the tokens: control: kinds
    of control maps; captions: of every picture, which then needs no class; latents: what the encoder gave. system:
    which says the shapes that pictures may have; held-out ones have the tokenizer's own.

    Raises:
        InputError: the cache is another tokenizer's, or lacks what is asked for, mirrored versions among it; or the
            pictures have another size than the tokenizer's, or a random crop.
        DataError: the cache is missing, not complete or damaged, there are no captions, or in their place no classes
            or empty ones, or the disk refuses.
    """
    data = recipe.data
    if recipe.tokens:
        held_out_split = data.held_out_split if data.held_out else None
        dataset, held_out = open_tokens(Path(recipe.tokens), tokenizer, data.split, held_out_split)
        if parallel.is_main():
            print(dataset.summary())
        if data.flip and not dataset.job.flips:
            raise InputError(f"recipe: data.flip is true, but {dataset.folder} has no mirrored tokens; make them with "
                             "`nextscale tokenize --flips`, or set data.flip to false")
        for cache in (dataset, held_out):
            missing = [] if cache is None else [kind for kind in control if kind not in cache.job.control]
            if cache is not None and missing:
                options = " ".join(f"--control {kind}" for kind in control)
                raise InputError(f"recipe: {cache.folder} has no control maps of {', '.join(missing)}; make them with "
                                 f"`nextscale tokenize {options}`")
            if cache is not None:
                cache.need(captions, latents)
        if not captions:
            _need_classes(dataset, data)
        return dataset, held_out
    check_size(tokenizer.config, data)
    if data.crop in RANDOM_CROPS:
        raise InputError(f"recipe: data.crop is {data.crop!r}, but a training's own tokens have one crop a picture; "
                         f"make tokens with `nextscale tokenize --crop {data.crop} --crops 8` and name their folder")
    schedules = None
    if data.largest_ratio > 1:
        schedules = system.schedules(tokenizer.config, data.largest_ratio, data.bucket_multiple)
    pictures, held_out_pictures = open_splits(data, None if schedules is None else list(schedules))
    if not captions and not (pictures.class_names and data.allow_empty_classes):
        pictures.need_classes()
    with TokenProgress(pictures.split, parallel.is_main()) as report:
        flips = data.flip and not pictures.left_right_matters
        dataset = cached_tokens(tokenizer, pictures, out / "tokens" / pictures.split, flips, data.workers, report,
                                control, captions, latents, schedules)
    if held_out_pictures is None:
        return dataset, None
    with TokenProgress(held_out_pictures.split, parallel.is_main()) as report:
        folder = out / "tokens" / held_out_pictures.split
        return dataset, cached_tokens(tokenizer, held_out_pictures, folder, False, data.workers, report, control,
                                      captions, latents)


def _need_classes(dataset: TokenDataset, data: DataRecipe) -> None:
    if not dataset.class_names:
        raise DataError(f"{dataset.folder}: the pictures have no classes; put them into one folder a class, then "
                        "tokenize again")
    empty = [name for kind, names in enumerate(dataset.class_names) for name, count in
             zip(names, dataset.labels[:, kind].bincount(minlength=len(names)).tolist(), strict=True) if not count]
    if empty and not data.allow_empty_classes:
        raise DataError(f"{dataset.folder}: no picture in {len(empty)} of the classes, the first is {empty[0]!r}; add "
                        "pictures and tokenize again, or set data.allow_empty_classes to true")


def token_loader(dataset: TokenDataset, data: DataRecipe, train: TrainConfig, control: Sequence[str] = (),
                 captions: bool = False, latents: bool = False) -> TokenLoader:
    """Batches of a cache in the recipe's order, by buckets where it has several shapes; each process reads its share of
    a batch. control, captions, latents: what of the cache batches have beside tokens and labels."""
    order: Order = ShuffledOrder(len(dataset), train.seed)
    if dataset.bucket_of is not None:
        order = BucketOrder(dataset.bucket_of, train.seed)
    elif data.balanced and dataset.class_names:
        order = ClassBalancedOrder(dataset.labels[:, 0], train.seed)
    return TokenLoader(dataset, order, train.batch_size, train.seed, parallel.rank(), parallel.world(), control,
                       captions, latents)
