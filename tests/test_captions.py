"""Captions from a picture's metadata to a training's batches, and what lies beside them in a token cache."""
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_task import draw_pictures
from test_sources import png, write_tar
from tiny import AUTOENCODER, fill, tiny_var
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.cli.main import run
from nextscale.data import Loader, PictureDataset, ShuffledOrder, open_dataset
from nextscale.data.bits import pack_bits, packed_width, unpack_bits
from nextscale.data.captions import LONGEST_CAPTION, PackedCaptions, texts_of
from nextscale.data.emoji_captions import STYLE_WORDS, emoji_captions
from nextscale.data.emoji_set import STYLES
from nextscale.data.sources import open_source
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.data.token_shards import JOB, MANIFEST, shard_file
from nextscale.errors import DataError, InputError
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.config import TrainConfig
from nextscale.training.generator_recipe import GeneratorTraining
from nextscale.training.recipes import DataRecipe
from nextscale.training.token_recipe import token_loader, training_tokens
from nextscale.training.tokenizer_recipe import save_tokenizer
from nextscale.training.tokens import check_fits, tokenize

APPLE: dict[str, Any] = {"name": "red apple", "keywords": ["red apple", "fruit", "mac", ":D", "butt"], "skin_tone": "",
                         "subcategory": "food-fruit", "style": "fluent-flat"}


# What a picture's metadata say


def test_an_emoji_is_called_by_name_style_and_search_words() -> None:
    assert emoji_captions(APPLE) == (
        "red apple, flat style", "red apple", "a flat drawing of a red apple", "red apple, fluent flat style",
        "flat red apple emoji", "fruit, red apple, flat style", "red apple, fruit, flat style",
        "fruit, mac, flat style")
    waving = {**APPLE, "name": "waving hand", "keywords": [], "subcategory": "hands", "style": "noto"}
    assert emoji_captions(waving)[0] == "waving hand, noto style"
    assert emoji_captions({**waving, "skin_tone": "medium-dark"})[0] == "waving hand, medium-dark skin tone, noto style"
    assert "light and dark skin tone" in emoji_captions({**waving, "skin_tone": "light+dark"})[2]
    spoken = {name: emoji_captions({**APPLE, "name": name, "keywords": None})[2].removeprefix("a flat drawing of ")
              for name in ("flag Norway", "owl", "grapes", "face with tears", "Santa Claus", "OK hand", "unicorn")}
    assert list(spoken.values()) == ["the flag of Norway", "an owl", "grapes", "a face with tears", "Santa Claus",
                                     "an OK hand", "a unicorn"]


def test_every_shipped_drawing_has_captions_of_its_own_in_every_split() -> None:
    source = open_source("emoji")
    rows = pq.read_table(source._groups._places[0][0], columns=["name", "style"]).to_pylist()  # type: ignore[attr-defined]
    assert set(STYLE_WORDS) == set(STYLES) and source.has_captions
    splits, canonical = source.splits(0.05), []
    for name, count in (("train", 7503), ("concept-test", 853), ("style-test", 252)):
        places = np.flatnonzero(splits[name])
        assert len(places) == count
        for place in places.tolist():
            texts, row = source.captions(place), rows[place]
            words = STYLE_WORDS[row["style"]]
            assert 5 <= len(texts) == len(set(texts)) and texts[:2] == (f"{row['name']}, {words[0]} style", row["name"])
            assert all(any(word in text for word in words) for text in (texts[0], *texts[2:])), texts
            canonical.append(texts[0])
    assert len(set(canonical)) == len(canonical) == 8608
    dataset = open_dataset("emoji", 16, "style-test", captions=True, memory_bytes=0)
    assert "captions" in dataset.summary() and dataset[0].caption == canonical[-252]


