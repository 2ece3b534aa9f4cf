"""Pictures of benchmark prompts in the folders that the published evaluators read.

Each layout reads its benchmark's prompt file, says which prompts still lack pictures, and writes those of one prompt:

    layout = GenEval(Path("out/geneval"))
    export(layout, layout.read(Path("evaluation_metadata.jsonl")), draw)

The evaluators themselves stay outside: they bring detectors, question answering and reward models of their own.
"""
from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from nextscale.data.pictures_out import settings_text, write_png, writing
from nextscale.errors import DataError, InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_RECORDS = 10_000_000  # characters of a prompt file, at most


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One prompt.

    text: what is to be drawn; name: of its files, letters, digits, ``_`` and ``-``; group: the folder or style that it
    belongs to, where the benchmark has some; record: what the benchmark says of it beside.
    """

    text: str
    name: str
    group: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout(ABC):
    """Where the pictures of prompts lie.

    out: the folder that all goes into; count: pictures a prompt; model: what the evaluator calls the model, where its
    folders are named so. Raises InputError for a count or a model's name that can't be used.
    """

    out: Path
    count: int = 4
    model: str = "nextscale"
    counts: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or (self.counts and self.count not in self.counts):
            allowed = " or ".join(map(str, self.counts)) or "at least 1"
            raise InputError(f"{type(self).__name__}: count is {self.count}; it must be {allowed}")
        checked_name(self.model, "the model's name")

    @classmethod
    @abstractmethod
    def read(cls, source: Path) -> list[BenchmarkPrompt]:
        """The prompts of the benchmark's own file or folder. Raises DataError where it is none."""

    @abstractmethod
    def files(self, prompt: BenchmarkPrompt) -> list[Path]:
        """The files of a prompt's pictures."""

    def begin(self, prompts: Sequence[BenchmarkPrompt]) -> None:
        """Checks names, and writes what the evaluator reads beside pictures.

        Raises InputError where a name can't be a file's, or two prompts have one file.
        """
        seen: dict[str, int] = {}
        for i, prompt in enumerate(prompts):
            for file in self.files(prompt):
                # Some disks tell no case.
                first = seen.setdefault(str(file).casefold(), i)
                if first != i:
                    raise InputError(f"two prompts are called {prompt.name!r} ({prompts[first].text[:40]!r}, "
                                     f"{prompt.text[:40]!r}); their pictures would have one file")

    def left(self, prompts: Iterable[BenchmarkPrompt]) -> list[BenchmarkPrompt]:
        """The prompts that have not all their pictures yet. Raises DataError where a file is of another prompt."""
        return [prompt for prompt in prompts if not self.done(prompt)]

    def done(self, prompt: BenchmarkPrompt) -> bool:
        """Whether a prompt has all its pictures. Raises DataError where a file is of another prompt."""
        found = [_prompt_in(file) for file in self.files(prompt)]
        for file, text in zip(self.files(prompt), found, strict=True):
            if text is not None and text != prompt.text:
                raise DataError(f"{file} is of another prompt ({text[:60]!r}); choose another folder or remove it")
        return all(text is not None for text in found)

    def write(self, prompt: BenchmarkPrompt, pictures_NHWC: np.ndarray) -> list[Path]:
        """Writes a prompt's pictures, uint8 (count, H, W, 3), each with the prompt inside.

        Raises:
            InputError: of another number or shape, or the prompt's name can't be a file's.
            DataError: they cannot be written.
        """
        shape = pictures_NHWC.shape
        if pictures_NHWC.dtype != np.uint8 or len(shape) != 4 or shape[0] != self.count or shape[3] != 3:
            raise InputError(f"{prompt.name}: pictures are {pictures_NHWC.dtype} {shape}, "
                             f"not uint8 ({self.count}, H, W, 3)")
        files = self.files(prompt)
        for file, image in zip(files, self.images(pictures_NHWC), strict=True):
            _write(image, file, {"prompt": prompt.text})
        return files

    def images(self, pictures_NHWC: np.ndarray) -> list[Image.Image]:
        """The contents of the files."""
        return [Image.fromarray(one) for one in pictures_NHWC]


