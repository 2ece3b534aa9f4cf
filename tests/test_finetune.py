"""Fine-tuning: adapters change nothing at first and only themselves later, merge exactly, and fit their base alone."""
from __future__ import annotations

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_task import draw_pictures
from tiny import labels, random_tokens, tiny_var
from torch import Tensor

import nextscale
from nextscale.cli.main import run
from nextscale.errors import InputError, MissingExtraError, WeightsError
from nextscale.layers.linear import Linear, _has_blocked_products
from nextscale.systems import folders
from nextscale.systems.var import VAR
from nextscale.training import TrainConfig, adapters, latest, read_metrics
from nextscale.training.adapters import AdapterConfig, AdapterFile, attach, load_adapters, merge, save_adapters
from nextscale.training.classes import extend_classes, translate
from nextscale.training.finetune import choose_trained
from nextscale.training.finetune_recipe import train_finetune

KINDS = [name for name, *_ in adapters.target_table(tiny_var())]
NAMED = ("cat", "dog", "class1", "sun", "tree")


def named_var(**settings: Any) -> VAR:
    """A tiny model whose classes have names, one of them the data's."""
    system = tiny_var(**settings)
    system.config = replace(system.config, class_names=(NAMED,))
    return system


def loss(system: VAR, pictures: int = 3) -> Tensor:
    return system.loss(random_tokens(system.plan, pictures), labels(pictures), 0.0)[0].detach()


def bend(system: VAR, size: float = 0.05) -> None:
    """Gives all adapters weights, as training would."""
    make = torch.Generator().manual_seed(3)
    for name, parameter in system.named_parameters():
        if adapters.is_adapter(name):
            parameter.data.add_(size * torch.randn(parameter.shape, generator=make).to(parameter.dtype))


def pictures_of(system: VAR) -> Tensor:
    return system.generate([0, 1, 2], seed=3, output="torch", progress=False).images


# Adapters

@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit_and_merging_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)  # of the adapters' first weights
    system, adapted = tiny_var(), tiny_var()
    attach(adapted, AdapterConfig(4, targets=(kind,)))
    plain = loss(system)
    assert torch.equal(loss(adapted), plain)
    bend(adapted)
    unmerged = loss(adapted)
    assert abs((unmerged - plain).item()) > 1e-4
    merge(adapted)
    assert torch.allclose(loss(adapted), unmerged, atol=2e-6)


def test_adapters_everywhere_draw_the_bases_pictures_at_first_and_the_merged_ones_later() -> None:
    system, adapted = tiny_var(), tiny_var()
    attach(adapted, AdapterConfig(4, targets=tuple(KINDS)))
    assert torch.equal(pictures_of(adapted), pictures_of(system))
    bend(adapted)
    drawn = pictures_of(adapted)
    assert not torch.equal(drawn, pictures_of(system))
    merge(adapted)
    assert torch.allclose(pictures_of(adapted), drawn, atol=1e-4)
    assert {n: p.shape for n, p in adapted.named_parameters()} == {n: p.shape for n, p in system.named_parameters()}
    assert all(type(mine) is type(plain) for mine, plain in zip(adapted.modules(), system.modules(), strict=True))


def test_fresh_adapters_change_no_bit_of_a_bf16_training_pass() -> None:
    system, adapted = tiny_var(), tiny_var()
    for model in (system, adapted):
        for part in adapters.network(model).values():
            part.to(torch.bfloat16)
    attach(adapted, AdapterConfig(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(adapted), loss(system))


@pytest.mark.skipif(not _has_blocked_products(), reason="this CPU or torch has no bfloat16 products")
@torch.no_grad()
def test_merging_renews_the_copy_of_the_weights_in_blocks() -> None:
    adapted = tiny_var().to_precision("bf16")
    attach(adapted, AdapterConfig(4))
    bend(adapted, 0.3)
    pictures_of(adapted)  # every layer keeps a copy of its weights in blocks now
    layer = adapted.generator.blocks[0].mlp.expand
    base, x = layer.get_base_layer(), torch.randn(1, 8, 48).bfloat16()
    assert isinstance(base, Linear) and base._packed is not None
    layer.merge()

    def error() -> float:
        true = torch.nn.functional.linear(x.float(), base.weight.float(), base.bias.float())
        return float((base(x).float() - true).norm() / true.norm())

    assert error() < 1e-2
    layer.unmerge()
    assert error() < 1e-2


def test_default_targets_are_the_systems_own_and_names_choose_others() -> None:
    system = tiny_var()
    assert adapters.target_names(system) == [f"generator.blocks.{i}.{kind}" for i in range(2) for kind in
                                             ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")]
    assert adapters.target_names(system, ("blocks.1",)) == [n for n in adapters.adaptable(system) if ".blocks.1." in n]
    assert adapters.target_names(system, ("head", "mlp.*")) == [
        *(f"generator.blocks.{i}.mlp.{part}" for i in range(2) for part in ("expand", "contract")), "head"]


def test_a_wrong_target_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"target 'attention\.qvk' names nothing.*did you mean 'attention\.qkv'"):
        attach(tiny_var(), AdapterConfig(4, targets=("attention.qvk",)))
    with pytest.raises(InputError, match="already"):
        system = tiny_var()
        attach(system, AdapterConfig(4))
        attach(system, AdapterConfig(4))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"nextscale\[train\]"):
        attach(tiny_var(), AdapterConfig(4))