def test_class_names_are_captions_where_there_are_no_others(tmp_path: Path) -> None:
    for name in ("golden_retriever", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(1))
    dataset = open_dataset(tmp_path, 8, "all", captions=True)
    assert [dataset.captions(place) for place in range(2)] == [("7",), ("golden retriever",)]
    assert sorted(Loader(dataset, ShuffledOrder(2), 2, captions=True).batch_at(0)["caption"]) == [
        "7", "golden retriever"]
    (tmp_path / "7" / "a.txt").write_text("a number")
    with pytest.raises(DataError, match=r"1 of 2 pictures have no caption, the first is .*a\.png; add a \.txt"):
        open_dataset(tmp_path, 8, "all", captions=True)
    table = pa.table({"image": [{"bytes": png(1), "path": None}] * 2, "label": [0, 1]})
    pq.write_table(table, tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match=r"2 of 2 pictures have no caption.*no class has a name"):
        open_dataset(tmp_path / "numbers.parquet", 8, "all", captions=True)


def test_several_captions_and_fields_of_other_names(tmp_path: Path) -> None:
    image = [{"bytes": png(shade), "path": None} for shade in (1, 2)]
    table = pa.table({"image": image, "captions": [["a cat", " a  pet", ""], None], "alt": ["cat", "dog"], "n": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")

    def found(place: str, field: str | None, **options: Any) -> list[tuple[str, ...]]:
        dataset = open_dataset(tmp_path / place, 8, "all", caption_field=field, **options)
        return [dataset.captions(i) for i in range(len(dataset))]

    assert found("a.parquet", None) == [(), ()]
    assert found("a.parquet", "captions") == [("a cat", "a pet"), ()]
    assert found("a.parquet", "alt", captions=True) == [("cat",), ("dog",)]
    rows = [{"captions": ["a cat", " a  pet"], "alt": "cat"}, {"captions": 3, "alt": "dog\ud800"}]
    write_tar(tmp_path / "a.tar", {f"{i}.{suffix}": data for i, row in enumerate(rows) for suffix, data in (
        ("png", png(i)), ("json", json.dumps(row).encode()), ("txt", b"beside"))})
    assert found("a.tar", None) == [("beside",), ("beside",)]
    assert found("a.tar", "captions") == [("a cat", "a pet"), ()] and found("a.tar", "alt")[1] == ("dog?",)
    (tmp_path / "folder").mkdir()
    for i in range(2):
        (tmp_path / "folder" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "folder" / f"{i}.txt").write_text("beside")
    lines = [json.dumps({"file_name": f"{i}.png", **row}) for i, row in enumerate(rows)]
    (tmp_path / "folder" / "metadata.jsonl").write_text("\n".join(lines))
    assert found("folder", None) == [("beside",), ("beside",)]
    assert found("folder", "captions") == [("a cat", "a pet"), ()]
    for place, words in (("a.parquet", "has no column 'x'; it has image, captions"), ("a.tar", "in field 'x'"),
                         ("folder", "in field 'x' of metadata.jsonl")):
        with pytest.raises(DataError, match=words):
            found(place, "x")
    with pytest.raises(DataError, match="column 'n' holds int64, not captions"):
        found("a.parquet", "n")
    assert texts_of("x" * 9999) == ("x" * LONGEST_CAPTION,) and texts_of(None) == texts_of([3, " "]) == ()


# How they and wide tokens are packed


@settings(max_examples=50)
@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4),
                min_size=1, max_size=5))
def test_packed_captions_are_the_captions(captions: list[list[str]]) -> None:
    packed = PackedCaptions.pack(captions)
    assert packed.misfit(len(captions)) == "" and len(packed) == len(captions)
    assert [packed.of(i) for i in range(len(captions))] == [tuple(texts) for texts in captions]
    assert packed.counts.tolist() == [len(texts) for texts in captions]
    assert packed.misfit(len(captions) + 1)


@pytest.mark.parametrize(("part", "value", "words"), [
    ("text", [0xC3, 0xA9, 0xFF, 0x61], "no UTF-8"), ("starts", [0, 1, 4], "mid-character"),
    ("starts", [0, 5, 4], "out of order"), ("starts", [0, 2, 3], "out of order"), ("starts", [0, 0, 4], "out of order"),
    ("starts", [], "out of order"), ("firsts", [0, 0, 2], "out of order"), ("firsts", [0, 1, 3], "out of order"),
    ("firsts", [-1, 1, 2], "out of order"), ("firsts", [0, 2], "other types or numbers"),
])
def test_packed_captions_that_are_damaged_are_found_out(part: str, value: list[int], words: str) -> None:
    packed = PackedCaptions.pack([["é"], ["aa"]])
    changed = replace(packed, **{part: torch.tensor(value, dtype=getattr(packed, part).dtype)})
    assert packed.misfit(2) == "" and words in changed.misfit(2)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 32, 62, 64, 70])
