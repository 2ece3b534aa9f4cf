"""The emoji set that ships, and the builder that makes it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextscale.data import emoji_set, emoji_sources
from nextscale.data.emoji_classes import CLASS_TABLE, FLAG_CLASSES, drawing_key
from nextscale.data.emoji_set import (
    COMPACT_PSNR_DB,
    STYLES,
    build_emoji_set,
    compact,
    emoji_set_path,
    psnr,
    render,
    split_concepts,
)
from nextscale.data.emoji_sources import Concept, Drawing, Package, fetch_package, fluent_stem, read_package
from nextscale.errors import DataError, InputError

parquet = pytest.importorskip("pyarrow.parquet")


@cache
def rows() -> list[dict[str, Any]]:
    """Every row of the shipped set, without the pictures."""
    columns = [name for name in parquet.read_schema(emoji_set_path()).names if name not in {"image", "alpha"}]
    return parquet.read_table(emoji_set_path(), columns=columns).to_pylist()


def test_schema_carries_hugging_face_features() -> None:
    schema = parquet.read_schema(emoji_set_path())
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == features["alpha"] == {"_type": "Image"}
    assert features["style_label"]["names"] == list(STYLES)
    names = features["label"]["names"]
    assert all(names[row["label"]] == row["class"] for row in rows())
    assert all(STYLES[row["style_label"]] == row["style"] for row in rows())
    assert set(FLAG_CLASSES) <= set(names)


def test_every_style_has_most_concepts_and_no_picture_twice() -> None:
    keys = Counter((row["codepoints"], row["style"]) for row in rows())
    assert max(keys.values()) == 1
    counts = Counter(row["style"] for row in rows())
    assert set(counts) == set(STYLES)
    assert min(counts.values()) >= 1500 and sum(counts.values()) >= 7000
    assert {row["skin_tone"] for row in rows()} == {""}
    assert all(row["name"] and row["keywords"] for row in rows())


def test_drawings_of_another_set_or_another_thing_are_left_out() -> None:
    assert not [row["name"] for row in rows() if row["style"] == "fluent-3d" and row["subcategory"] == "country-flag"]
    assert {row["style"] for row in rows() if row["name"] == "flag Sark"} == {"twemoji"}


def test_every_class_has_twenty_concepts_of_one_category() -> None:
    concepts: dict[str, set[str]] = defaultdict(set)
    for row in rows():
        concepts[row["class"]].add(row["codepoints"])
        assert row["category"] == CLASS_TABLE[row["class"]][0]
        assert row["subcategory"] in CLASS_TABLE[row["class"]][1]
    assert 40 <= len(concepts) <= 55
    assert min(map(len, concepts.values())) >= 20


def test_splits_are_disjoint_and_sized_as_stated() -> None:
    side: dict[str, set[str]] = defaultdict(set)
    styles: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows():
        side[row["codepoints"]].add(row["concept_split"])
        styles[row["codepoints"]][row["style_split"]] += 1
    assert all(len(splits) == 1 for splits in side.values())
    held_out = {concept for concept, splits in side.items() if splits == {"test"}}
    assert 0.09 <= len(held_out) / len(side) <= 0.11
    with_style = {concept for concept, counts in styles.items() if counts["test"]}
    assert not held_out & with_style
    assert all(styles[concept]["test"] == 1 and styles[concept]["train"] >= 1 for concept in with_style)
    assert 0.13 <= len(with_style) / (len(side) - len(held_out)) <= 0.16
    tested = {row["class"] for row in rows() if row["concept_split"] == "test"}
    assert tested == {row["class"] for row in rows()}


def test_variants_of_one_drawing_are_on_the_same_side() -> None:
    sides: dict[str, set[tuple[str, str]]] = defaultdict(set)
    held_styles: dict[str, set[str]] = defaultdict(set)
    for row in rows():
        key = drawing_key(row["codepoints"])
        sides[key].add(row["concept_split"])
        if row["style_split"] == "test":
            held_styles[key].add(row["style"])
    assert all(len(split) == 1 for split in sides.values())
    assert all(len(styles) == 1 for styles in held_styles.values())


def test_equal_pictures_are_on_the_same_side() -> None:
    table = parquet.read_table(emoji_set_path(), columns=["image", "style", "concept_split"])
    side: dict[tuple[str, bytes], set[str]] = defaultdict(set)
    for row in table.to_pylist():
        side[row["style"], row["image"]["bytes"]].add(row["concept_split"])
    assert len(side) < table.num_rows, "some flags share one picture; if none does, this test tests nothing"
    assert all(len(splits) == 1 for splits in side.values())


def test_drawing_key_joins_variants_and_keeps_others_apart() -> None:
    firefighters = {"1F9D1-200D-1F692", "1F468-200D-1F692", "1F469-200D-1F692"}
    assert len({drawing_key(codepoints) for codepoints in firefighters}) == 1
    assert drawing_key("1F468-200D-1F9AF-200D-27A1-FE0F") == drawing_key("1F469-200D-1F9AF")
    assert drawing_key("1F469-200D-2764-FE0F-200D-1F468") == drawing_key("1F491")
    assert drawing_key("1F469-200D-1F469-200D-1F466") == drawing_key("1F46A")
    assert drawing_key("1F3C3-200D-2640-FE0F") == drawing_key("1F3C3")
    assert drawing_key("2640-FE0F") != drawing_key("2642-FE0F")
    assert drawing_key("27A1-FE0F") != drawing_key("2B05-FE0F")
    assert drawing_key("1F469-200D-1F692") != drawing_key("1F469-200D-1F680")


def test_pictures_decode_and_are_white_where_the_mask_is_empty() -> None:
    table = parquet.read_table(emoji_set_path(), columns=["image", "alpha", "style"])
    seen = set()
    for row in table.to_pylist()[::37]:
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        mask = Image.open(io.BytesIO(row["alpha"]["bytes"])).convert("L")
        assert picture.size == mask.size == (64, 64) and picture.mode == "RGB"
        pixels, alpha = np.asarray(picture), np.asarray(mask)
        assert (pixels[alpha == 0] == 255).all() and alpha.max() > 0
        assert row["image"]["path"].startswith(row["style"] + "/")
        seen.add(row["style"])
    assert seen == set(STYLES)


def test_shipped_set_is_small_enough_for_the_repository() -> None:
    assert emoji_set_path().stat().st_size <= 11_500_000


def test_splits_do_not_depend_on_the_order_of_concepts() -> None:
    category, (subcategory, *_) = CLASS_TABLE["animal-mammal"]
    drawings = [Drawing(style, "", b"") for style in STYLES]
    groups = [[Concept(f"1F{n:03X}", "x", [], category, subcategory, drawings)] for n in range(200)]
    forwards, backwards = split_concepts(groups), split_concepts(groups[::-1])
    assert forwards == backwards
    assert len(forwards[0]) == 20 and len(forwards[1]) == 27


def gradient(size: int) -> bytes:
    y, x = np.mgrid[:size, :size]
    inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 2.5) ** 2
    colours = np.stack([x * 255 // size, y * 255 // size, (x + y) * 127 // size, inside * 255], -1)
    buffer = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("source", [64, 200])
def test_compact_pictures_keep_their_promised_quality(source: int) -> None:
    exact, exact_alpha = render(gradient(source), 64)
    picture, alpha = compact(exact, exact_alpha)
    assert psnr(np.asarray(exact), np.asarray(picture)) >= COMPACT_PSNR_DB
    assert ((np.asarray(alpha) == 0) == (np.asarray(exact_alpha) == 0)).all()
    assert (np.asarray(exact)[np.asarray(exact_alpha) == 0] == 255).all()


def test_render_refuses_what_draws_nothing() -> None:
    empty = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(empty, "PNG")
    with pytest.raises(ValueError, match="empty"):
        render(empty.getvalue(), 64)
    with pytest.raises(ValueError):
        render(b"\x89PNG\r\n\x1a\nnot really", 64)
    with pytest.raises(ValueError):
        render(gradient(64)[:200], 64)


def test_fluent_names_follow_unicode_names() -> None:
    assert fluent_stem("man red hair") == "man-red-hair"
    assert fluent_stem("piñata") == "pinata"
    assert fluent_stem("enraged face") == "pouting-face"


def pack(folder: Path, package: Package, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / package.archive, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def tiny_packages(tmp_path: Path) -> Path:
    """The six packages with two emoji: one in Noto and Twemoji with a skin tone, one broken in Noto."""
    table = [
        {
            "unified": codepoints,
            "image": f"{codepoints.lower()}.png",
            "has_img_google": True,
            "has_img_twitter": True,
            "category": category,
            "subcategory": subcategory,
            "sort_order": order,
        }
        for order, (codepoints, category, subcategory) in enumerate(
            [("1F44B", "People & Body", "hand-fingers-open"), ("1F994", "Animals & Nature", "animal-mammal")]
        )
    ]
    tone = dict(table[0], unified="1F44B-1F3FD", image="1f44b-1f3fd.png")
    table[0]["skin_variations"] = {"1F3FD": tone}
    good, names = gradient(64), {"👋": {"name": "waving hand"}, "🦔": {"name": "hedgehog"}}
    contents = {
        "noto": {
            "package/emoji.json": json.dumps(table).encode(),
            "package/img/google/64/1f44b.png": good,
            "package/img/google/64/1f44b-1f3fd.png": good,
            "package/img/google/64/1f994.png": b"not a picture",
            "package/../../escaped.png": good,
        },
        "twemoji": {"package/img/twitter/64/1f44b.png": good},
        "fluent": {"package/icons/flat/unrelated.svg": b"<svg/>"},
        "fluent-3d": {"package/assets/1f994.webp": good},
        "names": {"package/data-by-emoji.json": json.dumps(names).encode()},
        "keywords": {"package/dist/emoji-en-US.json": json.dumps({"👋": ["waving_hand", "hello"]}).encode()},
    }
    for role, files in contents.items():
        pack(tmp_path, emoji_sources.PACKAGES[role], files)
    return tmp_path


@pytest.mark.parametrize("exact", [False, True])
def test_build_skips_and_names_broken_drawings(tiny_packages: Path, exact: bool) -> None:
    pytest.importorskip("resvg_py")
    out = tiny_packages / "made" / "set.parquet"
    report = build_emoji_set(out, size=32, work=tiny_packages, progress=False, exact=exact)
    made = parquet.read_table(out).to_pylist()
    assert [(row["name"], row["style"]) for row in made] == [
        ("waving hand", "noto"),
        ("waving hand", "twemoji"),
        ("hedgehog", "fluent-3d"),
    ]
    assert report.pictures == 3 and report.missing["noto"] == 1
    assert [(style, codepoints) for style, codepoints, _ in report.skipped] == [("noto", "1F994")]
    picture = Image.open(io.BytesIO(made[0]["image"]["bytes"]))
    assert picture.size == (32, 32)
    if exact:
        assert picture.tobytes() == render(gradient(64), 32)[0].tobytes()
    assert made[0]["keywords"] == ["waving hand", "hello"]
    assert [path.name for path in out.parent.iterdir()] == ["set.parquet"], "nothing half-written is left"
    assert not list(tiny_packages.parent.glob("escaped.png"))


def test_skin_tones_are_built_on_demand(tiny_packages: Path) -> None:
    pytest.importorskip("resvg_py")
    out = tiny_packages / "set.parquet"
    build_emoji_set(out, size=16, skin_tones=True, work=tiny_packages, progress=False)
    made = parquet.read_table(out).to_pylist()
    toned = [row for row in made if row["skin_tone"]]
    assert [(row["codepoints"], row["style"], row["skin_tone"]) for row in toned] == [("1F44B", "noto", "medium")]


def test_damaged_archive_is_named(tiny_packages: Path) -> None:
    archive = tiny_packages / emoji_sources.PACKAGES["twemoji"].archive
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(DataError, match=archive.name):
        read_package(archive, emoji_sources.PACKAGES["twemoji"].wanted)


def test_missing_npm_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm"):
        fetch_package(Package("some-package", "1.0.0", ".*"), tmp_path)


def test_failing_npm_is_a_clear_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error 404 no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "work"
    with pytest.raises(DataError, match="404 no such package"):
        fetch_package(Package("some-package", "1.0.0", ".*"), folder)
    assert not list(folder.iterdir())


def test_size_out_of_range_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8 to 1024"):
        build_emoji_set(tmp_path / "x.parquet", size=4, work=tmp_path)


def test_set_that_was_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_set.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"emoji-64\.parquet"):
        emoji_set_path()
