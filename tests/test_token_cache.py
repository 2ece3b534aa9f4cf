"""Token caches: the same training as from pictures, whole after a kill, and refused where they don't fit."""
from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_task import draw_pictures
from tiny import tiny_var
from torch import Tensor

import nextscale
from nextscale.cli.main import run
from nextscale.data import Loader, PictureDataset, ShuffledOrder, open_dataset
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.data.token_shards import MANIFEST, TokenJob, begin, finish, shard_file, write_shard
from nextscale.errors import DataError, InputError
from nextscale.systems.var import VAR
from nextscale.training import TrainConfig, Trainer, read_metrics
from nextscale.training.generator import GeneratorTask
from nextscale.training.tokenizer_recipe import save_tokenizer
from nextscale.training.tokens import check_fits, tokenize, tokenizer_hash

SIZE, PICTURES, SHARD = 16, 30, 4
TIMES = ("seconds", "pictures_per_second", "flop_utilisation")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var(classes=(3,))


@pytest.fixture(scope="module")
def coder(system: VAR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tokenizer"
    save_tokenizer(system.tokenizer, folder)
    return folder


def opened(pictures: Path, crop: Any = "center") -> PictureDataset:
    return open_dataset(pictures, SIZE, "all", crop=crop, memory_bytes=0)


def make_cache(system: VAR, pictures: Path, folder: Path, **settings: Any) -> TokenDataset:
    assert tokenize(system.tokenizer, opened(pictures), folder, **{"shard_pictures": SHARD, **settings})
    return TokenDataset(folder)


@pytest.fixture(scope="module")
def cache(system: VAR, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache with mirrored versions, in shards of four pictures."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    make_cache(system, pictures, folder, flips=True)
    return folder


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[Any]) -> str:
    code = run([str(argument) for argument in arguments])
    line = capsys.readouterr().err
    assert code == 2 and line.startswith("nextscale: ") and line.count("\n") == 1, (code, line)
    return line


# The same training


class FromMemory:
    """Training without a cache: a table of all tokens in memory, batches in the loader's own order and flips."""

    def __init__(self, system: VAR, dataset: PictureDataset, batch_size: int, seed: int) -> None:
        self.loader = Loader(dataset, ShuffledOrder(len(dataset), seed), batch_size, flip=True, seed=seed)
        self.batch_size, self.system = batch_size, system
        pixels, _ = dataset.read(range(len(dataset)))
        plain = torch.from_numpy(pixels).float() / 127.5 - 1
        self.table = torch.stack([self.encode(plain), self.encode(plain.flip(-1))], 1)
        self.plain = plain

    def encode(self, pictures: Tensor) -> Tensor:
        parts = [torch.cat(self.system.encode(part), 1) for part in pictures.split(SHARD)]
        return torch.cat(parts)

    def batches(self, start_step: int) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader.batches(start_step):
            places = batch["id"]
            # Which version the loader gave shows in its pixels alone.
            mirrored = (batch["picture"] - self.plain[places]).abs().flatten(1).amax(1) > 1e-6
            yield {**batch, "tokens": self.table[places, mirrored.long()]}


def losses(source: Any, out: Path) -> list[dict[str, Any]]:
    config = TrainConfig(steps=8, batch_size=8, learning_rate=1e-3, warmup_steps=2, precision="fp32", seed=3,
                         log_every=1, sample_every=0, checkpoint_every=100, device="cpu")
    system = tiny_var(classes=(3,), seed=5)
    Trainer(GeneratorTask(system), source, config, out).train()
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(out)]


