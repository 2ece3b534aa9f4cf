"""The cache of text features: encoded once, whole whatever happens to its writers, refused to another encoder."""
from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.conditions import text_cached
from nextscale.conditions.text_cached import CachedTextEncoder
from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_words import WordConfig, WordEncoder
from nextscale.data import text_cache
from nextscale.data.text_cache import MANIFEST, TextCache, TextSource
from nextscale.errors import DataError, InputError, NextscaleError

PROMPTS = [f"{colour} {thing}{' in the rain' * (n % 3)}" for n, thing in enumerate(("apple", "house", "train", "cat"))
           for colour in ("red", "green", "blue")] + [""]


class Frozen:
    """A word encoder that doesn't learn any more, and counts what it is asked for."""

    def __init__(self, width: int = 8, seed: int = 0, pooled: bool = True, name: str = "frozen"):
        torch.manual_seed(seed)
        self.words = WordEncoder(WordConfig(width=width, heads=2, depth=1, buckets=64, bucket_width=8))
        self.name, self.width, self.pooled_width = name, width, width if pooled else 0
        self.fingerprint = f"of seed {seed}"
        self.asked: list[list[str]] = []

    @property
    def asked_for(self) -> list[str]:
        return sorted(prompt for batch in self.asked for prompt in batch)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        self.asked.append(list(prompts))
        found = self.words.encode(prompts)
        return found if self.pooled_width else TextFeatures(found.values, found.valid)


def source(**other: Any) -> TextSource:
    return TextSource(**{"name": "frozen", "fingerprint": "of seed 0", "width": 8, "pooled_width": 8, **other})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("text-*.safetensors"))


def same(one: TextFeatures, other: TextFeatures, atol: float = 0.0) -> None:
    pairs: list[tuple[Any, Any]] = [(one.values, other.values), (one.valid, other.valid), (one.pooled, other.pooled)]
    for a, b in pairs:
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert isinstance(error.value, NextscaleError) and "\n" not in text
    return text


@pytest.mark.parametrize("pooled", [True, False])
def test_a_prompt_is_encoded_once_and_gives_the_same_ever_after(tmp_path: Path, pooled: bool) -> None:
    encoder = Frozen(pooled=pooled)
    first = CachedTextEncoder(encoder, tmp_path)
    made = first.encode(PROMPTS)
    same(made, encoder.words.encode(PROMPTS) if pooled else Frozen(pooled=False).encode(PROMPTS), atol=2e-3)
    assert encoder.asked_for == sorted(PROMPTS)
    encoder.asked.clear()
    same(first.encode(PROMPTS), made)
    later = CachedTextEncoder(encoder, tmp_path)
    same(later.encode(PROMPTS), made)
    # Other batches: in another order, some twice, padded to the longest of them only.
    wanted = [PROMPTS[5], "", PROMPTS[5], PROMPTS[0]]
    items = torch.tensor([PROMPTS.index(prompt) for prompt in wanted])
    found = later.encode(wanted)
    same(found.padded(made.valid.shape[1]), made.gather(items))
    assert found.valid.shape[1] == int(found.valid.sum(1).max()) and not encoder.asked
    # What is new is all that is asked for, once.
    later.encode(["new", PROMPTS[1], "new", "", "newer"])
    assert [sorted(batch) for batch in encoder.asked] == [["new", "newer"]]
    assert len(later.cache) == len(PROMPTS) + 2