def test_packed_bits_are_the_bits(width: int) -> None:
    given_bits = torch.rand(3, 5, width, generator=torch.Generator().manual_seed(width)) < 0.5
    packed = pack_bits(given_bits)
    assert np.array_equal(packed.numpy(), np.packbits(given_bits.numpy(), axis=-1))
    assert packed.shape == (3, 5, packed_width(width)) and torch.equal(unpack_bits(packed, width), given_bits)


# In token caches


SIZE, SHARD = 16, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of three classes, each with one to three captions."""
    folder = draw_pictures(tmp_path_factory.mktemp("data") / "pictures")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    lines = [json.dumps({"file_name": name, "text": [f"{name} said {way} wäys" for way in range(1 + i % 3)]})
             for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def opened(pictures: Path) -> PictureDataset:
    return open_dataset(pictures, SIZE, "all", memory_bytes=0)


def bitwise(width: int, tokens: str = "bits") -> Tokenizer:
    sizes = replace(AUTOENCODER, latent_width=width)
    tokenizer = Tokenizer(TokenizerConfig(sizes, ((1, 1), (2, 2), (4, 4)), kind="bsq", tokens=tokens)).eval()  # type: ignore[arg-type]
    fill(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def cache(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bits of 32 channels in two versions, with captions and latents."""
    folder = tmp_path_factory.mktemp("caches") / "all"
    assert tokenize(bitwise(32), opened(pictures), folder, flips=True, shard_pictures=SHARD, captions=True,
                    latents=True)
    return folder


def test_a_cache_gives_the_captions_of_its_pictures(pictures: Path, cache: Path) -> None:
    tokens, dataset = TokenDataset(cache), opened(pictures)
    assert [tokens.captions(i) for i in range(len(tokens))] == [dataset.captions(i) for i in range(len(dataset))]
    assert tokens.caption(29) == dataset.caption(29) and tokens.caption(29, 2) == dataset.captions(29)[2]
    assert tokens.caption_counts is not None and tokens.caption_counts.tolist() == [1 + i % 3 for i in range(30)]
    assert "60 captions, latents" in tokens.summary()


def test_which_caption_a_picture_has_hangs_on_seed_epoch_and_id_alone(pictures: Path, cache: Path) -> None:
    tokens, dataset = TokenDataset(cache), opened(pictures)

    def drawn(loader: Any, steps: range) -> dict[tuple[int, int], str]:
        batches = [loader.batch_at(step) for step in steps]
        assert all(isinstance(batch["caption"], list) for batch in batches)
        rows = [zip(batch["epoch"].tolist(), batch["id"].tolist(), batch["caption"], strict=True) for batch in batches]
        return {(epoch, one): text for row in rows for epoch, one, text in row}

    whole = TokenLoader(tokens, ShuffledOrder(30, 1), 6, seed=3, captions=True)
    found = drawn(whole, range(60))
    assert all(text in dataset.captions(one) for (_, one), text in found.items()) and len(found) == 360
    seen = {one: {text for (_, other), text in found.items() if other == one} for one in range(30)}
    assert all(seen[one] == set(dataset.captions(one)) for one in seen)
    other = drawn(TokenLoader(tokens, ShuffledOrder(30, 9), 5, seed=3, captions=True), range(6))
    pixels = drawn(Loader(dataset, ShuffledOrder(30, 4), 10, seed=3, captions=True), range(3))
    assert all(found[key] == text for key, text in (other | pixels).items()) and len(other | pixels) == 30
    parts = [whole.shard(rank, 3).batch_at(7)["caption"] for rank in range(3)]
    assert [text for part in parts for text in part] == whole.batch_at(7)["caption"]
    assert drawn(TokenLoader(tokens, ShuffledOrder(30, 1), 6, seed=4, captions=True), range(60)) != found