def test_training_from_the_cache_has_the_losses_of_tokens_made_in_memory(
    system: VAR, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    dataset, tokens = opened(pictures), TokenDataset(cache)
    memory = FromMemory(system, dataset, 8, seed=3)
    cached = TokenLoader(tokens, ShuffledOrder(len(tokens), 3), 8, seed=3)
    assert len(tokens) == PICTURES and tokens.job.versions == 2
    there, here = losses(memory, tmp_path / "memory"), losses(cached, tmp_path / "cached")
    assert len(here) >= 8 and here == there
    assert len({record["main/loss"] for record in here}) == len(here)


def test_a_picture_has_the_version_that_seed_epoch_and_id_say(system: VAR, pictures: Path, cache: Path) -> None:
    tokens = TokenDataset(cache)
    order = ShuffledOrder(len(tokens), 1)
    loader = TokenLoader(tokens, order, 6, seed=1)
    seen: dict[tuple[int, int], list[int]] = {}
    for batch in (loader.batch_at(step) for step in range(20)):
        for row, (epoch, one) in enumerate(zip(batch["epoch"].tolist(), batch["id"].tolist(), strict=True)):
            seen[epoch, one] = batch["tokens"][row].tolist()
    other = TokenLoader(tokens, ShuffledOrder(len(tokens), 9), 5, seed=1)
    found = {(0, one): row.tolist() for batch in map(other.batch_at, range(6))
             for one, row in zip(batch["id"].tolist(), batch["tokens"], strict=True)}
    assert all(seen[key] == row for key, row in found.items()) and len(found) == PICTURES
    epochs = [np.array([loader.versions(np.array([epoch]), np.array([one]))[0] for one in range(PICTURES)])
              for epoch in range(4)]
    assert all(0.2 < versions.mean() < 0.8 for versions in epochs) and not np.array_equal(epochs[0], epochs[1])


def test_ranks_together_see_the_batch_of_one(cache: Path) -> None:
    tokens = TokenDataset(cache)
    loader = TokenLoader(tokens, ShuffledOrder(len(tokens), 1), 6, seed=1)
    parts = [loader.shard(rank, 3).batch_at(4) for rank in range(3)]
    for name, whole in loader.batch_at(4).items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole)
    with pytest.raises(InputError, match="multiple of ranks"):
        loader.shard(0, 4)


def test_random_crops_are_versions_of_their_own(system: VAR, pictures: Path, tmp_path: Path) -> None:
    dataset = opened(pictures, "random")
    assert tokenize(system.tokenizer, dataset, tmp_path / "c", crops=3, flips=True, shard_pictures=SHARD)
    tokens = TokenDataset(tmp_path / "c")
    assert tokens.job.versions == 6
    places = np.arange(8)
    for crop in range(3):
        pixels, _ = dataset.read(places, np.full(8, crop))
        for mirrored in (0, 1):
            wanted = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if mirrored else pixels))
            made = [torch.cat(system.encode(part.float() / 127.5 - 1), 1) for part in wanted.split(SHARD)]
            assert torch.equal(tokens.read(places, 2 * crop + mirrored).long(), torch.cat(made))
    loader = TokenLoader(tokens, ShuffledOrder(len(tokens)), 6)
    drawn = loader.versions(np.repeat(np.arange(20), 6), np.tile(places[:6], 20))
    assert set(drawn.tolist()) == set(range(6))
    for wrong in ({"crops": 1}, {"crops": 0}):
        with pytest.raises(InputError, match="crops"):
            tokenize(system.tokenizer, dataset, tmp_path / "d", **wrong)
    with pytest.raises(InputError, match="same every time"):
        tokenize(system.tokenizer, opened(pictures), tmp_path / "d", crops=2)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("vocabulary", "dtype"), [(32, torch.int16), (1 << 15, torch.int16),
                                                   ((1 << 15) + 1, torch.int32), ((1 << 31) + 1, torch.int64)])
