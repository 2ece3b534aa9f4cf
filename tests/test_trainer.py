"""The training loop: what it promises to any task, and its settings."""

from __future__ import annotations

import itertools
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_task import AdversarialTask, AutoencoderTask, config, draw_pictures, make_trainer
from torch import nn

from nextscale.configuration import build, read_mapping
from nextscale.devices import choose_device
from nextscale.errors import DataError, DeviceError, InputError, WeightsError
from nextscale.training import (
    Average,
    DivergedError,
    TrainConfig,
    checkpoints,
    latest,
    read_checkpoint,
    read_metrics,
)
from nextscale.training import trainer as trainer_module
from nextscale.training.schedules import learning_rate_scale


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def logged(out: Path) -> list[dict[str, Any]]:
    """Records of training steps, without those of the samples."""
    return [record for record in read_metrics(out) if "main/loss" in record]


def test_training_lowers_the_loss_and_leaves_metrics_samples_and_checkpoints(pictures: Path, tmp_path: Path) -> None:
    result = make_trainer(pictures, tmp_path, steps=40).train()
    records = logged(tmp_path)
    assert (result.step, result.stopped) == (40, "finished")
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["main/loss"] < 0.5 * records[0]["main/loss"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000035", "step-00000040"]
    assert (tmp_path / "samples" / "000040.txt").read_text() == "False"
    assert list((tmp_path / "tensorboard").iterdir())
    measured = [record["step"] for record in read_metrics(tmp_path) if "held_out/white" in record]
    assert measured == [5, 10, 15, 20, 25, 30, 35, 40]


def test_the_step_after_samples_knows_of_them_in_whichever_process(pictures: Path, tmp_path: Path) -> None:
    class Listening(AutoencoderTask):
        def after_step(self, at: Any) -> dict[str, float]:
            self.heard = [*getattr(self, "heard", []), at.rested]
            return super().after_step(at)

    task = Listening()
    make_trainer(pictures, tmp_path, task, steps=7, sample_every=3).train()
    assert task.heard == [False, False, False, True, False, False, True]


def test_accumulated_micro_batches_train_like_the_whole_batch(pictures: Path, tmp_path: Path) -> None:
    whole = make_trainer(pictures, tmp_path / "whole", AutoencoderTask(0.0, 0.0))
    parts = make_trainer(pictures, tmp_path / "parts", AutoencoderTask(0.0, 0.0), accumulate=4)
    whole.train()
    parts.train()
    for one, other in zip(logged(tmp_path / "whole"), logged(tmp_path / "parts"), strict=True):
        for name in ("main/loss", "error", "main/gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_each_phase_trains_its_own_parameters_and_may_begin_later(pictures: Path, tmp_path: Path) -> None:
    task = AdversarialTask()  # asserts in every loss which parameters require gradients
    make_trainer(pictures, tmp_path, task).train()
    records = logged(tmp_path)
    assert ["discriminator/loss" in record for record in records] == [False] * 2 + [True] * 10
    assert all("main/loss" in record for record in records)


def test_learning_rate_scale_of_a_group_holds(pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(pictures, tmp_path, AdversarialTask(), steps=4, schedule="constant", warmup_steps=0)
    trainer.train()
    assert {group["lr"] for group in trainer.optimisers["main"].param_groups} == {1e-2}
    assert {group["lr"] for group in trainer.optimisers["discriminator"].param_groups} == {5e-3}


def test_gradient_is_clipped_to_its_bound(pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(pictures, tmp_path, gradient_clip=1e-3, steps=1)
    norms: list[float] = []

    def before_step(optimiser: Any, *_: Any) -> None:
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    trainer.optimisers["main"].register_step_pre_hook(before_step)
    trainer.train()
    assert logged(tmp_path)[0]["main/gradient_norm"] > 0.1
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_average_follows_its_formula_in_fp32() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)).bfloat16()
    average = Average(module, decay=0.5)
    weight = module[0].weight
    expected = weight.detach().float().clone()
    generator = torch.Generator().manual_seed(0)
    for update in range(12):
        weight.data = torch.randn(weight.shape, generator=generator).bfloat16()
        module[1].running_mean += 1
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * weight.detach().float()
        average.update()
    assert average.module[0].weight.dtype == torch.float32
    torch.testing.assert_close(average.module[0].weight, expected)
    assert average.module[1].running_mean.item() == 12
    assert not average.module.training


def test_phases_share_their_micro_batch_and_are_updated_after_the_last(pictures: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    weights: list[torch.Tensor] = []

    class Watching(AdversarialTask):
        def loss(self, phase: str, batch: Any, at: Any) -> Any:
            seen.append((phase, int(batch["id"][0])))
            weights.append(self.modules["autoencoder"][0].weight.detach().clone())
            return super().loss(phase, batch, at)

    make_trainer(pictures, tmp_path, Watching(), steps=1, accumulate=2).train()
    first, second = seen[0][1], seen[2][1]
    assert seen == [("main", first), ("discriminator", first), ("main", second), ("discriminator", second)]
    assert first != second and all(torch.equal(weights[0], weight) for weight in weights)


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 1.0),
        ("cosine", 0.5, 0.55),
        ("cosine", 1.0, 0.1),
        ("linear", 0.25, 0.775),
        ("linear", 1.0, 0.1),
        ("constant", 0.9, 1.0),
    ],
)
def test_schedules_have_their_values(schedule: Any, progress: float, expected: float) -> None:
    assert learning_rate_scale(schedule, 1000, progress, 10, 0.1) == pytest.approx(expected)