def encoded(tokenizer: Tokenizer, dataset: PictureDataset, mirrored: bool, latent: bool) -> Tensor:
    """What a cache should hold, made here: tokens, or the latent in float16."""
    pixels, _ = dataset.read(range(len(dataset)))
    picture = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if mirrored else pixels)).float() / 127.5 - 1
    with torch.no_grad():
        found = [tokenizer.latent(part).half().flatten(2).transpose(1, 2) if latent
                 else torch.cat(tokenizer.encode(part).tokens, 1) for part in picture.split(SHARD)]
    return torch.cat(found)


def test_cached_latents_are_what_the_cached_tokens_code(pictures: Path, cache: Path) -> None:
    tokens, tokenizer, dataset = TokenDataset(cache), bitwise(32), opened(pictures)
    assert (tokens.job.bits, tokens.job.latents, tokens.job.vocabulary) == (32, 32, 2**32)
    for version in (0, 1):
        latents = tokens.read_latents(range(30), version)
        assert latents.dtype == torch.float16
        assert torch.equal(latents, encoded(tokenizer, dataset, bool(version), latent=True))
        canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, 30)
        again = pyramid.encode(latents.float().transpose(1, 2).reshape(30, 32, 4, 4), canvas,
                               lambda k, z: tokenizer.quantiser.quantise(z))
        assert torch.equal(torch.cat(again.tokens, 1), tokens.read(range(30), version))
        # Rounding to float16 moves a bit only where its channel was all but zero.
        whole = encoded(tokenizer, dataset, bool(version), latent=False)
        assert float((whole != tokens.read(range(30), version)).float().mean()) < 0.01
    loader = TokenLoader(tokens, ShuffledOrder(30, 1), 6, latents=True)
    batch = loader.batch_at(2)
    versions = loader.versions(batch["epoch"].numpy(), batch["id"].numpy())
    assert torch.equal(batch["latent"], tokens.read_latents(batch["id"].numpy(), versions)) and "caption" not in batch


@pytest.mark.parametrize(("width", "tokens", "dtype"), [(12, "index", torch.int16), (12, "bits", torch.uint8),
                                                        (70, "bits", torch.uint8)])
def test_a_cache_gives_the_tokens_that_the_tokenizer_emits(
    width: int, tokens: str, dtype: torch.dtype, pictures: Path, tmp_path: Path
) -> None:
    tokenizer, dataset = bitwise(width, tokens), opened(pictures)
    assert tokenize(tokenizer, dataset, tmp_path / "t", shard_pictures=SHARD)
    found, wanted = TokenDataset(tmp_path / "t"), encoded(tokenizer, dataset, False, latent=False)
    given = found.read(range(30))
    assert torch.equal(given.to(wanted.dtype), wanted) and (given.dtype == torch.bool) == (tokens == "bits")
    if width == 12:
        other = bitwise(width, "index" if tokens == "bits" else "bits")
        with pytest.raises(InputError, match="another tokenizer, with tokens of"):
            check_fits(tmp_path, found.job, other)
    stored = found.mapped[0]
    assert stored.dtype == dtype and stored.shape[3:] == ((packed_width(width),) if tokens == "bits" else ())
    assert found.job.vocabulary == json.loads((tmp_path / "t" / JOB).read_text())["vocabulary"] == 2**width
    if tokens == "bits":
        path = tmp_path / "t" / shard_file(0)
        tensors = load_file(path)
        tensors["tokens"][0, 0, 0, -1] |= 1
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
        with pytest.raises(DataError, match=f"of more than {width} bits"):
            TokenDataset(tmp_path / "t")


