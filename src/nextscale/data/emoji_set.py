"""The emoji set: one large set of labelled drawings, free to use, in five styles, as Hugging Face-layout parquet.

`emoji_set_path()` is the set that ships with the package; `build_emoji_set` makes it again, in other sizes, with
skin tones or with exact pixels. `docs/emoji-set.md` describes columns, classes and splits.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.data.emoji_classes import CLASS_OF_SUBCATEGORY, CLASS_TABLE, FLAG_CLASSES, drawing_key
from nextscale.data.emoji_sources import PACKAGES, STYLES, Concept, Drawing, read_concepts
from nextscale.errors import DataError, InputError, MissingExtraError

__all__ = ["FLAG_CLASSES", "STYLES", "BuildReport", "build_emoji_set", "emoji_set_path"]

#: Share of the concepts held out in all styles, and share of the others that have one style held out.
CONCEPT_TEST_SHARE = 0.10
STYLE_TEST_SHARE = 0.15

#: The pictures of the compact set differ from the drawings by at most this (mean over the picture).
COMPACT_PSNR_DB = 40.0

_COLOUR_COUNTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ALPHA_LEVELS = np.array([0, 85, 170, 255])


@dataclass
class BuildReport:
    """What a build wrote.

    Args:
        path: the parquet file.
        size: side of the pictures in pixels.
        pictures: rows in the file.
        concepts: concepts with at least one picture.
        per_style: pictures of each style.
        missing: concepts that a style does not draw, of each style.
        skipped: drawings left out because they could not be rendered or are empty: (style, code points, reason).
        file_bytes: size of the file.
    """

    path: Path
    size: int
    pictures: int = 0
    concepts: int = 0
    per_style: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    file_bytes: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.pictures} pictures of {self.concepts} concepts, {self.size}x{self.size}, "
            f"{self.file_bytes / 1e6:.1f} MB"
        ]
        for style in STYLES:
            count, missing = self.per_style.get(style, 0), self.missing.get(style, 0)
            lines.append(f"  {style}: {count} pictures, {missing} concepts not drawn in this style")
        lines.append(f"  skipped: {len(self.skipped)}")
        lines += [f"    {style} {codepoints}: {reason}" for style, codepoints, reason in self.skipped]
        return "\n".join(lines)


def emoji_set_path() -> Path:
    """Path of the emoji set that ships with the package (64x64, no skin tones).

    Raises:
        DataError: the package was installed without its data.
    """
    path = Path(str(importlib.resources.files("nextscale"))) / "data" / "emoji" / "emoji-64.parquet"
    if not path.is_file():
        raise DataError(f"{path}: the emoji set is not there; reinstall nextscale, or run `nextscale data build-emoji`")
    return path


def render(data: bytes, size: int) -> tuple[Image.Image, Image.Image]:
    """Draws one file at `size` x `size`: (picture on white as RGB, its alpha mask as L).

    Scaling is done on premultiplied colours, so transparent pixels don't bleed into the edges.

    Raises:
        ValueError: the file cannot be read, is too large, or draws nothing.
        MissingExtraError: resvg-py, which draws SVG, is not installed.
    """
    if data.lstrip()[:1] == b"<":
        try:
            import resvg_py
        except ImportError:
            raise MissingExtraError("resvg-py", "data", "draw SVG emoji") from None
        # Filters are drawn without anti-aliasing: draw such pictures four times larger and scale them down.
        side = 4 * size if b"filter" in data else size
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8"), width=side, height=side))
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if max(opened.size) > 4096:
                raise ValueError(f"is {opened.width}x{opened.height}; 4096x4096 is the largest that is read")
            drawn = opened.convert("RGBA")
    except OSError as error:
        raise ValueError(str(error)) from error
    if drawn.width != drawn.height:  # a few drawings are a pixel narrower than high
        side = max(drawn.size)
        square = Image.new("RGBA", (side, side))
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        drawn = square
    if drawn.width != size:
        drawn = drawn.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    alpha = drawn.getchannel("A")
    if alpha.getextrema()[1] == 0:
        raise ValueError("is empty")
    white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, drawn).convert("RGB"), alpha


def psnr(picture: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB (infinite where equal)."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compact(picture: Image.Image, alpha: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The picture in the fewest colours that keep `COMPACT_PSNR_DB`, the mask in four levels.

    Transparent pixels stay exactly white, and the mask stays 0 exactly where it was.
    """
    exact, mask = np.asarray(picture), np.asarray(alpha)
    result = None
    few, many = 0, len(_COLOUR_COUNTS)
    while few < many:
        middle = (few + many) // 2
        palette = picture.quantize(_COLOUR_COUNTS[middle], Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
        candidate = np.array(palette.convert("RGB"))
        candidate[mask == 0] = 255
        if psnr(exact, candidate) >= COMPACT_PSNR_DB:
            result, many = candidate, middle
        else:
            few = middle + 1
    if result is None:  # finely shaded all over: 32 levels a channel lose less than any 256 colours
        result = np.round(np.round(exact / 255 * 31) / 31 * 255).astype(np.uint8)
        result = result if psnr(exact, result) >= COMPACT_PSNR_DB else exact
    levels = _ALPHA_LEVELS[np.round(mask / 85).astype(int)]
    levels[(mask > 0) & (levels == 0)] = 85
    return Image.fromarray(result), Image.fromarray(levels.astype(np.uint8))


def encode(image: Image.Image, exact: bool) -> bytes:
    """Bytes of an image: PNG in an exact set, lossless WebP (two thirds the size) in a compact one."""
    buffer = io.BytesIO()
    if exact:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", lossless=True, quality=75, method=5)
    return buffer.getvalue()


def _fraction(purpose: str, key: str) -> float:
    digest = hashlib.sha256(f"nextscale emoji {purpose} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _groups(concepts: Sequence[Concept], drawn: dict[str, list[tuple[Drawing, str]]]) -> list[list[Concept]]:
    """Concepts that are variants of one drawing, or whose pictures are equal in some style, together."""
    parent = {concept.codepoints: concept.codepoints for concept in concepts}

    def root(node: str) -> str:
        while parent[node] != node:
            node = parent[node]
        return node

    first: dict[tuple[str, str], str] = {}
    for concept in concepts:
        marks = [("drawing", drawing_key(concept.codepoints))]
        marks += [(drawing.style, digest) for drawing, digest in drawn[concept.codepoints] if not drawing.skin_tone]
        for mark in marks:
            one, two = root(first.setdefault(mark, concept.codepoints)), root(concept.codepoints)
            parent[max(one, two)] = min(one, two)
    groups: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        groups[root(concept.codepoints)].append(concept)
    return list(groups.values())


def class_of(concept: Concept) -> str:
    """Name of the concept's merged class.

    Raises:
        DataError: Unicode has a subcategory that the table does not know.
    """
    try:
        return CLASS_OF_SUBCATEGORY[concept.category, concept.subcategory]
    except KeyError:
        raise DataError(
            f"emoji set: {concept.name!r} has subcategory {concept.subcategory!r}, which no class names; "
            "add it to CLASS_TABLE in nextscale/data/emoji_classes.py"
        ) from None


def split_concepts(groups: Iterable[Sequence[Concept]]) -> tuple[set[str], dict[str, str]]:
    """Which concepts are held out, and which style of which other concept is.

    In every class, groups are taken in the order of a hash of their smallest code points until the class's share is
    reached; groups that would overshoot it are passed over. No list order or random state takes part.

    Args:
        groups: concepts that must fall on the same side (see `drawing_key`).

    Returns:
        Code points held out in all styles; code points -> the one style held out.
    """
    by_class: dict[str, list[Sequence[Concept]]] = defaultdict(list)
    for group in groups:
        counts = Counter(class_of(concept) for concept in group)
        by_class[max(sorted(counts), key=counts.__getitem__)].append(group)

    def key(group: Sequence[Concept]) -> str:
        return min(concept.codepoints for concept in group)

    def take(groups: Sequence[Sequence[Concept]], share: float, purpose: str) -> list[Sequence[Concept]]:
        wanted, taken = round(share * sum(map(len, groups))), []
        for group in sorted(groups, key=lambda group: _fraction(purpose, key(group))):
            if len(group) <= wanted:
                taken.append(group)
                wanted -= len(group)
        return taken

    held_out: set[str] = set()
    held_style: dict[str, str] = {}
    for members in by_class.values():
        tested = take(members, CONCEPT_TEST_SHARE, "concept split")
        held_out |= {concept.codepoints for group in tested for concept in group}
        others = [group for group in members if key(group) not in held_out]
        for group in take(others, STYLE_TEST_SHARE, "style split"):
            shared = set.intersection(*({d.style for d in concept.drawings} for concept in group))
            styles = [style for style in STYLES if style in shared]
            if len(styles) < 2:
                continue
            style = styles[int(_fraction("held style", key(group)) * len(styles))]
            held_style.update({concept.codepoints: style for concept in group})
    return held_out, held_style


def _features(class_names: Sequence[str]) -> dict[str, Any]:
    """The columns as Hugging Face `datasets` writes them into a parquet schema."""
    text = {"dtype": "string", "_type": "Value"}
    return {
        "image": {"_type": "Image"},
        "alpha": {"_type": "Image"},
        "name": text,
        "keywords": {"feature": text, "_type": "Sequence"},
        "category": text,
        "subcategory": text,
        "class": text,
        "label": {"names": list(class_names), "_type": "ClassLabel"},
        "style": text,
        "style_label": {"names": list(STYLES), "_type": "ClassLabel"},
        "skin_tone": text,
        "codepoints": text,
        "concept_split": text,
        "style_split": text,
    }


def _write(rows: list[dict[str, Any]], out: Path, notes: dict[str, Any]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "write parquet") from None
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": picture, "alpha": picture, "keywords": pa.list_(pa.string())}
    types |= {"label": pa.int64(), "style_label": pa.int64()}
    features = _features(list(CLASS_TABLE))
    schema = pa.schema(
        [(name, types.get(name, pa.string())) for name in features],
        metadata={"huggingface": json.dumps({"info": {"features": features}}), "nextscale": json.dumps(notes)},
    )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            temporary,
            compression="zstd",
            compression_level=19,
            row_group_size=1000,
            use_dictionary=[name for name in features if name not in {"image", "alpha"}],
        )
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def build_emoji_set(
    out: Path,
    size: int = 64,
    skin_tones: bool = False,
    work: Path | None = None,
    progress: bool = True,
    exact: bool = False,
) -> BuildReport:
    """Builds the emoji set: Noto, Twemoji and three Fluent styles on white, with masks, classes and splits.

    Fetched packages (about 180 MB) stay in `work` and are used again; the file appears under its name only when it
    is whole.

    Args:
        out: parquet file to write.
        size: side of the pictures, 8 to 1024 pixels; Noto and Twemoji are drawn for 64, 3D for 256, the rest is SVG.
        skin_tones: also the variants with skin tones (about twice the pictures).
        work: folder for the fetched packages; a cache folder of the user's by default.
        progress: show progress bars and print the report.
        exact: keep every pixel, as PNG; otherwise few colours at `COMPACT_PSNR_DB` or better, a third of the bytes.

    Returns:
        What was written and what was left out.

    Raises:
        InputError: a size out of range.
        DataError: npm or a package is missing or damaged, or the file cannot be written.
        MissingExtraError: resvg-py or pyarrow is not installed.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not 8 <= size <= 1024:
        raise InputError(f"emoji set: size {size} is out of range; choose 8 to 1024 pixels")
    for module, package in (("pyarrow", "pyarrow"), ("resvg_py", "resvg-py")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "data", "build the emoji set")
    out = Path(out)
    folder = Path(work) if work is not None else _cache_folder()
    report = BuildReport(path=out, size=size)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        disable=not progress,
    )
    pictures: dict[tuple[str, str, str], tuple[bytes, bytes]] = {}
    drawn: dict[str, list[tuple[Drawing, str]]] = {}
    with bars:
        reading = bars.add_task("packages", total=len(PACKAGES), rate="")

        def step(what: str) -> None:
            bars.update(reading, advance=0 if what == _first_package() else 1, rate=what)

        concepts = read_concepts(folder, skin_tones, step)
        bars.update(reading, completed=len(PACKAGES), rate="")
        drawing_task = bars.add_task("drawing", total=sum(len(c.drawings) for c in concepts), rate="")
        for concept in concepts:
            drawn[concept.codepoints] = []
            for drawing in concept.drawings:
                task = bars.tasks[1]
                rate = f"{task.speed:.0f}/s" if task.speed else ""
                bars.update(drawing_task, advance=1, rate=rate)
                try:
                    picture, alpha = render(drawing.data, size)
                except ValueError as error:
                    report.skipped.append((drawing.style, concept.codepoints, str(error)))
                    continue
                digest = hashlib.sha256(picture.tobytes()).hexdigest()
                drawn[concept.codepoints].append((drawing, digest))
                if not exact:
                    picture, alpha = compact(picture, alpha)
                key = (concept.codepoints, drawing.style, drawing.skin_tone)
                pictures[key] = (encode(picture, exact), encode(alpha, exact))
    for concept in concepts:
        concept.drawings = [drawing for drawing, _ in drawn[concept.codepoints]]
    concepts = [concept for concept in concepts if concept.drawings]
    held_out, held_style = split_concepts(_groups(concepts, drawn))
    rows = _rows(concepts, pictures, held_out, held_style, exact)
    notes = {
        "size": size,
        "skin_tones": skin_tones,
        "exact": exact,
        "flag_classes": list(FLAG_CLASSES),
        "packages": {package.name: package.version for package in PACKAGES.values()},
    }
    _write(rows, out, notes)
    report.pictures, report.concepts = len(rows), len(concepts)
    report.per_style = dict(Counter(row["style"] for row in rows))
    for style in STYLES:
        report.missing[style] = sum(all(d.style != style for d in concept.drawings) for concept in concepts)
    report.file_bytes = out.stat().st_size
    if progress:
        print(report)
    return report


def _first_package() -> str:
    package = next(iter(PACKAGES.values()))
    return f"{package.name} {package.version}"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nextscale" / "emoji"


def _rows(
    concepts: Sequence[Concept],
    pictures: dict[tuple[str, str, str], tuple[bytes, bytes]],
    held_out: set[str],
    held_style: dict[str, str],
    exact: bool,
) -> list[dict[str, Any]]:
    labels = {name: index for index, name in enumerate(CLASS_TABLE)}
    ending = "png" if exact else "webp"
    rows = []
    for concept in concepts:
        name = class_of(concept)
        for drawing in concept.drawings:
            image, alpha = pictures[concept.codepoints, drawing.style, drawing.skin_tone]
            stem = "-".join([concept.codepoints, *filter(None, [drawing.skin_tone])])
            rows.append(
                {
                    "image": {"bytes": image, "path": f"{drawing.style}/{stem}.{ending}"},
                    "alpha": {"bytes": alpha, "path": f"{drawing.style}/{stem}-alpha.{ending}"},
                    "name": concept.name,
                    "keywords": concept.keywords,
                    "category": concept.category,
                    "subcategory": concept.subcategory,
                    "class": name,
                    "label": labels[name],
                    "style": drawing.style,
                    "style_label": STYLES.index(drawing.style),
                    "skin_tone": drawing.skin_tone,
                    "codepoints": concept.codepoints,
                    "concept_split": "test" if concept.codepoints in held_out else "train",
                    "style_split": "test" if held_style.get(concept.codepoints) == drawing.style else "train",
                }
            )
    return rows
