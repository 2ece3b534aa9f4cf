"""Every kind of data set gives the same pictures, classes, captions and splits, or one clear line."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nextscale.data import Loader, ShuffledOrder, open_dataset
from nextscale.data.parquet import ParquetSource
from nextscale.data.tars import TarSource
from nextscale.errors import DataError, InputError, NextscaleError

SHADES = {"cat": range(0, 120, 20), "dog": range(120, 240, 20)}


def png(shade: int, side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 7, 9)).save(out, "PNG")
    return out.getvalue()


def rows() -> list[tuple[str, int, str]]:
    """(class, shade, caption) of twelve pictures."""
    return [(name, shade, f"a {name} of shade {shade}") for name, shades in SHADES.items() for shade in shades]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return path


def members(first: int = 0, last: int = 12, captions: bool = True) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i, (name, shade, caption) in list(enumerate(rows()))[first:last]:
        found[f"{i:04d}.png"] = png(shade)
        found[f"{i:04d}.cls"] = str(list(SHADES).index(name)).encode()
        if captions:
            found[f"{i:04d}.txt"] = caption.encode()
    return found


def make(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same twelve pictures as one kind of set; what ``open_dataset`` is asked for."""
    place = tmp_path / "set"
    if kind in ("sidecars", "metadata"):
        lines = []
        for i, (name, shade, caption) in enumerate(rows()):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name / f"{i:02d}.png").write_bytes(png(shade))
            if kind == "sidecars":
                (place / name / f"{i:02d}.txt").write_text(caption + "\n")
            lines.append(json.dumps({"file_name": f"{name}/{i:02d}.png", "text": caption}))
        if kind == "metadata":
            (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return str(place)
    place.mkdir()
    if kind == "parquet":
        table = pa.table({
            "image": [{"bytes": png(shade), "path": None} for _, shade, _ in rows()],
            "label": [name for name, _, _ in rows()],
            "text": [caption for _, _, caption in rows()],
        })  # fmt: skip
        pq.write_table(table, place / "part-0.parquet", row_group_size=5)
        return str(place)
    if kind == "tar":
        write_tar(place / "part-00.tar", members(0, 7))
        write_tar(place / "part-01.tar", members(7, 12))
        return f"{place}/part-{{00..01}}.tar"
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(SHADES)), text=datasets.Value("string")
    )
    columns = {
        "image": [{"bytes": png(shade), "path": None} for _, shade, _ in rows()],
        "label": [list(SHADES).index(name) for name, _, _ in rows()],
        "text": [caption for _, _, caption in rows()],
    }
    whole = datasets.Dataset.from_dict(columns, features)
    if kind == "saved":
        whole.save_to_disk(str(place))
        return str(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole.to_parquet(str(place / "train.parquet"))
    return f"hf:{place}"


@pytest.mark.parametrize("kind", ["sidecars", "metadata", "parquet", "tar", "saved", "hub"])
def test_every_kind_of_set_gives_the_same_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(make(kind, tmp_path, monkeypatch), 8, split="all", captions=True)
    assert dataset.class_names == [["0", "1"] if kind == "tar" else ["cat", "dog"]]
    assert dataset.label_counts == [[6, 6]] and "captions" in dataset.summary()
    batch = Loader(dataset, ShuffledOrder(12, 3), 12, captions=True).batch_at(0)
    shades = ((batch["picture"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(shades) == [shade for _, shade, _ in rows()]
    expected = {shade: (list(SHADES).index(name), caption) for name, shade, caption in rows()}
    for shade, label, caption in zip(shades, batch["labels"][:, 0].tolist(), batch["caption"], strict=True):
        assert expected[shade] == (label, caption)
    assert dataset[3].caption == rows()[3][2]


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_names_of_folders_and_files_are_splits(kind: str, tmp_path: Path) -> None:
    for name, some in (("train", slice(0, 8)), ("val", slice(8, 12))):
        if kind == "folder":
            for i, (label, shade, _) in enumerate(rows()[some]):
                (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
                (tmp_path / name / label / f"{i}.png").write_bytes(png(shade))
        elif kind == "parquet":
            pictures = [{"bytes": png(shade), "path": None} for _, shade, _ in rows()[some]]
            labels = [label for label, _, _ in rows()[some]]
            pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / f"{name}-0-of-1.parquet")
        else:
            write_tar(tmp_path / f"{name}-0.tar", members(some.start, some.stop))
    counts = {split: len(open_dataset(tmp_path, 8, split=split)) for split in ("train", "validation", "all")}
    assert counts == {"train": 8, "validation": 4, "all": 12}
    assert len(open_dataset(tmp_path, 8, split="validation").class_names[0]) == 2


def test_validation_is_taken_from_train_where_only_a_test_split_is_named(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(png(i))
    parts = {
        split: set(open_dataset(tmp_path, 8, split=split, validation_fraction=0.3).rows.tolist())
        for split in ("train", "validation", "test")
    }
    assert len(parts["test"]) == 5 and len(parts["train"] | parts["validation"]) == 40
    assert parts["validation"] and not parts["train"] & parts["validation"]


def test_labels_may_come_from_metadata(tmp_path: Path) -> None:
    lines = []
    for i, (name, shade, _) in enumerate(rows()):
        (tmp_path / f"{i:02d}.png").write_bytes(png(shade))
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "label": name, "size": "big" if i % 2 else "small"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert open_dataset(tmp_path, 8, split="all").class_names == [["cat", "dog"]]
    assert open_dataset(tmp_path, 8, split="all", columns=["size"]).class_names == [["big", "small"]]
    with pytest.raises(DataError, match=r"field 'colour' of metadata\.jsonl has rows without a label"):
        open_dataset(tmp_path, 8, columns=["colour"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON object"),
        ('{"text": "a"}', "line 2 is no JSON object with a file_name"),
        ('{"file_name": "../gone.png"}', "line 2 names '../gone.png', which is no picture there"),
    ],
)
def test_broken_metadata_is_one_line_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(tmp_path, 8, split="all")
    assert "\n" not in str(caught.value)


def test_missing_captions_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        if i != 2:
            (tmp_path / f"{i}.txt").write_text("a picture")
    with pytest.raises(DataError, match=r"1 of 4 pictures have no caption, the first is .*2\.png"):
        open_dataset(tmp_path, 8, split="all", captions=True)
    dataset = open_dataset(tmp_path, 8, split="all")
    assert [dataset.caption(i) for i in range(4)] == ["a picture", "a picture", None, "a picture"]
    assert Loader(dataset, ShuffledOrder(4), 4, captions=True).batch_at(0)["caption"].count("") == 1
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "a.png").write_bytes(png(0))
    bare = open_dataset(tmp_path / "bare", 8, split="all")
    with pytest.raises(InputError, match="has no captions, nor class names"):
        Loader(bare, ShuffledOrder(1), 1, captions=True)


def test_a_class_without_pictures_is_named(tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(0))
    (tmp_path / "owl" / "a.png").write_bytes(b"broken")
    dataset = open_dataset(tmp_path, 8, split="all")
    assert dataset.class_names == [["cat", "dog", "owl"]] and dataset.empty_classes == ["dog", "owl"]
    with pytest.raises(DataError, match="no readable picture in 2 classes: dog, owl") as caught:
        dataset.need_classes()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="have no classes"):
        open_dataset(tmp_path / "cat", 8, split="all").need_classes()


def test_left_and_right_matter_where_a_set_says_so(tmp_path: Path) -> None:
    ramp = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for i in range(8):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")

    def mirrored() -> int:
        dataset = open_dataset(tmp_path, 8, split="all")
        batch = Loader(dataset, ShuffledOrder(8), 16, flip=True).batch_at(0)
        return int((batch["picture"][:, 0, 0, 0] != batch["picture"][:, 0, 0].amin(1)).sum())

    assert 2 < mirrored() < 14
    (tmp_path / "nextscale.json").write_text('{"left_right_matters": true}')
    assert mirrored() == 0
    for wrong in ('{"left": 1}', "[]", "{", '{"left_right_matters": "yes"}'):
        (tmp_path / "nextscale.json").write_text(wrong)
        with pytest.raises(DataError, match=r"nextscale\.json"):
            open_dataset(tmp_path, 8)


def test_emoji_are_never_mirrored() -> None:
    from nextscale.data.sources import open_source

    assert open_source("emoji").left_right_matters


def test_a_shard_is_read_without_unpacking_anything(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    path = tmp_path / "a.tar"
    write_tar(path, {"../outside.png": png(1), "/tmp/b.jpg": png(2), "c.seg.png": png(3), "d.txt": b"alone", "e": b""})
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            about = tarfile.TarInfo(f"special{ord(kind)}.png")
            about.type, about.linkname = kind, "/etc/hostname"
            archive.addfile(about)
    dataset = open_dataset(path, 8, split="all")
    assert sorted(int(dataset[i].picture[0, 0, 0]) for i in range(len(dataset))) == [1, 2]
    assert not outside.exists()
    assert [title.rpartition(":")[2] for title, _ in dataset.skipped] == ["d"]


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "between files", "compressed", "text"])
def test_a_shard_cut_short_is_one_clear_line(cut: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) + bytes(1000) for i in range(3)})
    data = path.read_bytes()
    member = 512 + 1536
    lengths = {"in a picture": member + 700, "in a header": 2 * member + 100, "between files": 2 * member}
    if cut in lengths:
        path.write_bytes(data[: lengths[cut]])
    elif cut == "compressed":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(__file__, "a.py")
    else:
        path.write_text("hello")
    with pytest.raises(DataError, match="cut short") as caught:
        open_dataset(tmp_path, 8, split="all")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_shards_open_or_are_one_clear_line(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", members(0, 3)).read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "a.tar").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            source = TarSource([tmp_path / "a.tar"])
            for i in range(len(source)):
                source.read(i)
        except NextscaleError as error:
            assert "\n" not in str(error)


def test_shards_of_the_webdataset_package_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-000.tar")) as out:
        for i, (name, shade, caption) in enumerate(rows()):
            out.write({"__key__": f"photos/{i:05d}", "png": png(shade), "json": {"label": name, "caption": caption}})
    dataset = open_dataset(tmp_path, 8, split="all", captions=True)
    assert dataset.class_names == [["cat", "dog"]] and dataset[11].caption == rows()[11][2]


def test_a_broken_picture_in_a_shard_is_skipped_and_named(tmp_path: Path) -> None:
    found = members()
    found["0004.png"] = b"hello"
    dataset = open_dataset(write_tar(tmp_path / "a.tar", found), 8, split="all")
    assert len(dataset) == 11 and [title for title, _ in dataset.skipped] == [f"{tmp_path / 'a.tar'}:0004.png"]


def test_wrong_shard_numbers_are_refused(tmp_path: Path) -> None:
    for spec in (tmp_path / "a-{3..1}.tar", tmp_path / "a-{0..1}.png"):
        with pytest.raises(InputError, match=r"shards count|are \.tar files"):
            open_dataset(str(spec), 8)
    with pytest.raises(DataError, match=r"a-0\.tar: no such file"):
        open_dataset(str(tmp_path / "a-{0..1}.tar"), 8)


def test_names_of_the_hub_need_their_extra_and_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be opened") as caught:
        open_dataset(f"hf:{tmp_path / 'empty'}", 8)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(NextscaleError, match=r"datasets is needed .* 'nextscale\[train\]'"):
        open_dataset("hf:owner/name", 8)


def large_parquet(path: Path, count: int = 240, group: int = 20) -> Path:
    pictures = [{"bytes": png(i) + bytes(2000), "path": None} for i in range(count)]
    pq.write_table(pa.table({"image": pictures}), path, row_group_size=group)
    return path


def test_parquet_larger_than_memory_is_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nextscale.data.parquet as module

    path = large_parquet(tmp_path / "a.parquet")
    source = ParquetSource([path], held_bytes=200_000)
    assert source.blocks is not None and source.blocks_at_once == 4
    order = ShuffledOrder(len(source), 5, source.blocks, source.blocks_at_once)
    reads: list[int] = []
    read = module._RowGroups._read
    monkeypatch.setattr(module._RowGroups, "_read", lambda self, group: (reads.append(group), read(self, group))[1])
    positions, _ = order.batch(0, 240)
    assert sorted(positions.tolist()) == list(range(240))
    for position in positions.tolist():
        assert source.read(position)[0].getpixel((0, 0))[0] == position
    assert sorted(reads) == list(range(12))
    assert sum(a != b for a, b in zip(positions[:-1] // 20, positions[1:] // 20, strict=True)) > 60
    assert order.batch(0, 240)[0].tolist() == positions.tolist() != order.batch(1, 240)[0].tolist()


def test_a_row_group_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = large_parquet(tmp_path / "a.parquet")
    place = pq.read_metadata(path).row_group(6).column(0)
    start, data = place.data_page_offset, bytearray(path.read_bytes())
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    source = ParquetSource([path], held_bytes=100_000)
    assert source.read(0)[0].size == (8, 8)
    with pytest.raises(DataError, match="row group 6 cannot be read") as caught:
        source.read(125)
    assert "\n" not in str(caught.value)


def test_a_generator_is_not_trained_on_a_class_without_pictures(tmp_path: Path) -> None:
    from nextscale.tokenizers.autoencoder import AutoencoderConfig
    from nextscale.tokenizers.config import TokenizerConfig
    from nextscale.tokenizers.tokenizer import Tokenizer
    from nextscale.training.generator_recipe import GeneratorTraining
    from nextscale.training.recipes import DataRecipe
    from nextscale.training.token_recipe import training_tokens

    for name in ("cat", "dog", "owl"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(3, 16) if name != "dog" else b"broken")
    model = TokenizerConfig(
        AutoencoderConfig(width=8, multipliers=(1, 1), groups=4, latent_width=4), grids=((1, 1), (8, 8)), vocabulary=8
    )
    data = DataRecipe(str(tmp_path / "set"), 16, split="all", held_out=0)
    with pytest.raises(DataError, match="no readable picture in class 'dog'"):
        training_tokens(GeneratorTraining(data=data), Tokenizer(model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    allowed = GeneratorTraining(data=replace(data, allow_empty_classes=True))
    assert len(training_tokens(allowed, Tokenizer(model), tmp_path / "run")[0]) == 2


def test_data_show_tells_captions_buckets_and_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nextscale.cli.main import run

    shards = tmp_path / "train-0.tar"
    write_tar(shards, members())
    assert run(["data", "show", str(shards), "--size", "32", "--largest-ratio", "2", "--bucket-multiple", "8"]) == 0
    told = capsys.readouterr().out
    assert "12 pictures, 2 classes, captions" in told and "bucket 32x32          12" in told
    assert run(["data", "show", str(shards), "--captions"]) == 0
    assert f"  {rows()[0][2]}\n" in capsys.readouterr().out
    assert run(["data", "show", "emoji", "--split", "style-test"]) == 0
    assert "left and right matter: nothing is mirrored" in capsys.readouterr().out
    write_tar(shards, members(captions=False))
    for arguments, message in (
        (["--captions"], "12 of 12 pictures have no caption, the first is"),
        (["--captions", "--caption-field", "alt"], "no sample has a caption in field 'alt'"),
        (["--crop", "middle"], "unknown crop 'middle'"),
        (["--largest-ratio", "2", "--size", "30"], "30 is not a multiple of 32"),
        (["--largest-ratio", "2", "--sheet", str(tmp_path / "a.png")], "pictures have one size"),
    ):
        assert run(["data", "show", str(shards), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in " ".join(error.split()) and error.count("\n") == 1