class GenEval(Layout):
    """``OUT/00000/metadata.jsonl`` (the prompt's line of the file), ``OUT/00000/samples/00000.png``, ...

    Read by ``evaluation/evaluate_images.py OUT``, which takes folders and pictures with names of digits (GenEval,
    arXiv 2310.11513; https://github.com/djghosh13/geneval, README, "Image generation").
    """

    @classmethod
    def read(cls, source: Path) -> list[BenchmarkPrompt]:
        """``evaluation_metadata.jsonl``: an object a line, with ``prompt`` and ``tag``."""
        lines = [line for line in _text(source).splitlines() if line.strip()]
        records = [_json(line, f"{source} line {i}") for i, line in enumerate(lines, 1)]
        return [BenchmarkPrompt(_words(record, "prompt", f"{source} line {i + 1}"), f"{i:05d}", record=record)
                for i, record in enumerate(records)]

    def files(self, prompt: BenchmarkPrompt) -> list[Path]:
        folder = self.out / checked_name(prompt.name) / "samples"
        return [folder / f"{i:05d}.png" for i in range(self.count)]

    def done(self, prompt: BenchmarkPrompt) -> bool:
        return super().done(prompt) and (self.out / prompt.name / "metadata.jsonl").is_file()

    def write(self, prompt: BenchmarkPrompt, pictures_NHWC: np.ndarray) -> list[Path]:
        files = super().write(prompt, pictures_NHWC)
        _write_text(self.out / prompt.name / "metadata.jsonl", json.dumps(dict(prompt.record)) + "\n")
        return files


class DPG(Layout):
    """``OUT/NAME.png``, named as the prompt's file: four square pictures as a grid of 2 x 2, or a single one.

    Read by ``dpg_bench/dist_eval.sh OUT SIDE`` (``PIC_NUM=1`` for single ones), which cuts squares of ``SIDE`` pixels,
    row by row from the upper left, and takes every file in the folder for a picture (ELLA, arXiv 2403.05135;
    https://github.com/TencentQQGYLab/ELLA, README, "DPG-Bench").
    """

    counts = (1, 4)

    @classmethod
    def read(cls, source: Path) -> list[BenchmarkPrompt]:
        """``dpg_bench/prompts``: a ``.txt`` a prompt."""
        files = sorted(source.glob("*.txt"))
        if not files:
            raise DataError(f"{source} holds no .txt files; give DPG-Bench's folder of prompts")
        return [BenchmarkPrompt(" ".join(_text(file).split()), file.stem) for file in files]

    def files(self, prompt: BenchmarkPrompt) -> list[Path]:
        return [self.out / f"{checked_name(prompt.name)}.png"]

    def images(self, pictures_NHWC: np.ndarray) -> list[Image.Image]:
        _, height, width, _ = pictures_NHWC.shape
        if height != width:
            raise InputError(f"DPG-Bench cuts squares, pictures are {height}x{width}; draw square ones")
        side = 2 if self.count == 4 else 1
        grid = pictures_NHWC.reshape(side, side, height, width, 3).swapaxes(1, 2)
        return [Image.fromarray(grid.reshape(side * height, side * width, 3))]


class HPSv2(Layout):
    """``OUT/benchmark_imgs/MODEL/STYLE/00000.jpg``, ... one a prompt, numbered within its style, and
    ``OUT/STYLE.json``, the style's prompts.

    Read by ``hpsv2.evaluate("OUT/benchmark_imgs/MODEL")``; with prompts of one's own by ``evaluation.py --data-type
    benchmark --data-path OUT --image-path OUT/benchmark_imgs/MODEL``. It takes every entry of MODEL for a style, and
    the next picture where one is missing (HPS v2, arXiv 2306.09341; https://github.com/tgxs002/HPSv2, README, "Custom
    Evaluation", and ``hpsv2/evaluation.py``). Styles of the benchmark: anime, concept-art, paintings, photo.
    """

    counts = (1,)

    def __init__(self, out: Path, count: int = 1, model: str = "nextscale"):
        super().__init__(out, count, model)

    @classmethod
    def read(cls, source: Path) -> list[BenchmarkPrompt]:
        """A folder with a ``STYLE.json`` a style, a list of prompts each; ``drawbench.json`` is another benchmark."""
        files = [file for file in sorted(source.glob("*.json")) if file.stem != "drawbench"]
        if not files:
            raise DataError(f"{source} holds no STYLE.json; give HPS v2's folder of benchmark prompts")
        return [BenchmarkPrompt(_words({"prompt": text}, "prompt", f"{file} entry {i}"), f"{i:05d}", file.stem)
                for file in files for i, text in enumerate(_list(file))]

    def files(self, prompt: BenchmarkPrompt) -> list[Path]:
        style = checked_name(prompt.group, "the prompt's style")
        return [self.out / "benchmark_imgs" / self.model / style / f"{checked_name(prompt.name)}.jpg"]

    def begin(self, prompts: Sequence[BenchmarkPrompt]) -> None:
        super().begin(prompts)
        for style in dict.fromkeys(prompt.group for prompt in prompts):
            of_style = [prompt for prompt in prompts if prompt.group == style]
            if [prompt.name for prompt in of_style] != [f"{i:05d}" for i in range(len(of_style))]:
                raise InputError(f"HPS v2 finds pictures by their number; prompts of {style} must be called 00000, "
                                 "00001, ... in their order")
            texts = [prompt.text for prompt in of_style]
            _write_text(self.out / f"{style}.json", json.dumps(texts, ensure_ascii=False, indent=1) + "\n")


