"""Data sets, the orders that draw from them, and batches."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_task import draw_pictures

from nextscale.data import ClassBalancedOrder, Loader, ShuffledOrder, open_dataset
from nextscale.errors import DataError, InputError, NextscaleError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def png(colour: tuple[int, int, int], size: int = 8, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (size, size), colour if mode == "RGB" else colour[0]).save(out, "PNG")
    return out.getvalue()


def write_parquet(path: Path, rows: int = 12, broken: int | None = None, **columns: list[object]) -> Path:
    images = [{"bytes": png((i * 20, 0, 0)), "path": None} for i in range(rows)]
    if broken is not None:
        images[broken] = {"bytes": images[broken]["bytes"][:40], "path": None}
    table = pa.table({"image": images, **columns})
    features = {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_subfolders_are_classes_and_a_flat_folder_has_none(pictures: Path) -> None:
    dataset = open_dataset(pictures, 16, split="all")
    assert dataset.class_names == [["class0", "class1", "class2"]]
    assert dataset.label_counts == [[8, 10, 12]]
    sample = dataset[29]
    assert sample.picture.shape == (3, 16, 16) and sample.picture.dtype == torch.uint8
    assert sample.labels == (2,) and sample.alpha is None
    stored = np.asarray(Image.open(pictures / "class2" / "011.png"))
    assert np.array_equal(sample.picture.permute(1, 2, 0).numpy(), stored)
    flat = open_dataset(pictures / "class0", 16, split="all")
    assert flat.class_names == [] and flat[0].labels == () and flat.label_counts == []


def test_parquet_labels_are_named_by_its_metadata(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", label=[i % 3 for i in range(12)], sort=list("aabbccaabbcc"))
    dataset = open_dataset(path, 8, split="all")
    assert dataset.class_names == [["cat", "dog", "owl"]] and dataset.label_counts == [[4, 4, 4]]
    assert dataset[5].picture[0].unique().tolist() == [100]
    both = open_dataset(tmp_path, 8, split="all", columns=["sort", "label"])
    assert both.class_names == [["a", "b", "c"], ["cat", "dog", "owl"]] and both[2].labels == (1, 2)


def test_alpha_masks_come_along(tmp_path: Path) -> None:
    masks = [{"bytes": png((i, 0, 0), mode="L"), "path": None} for i in range(12)]
    dataset = open_dataset(write_parquet(tmp_path / "a.parquet", alpha=masks), 8, split="all")
    alpha = dataset[7].alpha
    assert alpha is not None and alpha.shape == (1, 8, 8) and alpha.unique().tolist() == [7]
    batch = Loader(dataset, ShuffledOrder(12), 4).batch_at(0)
    assert batch["alpha"].shape == (4, 1, 8, 8)
    torch.testing.assert_close(batch["alpha"][:, 0, 0, 0], batch["id"].float() / 255)


def test_held_out_columns_make_the_emoji_sets_splits(tmp_path: Path) -> None:
    concept = ["test"] * 3 + ["train"] * 9
    style = ["train"] * 6 + ["test"] * 2 + ["train"] * 4
    path = write_parquet(tmp_path / "a.parquet", concept_split=concept, style_split=style)
    splits = ("train", "concept-test", "style-test")
    found = {split: open_dataset(path, 8, split=split).rows.tolist() for split in splits}
    assert found == {"train": [3, 4, 5, 8, 9, 10, 11], "concept-test": [0, 1, 2], "style-test": [6, 7]}
    with pytest.raises(InputError, match="no split 'validation'; it has train, concept-test, style-test, all"):
        open_dataset(path, 8, split="validation")


def test_the_shipped_emoji_set_opens() -> None:
    from nextscale.data.emoji_set import emoji_set_path

    assert Path(emoji_set_path()).is_file()
    dataset = open_dataset("emoji", 64, split="style-test")
    assert not dataset.skipped and len(dataset.class_names) == 2 and dataset.has_alpha
    batch = Loader(dataset, ClassBalancedOrder(dataset.labels[:, 0]), 16).batch_at(0)
    assert batch["picture"].shape == (16, 3, 64, 64) and batch["labels"].shape == (16, 2)
    outside = (batch["alpha"] == 0).expand_as(batch["picture"])
    assert outside.any() and (batch["picture"][outside] == 1).all()


def test_validation_is_a_disjoint_share_that_new_pictures_do_not_move(tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path, classes=2, each=60)

    def titles(split: str) -> set[str]:
        dataset = open_dataset(folder, 8, split=split, validation_fraction=0.3)
        return {dataset.source.title(int(row)) for row in dataset.rows}

    train, validation = titles("train"), titles("validation")
    assert not train & validation and len(train | validation) == 122
    assert 0.15 < len(validation) / 122 < 0.45
    Image.new("RGB", (8, 8)).save(folder / "class0" / "0000new.png")
    assert validation <= titles("validation") and train <= titles("train")


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0], ids=["in memory", "on demand"])
def test_corrupt_pictures_are_skipped_counted_and_named(tmp_path: Path, memory_bytes: int) -> None:
    folder = draw_pictures(tmp_path, classes=1, each=8)
    (folder / "class0" / "no_picture.png").write_bytes(b"hello")
    whole = (folder / "class0" / "003.png").read_bytes()
    (folder / "class0" / "003.png").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset(folder, 16, split="all", memory_bytes=memory_bytes)
    shown = {dataset[i].id for i in range(len(dataset))}
    assert len(shown) == 7 and all(dataset[i].labels == (0,) for i in range(len(dataset)))
    names = [Path(title).name for title, _ in dataset.skipped]
    assert sorted(names) == ["003.png", "no_picture.png"]
    assert "2 skipped" in dataset.summary()


def test_broken_parquet_rows_are_skipped(tmp_path: Path) -> None:
    dataset = open_dataset(write_parquet(tmp_path / "a.parquet", broken=4), 8, split="all")
    assert len(dataset) == 11 and [title for title, _ in dataset.skipped] == [f"{tmp_path / 'a.parquet'} row 4"]
    assert dataset[4].id == 5


@pytest.mark.parametrize("make", ["absent", "empty", "no pictures", "all broken", "text", "no image column", "cut"])
def test_an_unusable_data_set_is_one_clear_line(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data"
    if make in ("empty", "no pictures", "all broken"):
        path.mkdir()
    if make == "no pictures":
        (path / "readme.txt").write_text("hello")
    elif make == "all broken":
        (path / "a.png").write_bytes(b"hello")
    elif make == "text":
        path.write_text("hello")
    elif make == "no image column":
        pq.write_table(pa.table({"label": [1, 2]}), path)
    elif make == "cut":
        write_parquet(path)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=str(path)) as caught:
        open_dataset(path, 8, split="all")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [[-1] * 12, [3] * 12, [None] * 12, [0.5] * 12])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: list[object]) -> None:
    with pytest.raises(DataError, match="column 'label'"):
        open_dataset(write_parquet(tmp_path / "a.parquet", label=labels), 8)


@given(count=st.integers(1, 50), batch_size=st.integers(1, 70), seed=st.integers(0, 2**64))
@settings(max_examples=60)
def test_shuffled_order_shows_each_picture_once_an_epoch(count: int, batch_size: int, seed: int) -> None:
    steps = 3 * count // batch_size + 1
    drawn = [ShuffledOrder(count, seed).batch(step, batch_size) for step in range(steps)]
    positions = torch.cat([positions for positions, _ in drawn])
    epochs = torch.cat([epochs for _, epochs in drawn])
    assert epochs.tolist() == [i // count for i in range(steps * batch_size)]
    for epoch in range(steps * batch_size // count):
        assert sorted(positions[epochs == epoch].tolist()) == list(range(count))


@given(labels=st.lists(st.integers(0, 6), min_size=1, max_size=40), batch_size=st.integers(1, 30), seed=st.integers())
@settings(max_examples=60)
def test_balanced_order_draws_classes_evenly_and_pictures_in_turn(
    labels: list[int], batch_size: int, seed: int
) -> None:
    order = ClassBalancedOrder(labels, seed)
    steps = 40
    drawn = [order.batch(step, batch_size) for step in range(steps)]
    positions = torch.cat([positions for positions, _ in drawn]).tolist()
    epochs = torch.cat([epochs for _, epochs in drawn]).tolist()
    by_class = Counter(labels[position] for position in positions)
    assert set(by_class) == set(labels) or len(positions) < len(set(labels))
    assert max(by_class.values()) - min(by_class.values()) <= 1
    assert len(set(zip(positions, epochs, strict=True))) == len(positions)
    for label in set(labels):
        counts = Counter(position for position in positions if labels[position] == label)
        members = labels.count(label)
        assert max(counts.values(), default=0) - (min(counts.values()) if len(counts) == members else 0) <= 1


def test_orders_are_pure_functions_of_seed_and_step() -> None:
    labels = [i % 5 for i in range(33)]
    for make in (lambda seed: ShuffledOrder(33, seed), lambda seed: ClassBalancedOrder(labels, seed)):
        straight = [make(3).batch(step, 16)[0].tolist() for step in range(20)]
        again = make(3)
        jumping = {step: again.batch(step, 16)[0].tolist() for step in (19, 0, 7, 7, 12)}
        assert all(straight[step] == drawn for step, drawn in jumping.items())
        assert straight[0] != straight[5] and straight[0] != make(4).batch(0, 16)[0].tolist()


def test_order_is_the_same_on_every_machine() -> None:
    assert ShuffledOrder(10, 0).batch(0, 10)[0].tolist() == [0, 1, 9, 4, 2, 3, 6, 8, 7, 5]
    assert ClassBalancedOrder([0, 0, 1, 1, 1, 2], 0).batch(1, 6)[0].tolist() == [5, 2, 1, 0, 3, 5]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_from_any_step_equal_those_of_the_whole_run(pictures: Path, workers: int) -> None:
    dataset = open_dataset(pictures, 16, split="all")
    loader = Loader(dataset, ShuffledOrder(len(dataset)), 8, flip=True, workers=workers)
    whole = [batch for _, batch in zip(range(9), loader.batches(0), strict=False)]
    late = [batch for _, batch in zip(range(4), loader.batches(5), strict=False)]
    for one, other in zip(whole[5:], late, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert whole[0]["picture"].min() >= -1 and whole[0]["picture"].max() <= 1
    assert whole[0]["labels"].shape == (8, 1)


def test_flips_depend_on_seed_epoch_and_picture_only(pictures: Path) -> None:
    dataset = open_dataset(pictures, 16, split="all")

    def flipped(batch_size: int, seed: int) -> dict[tuple[int, int], bool]:
        loader = Loader(dataset, ShuffledOrder(len(dataset), 5), batch_size, flip=True, seed=seed)
        found = {}
        for step in range(60 // batch_size):
            batch = loader.batch_at(step)
            for i, (epoch, number) in enumerate(zip(batch["epoch"].tolist(), batch["id"].tolist(), strict=True)):
                plain = dataset[number].picture.float() / 127.5 - 1
                same = torch.equal(batch["picture"][i], plain)
                mirrored = torch.equal(batch["picture"][i], plain.flip(-1))
                assert same or mirrored
                if not (same and mirrored):
                    found[epoch, number] = mirrored
        return found

    assert flipped(4, 0) == flipped(20, 0) != flipped(4, 1)
    assert 0.2 < np.mean(list(flipped(4, 0).values())) < 0.8


def test_a_loader_that_is_left_ends_its_threads(pictures: Path) -> None:
    dataset = open_dataset(pictures, 16, split="all")
    batches = Loader(dataset, ShuffledOrder(len(dataset)), 8, workers=2).batches(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nextscale-loader")]


def test_wrong_arguments_are_refused(pictures: Path) -> None:
    for call in (
        lambda: open_dataset(pictures, 16, split="tests"),
        lambda: open_dataset(pictures, 16, validation_fraction=1.0),
        lambda: ShuffledOrder(0),
        lambda: ClassBalancedOrder([]),
        lambda: Loader(open_dataset(pictures, 16, split="all"), ShuffledOrder(30), 0),
    ):
        with pytest.raises(NextscaleError):
            call()