@pytest.mark.parametrize("dtype, rounding", [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float32", 0.0)])
def test_features_are_kept_in_the_wanted_format(tmp_path: Path, dtype: str, rounding: float) -> None:
    encoder = Frozen()
    exact = encoder.encode(PROMPTS).values
    found = CachedTextEncoder(encoder, tmp_path, dtype).encode(PROMPTS).values
    assert found.dtype == torch.float32
    # Alone they differ by the order of sums; 6e-8 is half the smallest float16.
    assert bool(((found - exact).abs() <= rounding * exact.abs() + 2e-6).all())
    again = CachedTextEncoder(encoder, tmp_path)  # takes the folder's format
    assert again.cache.source.dtype == dtype
    torch.testing.assert_close(again.encode(PROMPTS).values, found, rtol=0, atol=0)
    size = sum(path.stat().st_size for path in shards(tmp_path))
    tokens = int(encoder.words.encode(PROMPTS).valid.sum())
    assert size < (tokens + len(PROMPTS)) * 8 * (4 if dtype == "float32" else 2) + 40 * len(PROMPTS) + 1000


@pytest.mark.parametrize("other, told", [
    ({"name": "thawed"}, "holds features of another text encoder (frozen, width 8 and 8 pooled, and this is thawed"),
    ({"width": 16}, "(frozen, width 8 and 8 pooled, and this is frozen, width 16 and 16 pooled)"),
    ({"pooled": False}, "and this is frozen, width 8); choose another folder"),
    ({"seed": 1}, "its weights, tokenizer or limit differ (of seed 0, and this is of seed 1); choose another folder"),
])
def test_another_encoders_folder_is_refused_and_left_alone(tmp_path: Path, other: dict[str, Any], told: str) -> None:
    CachedTextEncoder(Frozen(), tmp_path).encode(PROMPTS[:2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as error:
        CachedTextEncoder(Frozen(**other), tmp_path)
    assert told in one_line(error) and str(tmp_path) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_cant_be_cached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learns with its model"):
        CachedTextEncoder(WordEncoder(), tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch is 0"):
        CachedTextEncoder(Frozen(), tmp_path / "a", batch=0)
    with pytest.raises(InputError, match="kept as 'int8'; use one of float16, bfloat16, float32"):
        CachedTextEncoder(Frozen(), tmp_path / "a", "int8")
    assert not (tmp_path / "a").exists()
    CachedTextEncoder(Frozen(), tmp_path / "b", "float16")
    with pytest.raises(InputError, match="holds features in float16, not bfloat16"):
        CachedTextEncoder(Frozen(), tmp_path / "b", "bfloat16")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        CachedTextEncoder(Frozen(), tmp_path / "file")
    cache = TextCache(tmp_path / "b", source())
    with pytest.raises(InputError, match=r"1 texts and shapes \[\(7,\)\], not of 1 and \[\(1, 8\), \(8,\)\]"):
        cache.write(["a"], [torch.zeros(3, 7)])
    with pytest.raises(InputError, match="float16 can't hold; keep them as bfloat16"):
        cache.write(["a"], [torch.full((3, 8), 1e5)], torch.zeros(1, 8))
    with pytest.raises(DataError, match="no features of the text 'a'"):
        cache.read(["a"])
    assert not shards(tmp_path / "b")
    TextCache(tmp_path / "c", source(dtype="bfloat16")).write(["a"], [torch.full((3, 8), 1e5)], torch.zeros(1, 8))


def test_many_prompts_are_encoded_short_ones_first_and_written_in_large_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, told = Frozen(), []
    cached = CachedTextEncoder(encoder, tmp_path / "one", batch=4)
    assert cached.fill(PROMPTS * 2, lambda done, all_of_them: told.append((done, all_of_them))) == 13
    assert told == [(4, 13), (8, 13), (12, 13), (13, 13)] and len(shards(tmp_path / "one")) == 1
    lengths = [len(prompt) for batch in encoder.asked for prompt in batch]
    assert lengths == sorted(lengths) and cached.fill(PROMPTS) == 0
    monkeypatch.setattr(text_cached, "SHARD_BYTES", 400)
    several = CachedTextEncoder(encoder, tmp_path / "many", batch=4)
    several.fill(PROMPTS)
    assert len(shards(tmp_path / "many")) > 2
    same(several.encode(PROMPTS), cached.encode(PROMPTS), atol=1e-3)


def test_few_shards_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "OPEN_SHARDS", 2)
    cached = CachedTextEncoder(Frozen(), tmp_path)
    made = [cached.encode([prompt]) for prompt in PROMPTS]
    assert len(shards(tmp_path)) == len(PROMPTS)
    later = CachedTextEncoder(Frozen(), tmp_path)
    same(later.encode(PROMPTS), TextFeatures.join(made))
    assert len(later.cache._mapped) <= 2


# Several processes, and their deaths


def in_processes(*works: Any) -> list[int]:
    """Exit codes of functions that run at the same time in processes of their own."""
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=work) for work in works]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    return [process.exitcode for process in running]  # type: ignore[misc]


def test_writers_at_the_same_time_do_each_other_no_harm(tmp_path: Path) -> None:
    def write(first: int) -> None:
        cached = CachedTextEncoder(Frozen(), tmp_path, batch=2)
        for i in range(len(PROMPTS)):
            at = (first + i) % len(PROMPTS)
            found = cached.encode([PROMPTS[at], PROMPTS[(at + 1) % len(PROMPTS)]])
            same(found, Frozen().encode([PROMPTS[at], PROMPTS[(at + 1) % len(PROMPTS)]]), atol=2e-3)

    assert in_processes(lambda: write(0), lambda: write(0), lambda: write(5)) == [0, 0, 0]
    encoder = Frozen()
    same(CachedTextEncoder(encoder, tmp_path).encode(PROMPTS), Frozen().encode(PROMPTS), atol=2e-3)
    assert not encoder.asked
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_another_process_wrote_is_found_without_opening_again(tmp_path: Path) -> None:
    encoder = Frozen()
    open_before = CachedTextEncoder(encoder, tmp_path)
    assert in_processes(lambda: CachedTextEncoder(Frozen(), tmp_path).fill(PROMPTS)) == [0]
    open_before.encode(PROMPTS)
    assert not encoder.asked


def test_a_writer_that_is_killed_leaves_a_whole_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CachedTextEncoder(Frozen(), tmp_path).encode(PROMPTS[:3])

    def die(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        text_cache.save_file = die
        CachedTextEncoder(Frozen(), tmp_path).encode(PROMPTS)

    assert in_processes(write) == [-signal.SIGKILL]
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".text-")]
    assert len(left) == 1 and len(shards(tmp_path)) == 1
    encoder = Frozen()
    same(CachedTextEncoder(encoder, tmp_path).encode(PROMPTS), Frozen().encode(PROMPTS), atol=2e-3)
    assert encoder.asked_for == sorted(PROMPTS[3:])
    assert left[0].exists()  # it might be a living process's
    old = time.time() - 2 * text_cache.ABANDONED_SECONDS
    os.utime(left[0], (old, old))
    CachedTextEncoder(Frozen(), tmp_path)
    assert not left[0].exists()


def test_a_damaged_or_foreign_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    CachedTextEncoder(Frozen(), folder).encode(PROMPTS[:2])
    CachedTextEncoder(Frozen(seed=1), other).encode(PROMPTS[2:4])
    shard = shards(folder)[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(DataError) as error:
        CachedTextEncoder(Frozen(), folder)
    assert shard.name in one_line(error) and "gone or damaged" in str(error.value) and "remove it" in str(error.value)
    shard.write_bytes(whole)
    foreign = Path(shutil.copy(shards(other)[0], folder))
    with pytest.raises(InputError) as error:
        CachedTextEncoder(Frozen(), folder)
    assert foreign.name in one_line(error) and "another text encoder" in str(error.value)
    foreign.unlink()
    manifest = folder / MANIFEST
    text = manifest.read_text()
    for damaged in ("{", "[]", text.replace('"width": 8', '"width": "8"'), text.replace("float16", "float8")):
        manifest.write_text(damaged)
        with pytest.raises(DataError) as error:
            CachedTextEncoder(Frozen(), folder)
        assert f"{MANIFEST} is damaged" in one_line(error)
    manifest.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(DataError, match="of format 7, this version reads 1"):
        CachedTextEncoder(Frozen(), folder)


def test_texts_are_found_by_the_hash_of_encoder_and_text(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, source())
    assert cache.key("a dog") == hashlib.sha256(b"frozen\0a dog").digest()
    cache.write(["a dog"], [torch.ones(2, 8)], torch.zeros(1, 8))
    assert cache.missing(["a dog", "a  dog", "A dog", "a dog "]) == ["a  dog", "A dog", "a dog "]


def test_pooled_features_are_read_inside_autocast_as_outside(tmp_path: Path) -> None:
    cached = CachedTextEncoder(Frozen(), tmp_path)
    outside = cached.encode(["a red apple", "sun"])
    with torch.autocast("cpu", torch.bfloat16):
        same(cached.encode(["a red apple", "sun"]), outside)
