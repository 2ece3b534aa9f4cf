"""A training that stops, is killed, or loses its computer goes on to the very same losses."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import AdversarialTask, AutoencoderTask, draw_pictures, make_trainer
from torch import Tensor

import nextscale.training.checkpoint as checkpoint_module
from nextscale.training import latest, read_checkpoint, read_metrics

TIMES = ("seconds", "pictures_per_second")
SCRIPT = Path(__file__).with_name("small_task.py")


class PowerCut(BaseException):
    """Stands for a crash that no code of ours sees."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def losses(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in read_metrics(out)]


def steps_of(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out) if "main/loss" in record]


def tensors(out: Path) -> dict[str, dict[str, Tensor]]:
    path = latest(out)
    assert path is not None
    return read_checkpoint(path).tensors


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        assert all(torch.equal(ours[file][name], theirs[file][name]) for name in ours[file])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [AutoencoderTask, AdversarialTask])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    pictures: Path, tmp_path: Path, kind: Any, precision: str
) -> None:
    settings = {"precision": precision, "accumulate": 2, "log_every": 3}
    make_trainer(pictures, tmp_path / "whole", kind(), **settings).train()
    task = kind()
    real = task.after_step

    def cut(at: Any) -> Any:
        if at.step == 8:
            raise PowerCut
        return real(at)

    task.after_step = cut
    with pytest.raises(PowerCut):
        make_trainer(pictures, tmp_path / "cut", task, **settings).train()
    resumed = make_trainer(pictures, tmp_path / "cut", kind(), resume=True, **settings)
    assert resumed.step == 5
    torch.randn(3)  # what happened to the generator before must not matter
    resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resuming_without_a_checkpoint_begins_anew(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "main/loss": 9}\n{"step": 2, "ma')
    trainer = make_trainer(pictures, tmp_path, resume=True, steps=3)
    assert trainer.step == 0
    trainer.train()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_longer_run_goes_on_where_the_shorter_ended(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    make_trainer(pictures, tmp_path, steps=6).train()
    make_trainer(pictures, tmp_path, resume=True, steps=9).train()
    assert steps_of(tmp_path) == list(range(1, 10))
    assert "changed since: steps" in capsys.readouterr().out


@pytest.mark.parametrize("call", range(15))
def test_a_crash_at_any_moment_of_writing_leaves_a_good_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    settings = {"keep_checkpoints": 1, "checkpoint_every": 4, "steps": 9}
    make_trainer(pictures, tmp_path / "whole", **settings).train()
    trainer = make_trainer(pictures, tmp_path / "cut", **settings)
    done: list[str] = []

    def cutting(name: str, real: Any) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            # Only while the second checkpoint is written, when there is a first one to lose.
            if trainer.step == 8:
                done.append(name)
                if len(done) == call + 1:
                    raise PowerCut
            return real(*arguments, **options)

        return act

    for name in ("flush", "_remove", "save_file"):
        monkeypatch.setattr(checkpoint_module, name, cutting(name, getattr(checkpoint_module, name)))
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", cutting("rmtree", checkpoint_module.shutil.rmtree))
    with pytest.raises(PowerCut):
        trainer.train()
    monkeypatch.undo()
    survivor = latest(tmp_path / "cut")
    assert survivor is not None and read_checkpoint(survivor).step in (4, 8)
    make_trainer(pictures, tmp_path / "cut", resume=True, **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000009"]


def run_script(pictures: Path, out: Path, steps: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(pictures), str(out), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_runs_resume_to_the_losses_of_an_unkilled_one(pictures: Path, tmp_path: Path) -> None:
    steps, whole, killed = 120, tmp_path / "whole", tmp_path / "killed"
    make_trainer(pictures, whole, steps=steps, log_every=2, checkpoint_every=7).train()
    moments = random.Random(time.time_ns())
    kills = 0
    for _ in range(2):
        process = run_script(pictures, killed, steps)
        begun = len(read_metrics(killed)) if (killed / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 60
        # Not before it trains: a kill while Python starts would prove nothing.
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "metrics.jsonl").exists() and len(read_metrics(killed)) > begun:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    last = run_script(pictures, killed, steps)
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors.decode()
    assert kills >= 1
    assert_same_run(whole, killed)
    assert steps_of(killed) == list(range(2, steps + 1, 2))
    assert not list((killed / "checkpoints").glob(".step-*"))
