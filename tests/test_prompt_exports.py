"""Exported pictures lie where the published evaluators look for them, and nothing of a prompt leads elsewhere."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nextscale.errors import DataError, InputError
from nextscale.evaluation.prompt_exports import (
    DPG,
    LAYOUTS,
    BenchmarkPrompt,
    GenEval,
    HPSv2,
    ImageReward,
    Layout,
    checked_name,
    export,
)

TEXTS = ["a photo of a bench", "a red apple on a blue plate", "ein grüner Bär ☃"]


def shades(count: int, asked: list[str] | None = None) -> Callable[[BenchmarkPrompt], np.ndarray]:
    """Flat pictures: the prompt tells red, the picture's number green; asked prompts are noted."""

    def draw(prompt: BenchmarkPrompt) -> np.ndarray:
        if asked is not None:
            asked.append(prompt.text)
        pictures = np.zeros((count, 8, 8, 3), np.uint8)
        pictures[..., 0] = 40 * (1 + TEXTS.index(prompt.text))
        pictures[..., 1] = 60 * np.arange(count)[:, None, None]
        return pictures

    return draw


def sources(folder: Path) -> dict[str, Path]:
    """The four benchmarks' own prompt files, with TEXTS inside."""
    folder.mkdir()
    lines = [json.dumps({"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": text})
             for text in TEXTS]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "dpg").mkdir()
    for name, text in zip(("COCOval2014000000000042", "drawtext1", "vrd7"), TEXTS, strict=True):
        (folder / "dpg" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "hps").mkdir()
    (folder / "hps" / "anime.json").write_text(json.dumps(TEXTS[:2]))
    (folder / "hps" / "concept-art.json").write_text(json.dumps(TEXTS[2:]))
    (folder / "hps" / "drawbench.json").write_text(json.dumps(["not of this benchmark"]))
    (folder / "benchmark-prompts.json").write_text(json.dumps(
        [{"id": f"005695-00{i}7", "prompt": text} for i, text in enumerate(TEXTS)]))
    return {"geneval": folder / "evaluation_metadata.jsonl", "dpg": folder / "dpg", "hpsv2": folder / "hps",
            "imagereward": folder / "benchmark-prompts.json"}


def red_and_green(image: Image.Image) -> tuple[int, int]:
    pixel = image.convert("RGB").getpixel((4, 4))
    assert isinstance(pixel, tuple)
    return round(pixel[0] / 40), round(pixel[1] / 60)


def test_geneval_folders_hold_the_prompts_line_and_numbered_samples(tmp_path: Path) -> None:
    layout = GenEval(tmp_path / "out", 3)
    export(layout, layout.read(sources(tmp_path / "in")["geneval"]), shades(3))
    # What evaluate_images.py walks over: folders of digits, pictures that match \d+\.png.
    found = {}
    for folder in os.listdir(tmp_path / "out"):
        assert folder.isdigit()
        record = json.loads((tmp_path / "out" / folder / "metadata.jsonl").read_text())
        names = sorted(os.listdir(tmp_path / "out" / folder / "samples"))
        assert all(re.fullmatch(r"\d+\.png", name) for name in names) and record["tag"] == "single_object"
        shown = [red_and_green(Image.open(tmp_path / "out" / folder / "samples" / name)) for name in names]
        found[int(folder)] = (record["prompt"], shown)
    assert found == {i: (text, [(i + 1, k) for k in range(3)]) for i, text in enumerate(TEXTS)}


def test_dpg_grids_are_cut_into_the_pictures_that_were_drawn(tmp_path: Path) -> None:
    layout = DPG(tmp_path / "out")
    export(layout, layout.read(sources(tmp_path / "in")["dpg"]), shades(4))
    assert sorted(os.listdir(tmp_path / "out")) == ["COCOval2014000000000042.png", "drawtext1.png", "vrd7.png"]
    with Image.open(tmp_path / "out" / "drawtext1.png") as grid:
        assert grid.size == (16, 16)
        boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]  # the order of compute_dpg_bench.py
        assert [red_and_green(grid.crop(box)) for box in boxes] == [(2, k) for k in range(4)]
    with pytest.raises(InputError, match="cuts squares"):
        DPG(tmp_path / "wide", 1).write(BenchmarkPrompt("a", "a"), np.zeros((1, 8, 16, 3), np.uint8))
    with pytest.raises(InputError, match="count is 3; it must be 1 or 4"):
        DPG(tmp_path, 3)


def test_hpsv2_finds_the_picture_of_each_index_of_a_style(tmp_path: Path) -> None:
    layout = HPSv2(tmp_path / "out", model="ours")
    export(layout, layout.read(sources(tmp_path / "in")["hpsv2"]), shades(1))
    images, seen = tmp_path / "out" / "benchmark_imgs" / "ours", []
    for style in sorted(os.listdir(images)):
        prompts = json.loads((tmp_path / "out" / f"{style}.json").read_text(encoding="utf-8"))
        assert len(os.listdir(images / style)) == len(prompts)
        for index, text in enumerate(prompts):
            with Image.open(images / style / f"{index:05d}.jpg") as image:
                assert image.format == "JPEG" and red_and_green(image)[0] == 1 + TEXTS.index(text)
            seen.append((style, text))
    assert seen == [("anime", TEXTS[0]), ("anime", TEXTS[1]), ("concept-art", TEXTS[2])]
    with pytest.raises(InputError, match="by their number"):
        layout.begin([BenchmarkPrompt("a", "00001", "anime")])