# Files

def saved(system: VAR, folder: Path) -> AdapterFile:
    about = AdapterFile(adapters.fingerprint(system), "tiny", AdapterConfig(4, 8.0, targets=("mlp.*", "head")))
    attach(system, about.lora)
    bend(system)
    save_adapters({n: p for n, p in system.named_parameters() if adapters.is_adapter(n)}, about, folder)
    return about


def test_saved_adapters_load_onto_their_base_in_either_precision(tmp_path: Path) -> None:
    system = tiny_var()
    saved(system, tmp_path)
    again = tiny_var()
    load_adapters(again, tmp_path)
    assert torch.equal(loss(again), loss(system))
    load_adapters(tiny_var().to_precision("bf16"), tmp_path)
    kept = load_file(tmp_path / "adapters.safetensors")
    assert all(adapters.is_adapter(name) for name in kept)


def test_saved_adapters_refuse_another_base(tmp_path: Path) -> None:
    saved(tiny_var(), tmp_path)
    with pytest.raises(WeightsError, match="trained on another model \\(tiny, fingerprint"):
        load_adapters(tiny_var(seed=1), tmp_path)
    near = tiny_var()
    near.generator.blocks[1].mlp.contract.weight.data.mul_(1.01)
    with pytest.raises(WeightsError, match="another model"):
        load_adapters(near, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "tensor", "shape", "json", "key"])
def test_damaged_adapters_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    saved(tiny_var(), tmp_path)
    weights, about = tmp_path / "adapters.safetensors", tmp_path / "adapters.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if damage == "missing":
        about.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "tensor":
        save_file({n: t for n, t in tensors.items() if n != name}, weights)
    elif damage == "shape":
        save_file({**tensors, name: tensors[name][:1].clone()}, weights)
    elif damage == "json":
        about.write_text("{")
    else:
        about.write_text(json.dumps({**json.loads(about.read_text()), "surprise": 1}))
    with pytest.raises(WeightsError) as caught:
        load_adapters(tiny_var(), tmp_path)
    assert "\n" not in str(caught.value)


# Classes

def test_class_surgery_keeps_old_classes_to_the_bit_and_the_null_class_last() -> None:
    system, changed = named_var(), named_var()
    change = extend_classes(changed, [["owl", "class1", "fox"]])
    assert changed.config.classes == (7,) and changed.config.class_names == ((*NAMED, "owl", "fox"),)
    tokens = random_tokens(system.plan, 2)
    for label in (*NAMED, None):
        before, after = system.log_prob(tokens, label), changed.log_prob(tokens, label)
        assert torch.equal(before.token, after.token), label
    table, old = changed.labels.tables[0].weight, system.labels.tables[0].weight
    assert torch.equal(table[5], old[:-1].mean(0)) and torch.equal(table[-1], old[-1])
    places = translate(torch.tensor([[0], [1], [2], [3]]), change, changed.config.classes)
    assert places.tolist() == [[5], [2], [6], [7]]


def test_class_surgery_can_drop_other_classes_and_start_from_the_null_row() -> None:
    system, changed = named_var(), named_var()
    change = extend_classes(changed, [["owl", "class1"]], keep=False, initial="null")
    table, old = changed.labels.tables[0].weight, system.labels.tables[0].weight
    assert changed.config.class_names == (("owl", "class1"),)
    assert torch.equal(table, torch.stack([old[-1], old[2], old[-1]]))
    assert change.new[0].tolist() == [True, False, False]


def test_classes_without_names_are_known_by_index_and_missing_kinds_stay() -> None:
    system = tiny_var(classes=(4, 3))
    before = system.labels.tables[1].weight.clone()
    change = extend_classes(system, [["2", "owl"]])
    assert system.config.classes == (5, 3)
    assert torch.equal(system.labels.tables[1].weight, before)
    assert translate(torch.tensor([[0], [1]]), change, system.config.classes).tolist() == [[2, 3], [4, 3]]
    assert system.label_rows(["owl", "2"]).tolist() == [[4, 3], [2, 3]]