class ImageReward(Layout):
    """``OUT/benchmark-prompts.json`` and ``OUT/generations/MODEL/ID_0.png``, ``ID_1.png``, ...

    Read by ``test-benchmark.py --prompts_path OUT/benchmark-prompts.json --img_dir OUT/generations --model MODEL``,
    which divides the number of files by that of prompts (ImageReward, arXiv 2304.05977;
    https://github.com/THUDM/ImageReward, ``test-benchmark.py``).
    """

    @classmethod
    def read(cls, source: Path) -> list[BenchmarkPrompt]:
        """``benchmark/benchmark-prompts.json``: a list of objects with ``id`` and ``prompt``."""
        places = [(record, f"{source} entry {i}") for i, record in enumerate(_list(source))]
        return [BenchmarkPrompt(_words(record, "prompt", place), _words(record, "id", place), record=record)
                for record, place in places]

    def files(self, prompt: BenchmarkPrompt) -> list[Path]:
        folder, name = self.out / "generations" / self.model, checked_name(prompt.name)
        return [folder / f"{name}_{i}.png" for i in range(self.count)]

    def begin(self, prompts: Sequence[BenchmarkPrompt]) -> None:
        super().begin(prompts)
        records = [{"id": prompt.name, "prompt": prompt.text} for prompt in prompts]
        _write_text(self.out / "benchmark-prompts.json", json.dumps(records, ensure_ascii=False, indent=4) + "\n")


LAYOUTS: dict[str, type[Layout]] = {"geneval": GenEval, "dpg": DPG, "hpsv2": HPSv2, "imagereward": ImageReward}


def export(layout: Layout, prompts: Sequence[BenchmarkPrompt], draw: Callable[[BenchmarkPrompt], np.ndarray],
           each: Callable[[int, int], None] | None = None) -> int:
    """Draws and writes the pictures of all prompts that lack some, and returns of how many.

    draw: gives uint8 (count, H, W, 3) of a prompt, and is not asked for what is there already, so a stopped export goes
    on; each: called with (done, of how many).

    Raises:
        InputError: names or pictures that the layout can't hold.
        DataError: files that belong to other prompts, or can't be written.
    """
    layout.begin(prompts)
    todo = layout.left(prompts)
    for i, prompt in enumerate(todo, 1):
        layout.write(prompt, draw(prompt))
        if each is not None:
            each(i, len(todo))
    return len(todo)


def checked_name(name: str, what: str = "the prompt's name") -> str:
    """A name that can be a file's in every folder, unchanged. Raises InputError for others: prompt files come from
    elsewhere, and nothing in them may lead out of the folder."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{what} is {name[:80]!r}; it must be of letters, digits, _ and -, and begin with the former")
    return name


def _write(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    if path.suffix == ".png":
        write_png(image, path, settings)
        return
    with writing(path) as temporary:
        image.save(temporary, quality=95, subsampling=0, comment=settings_text(settings).encode())


def _prompt_in(path: Path) -> str | None:
    """The prompt inside a picture, None where there is no picture, "" where it has none."""
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            found = json.loads(image.info.get("nextscale") or image.info.get("comment") or "{}")
    except Exception as error:  # Pillow and json have dozens of error types for damaged files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); remove it, then export again") from None
    return str(found.get("prompt", "")) if isinstance(found, dict) else ""


def _write_text(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _RECORDS:
            raise DataError(f"{path} is larger than {_RECORDS // 1_000_000} MB; that is no prompt file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the benchmark's own prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give the benchmark's own prompts") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not valid JSON ({error})") from None


def _list(path: Path) -> list[Any]:
    found = _json(_text(path), str(path))
    if not isinstance(found, list) or not found:
        raise DataError(f"{path} holds no list of prompts; give the benchmark's own file")
    return found


def _words(record: Any, key: str, where: str) -> str:
    """A text of a record that isn't empty."""
    found = record.get(key) if isinstance(record, dict) else None
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{where} has no {key!r}; give the benchmark's own file")
    return found