def test_captions_and_latents_are_part_of_the_job(pictures: Path, cache: Path, tmp_path: Path) -> None:
    lines = (pictures / "metadata.jsonl").read_text()
    settings: dict[str, Any] = {"flips": True, "shard_pictures": SHARD, "captions": True, "latents": True}
    try:
        (pictures / "metadata.jsonl").write_text(lines.replace("said 1", "says 1", 1))
        with pytest.raises(InputError, match=r"holds tokens of another job.*captions"):
            tokenize(bitwise(32), opened(pictures), cache, **settings)
    finally:
        (pictures / "metadata.jsonl").write_text(lines)
    for name, words in (("captions", "captions"), ("latents", "latents 32, not 0")):
        with pytest.raises(InputError, match=words):
            tokenize(bitwise(32), opened(pictures), cache, **{**settings, name: False})
    assert tokenize(bitwise(32), opened(pictures), cache, **settings)
    assert tokenize(bitwise(32), opened(pictures), tmp_path / "bare", shard_pictures=SHARD)
    bare = TokenDataset(tmp_path / "bare")
    for name in ("captions", "latents"):
        with pytest.raises(InputError, match=f"has no {name}; make them with `nextscale tokenize --{name}`"):
            TokenLoader(bare, ShuffledOrder(30), 6, **{name: True})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no captions"):
        bare.caption(0)
    continuous = Tokenizer(TokenizerConfig(AUTOENCODER, ((4, 4),), kind="kl")).eval()
    with pytest.raises(InputError, match="latents already"):
        tokenize(continuous, opened(pictures), tmp_path / "x", latents=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("name", ["caption_text", "caption_starts", "caption_firsts", "latents"])
def test_damaged_captions_and_latents_are_refused_by_name(name: str, gone: bool, cache: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "copied"))
    path, manifest = copied / shard_file(1), copied / MANIFEST
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if gone:
        del tensors[name]
    else:
        tensors[name].view(-1)[3] = 0
    save_file(tensors, path, metadata)
    told = json.loads(manifest.read_text())
    told["shards"][1]["bytes"] = path.stat().st_size  # so that the length alone doesn't tell
    manifest.write_text(json.dumps(told))
    with pytest.raises(DataError, match=shard_file(1)) as caught:
        TokenDataset(copied)
    assert "\n" not in str(caught.value)


def test_a_set_without_classes_trains_on_its_captions(tmp_path: Path) -> None:
    """Through the command line, and through a training's own cache."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(40 * i, 16))
        (folder / f"{i}.txt").write_text(f"shade {i}")
    lines = [json.dumps({"file_name": f"{i}.png", "alt": f"grey {i}"}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    coder = tmp_path / "tokenizer"
    system = tiny_var()
    save_tokenizer(system.tokenizer, coder)
    data = DataRecipe(str(folder), 16, "all", held_out=0)
    recipe = GeneratorTraining(data=data)
    own, _ = training_tokens(recipe, system.tokenizer, tmp_path / "run", captions=True)
    batch = token_loader(own, data, TrainConfig(batch_size=6), captions=True).batch_at(0)
    assert batch["caption"] == [f"shade {one}" for one in batch["id"].tolist()] and batch["labels"].shape == (6, 0)
    other = GeneratorTraining(data=replace(data, caption_field="alt"))
    assert training_tokens(other, system.tokenizer, tmp_path / "alt", captions=True)[0].caption(3) == "grey 3"
    with pytest.raises(DataError, match="no classes"):
        training_tokens(recipe, system.tokenizer, tmp_path / "other")
    command = ["tokenize", "--data", str(folder), "--tokenizer", str(coder), "--split", "all", "--device", "cpu"]
    assert run([*command, "--captions", "--latents", "--out", str(tmp_path / "tokens")]) == 0
    assert run([*command, "--captions", "--caption-field", "alt", "--out", str(tmp_path / "grey")]) == 0
    assert TokenDataset(tmp_path / "grey" / "all").captions(2) == ("grey 2",)
    named = replace(recipe, tokens=str(tmp_path / "tokens"))
    found, _ = training_tokens(named, system.tokenizer, tmp_path / "run", captions=True, latents=True)
    assert found.captions(2) == ("shade 2",) and found.read_latents([2]).shape == (1, 16, 8)
    assert run([*command, "--caption-field", "alt", "--out", str(tmp_path / "x")]) == 2
    assert run([*command, "--captions", "--caption-field", "gone", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
    assert run([*command, "--out", str(tmp_path / "plain")]) == 0
    with pytest.raises(InputError, match="nextscale tokenize --captions"):
        training_tokens(replace(recipe, tokens=str(tmp_path / "plain")), system.tokenizer, tmp_path / "run",
                        captions=True)
