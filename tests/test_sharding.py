"""Which pictures a step sees hangs on the seed alone: not on ranks, workers, or where a run was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_task import draw_pictures

from nextscale.data import BucketOrder, ClassBalancedOrder, Loader, ShuffledOrder, aspect_buckets, open_dataset
from nextscale.data.buckets import nearest_bucket
from nextscale.data.orders import Order
from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.recipes import DataRecipe, check_size, open_splits, order_of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures: wide ones, tall ones and squares; the red channel is the number."""
    folder = tmp_path_factory.mktemp("shapes")
    for i in range(40):
        side = [(30, 30), (48, 24), (20, 41)][(i * 7) % 5 % 3]
        Image.new("RGB", side, (i, 0, 0)).save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.parametrize("kind", ["shuffled", "balanced", "buckets"])
@pytest.mark.parametrize("crop", ["center", "random-resized"])
def test_the_union_over_ranks_is_the_same_batch_whatever_their_number(
    kind: str, crop: str, pictures: Path, shapes: Path
) -> None:
    buckets = aspect_buckets(32, 2, 8) if kind == "buckets" else None
    dataset = open_dataset(shapes if buckets else pictures, 16, split="all", crop=crop, buckets=buckets)
    order: Order = {
        "shuffled": lambda: ShuffledOrder(len(dataset), 2),
        "balanced": lambda: ClassBalancedOrder(dataset.labels[:, 0], 2),
        "buckets": lambda: BucketOrder(dataset.bucket_of, 2),
    }[kind]()
    whole = Loader(dataset, order, 12, flip=True, seed=4)
    for ranks in (2, 3, 12):
        for step in (0, 5, 17):
            parts = [whole.shard(rank, ranks).batch_at(step) for rank in range(ranks)]
            for name, value in whole.batch_at(step).items():
                assert torch.equal(value, torch.cat([part[name] for part in parts])), name


def test_a_run_stopped_in_mid_epoch_goes_on_with_other_ranks_and_workers(pictures: Path) -> None:
    dataset = open_dataset(pictures, 16, split="all", crop="random")
    loader = Loader(dataset, ShuffledOrder(len(dataset), 1), 8, flip=True, seed=3)
    straight = [batch for _, batch in zip(range(9), loader.batches(0), strict=False)]
    for step in range(5, 9):
        parts = []
        for rank in range(4):
            late = Loader(dataset, ShuffledOrder(len(dataset), 1), 8, flip=True, seed=3, workers=3, rank=rank, ranks=4)
            stream = late.batches(5)
            parts.append([next(stream) for _ in range(step - 4)][-1])
            stream.close()
        for name, value in straight[step].items():
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name


def test_ranks_that_do_not_divide_the_batch_are_refused(pictures: Path) -> None:
    dataset = open_dataset(pictures, 16, split="all")
    for rank, ranks in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="multiple of ranks"):
            Loader(dataset, ShuffledOrder(30), 8, rank=rank, ranks=ranks)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=60), batch=st.integers(1, 9), seed=st.integers(0, 2**64))
@settings(max_examples=40)
def test_bucket_batches_share_a_bucket_and_show_every_picture_equally_often(
    sizes: list[int], batch: int, seed: int
) -> None:
    order = BucketOrder(sizes, seed)
    drawn = [order.batch(step, batch) for step in range(2 * len(sizes))]
    positions = torch.cat([positions for positions, _ in drawn]).tolist()
    for found, _ in drawn:
        assert len(found) == batch and len({sizes[position] for position in found.tolist()}) == 1
    assert all(positions.count(position) == 2 * batch for position in range(len(sizes)))
    epochs = torch.cat([epochs for _, epochs in drawn]).tolist()
    assert len(set(zip(positions, epochs, strict=True))) == len(positions)
    late = BucketOrder(sizes, seed)
    for step in (2 * len(sizes) - 1, 0):
        assert torch.equal(late.batch(step, batch)[0], drawn[step][0])