def test_class_surgery_refuses_more_kinds_than_the_model_has_and_names_given_twice() -> None:
    with pytest.raises(InputError, match="2 kinds of label, the model 1"):
        extend_classes(named_var(), [["owl"], ["noto"]])
    with pytest.raises(InputError, match="'owl' is there twice"):
        extend_classes(named_var(), [["owl", "owl"]])


# Training

@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    folders.save(named_var(), folder, torch.float32)
    return folder


def recipe(base: Path, pictures: Path, **changes: Any) -> dict[str, Any]:
    train = {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0, "log_every": 1, "device": "cpu",
             "sample_every": 0, "checkpoint_every": 3, "ema_decay": 0.5, "precision": "fp32",
             **changes.pop("train", {})}
    return {"model": str(base), "data": {"spec": str(pictures), "held_out": 4}, "base_precision": "fp32",
            "train": train, **changes}


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["main/loss"] for r in read_metrics(out) if "main/loss" in r}


def test_training_changes_adapters_and_new_classes_alone(base: Path, pictures: Path, tmp_path: Path) -> None:
    train_finetune(recipe(base, pictures), tmp_path)
    assert losses(tmp_path)[6] < losses(tmp_path)[1]
    before, after = nextscale.load(str(base), device="cpu"), nextscale.load(str(base), device="cpu")
    about = load_adapters(after, tmp_path / "adapters")
    assert about.trained == ("labels.tables.0.weight",)
    own = {name.replace(".base_layer.", "."): p for name, p in after.named_parameters()}
    for name, parameter in before.named_parameters():
        if name != "labels.tables.0.weight":
            assert torch.equal(own[name], parameter), name
    old, new = before.labels.tables[0].weight, after.labels.tables[0].weight
    assert after.config.class_names == ((*NAMED, "class0", "class2"),)
    assert torch.equal(new[:5], old[:5]) and torch.equal(new[-1], old[-1])
    assert (new[5:7] - old[:-1].mean(0)).abs().amax(1).min() > 1e-4
    assert all(float(p.detach().abs().max()) > 0 for n, p in after.named_parameters() if ".lora_B." in n)
    checkpoint = load_file(latest(tmp_path) / "modules.safetensors")  # type: ignore[operator]
    assert all(".lora_" in name or "labels" in name for name in checkpoint)


