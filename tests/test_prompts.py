"""Files of prompts: every form gives the same prompts; what is wrong is one line that names it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextscale.data import prompts
from nextscale.data.prompts import Prompt, read_prompts
from nextscale.errors import DataError

PARTI = ('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n'
         '"G I G G L E" painted in thick letters, as graffiti\tIllustrations\tWriting & Symbols\t\n'
         'Salvador Dalí\tPeople\tBasic\t\n')
OBJECTS = [{"prompt": "a red apple", "negative": "green", "seed": 7, "ratio": "16:9", "tag": "single_object"},
           {"caption": " a\n green  apple ", "negative_prompt": "red", "ratio": 0.5}, {"text": "grapes"}, "an owl"]
FOUND = [Prompt("a red apple", "green", 7, 16 / 9), Prompt("a green apple", "red", None, 0.5), Prompt("grapes"),
         Prompt("an owl")]


def written(tmp_path: Path, suffix: str, content: str | bytes) -> Path:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(("suffix", "content", "wanted"), [
    (".txt", "\ufeffa red apple\r\n\n  \n# 1 fan\nan owl",
     [Prompt("a red apple"), Prompt("# 1 fan"), Prompt("an owl")]),
    (".txt", "one\u2028line\n", [Prompt("one line")]),
    (".json", json.dumps(OBJECTS), FOUND),
    (".jsonl", "\n".join(map(json.dumps, OBJECTS)) + "\n\n", FOUND),
    (".tsv", PARTI, [Prompt("bond", category="Abstract"), Prompt('"G I G G L E" painted in thick letters, as graffiti',
                                                                category="Illustrations"),
                     Prompt("Salvador Dalí", category="People")]),
    (".csv", 'seed,prompt,ratio\n3,"a cat, ""asleep"", on\na mat",4:3\n,an owl\n',
     [Prompt('a cat, "asleep", on a mat', "", 3, 4 / 3), Prompt("an owl")]),
])
def test_every_form_gives_its_prompts(tmp_path: Path, suffix: str, content: str, wanted: list[Prompt]) -> None:
    assert read_prompts(written(tmp_path, suffix, content)) == wanted
    assert read_prompts(str(written(tmp_path, suffix.upper(), content))) == wanted


@pytest.mark.parametrize(("suffix", "content", "words"), [
    (".md", "a", r"ends in \.txt, \.json"), (".txt", " \n", "holds no prompt"), (".json", "[]", "holds no prompt"),
    (".txt", b"fine\nbad \xff\n", "line 2 is no UTF-8"), (".txt", "\nx" + "x" * 4096, "line 2: prompt has 4,097"),
    (".json", '["a",\n]', "line 2 is no JSON"), (".json", '{"prompt": "a"}', "dict and no list"),
    (".json", '["a", 3]', "prompt 2 is int"), (".json", "[" * 100_000, "too deeply"),
    (".jsonl", '"a"\n{"prompt": }', "line 2 is no JSON .* at column 12"),
    (".jsonl", '{"seed": 1}', "line 1 has no prompt"),
    (".jsonl", '{"prompt": ["a"]}', "line 1: prompt is list"), (".jsonl", '{"text": " "}', "line 1 has no prompt"),
    (".jsonl", '{"text": "a", "negative": 3}', "negative is int"),
    *((".jsonl", f'{{"text": "a", "seed": {seed}}}', "seed is") for seed in ("-1", "1.5", "true", '"x"', "1" * 30)),
    *((".jsonl", f'{{"text": "a", "ratio": {ratio}}}', "ratio is")
      for ratio in ("0", '"16:0"', '"a:b"', "NaN", "17", "true", "[1, 2]", '"1:2:3"', "1" + "0" * 400)),
    (".tsv", "", "has no column"), (".tsv", "name\tnote\na\tb", "its first line names name, note"),
    (".tsv", "Prompt\tNote\na\tb\tc", "line 2 has 3 columns, the header 2"),
    (".csv", 'prompt\nfine\n"open', "line 3 is no CSV"), (".csv", "prompt,seed\na,b", "line 2: seed is 'b'"),
])
def test_what_is_wrong_is_one_line_that_names_file_and_place(
    tmp_path: Path, suffix: str, content: str | bytes, words: str
) -> None:
    path = written(tmp_path, suffix, content)
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and str(path) in str(caught.value)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, ".txt", "a\nb\nc\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="cannot be read"):
        (tmp_path / "folder.txt").mkdir()
        read_prompts(tmp_path / "folder.txt")
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 2)
    with pytest.raises(DataError, match="more than 2 prompts"):
        read_prompts(path)
    monkeypatch.setattr(prompts, "LARGEST_FILE", 3)
    with pytest.raises(DataError, match="MiB"):
        read_prompts(path)


VALUES: Any = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=12),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                               st.sampled_from(["prompt", "text", "seed", "ratio", "negative", "category"]), inner,
                               max_size=4), max_leaves=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([".txt", ".json", ".jsonl", ".tsv", ".csv"]),
       st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())
       | st.lists(VALUES, max_size=3).map(lambda values: json.dumps(values).encode()))
def test_any_file_is_prompts_or_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    try:
        found = read_prompts(written(tmp_path, suffix, content))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(one.text.strip() and (one.ratio is None or 1 / 16 <= one.ratio <= 16) for one in found)