def test_tokens_are_kept_in_the_smallest_integers_that_hold_them(
    vocabulary: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    job = TokenJob("t", ((1, 1), (2, 2)), vocabulary, (8, 8), "d", "all", 2, "f")
    begin(tmp_path, job)
    largest = torch.full((2, 1, 5), vocabulary - 1)
    write_shard(tmp_path, job, 0, largest, torch.zeros(2, 0), torch.arange(2))
    assert finish(tmp_path, job) is not None
    found = TokenDataset(tmp_path).read([1, 0])
    assert found.dtype == dtype and torch.equal(found.long(), largest[:, 0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_tokens_stay_in_their_files_and_are_not_read_into_memory(cache: Path) -> None:
    tokens = TokenDataset(cache)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = {line[-1]: [int(end, 16) for end in line[0].split("-")] for line in maps if len(line) == 6}
    for number, mapped in enumerate(tokens.mapped):
        low, high = places[str(cache / shard_file(number))]
        assert low <= mapped.data_ptr() and mapped.data_ptr() + mapped.nbytes <= high
    before = tokens.mapped[0].clone()
    tokens.read([0, 1]).zero_()
    assert torch.equal(tokens.mapped[0], before)


# Kills, shares and resuming


def slow_script(pictures: Path, coder: Path, out: Path, die_while_writing: bool = False) -> str:
    """Tokenizes a picture at a time, slowly; or kills itself with a shard half-written."""
    return textwrap.dedent(f"""
        import os, signal, sys, time
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from nextscale.data import open_dataset, token_shards
        from nextscale.training import tokens
        from nextscale.training.tokenizer_recipe import load_tokenizer
        encode, save = tokens.encode, token_shards.save_file
        def slow(*given):
            time.sleep(0.05)
            return encode(*given)
        def die(tensors, path, metadata):
            if "00002" in str(path):
                Path(path).write_bytes(b"half a shard")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, path, metadata)
        if {die_while_writing}:
            token_shards.save_file = die
        else:
            tokens.encode = slow
        dataset = open_dataset({str(pictures)!r}, {SIZE}, "all", memory_bytes=0)
        print("begun", flush=True)
        tokens.tokenize(load_tokenizer(Path({str(coder)!r})), dataset, Path({str(out)!r}), flips=True,
                        shard_pictures={SHARD}, batch_size=2)
        """)


@pytest.mark.parametrize("moment", ["between", "while writing"])
def test_a_killed_job_goes_on_and_ends_with_the_very_same_cache(
    moment: str, system: VAR, pictures: Path, coder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    script = slow_script(pictures, coder, out, moment == "while writing")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        if moment == "between":
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            until = time.monotonic() + 60
            while not (out / shard_file(1)).exists() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.13)  # into the next shard
            process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    names = {path.name for path in out.iterdir()}
    assert {shard_file(0), shard_file(1)} <= names and MANIFEST not in names
    left = [name for name in names if name.startswith(".")]
    assert bool(left) == (moment == "while writing")
    with pytest.raises(DataError, match=r"is not complete: \d of 8 shards"):
        TokenDataset(out)
    before = (out / shard_file(0)).stat().st_mtime_ns
    done: list[int] = []
    settings: dict[str, Any] = {"flips": True, "shard_pictures": SHARD, "batch_size": 2}
    assert tokenize(system.tokenizer, opened(pictures), out, **settings, report=lambda _, total: done.append(total))
    assert done[-1] <= PICTURES - 2 * SHARD and (out / shard_file(0)).stat().st_mtime_ns == before
    assert tokenize(system.tokenizer, opened(pictures), tmp_path / "whole", **settings)
    assert contents(out) == contents(tmp_path / "whole")


def test_shares_of_any_number_of_processes_make_the_same_cache(
    pictures: Path, coder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenize", "--data", str(pictures), "--tokenizer", str(coder), "--shard-size", "4", "--device", "cpu"]
    assert run([*command, "--out", str(tmp_path / "one")]) == 0
    for part in (2, 0):
        assert run([*command, "--out", str(tmp_path / "parts"), "--shard", f"{part}/3"]) == 0
    assert "part 0 of 3 is done" in capsys.readouterr().out
    assert not (tmp_path / "parts" / "train" / MANIFEST).exists()
    # The rest by another number of processes, told by torchrun's variables.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run([*command, "--out", str(tmp_path / "parts")]) == 0
    for split in ("train", "validation"):
        assert contents(tmp_path / "one" / split) == contents(tmp_path / "parts" / split)
    monkeypatch.setenv("RANK", "2")
    assert "RANK=2" in refused(capsys, [*command, "--out", tmp_path / "parts"])
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        assert "--shard" in refused(capsys, [*command, "--out", tmp_path / "x", f"--shard={wrong}"])
    assert not (tmp_path / "x").exists()


def test_torchrun_shares_the_work(pictures: Path, coder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "nextscale.cli.main", "tokenize", "--data", str(pictures), "--tokenizer", str(coder), "--split", "all",
         "--shard-size", "4", "--device", "cpu", "--out", str(tmp_path / "tokens")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(TokenDataset(tmp_path / "tokens" / "all")) == PICTURES


def test_a_full_disk_is_one_line_and_the_job_goes_on_afterwards(
    pictures: Path, coder: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real limit on the size of files: the first shard doesn't fit, nothing of it is left."""
    out = tmp_path / "tokens"
    command = ["tokenize", "--data", str(pictures), "--tokenizer", str(coder), "--split", "all", "--flips",
               "--shard-size", "4", "--device", "cpu", "--out", str(out)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (cache / shard_file(7)).stat().st_size  # the last shard is smaller than the others
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = refused(capsys, command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in line and "MB are free there" in line
    assert [path.name for path in (out / "all").iterdir()] == ["job.json"]
    assert run(command) == 0
    assert len(TokenDataset(out / "all")) == PICTURES


def test_pictures_found_broken_on_the_way_are_left_out_and_named(system: VAR, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    victim = folder / "class1" / "004.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(victim)
    victim.write_bytes(victim.read_bytes()[:400])
    whole = opened(folder)
    assert len(whole) == PICTURES  # its header is good
    assert tokenize(system.tokenizer, whole, tmp_path / "tokens", shard_pictures=SHARD)
    tokens = TokenDataset(tmp_path / "tokens")
    assert len(tokens) == PICTURES - 1 and [title for title, _ in tokens.skipped] == [str(victim)]
    gone = next(row for row in range(PICTURES) if whole.source.title(row) == str(victim))
    assert tokens.rows.tolist() == [row for row in range(PICTURES) if row != gone]
    others = [place for place in range(PICTURES) if place != gone]
    before = contents(tmp_path / "tokens")
    assert tokenize(system.tokenizer, whole, tmp_path / "tokens", shard_pictures=SHARD)
    assert contents(tmp_path / "tokens") == before
    assert torch.equal(tokens.labels, whole.labels[others]) and "1 skipped" in tokens.summary()


# What is refused


def test_caches_of_another_tokenizer_are_refused(cache: Path, system: VAR) -> None:
    job = TokenDataset(cache).job
    check_fits(cache, job, system.tokenizer)
    other = tiny_var(classes=(3,), seed=1).tokenizer
    grids = tiny_var(((1, 1), (2, 2), (4, 4)), classes=(3,)).tokenizer
    codes = tiny_var(vocabulary=16, classes=(3,)).tokenizer
    for tokenizer, words in ((other, "fingerprint"), (grids, "schedule 1-2-3-4 and not 1-2-4"),
                             (codes, "vocabulary 32 and not 16")):
        with pytest.raises(InputError, match=f"another tokenizer, with the {words}"):
            check_fits(cache, job, tokenizer)


def test_the_fingerprint_follows_weights_and_settings_but_not_the_number_format(system: VAR) -> None:
    from nextscale.tokenizers.tokenizer import Tokenizer

    first = tokenizer_hash(system.tokenizer)
    again = tiny_var(classes=(3,)).tokenizer
    assert tokenizer_hash(again) == first
    with torch.no_grad():
        again.to_latent.weight[0, 0, 0, 0] += 1e-3  # type: ignore[union-attr, operator]
    assert tokenizer_hash(again) != first
    redrawn = tiny_var(classes=(3,)).tokenizer
    with torch.no_grad():
        redrawn.decoder.output.weight.add_(1e-3)
        redrawn.quantiser.usage_KV.add_(1)
    assert tokenizer_hash(redrawn) == first, "decoder and statistics of use make no codes"
    angle = Tokenizer(replace(system.tokenizer.config, cosine=True))
    angle.load_state_dict(system.tokenizer.state_dict())
    assert tokenizer_hash(angle) != first


@pytest.mark.parametrize("damage", ["short", "byte", "missing", "swapped", "empty", "range"])
def test_damaged_shards_are_refused_by_name(damage: str, copied: Path) -> None:
    path = copied / shard_file(3)
    data = bytearray(path.read_bytes())
    words = {"short": r"is cut short \([0-9,]+ of [0-9,]+ bytes\)", "byte": "checksum", "missing": "is missing",
             "swapped": "another cache", "empty": "cut short", "range": "outside 0..31"}[damage]
    if damage == "short":
        path.write_bytes(data[:-17])
    elif damage == "byte":
        data[-2] ^= 1  # a token's lowest bit
        path.write_bytes(data)
    elif damage == "missing":
        path.unlink()
    elif damage == "swapped":
        shutil.copy(copied / shard_file(2), path)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        tensors = load_file(path)
        tensors["tokens"][0, 0, 0] = 32
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata)
    with pytest.raises(DataError, match=words) as caught:
        TokenDataset(copied)
    assert shard_file(3) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_shard_stops_a_resumed_job_and_a_removed_one_is_made_anew(
    system: VAR, pictures: Path, copied: Path, cache: Path
) -> None:
    path = copied / shard_file(3)
    path.write_bytes(path.read_bytes()[:-17])
    with pytest.raises(DataError, match=r"cut short or damaged.*remove it and run the same"):
        tokenize(system.tokenizer, opened(pictures), copied, flips=True, shard_pictures=SHARD)
    path.unlink()
    assert tokenize(system.tokenizer, opened(pictures), copied, flips=True, shard_pictures=SHARD)
    assert contents(copied) == contents(cache)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"job": {"format": 1}, "shards": [], "skipped": []}'])
def test_damaged_manifests_are_one_line(text: str, copied: Path) -> None:
    (copied / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json") as caught:
        TokenDataset(copied)
    assert "\n" not in str(caught.value)


def test_manifests_of_other_versions_or_shards_are_refused(copied: Path) -> None:
    found = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**found, "job": {**found["job"], "format": 2}}))
    with pytest.raises(DataError, match="format 2"):
        TokenDataset(copied)
    (copied / MANIFEST).write_text(json.dumps({**found, "shards": found["shards"][:-1]}))
    with pytest.raises(DataError, match="names 7 shards"):
        TokenDataset(copied)
    found["shards"][0]["file"] = "../../elsewhere.safetensors"
    (copied / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(DataError, match="elsewhere"):
        TokenDataset(copied)


def test_a_cache_from_before_vectors_controls_and_captions_opens(copied: Path) -> None:
    for name in ("job.json", "manifest.json"):
        told = json.loads((copied / name).read_text())
        job = told.get("job", told)
        for later in ("width", "control", "captions", "bits", "latents"):
            del job[later]
        (copied / name).write_text(json.dumps(told))
    with safe_open(copied / "tokens-00000.safetensors", framework="pt") as shard:
        about = json.loads(shard.metadata()["nextscale"])
    assert about["job"] == hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
    assert TokenDataset(copied).job.control == ()


def test_a_folder_of_another_job_is_refused_and_left_alone(system: VAR, pictures: Path, copied: Path) -> None:
    before = contents(copied)
    for settings, words in (({"flips": False}, "flips True, not False"), ({"shard_pictures": 5}, "shard_pictures 4")):
        with pytest.raises(InputError, match=words):
            tokenize(system.tokenizer, opened(pictures), copied, **{"flips": True, "shard_pictures": SHARD, **settings})
    with pytest.raises(InputError, match="tokenizer"):
        tokenize(tiny_var(seed=1).tokenizer, opened(pictures), copied, flips=True, shard_pictures=SHARD)
    more = Path(shutil.copytree(pictures, copied.parent / "more"))
    shutil.copy(more / "class0" / "000.png", more / "class0" / "new.png")
    with pytest.raises(InputError, match="pictures 30, not 31"):
        tokenize(system.tokenizer, opened(more), copied, flips=True, shard_pictures=SHARD)
    assert contents(copied) == before


def test_mirrored_tokens_are_not_made_where_left_and_right_matter(
    pictures: Path, coder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "signs"))
    (folder / "nextscale.json").write_text('{"left_right_matters": true}')
    line = refused(capsys, ["tokenize", "--data", folder, "--tokenizer", coder, "--flips", "--out", tmp_path / "t"])
    assert "left and right matter" in line and not (tmp_path / "t" / "train").exists()


# From a folder to a model


RECIPE = """
[data]
size = 16
held_out_split = "validation"
balanced = false
[generator]
depth = 2
width = 48
heads = 3
[train]
steps = 3
batch_size = 4
precision = "fp32"
sample_every = 0
log_every = 1
device = "cpu"
"""


def test_a_generator_trains_from_tokens_when_the_pictures_are_gone(
    pictures: Path, coder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    train = ["train", "generator", "--recipe", str(tmp_path / "recipe.toml"), "--tokenizer", str(coder)]
    tokens = tmp_path / "tokens"
    make = ["tokenize", "--data", str(folder), "--tokenizer", str(coder), "--device", "cpu", "--out", str(tokens)]
    assert run(make) == 0
    assert run([*train, "--data", str(folder), "--out", str(tmp_path / "from-pictures")]) == 0
    shutil.rmtree(folder)
    assert run([*train, "--tokens", str(tokens), "--out", str(tmp_path / "from-tokens")]) == 0
    of = [[{name: value for name, value in record.items() if name not in TIMES}
           for record in read_metrics(tmp_path / name)] for name in ("from-pictures", "from-tokens")]
    assert of[0] == of[1] and any("held_out/nats_per_token" in record for record in of[1])
    # The training's own cache is of the same kind.
    assert contents(tmp_path / "from-pictures" / "tokens" / "train").keys() == contents(tokens / "train").keys()
    model = nextscale.load(tmp_path / "from-tokens" / "model", device="cpu")
    assert model.config.class_names == (("class0", "class1", "class2"),)
    capsys.readouterr()

    out = ["--out", tmp_path / "x"]
    assert "no mirrored tokens" in refused(capsys, [*train, "--tokens", tokens, "--set", "data.flip=true", *out])
    assert "no tokens of split 'test', it has train, validation" in refused(
        capsys, [*train, "--tokens", tokens, "--set", "data.split=test", *out])
    assert "holds no tokens" in refused(capsys, [*train, "--tokens", tmp_path / "nowhere", *out])
    assert "--crops 8" in refused(capsys, [*train, "--data", pictures, "--set", "data.crop=random", *out])
    save_tokenizer(tiny_var(seed=1).tokenizer, tmp_path / "other")
    assert "another tokenizer" in refused(
        capsys, ["train", "generator", "--recipe", tmp_path / "recipe.toml", "--tokenizer", tmp_path / "other",
                 "--tokens", tokens, *out])
    shard = tokens / "train" / shard_file(0)
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in refused(capsys, [*train, "--tokens", tokens, *out])
    (tokens / "train" / MANIFEST).unlink()
    assert "is not complete" in refused(capsys, [*train, "--tokens", tokens, *out])
