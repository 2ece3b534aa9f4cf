"""Pictures that are written: whole or not at all, with the settings that made them inside, under names that stay."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.data import pictures_out
from nextscale.data.pictures_out import (
    check_writable,
    folder_of,
    out_kind,
    read_settings,
    write_animation,
    write_folder,
    write_npz,
    write_png,
    writing,
    writing_folder,
)
from nextscale.data.sheets import board
from nextscale.errors import DataError, InputError, NextscaleError

SETTINGS = {"model": "emoji-64", "seeds": [3, 4], "labels": [["plant", "noto"], None], "top_p": 0.95, "name": "é≠"}


def shades(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.webp", "a.npz"])
def test_settings_come_back_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / name
    if name == "a.png":
        write_png(board(shades(2), 2), path, SETTINGS)
    elif name == "a.npz":
        write_npz(shades(2), path, SETTINGS)
    else:
        write_animation([shades(2), shades(3)[:2]], path, 2, SETTINGS)
    assert read_settings(path) == SETTINGS
    assert leftovers(path.parent) == [name]


def test_npz_is_adm_layout(tmp_path: Path) -> None:
    pixels = shades(5)
    write_npz(pixels, tmp_path / "a.npz", {})
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], pixels)


def test_sheet_holds_every_picture_at_its_place() -> None:
    pixels = shades(5)
    sheet = np.asarray(board(pixels, 3))
    assert sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert np.array_equal(sheet[12:20, 12:20], pixels[4])
    assert (sheet[12:20, 22:30] == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_has_a_frame_a_step_and_holds_the_last(tmp_path: Path, suffix: str) -> None:
    frames = [np.full((1, 8, 8, 3), level, np.uint8) for level in (0, 90, 200)]
    path = write_animation(frames, tmp_path / f"a{suffix}", 1, {})
    with Image.open(path) as image:
        assert image.n_frames == 3 and image.info.get("loop") == 0
        times = []
        for frame in range(3):
            image.seek(frame)
            image.load()
            assert abs(int(np.asarray(image.convert("RGB"))[6, 6, 0]) - frames[frame][0, 0, 0, 0]) < 6
            times.append(image.info["duration"])
    assert times[2] > 3 * times[0]


def test_class_names_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "inner" / "out"
    titles = ["../../evil", "/etc/passwd", "a\x00b", "", "ok name", "." * 300]
    written = write_folder(shades(6), out, titles, [{"seed": i} for i in range(6)], {}, 3)
    assert all(path.parent == out and path.is_file() for path in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner"]
    assert len(list(out.iterdir())) == 7
    assert read_settings(written[3]) == {"seed": 3}


def test_files_are_the_same_bytes_in_batches_by_a_thread_as_one_after_the_other(tmp_path: Path) -> None:
    pixels, titles = shades(7), [f"t{i}" for i in range(7)]
    with folder_of(tmp_path / "batches") as folder:
        for at in (slice(0, 3), slice(3, 6), slice(6, 7)):
            folder.add(pixels[at], titles[at], [{"seed": i} for i in range(7)[at]])
        folder.sheet(pixels, 3, SETTINGS)
    for i, title in enumerate(titles):
        write_png(Image.fromarray(pixels[i]), tmp_path / "plain" / f"{i:05d}-{title}.png", {"seed": i})
    write_png(board(pixels, 3), tmp_path / "plain" / "sheet.png", SETTINGS)
    assert leftovers(tmp_path / "batches") == leftovers(tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "batches" / path.name).read_bytes()


def test_a_picture_that_its_thread_cannot_write_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match="No space left on device") as told:
        with folder_of(tmp_path / "out") as folder:
            monkeypatch.setattr(Image.Image, "save", full)
            folder.add(shades(3), ["a", "b", "c"], [{}] * 3)
    assert leftovers(tmp_path) == [] and ".out." not in str(told.value)


def test_an_error_while_drawing_drops_what_waits_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with folder_of(tmp_path / "out") as folder:
            folder.add(shades(3), ["a", "b", "c"], [{}] * 3)
            raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_folder_keeps_files_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    write_folder(shades(1), tmp_path, ["a"], [{}], {}, 1)
    assert leftovers(tmp_path) == ["00000-a.png", "mine.txt", "sheet.png"]


def test_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(DataError, match=r"a\.png cannot be written \(No space left on device\); .* MB are free"):
        with writing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == ["a.png"]


def test_interruption_leaves_no_half_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with writing_folder(tmp_path / "out") as temporary:
            (temporary / "one.png").write_bytes(b"half")
            raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.png", tmp_path / "file" / "deep" / "a.png"):
        with pytest.raises(DataError, match="is a file, not a folder"):
            check_writable(path)
    with pytest.raises(DataError, match="is a file, not a folder"):
        check_writable(tmp_path / "file", folder=True)
    with pytest.raises(DataError, match="is a folder, not a file"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "deep" / "a.png")
    assert leftovers(tmp_path) == ["file"]


def test_suffix_decides_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    kinds = {"a.PNG": "sheet", "a": "folder", "a.gif": "animation", "a.webp": "animation", "a.npz": "npz"}
    assert {name: out_kind(Path(name)) for name in kinds} == kinds
    (tmp_path / "v1.5").mkdir()
    assert out_kind(tmp_path / "v1.5") == "folder"
    with pytest.raises(InputError, match=r"cannot write \.jpg"):
        out_kind(Path("a.jpg"))


def test_files_without_settings_are_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.gif", comment="made by hand")
    np.savez(tmp_path / "plain.npz", arr_0=shades(1))
    for name, phrase in (
        ("plain.png", "no settings inside"),
        ("plain.npz", "no settings inside"),
        ("foreign.gif", "cannot be read"),
        ("text.png", "cannot be read"),
        ("absent.png", "no such file"),
    ):
        with pytest.raises(InputError, match=phrase):
            read_settings(tmp_path / name)


@given(st.data())
@settings(max_examples=60)
def test_damaged_files_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    suffix = data.draw(st.sampled_from([".png", ".gif", ".webp", ".npz"]))
    whole = folder / f"whole{suffix}"
    if not whole.exists():
        if suffix == ".png":
            write_png(board(shades(1), 1), whole, SETTINGS)
        elif suffix == ".npz":
            write_npz(shades(1), whole, SETTINGS)
        else:
            write_animation([shades(1), shades(1)], whole, 1, SETTINGS)
    damaged = bytearray(whole.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=6)):
        damaged[place] = data.draw(st.integers(0, 255))
    path = folder / f"damaged{suffix}"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        assert isinstance(read_settings(path), dict)
    except NextscaleError as error:
        assert "\n" not in str(error)


def test_settings_are_plain_json_in_the_png_text(tmp_path: Path) -> None:
    with Image.open(write_png(board(shades(1), 1), tmp_path / "a.png", SETTINGS)) as image:
        assert json.loads(image.text[pictures_out.SETTINGS_KEY]) == SETTINGS