def test_the_finished_model_is_base_and_adapters_merged(base: Path, pictures: Path, tmp_path: Path) -> None:
    train_finetune(recipe(base, pictures), tmp_path)
    after = nextscale.load(str(base), device="cpu")
    load_adapters(after, tmp_path / "adapters")
    finished = nextscale.load(str(tmp_path / "model"), device="cpu")
    assert finished.config == after.config
    assert float(loss(finished)) == pytest.approx(float(loss(after)), abs=0.02)  # saved in bf16
    assert abs(float(loss(after)) - float(loss(nextscale.load(str(base), device="cpu")))) > 0.02
    arguments = ["train", "merge", "--model", str(base), "--adapters", str(tmp_path / "adapters"), "--out",
                 str(tmp_path / "merged"), "--dtype", "fp32"]
    assert run(arguments) == 0
    assert torch.allclose(loss(nextscale.load(str(tmp_path / "merged"), device="cpu")), loss(after), atol=2e-6)
    assert run(arguments) == 2  # the folder is there already


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor", "muon"])
def test_a_resumed_run_repeats_the_losses(base: Path, pictures: Path, tmp_path: Path, optimiser: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"train": {"optimiser": optimiser}, "lora": {"dropout": 0.2}}
    train_finetune(recipe(base, pictures, **copy.deepcopy(settings)), whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "model")
    shutil.rmtree(parts / "adapters")
    shutil.rmtree(parts / "checkpoints" / "step-00000006")
    train_finetune(recipe(base, pictures, **copy.deepcopy(settings)), parts, resume=True)
    assert losses(parts) == losses(whole)
    mine, theirs = (load_file(out / "adapters" / "adapters.safetensors") for out in (parts, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_resumed_on_another_model_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    train_finetune(recipe(base, pictures, train={"steps": 1}), tmp_path / "run")
    other = named_var()
    other.generator.start.data.add_(1.0)
    folders.save(other, tmp_path / "other", torch.float32)
    with pytest.raises(WeightsError, match="begun on another model"):
        train_finetune(recipe(tmp_path / "other", pictures), tmp_path / "run", resume=True)


def test_full_fine_tuning_leaves_frozen_parameters_equal(base: Path, pictures: Path, tmp_path: Path) -> None:
    train_finetune(recipe(base, pictures, lora={"rank": 0}, freeze=["blocks.0", "word", "head.bias"],
                          classes={"train": "all"}, train={"optimiser": "adafactor", "ema_decay": 0.0}), tmp_path)
    assert not (tmp_path / "adapters").exists()
    before = {n: p.bfloat16() for n, p in nextscale.load(str(base), device="cpu").named_parameters()}
    moved = {name for name, p in nextscale.load(str(tmp_path / "model"), device="cpu").named_parameters()
             if p.shape != before[name].shape or not torch.equal(p.bfloat16(), before[name])}
    frozen = {n for n in before if n.startswith(("generator.blocks.0.", "generator.word.", "tokenizer.", "head.bias"))}
    assert not moved & frozen
    assert {n for n in before if n.startswith("generator.blocks.1.") and n.endswith("weight")} <= moved


def test_bf16_base_with_a_layer_trained_whole_trains_and_draws(base: Path, pictures: Path, tmp_path: Path) -> None:
    train_finetune(recipe(base, pictures, base_precision="bf16", train_also=["head"], checkpointing=True,
                          train={"precision": "bf16", "sample_every": 3}), tmp_path)
    assert sorted(file.name for file in (tmp_path / "samples").iterdir())
    about = load_adapters(nextscale.load(str(base), device="cpu"), tmp_path / "adapters")
    assert set(about.trained) == {"head.weight", "head.bias", "labels.tables.0.weight"}


def test_adafactor_keeps_less_than_a_tenth_of_adamw_state() -> None:
    def state(optimiser: torch.optim.Optimizer, system: VAR) -> int:
        system.loss(random_tokens(system.plan, 2), labels(2))[0].backward()
        optimiser.step()
        return sum(v.numel() for kept in optimiser.state.values() for v in kept.values())

    one, two = tiny_var(), tiny_var()
    small = state(torch.optim.Adafactor([p for p in one.generator.parameters()]), one)
    assert small < 0.1 * state(torch.optim.AdamW([p for p in two.generator.parameters()]), two)


@pytest.mark.parametrize(("changes", "message"), [
    ({"freeze": ["blocks.7"]}, "freeze 'blocks.7' names nothing"),
    ({"train_also": ["haed"]}, "did you mean 'head'"),
    ({"lora": {"rank": -1}}, "lora.rank is -1"),
    ({"lora": {"rank": 0}, "train_also": ["head"]}, "train_also is for adapters"),
    ({"lora": {"rank": 0}, "freeze": ["generator", "head", "labels"]}, "nothing to train"),
    ({"lora": {"targets": ["mlp.expnad"]}}, "did you mean 'mlp.expand'"),
    ({"base_precision": "bf16"}, "base_precision must be fp32"),
    ({"model": ""}, "model is missing"),
    ({"model": "var-d61"}, "did you mean 'var-d16'"),
    ({"model": "var-d16", "data": {"size": 256}}, "comes without weights"),
])
def test_bad_recipes_are_one_line(base: Path, pictures: Path, tmp_path: Path, changes: dict[str, Any],
                                  message: str) -> None:
    with pytest.raises((InputError, WeightsError), match=message) as caught:
        train_finetune(recipe(base, pictures, **changes), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_command_line_fine_tunes_lists_targets_and_merges(base: Path, pictures: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["train", "finetune", "--model", str(base), "--data", str(pictures), "--out", str(out), "--lora-rank",
                 "2", *(part for change in ("train.steps=2", "train.sample_every=0", "data.held_out=0",
                                            "train.device=cpu") for part in ("--set", change))]
    assert run(arguments) == 0
    assert json.loads((out / "adapters" / "adapters.json").read_text())["lora"]["rank"] == 2
    assert run(["generate", "--model", str(out / "model"), "--label", "class0", "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    assert run(["train", "targets", "--model", str(base)]) == 0
    assert "* generator.blocks.*.attention.qkv" in capsys.readouterr().out
    assert run(["train", "merge", "--model", str(out / "model"), "--adapters", str(out / "adapters"), "--out",
                str(tmp_path / "no")]) == 2
    assert "trained on another model" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_settings_know_the_optimisers() -> None:
    assert TrainConfig(optimiser="adafactor").optimiser == "adafactor"
    system = tiny_var()
    choose_trained(system, adapters=False, frozen=("labels",))
    assert not any(p.requires_grad for p in system.labels.parameters())
