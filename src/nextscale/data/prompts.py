"""Files of prompts: what pictures are to be drawn of, one a line, or with settings of their own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextscale.data.captions import texts_of
from nextscale.errors import DataError

LONGEST_PROMPT = 4096
"""Characters of a prompt, and of a negative one."""
MOST_PROMPTS = 1_000_000
LARGEST_FILE = 1 << 28
LARGEST_RATIO = 16.0
_TEXT_FIELDS = ("prompt", "caption", "text")
_NEGATIVE_FIELDS = ("negative", "negative_prompt")


@dataclass(frozen=True)
class Prompt:
    """What one picture is to be drawn of.

    Attributes:
        text: the prompt.
        negative: what it should not be of, "" for nothing.
        seed: the picture's own, None where the run chooses.
        ratio: width to height, None where the run chooses.
        category: the group that a set of prompts counts it to, "" where it has none.
    """

    text: str
    negative: str = ""
    seed: int | None = None
    ratio: float | None = None
    category: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order, by its suffix.

    - ``.txt``: one prompt a line; empty lines are passed over.
    - ``.json``: a list of prompts, or of objects; ``.jsonl``: one of either a line. Objects have ``prompt``,
      ``caption`` or ``text``, and may have ``negative`` (or ``negative_prompt``), ``seed``, ``ratio`` and
      ``category``; other keys are passed over.
    - ``.tsv``, ``.csv``: a header that names these as columns, in any case, as PartiPrompts has it. In ``.tsv``
      quotation marks mean nothing; in ``.csv`` a field in them may hold commas.

    ``ratio`` is ``"16:9"`` or a number, from 1/16 to 16; ``seed`` a whole number from 0.

    Raises:
        DataError: another suffix; a file that is missing, empty, too large (256 MiB, a million prompts) or no UTF-8;
            and what is wrong with a prompt, with its line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a file of prompts ends in {', '.join(_READERS)}")
    found: list[Prompt] = []
    for where, value in reader(path, _text(path)):
        if len(found) == MOST_PROMPTS:
            raise DataError(f"{path} has more than {MOST_PROMPTS:,} prompts; share them out over several files")
        found.append(_prompt(value, where))
    if not found:
        raise DataError(f"{path} holds no prompt; write one a line, or name another file")
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if len(data) > LARGEST_FILE:
        raise DataError(f"{path} has more than {LARGEST_FILE >> 20} MiB; share its prompts out over several files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line} is no UTF-8; save the file as UTF-8") from None


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Lines that aren't empty. Only line feeds end them: other separators of Unicode may stand in a prompt."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", line.rstrip("\r")


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path, text):
        yield where, _json(where, line)


def _list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    values = _json(str(path), text)
    if not isinstance(values, list):
        raise DataError(f'{path} holds {type(values).__name__} and no list; write ["a prompt", ...]')
    for number, value in enumerate(values, 1):
        yield f"{path} prompt {number}", value


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line} is no JSON ({error.msg} at column {error.colno}); correct it") from None
    except (RecursionError, ValueError):  # nested beyond Python's stack, or a number beyond its digits
        raise DataError(f"{where} is JSON nested too deeply, or has a number that is too long; correct it") from None


def _tsv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return _table(path, ((where, line.split("\t")) for where, line in _lines(path, text)))


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    return _table(path, _csv_rows(path, text))


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield f"{path} line {rows.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num} is no CSV ({error}); correct it") from None


def _table(path: Path, rows: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, Any]]:
    _, header = next(rows, ("", []))
    names = [name.strip().lower() for name in header]
    if not set(names) & set(_TEXT_FIELDS):
        raise DataError(f"{path} has no column {', '.join(_TEXT_FIELDS)}; its first line names {', '.join(names)}")
    for where, cells in rows:
        if len(cells) > len(names):
            raise DataError(f"{where} has {len(cells)} columns, the header {len(names)}; quote or remove what is over")
        # Of a table all is text, and what a row leaves empty it doesn't say.
        yield where, {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".txt": _lines, ".json": _list, ".jsonl": _jsonl, ".tsv": _tsv, ".csv": _csv,
}  # fmt: skip


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}; give a prompt in quotation marks, or an object with one")
    text = _field(value, _TEXT_FIELDS, where)
    if not text:
        raise DataError(f"{where} has no prompt; give it under {', '.join(_TEXT_FIELDS)}")
    category = value.get("category")
    return Prompt(text, _field(value, _NEGATIVE_FIELDS, where), _seed(value.get("seed"), where),
                  _ratio(value.get("ratio"), where), category.strip() if isinstance(category, str) else "")


def _field(value: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first text under some names, white space collapsed; "" where there is none."""
    for name in names:
        given = value.get(name)
        if given is None:
            continue
        if not isinstance(given, str):
            raise DataError(f"{where}: {name} is {type(given).__name__} and no text; put it in quotation marks")
        if len(given) > LONGEST_PROMPT:
            raise DataError(f"{where}: {name} has {len(given):,} characters, {LONGEST_PROMPT:,} are the most; shorten "
                            "it")
        if texts := texts_of(given):
            return texts[0]
    return ""


def _seed(given: Any, where: str) -> int | None:
    if given is None:
        return None
    text = given.strip() if isinstance(given, str) else given
    good = (isinstance(text, int) and not isinstance(text, bool)) or (isinstance(text, str) and text.isdecimal())
    if not good or len(str(text)) > 19 or not 0 <= int(text) < 2**63:
        raise DataError(f"{where}: seed is {given!r:.40}; give a whole number from 0 to 2^63 - 1")
    return int(text)


def _ratio(given: Any, where: str) -> float | None:
    return None if given is None else read_ratio(given, where)


def read_ratio(given: Any, where: str) -> float:
    """Width to height, written as ``"16:9"`` or a number. Raises DataError, naming ``where`` it stands, for others."""
    try:
        width, _, height = given.partition(":") if isinstance(given, str) else (given, "", "")
        ratio = float(width) / float(height or 1)
        if isinstance(given, bool) or not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise DataError(f"{where}: ratio is {given!r:.40}; give width to height as in \"16:9\" or 1.78, from 1:16 to "
                        "16:1") from None
    return ratio