@given(
    blocks=st.lists(st.integers(1, 9), min_size=1, max_size=12), at_once=st.integers(1, 8), seed=st.integers(0, 2**64)
)
@settings(max_examples=60)
def test_shuffling_by_blocks_needs_few_of_them_at_a_time(blocks: list[int], at_once: int, seed: int) -> None:
    of_row = np.repeat(np.arange(len(blocks)), blocks)
    order = ShuffledOrder(len(of_row), seed, of_row, at_once)
    positions, epochs = order.batch(0, 2 * len(of_row))
    for epoch in (0, 1):
        seen = positions[epochs == epoch].numpy()
        assert sorted(seen.tolist()) == list(range(len(of_row)))
        visits = of_row[seen]
        spans = [np.flatnonzero(visits == block) for block in range(len(blocks))]
        open_now = [sum(span[0] <= place <= span[-1] for span in spans) for place in range(len(seen))]
        assert max(open_now) <= max(1, at_once // 2)


def test_buckets_keep_the_area_and_the_ratio() -> None:
    found = aspect_buckets(256, 2.0, 32)
    assert (256, 256) in found and (224, 288) in found and (352, 160) not in found
    for height, width in found:
        assert height % 32 == width % 32 == 0 and height * width <= 256 * 256
        assert max(height, width) <= 2 * min(height, width) and (width, height) in found
    assert aspect_buckets(64, 1.0, 32) == [(64, 64)]
    chosen = nearest_bucket(np.array([[400, 400], [800, 400], [300, 600], [5000, 10]]), found)
    wide = max(found, key=lambda bucket: bucket[1] / bucket[0])
    assert [found[i] for i in chosen] == [(256, 256), wide, wide[::-1], wide]
    for wrong in ((250, 2.0, 32), (256, 0.5, 32), (256, 2.0, 0), (256, float("nan"), 32)):
        with pytest.raises(InputError, match="buckets"):
            aspect_buckets(*wrong)


def test_a_batch_has_its_buckets_size_and_nothing_else(shapes: Path) -> None:
    dataset = open_dataset(shapes, 32, split="all", buckets=aspect_buckets(32, 2, 8))
    assert sum(dataset.bucket_counts().values()) == 40 and dataset.bucket_counts()["32x32"] > 0
    loader = Loader(dataset, order_of(dataset, DataRecipe(), 0), 4)
    seen = set()
    for step in range(30):
        batch = loader.batch_at(step)
        numbers = ((batch["picture"][:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(numbers, batch["id"])
        for number in numbers.tolist():
            with Image.open(shapes / f"{number:02d}.png") as image:
                wide = image.width / image.height
            height, width = batch["picture"].shape[-2:]
            assert abs(np.log(width / height) - np.log(wide)) < 0.35
        seen.add(tuple(batch["picture"].shape[-2:]))
    assert len(seen) == 3
    with pytest.raises(InputError, match="several buckets"):
        dataset.read(range(40))


def test_a_broken_picture_found_late_is_replaced_inside_its_bucket(shapes: Path, tmp_path: Path) -> None:
    for file in shapes.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "01.png").read_bytes()
    (tmp_path / "01.png").write_bytes(whole[:-30])  # the header is good
    dataset = open_dataset(tmp_path, 32, split="all", buckets=aspect_buckets(32, 2, 8))
    pixels, places = dataset.read([1])
    assert places[0] != 1 and pixels.shape[-2:] == dataset.size_of(1) == dataset.size_of(int(places[0]))
    assert places[0] != 2  # the next one, of another shape
    assert [Path(title).name for title, _ in dataset.skipped] == ["01.png"]


def test_a_schedule_follows_its_bucket() -> None:
    plan = Plan.scales([1, 2, 3, 4, 8])
    assert plan.stretched((8, 8)) is plan
    grids = [step.grid for step in plan.stretched((6, 10))]
    assert grids == [(1, 1), (2, 2), (2, 4), (3, 5), (6, 10)]
    assert plan.stretched((2, 32)).steps[0].grid == (1, 4)


def test_a_tokenizer_trains_on_buckets(shapes: Path, tmp_path: Path) -> None:
    from nextscale.training.tokenizer_recipe import train_tokenizer

    recipe = {
        "data": {"spec": str(shapes), "size": 32, "largest_ratio": 2.0, "bucket_multiple": 8, "held_out": 4,
                 "crop": "random", "workers": 2},
        "tokenizer": {
            "model": {"grids": [[1, 1], [2, 2], [4, 4], [8, 8]], "vocabulary": 16,
                      "autoencoder": {"width": 8, "multipliers": [1, 1, 1], "groups": 4, "latent_width": 4,
                                      "encoder_blocks": 1, "decoder_blocks": 1}},
            "weights": {"adversarial": 0.0},
        },
        "train": {"steps": 5, "batch_size": 4, "device": "cpu", "precision": "fp32", "log_every": 1},
    }  # fmt: skip
    result = train_tokenizer(recipe, tmp_path / "run")
    assert result.step == 5 and np.isfinite(result.metrics["main/loss"])


def test_recipes_name_what_cannot_be(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TokenizerConfig(
        autoencoder=AutoencoderConfig(width=32, multipliers=(1, 1, 1), latent_width=4), grids=((1, 1), (8, 8))
    )
    with pytest.raises(InputError, match="bucket_multiple is 6"):
        check_size(model, DataRecipe(size=32, largest_ratio=2.0, bucket_multiple=6))
    for wrong in ({"crop": "middle"}, {"workers": 0}, {"largest_ratio": 0.5}, {"held_out": -1}):
        with pytest.raises(InputError):
            DataRecipe(**wrong)  # type: ignore[arg-type]
    for i, split in enumerate(("train", "train", "val")):
        (tmp_path / split).mkdir(exist_ok=True)
        shutil.copy(shapes / f"{i:02d}.png", tmp_path / split)
    (tmp_path / "nextscale.json").write_text('{"left_right_matters": true}')
    recipe = DataRecipe(str(tmp_path), 32, largest_ratio=2.0, bucket_multiple=8, crop="random", flip=True)
    dataset, held_out = open_splits(recipe)
    assert dataset.buckets and held_out is not None and held_out.buckets is None and held_out.crop == "center"
    told = capsys.readouterr().out
    assert "buckets (height x width): " in told and "nothing is mirrored" in told