def test_imagereward_counts_the_pictures_of_a_prompt_right(tmp_path: Path) -> None:
    layout = ImageReward(tmp_path / "out", 2, "ours")
    export(layout, layout.read(sources(tmp_path / "in")["imagereward"]), shades(2))
    prompts = json.loads((tmp_path / "out" / "benchmark-prompts.json").read_text(encoding="utf-8"))
    folder = tmp_path / "out" / "generations" / "ours"
    count = len(os.listdir(folder)) // len(prompts)  # as test-benchmark.py finds it
    assert count == 2 and [item["prompt"] for item in prompts] == TEXTS
    for i, item in enumerate(prompts):
        shown = [red_and_green(Image.open(folder / f"{item['id']}_{k}.png")) for k in range(count)]
        assert shown == [(i + 1, 0), (i + 1, 1)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stopped_export_goes_on_and_draws_only_what_is_missing(name: str, tmp_path: Path) -> None:
    kind = LAYOUTS[name]
    prompts = kind.read(sources(tmp_path / "in")[name])
    layout = kind(tmp_path / "out", 1)
    asked: list[str] = []

    def stops(prompt: BenchmarkPrompt) -> np.ndarray:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return shades(1, asked)(prompt)

    with pytest.raises(KeyboardInterrupt):
        export(layout, prompts, stops)
    assert [p.text for p in layout.left(prompts)] == [prompts[2].text]
    assert export(layout, prompts, shades(1, asked)) == 1
    assert sorted(asked) == sorted(TEXTS) and export(layout, prompts, shades(1, asked)) == 0
    assert not [file for file in (tmp_path / "out").rglob(".*")]


def test_pictures_of_another_prompt_are_never_taken_for_this_ones(tmp_path: Path) -> None:
    layout = ImageReward(tmp_path, 1)
    export(layout, [BenchmarkPrompt(TEXTS[0], "a")], shades(1))
    with pytest.raises(DataError, match="of another prompt"):
        export(layout, [BenchmarkPrompt(TEXTS[1], "a")], shades(1))
    (tmp_path / "generations" / "nextscale" / "a_0.png").write_bytes(b"half a picture")
    with pytest.raises(DataError, match="cannot be read"):
        layout.left([BenchmarkPrompt(TEXTS[0], "a")])
    with pytest.raises(InputError, match="two prompts are called 'a'"):
        layout.begin([BenchmarkPrompt("x", "A"), BenchmarkPrompt("y", "a")])


@pytest.mark.parametrize("kind", [GenEval, DPG, ImageReward, HPSv2])
@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "a/b", "..", ".hidden", "", "a.b", "a\x00b", "-x",
                                  "é", "a\n", "x" * 200])
def test_names_in_prompt_files_cannot_leave_the_folder(kind: type[Layout], name: str, tmp_path: Path) -> None:
    layout = kind(tmp_path / "out", 1)
    # Of HPS v2 the style is what comes from a file's name.
    prompt = BenchmarkPrompt("text", "00000", name) if kind is HPSv2 else BenchmarkPrompt("text", name)
    for act in (lambda: layout.begin([prompt]), lambda: layout.write(prompt, np.zeros((1, 8, 8, 3), np.uint8)),
                lambda: layout.left([prompt])):
        with pytest.raises(InputError, match="must be of letters"):
            act()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="model's name"):
        kind(tmp_path, 1, "../up")


@given(st.text(max_size=120))
def test_every_name_that_passes_stays_a_single_plain_file_name(name: str) -> None:
    try:
        checked_name(name)
    except InputError:
        return
    assert Path(name).name == name and not name.startswith((".", "-")) and name.isascii()


def test_files_that_are_no_prompt_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"tag": 1}\n')
    with pytest.raises(DataError, match=r"line 2 has no 'prompt'"):
        GenEval.read(tmp_path / "bad.jsonl")
    (tmp_path / "bad.json").write_text('{"prompt": "a"}')
    for kind in (ImageReward, HPSv2):
        with pytest.raises(DataError, match="no list of prompts"):
            kind.read(tmp_path / "bad.json" if kind is ImageReward else tmp_path)
    (tmp_path / "bad.json").write_text("[{]")
    with pytest.raises(DataError, match="not valid JSON"):
        ImageReward.read(tmp_path / "bad.json")
    for kind in (GenEval, ImageReward):
        with pytest.raises(DataError, match="no such file"):
            kind.read(tmp_path / "nothing")
    for kind in (DPG, HPSv2):
        with pytest.raises(DataError, match="holds no"):
            kind.read(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"not uint8 \(1, H, W, 3\)"):
        ImageReward(tmp_path, 1).write(BenchmarkPrompt("a", "a"), np.zeros((2, 8, 8, 3), np.uint8))
