"""Several processes train as one does: the same losses, the same files, one message, and any number may go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import draw_pictures, make_trainer
from tiny import tiny_var
from two_processes import train_generator, train_phases, train_tokenizer

from nextscale import parallel
from nextscale.cli.main import run
from nextscale.errors import InputError
from nextscale.training import checkpoints, latest, read_checkpoint, read_metrics
from nextscale.training.tokenizer_recipe import save_tokenizer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed part")

# The share of the steps done is that of each run's own length; times are times.
OWN = ("seconds", "pictures_per_second", "flop_utilisation", "progress")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does."""
    out = tmp_path_factory.mktemp("alone")
    train_generator(out / "generator", steps=4)
    train_phases(pictures, out / "phases")
    train_tokenizer(pictures, out / "tokenizer")
    return out


@pytest.fixture(scope="module")
def two(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes do, in one launch."""
    out = tmp_path_factory.mktemp("two")
    train_generator(out / "to-fsdp")
    script = Path(__file__).with_name("two_processes.py")
    command = [*TORCHRUN, str(script), str(pictures), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    # Each line once: rank 1 keeps its peace.
    assert done.stdout.count("stopped after step 2 (finished)") == 2
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def met(two: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((two / f"rank-{rank}.json").read_text())
    return found


def assert_same_metrics(one: Path, other: Path, last: int | None = None, rel: float = 2e-4) -> None:
    ours, theirs = read_metrics(one), [r for r in read_metrics(other) if last is None or r["step"] <= last]
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] != []
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() ^ yours.keys() <= {"flop_utilisation"}  # unknown in the first step of a life
        for name in mine.keys() - set(OWN):
            assert mine[name] == pytest.approx(yours[name], rel=rel, abs=1e-5), (name, mine["step"])


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = read_checkpoint(one).tensors, read_checkpoint(other).tensors
    # Sharded checkpoints hold no empty groups.
    assert {name for name, group in ours.items() if group} == {name for name, group in theirs.items() if group}
    for file, group in ours.items():
        assert group.keys() == theirs[file].keys()
        for name, tensor in group.items():
            torch.testing.assert_close(tensor, theirs[file][name], rtol=1e-3, atol=2e-4, msg=f"{file} {name}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_and_weights_of_one(alone: Path, two: Path, kind: str) -> None:
    assert_same_metrics(two / kind, alone / "generator", last=2)
    assert_same_tensors(checkpoints(two / kind)[1], checkpoints(alone / "generator")[1])


def test_phases_that_begin_later_are_shared_too(alone: Path, two: Path) -> None:
    assert_same_metrics(two / "phases", alone / "phases")
    begun = ["discriminator/loss" in record for record in read_metrics(two / "phases") if "main/loss" in record]
    assert begun == [False, False, True, True, True]


def test_codebook_and_revived_codes_are_the_same_on_any_number_of_processes(alone: Path, two: Path) -> None:
    assert_same_metrics(two / "tokenizer", alone / "tokenizer", rel=2e-3)
    assert any(record["revived"] > 0 for record in read_metrics(two / "tokenizer"))
    ours, theirs = (read_checkpoint(latest(out / "tokenizer")).module("tokenizer") for out in (two, alone))  # type: ignore[arg-type]
    for name in ("quantiser.codebook.weight", "quantiser.usage_KV", "quantiser.assigned_V"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)


def test_a_sharded_run_goes_on_in_one_process(alone: Path, two: Path) -> None:
    folder = latest(two / "fsdp")
    assert folder is not None and len(list((folder / "shards").glob("*.safetensors"))) == 2
    train_generator(two / "fsdp", resume=True, steps=4)
    assert_same_metrics(two / "fsdp", alone / "generator")
    assert_same_tensors(latest(two / "fsdp"), latest(alone / "generator"))  # type: ignore[arg-type]


def test_one_process_s_run_goes_on_sharded_over_two(alone: Path, two: Path) -> None:
    assert_same_metrics(two / "to-fsdp", alone / "generator")
    assert_same_tensors(latest(two / "to-fsdp"), latest(alone / "generator"))  # type: ignore[arg-type]


def test_a_loss_that_is_no_number_stops_all_and_names_the_pictures_of_the_process_that_met_it(two: Path) -> None:
    first, second = met(two, 0), met(two, 1)
    assert first["nan"].startswith("DivergedError") and second["nan"].startswith("ElsewhereError")
    assert f"at step 3, pictures {second['seen']}" in first["nan"]
    assert first["seen"] != second["seen"] and "step-00000002" in first["nan"]
    kept = latest(two / "nan")
    assert kept is not None and kept.name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(kept).group("modules").values())


def test_a_signal_to_one_process_stops_all_in_the_same_step(two: Path) -> None:
    assert met(two, 0)["signal"] == met(two, 1)["signal"] == [4, "signal"]
    assert [path.name for path in checkpoints(two / "signal")] == ["step-00000004"]


def test_a_batch_that_cannot_be_shared_is_refused(two: Path) -> None:
    for rank in (0, 1):
        assert met(two, rank)["rest"].startswith("InputError: batch_size (8) must be a multiple of the number of proc")


@pytest.mark.parametrize("where", ["full", "full-fsdp"])
def test_a_full_disk_in_one_process_ends_the_job_with_one_message(two: Path, where: str) -> None:
    told, other = met(two, 0)[where], met(two, 1)[where]
    assert told.startswith("WeightsError") and "No space left on device" in told and "\n" not in told
    assert other.startswith("ElsewhereError")
    assert met(two, 0)["latest"] == ["None", "None"]
    assert list((two / where / "checkpoints").iterdir()) == []


def test_a_damaged_shard_is_one_clear_line(two: Path) -> None:
    path = latest(two / "to-fsdp")
    assert path is not None
    shard = sorted((path / "shards").iterdir())[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(Exception, match="truncated") as caught:
        read_checkpoint(path)
    assert str(shard) in str(caught.value)
    shard.write_bytes(b"\xff" * len(whole))
    with pytest.raises(Exception, match="damaged") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    shard.write_bytes(whole)


def test_shares_cover_everything_once() -> None:
    for count in (0, 1, 7, 64):
        for among in (1, 2, 3, 8):
            shares = [parallel.share(count, of, among) for of in range(among)]
            assert [i for part in shares for i in part] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_draws_of_pictures_do_not_hang_on_how_the_batch_is_divided() -> None:
    def draw(first: int, count: int) -> torch.Tensor:
        torch.manual_seed(5)
        with parallel.pictures_of_batch(first, count, 6):
            return torch.cat([parallel.rand_pictures(count, 2), parallel.rand_pictures(count, 1)], 1)

    assert torch.equal(torch.cat([draw(0, 2), draw(2, 1), draw(3, 3)]), draw(0, 6))
    with parallel.pictures_of_batch(0, 2, 6), pytest.raises(ValueError, match="draw once a picture"):
        parallel.rand_pictures(4)
    assert parallel.rand_pictures(4).shape == (4,)


def test_a_process_of_a_job_leaves_without_taking_python_down() -> None:
    script = ("import atexit; from nextscale import parallel; atexit.register(print, 'late'); "
              "print('said', end=''); parallel.leave(3)")  # fmt: skip
    job = {**environment(), "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=job, timeout=300)
    assert (done.returncode, done.stdout) == (3, "said")
    with pytest.raises(SystemExit) as ended:
        parallel.leave(3)
    assert ended.value.code == 3


def test_only_generators_are_sharded(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextscale.training import distributed

    monkeypatch.setattr(distributed.parallel, "world", lambda: 2)
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    with pytest.raises(InputError, match='use parallel = "ddp"'):
        make_trainer(pictures, tmp_path, parallel="fsdp")


RECIPE = """
[data]
size = 16
held_out = 0
[generator]
depth = 2
width = 48
heads = 3
drop_path = 0.2
[train]
steps = 40
batch_size = 4
log_every = 1
checkpoint_every = 4
sample_every = 0
warmup_steps = 2
learning_rate = 1e-3
precision = "fp32"
device = "cpu"
"""


def worker_of(launcher: int, rank: int) -> int | None:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the process to kill in /proc")
def test_a_job_whose_process_is_killed_says_so_and_goes_on_with_another_number(pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    out = tmp_path / "killed"
    save_tokenizer(tiny_var().tokenizer, tmp_path / "tokenizer")
    options = ["train", "generator", "--recipe", str(recipe), "--data", str(pictures)]
    options += ["--tokenizer", str(tmp_path / "tokenizer"), "--out"]
    command = [*TORCHRUN, "-m", "nextscale.cli.main", *options, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as job:
        deadline = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < deadline and latest(out) is None:
            time.sleep(0.01)
        victim = worker_of(job.pid, 1)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        _, errors = job.communicate(timeout=120)
    assert job.returncode not in (0, None)
    assert "nextscale: another process of the job is gone, noticed at step" in errors
    begun = latest(out)
    assert begun is not None and begun.name != "step-00000040" and not (out / "model").exists()
    assert run([*options, str(out), "--resume"]) == 0
    assert run([*options, str(tmp_path / "whole")]) == 0
    assert_same_metrics(out, tmp_path / "whole", rel=1e-3)
    assert (out / "model" / "generator.safetensors").is_file()
    assert not list((out / "checkpoints").glob(".step-*"))