def test_warm_up_rises_linearly_to_the_schedule() -> None:
    assert [learning_rate_scale("constant", step, 0.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_schedule_reaches_the_logged_learning_rate(pictures: Path, tmp_path: Path) -> None:
    make_trainer(pictures, tmp_path, warmup_steps=0, final_learning_rate_ratio=0.0).train()
    rates = [record["learning_rate"] for record in logged(tmp_path)]
    assert rates == pytest.approx([0.5e-2 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])


def test_bf16_keeps_weights_and_averages_in_fp32(pictures: Path, tmp_path: Path) -> None:
    class Watching(AutoencoderTask):
        def loss(self, phase: str, batch: Any, at: Any) -> Any:
            assert self.modules["autoencoder"](batch["picture"]).dtype == torch.bfloat16
            return super().loss(phase, batch, at)

    trainer = make_trainer(pictures, tmp_path, Watching(), precision="bf16")
    trainer.train()
    for module in (trainer.task.modules["autoencoder"], trainer.averaged_modules()["autoencoder"]):
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert trainer.averaged_modules()["autoencoder"] is not trainer.task.modules["autoencoder"]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_before_it_harms(pictures: Path, tmp_path: Path, where: str) -> None:
    class Diverging(AutoencoderTask):
        def loss(self, phase: str, batch: Any, at: Any) -> Any:
            loss, metrics = super().loss(phase, batch, at)
            if at.step == 7:
                # The root of 0 is a number, its slope is not.
                bad = loss * math.nan if where == "loss" else loss + (loss * 0).sqrt()
                return bad, metrics
            return loss, metrics

    trainer = make_trainer(pictures, tmp_path, Diverging())
    with pytest.raises(DivergedError, match=r"at step 7, pictures \[\d+.*step-00000005") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in trainer.task.modules["autoencoder"].parameters())
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000005"


def test_a_signal_finishes_the_step_and_checkpoints(pictures: Path, tmp_path: Path) -> None:
    class Interrupted(AutoencoderTask):
        def after_step(self, at: Any) -> Any:
            if at.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().after_step(at)

    handler = signal.getsignal(signal.SIGTERM)
    result = make_trainer(pictures, tmp_path, Interrupted()).train()
    assert (result.step, result.stopped) == (7, "signal")
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000007"
    assert signal.getsignal(signal.SIGTERM) is handler
    make_trainer(pictures, tmp_path, resume=True).train()
    assert [record["step"] for record in logged(tmp_path)] == list(range(1, 13))


class Ticking:
    """Clocks of a trainer that go on by so many seconds whenever one is read, whatever the machine does meanwhile."""

    def __init__(self, wall: float, processor: float):
        self.monotonic = itertools.count(0.0, wall).__next__
        self.process_time = itertools.count(0.0, processor).__next__


def test_a_time_limit_stops_cleanly_and_the_schedule_follows_it(
        pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "time", Ticking(1 / 64, 0.0))
    result = make_trainer(pictures, tmp_path, steps=100_000, minutes=0.01, final_learning_rate_ratio=0.0).train()
    # A tick a step and one for what comes behind it, but behind the last: 39 are the first to reach 0.6 s.
    assert (result.stopped, result.step, result.seconds) == ("time", 20, 39 / 64)
    assert [record["progress"] for record in logged(tmp_path)] == pytest.approx([i / 32 / 0.6 for i in range(20)])
    assert logged(tmp_path)[-1]["learning_rate"] < 1e-3
    again = make_trainer(pictures, tmp_path, resume=True, steps=100_000, minutes=0.01)
    assert again.seconds == pytest.approx(result.seconds)
    assert again.train().step <= result.step + 1


def test_time_of_the_processor_leaves_out_what_others_did(
        pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "time", Ticking(1.0, 0.25))
    found = {clock: make_trainer(pictures, tmp_path / clock, steps=12, clock=clock).train().seconds
             for clock in ("wall", "processor")}
    assert found["wall"] == pytest.approx(4 * found["processor"]) and found["processor"] > 0


def test_a_folder_with_a_run_is_not_overwritten(pictures: Path, tmp_path: Path) -> None:
    make_trainer(pictures, tmp_path, steps=2).train()
    with pytest.raises(DataError, match="holds a run already"):
        make_trainer(pictures, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(pictures: Path, tmp_path: Path) -> None:
    make_trainer(pictures, tmp_path, steps=2).train()
    task = AutoencoderTask()
    task.modules["autoencoder"][0] = nn.Conv2d(3, 8, 5, 2, 2)
    with pytest.raises(WeightsError, match="does not fit the model"):
        make_trainer(pictures, tmp_path, task, resume=True)


@pytest.mark.parametrize("damage", ["truncate", "remove", "scribble", "state", "foreign"])
def test_a_damaged_checkpoint_is_one_clear_line(pictures: Path, tmp_path: Path, damage: str) -> None:
    make_trainer(pictures, tmp_path, steps=2).train()
    path = latest(tmp_path)
    assert path is not None
    weights = path / "modules.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "remove":
        weights.unlink()
    elif damage == "scribble":
        weights.write_bytes(b"\xff" * weights.stat().st_size)
    elif damage == "state":
        (path / "state.json").write_text('{"format": 1, "fil')
    else:
        (path / "state.json").write_text("[]")
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_half_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nextscale.training.checkpoint as module

    written: list[Path] = []
    real = module.save_file

    def save_until_full(tensors: Any, path: Path) -> None:
        written.append(path)
        if "step-00000010" in str(path) and len(tensors) and "averaged" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(module, "save_file", save_until_full)
    with pytest.raises(WeightsError, match=r"No space left on device.*step-00000005"):
        make_trainer(pictures, tmp_path).train()
    assert any("step-00000010" in str(path) for path in written)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert make_trainer(pictures, tmp_path, resume=True).train().step == 12


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="'cuda' is not there"):
        choose_device("cuda")
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        choose_device("gpu")
    assert choose_device("cpu").type == "cpu"


@dataclass(frozen=True)
class Recipe:
    width: int
    train: TrainConfig = field(default_factory=TrainConfig)
    data: Path | None = None
    scales: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_settings_are_read_from_toml_and_yaml(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"recipe{suffix}"
    if suffix == ".toml":
        train = "[train]\nlearning_rate = 1e-4\nbetas = [0.5, 0.9]\n"
        path.write_text(f'width = 8\nscales = [1, 2, 4]\ndata = "x"\n{train}')
    else:
        path.write_text("width: 8\nscales: [1, 2, 4]\ndata: x\ntrain: {learning_rate: 1e-4, betas: [0.5, 0.9]}\n")
    recipe = build(Recipe, read_mapping(path), str(path))
    assert recipe == Recipe(8, TrainConfig(learning_rate=1e-4, betas=(0.5, 0.9)), Path("x"), (1, 2, 4))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"width": 8, "train": {"learnin_rate": 1}}, r"recipe: train: unknown key 'learnin_rate'; .*'learning_rate'"),
        ({"width": "wide"}, "recipe: width is 'wide'; it must be int"),
        ({"width": True}, "recipe: width is True; it must be int"),
        ({}, "recipe: key 'width' is missing"),
        ({"width": 8, "train": 3}, "recipe: train is 3; it must be a table of keys"),
        ({"width": 8, "train": {"schedule": "cosin"}}, "train: schedule is 'cosin'; use one of 'cosine'"),
        ({"width": 8, "train": {"betas": [0.9]}}, "train: betas has 1 entries; it must have 2"),
        ({"width": 8, "train": {"batch_size": 9, "accumulate": 2}}, r"train: accumulate \(2\) must divide"),
        ({"width": 8, "train": {"learning_rate": "fast"}}, "train: learning_rate is 'fast'; it must be a number"),
        ({"width": 8, "scales": [1, "two"]}, r"recipe: scales\[1\] is 'two'; it must be int"),
    ],
)
def test_wrong_settings_name_the_key(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(Recipe, mapping, "recipe")


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "x = ="), ("a.yaml", "a: [1"), ("a.yaml", "- 1"), ("a.ini", "x"), ("none.toml", None)]
)
def test_an_unreadable_configuration_is_one_clear_line(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=name) as caught:
        read_mapping(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"ema_decay": 1.0}, {"minutes": 0.0}, {"warmup_steps": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        config(**wrong)
