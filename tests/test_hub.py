"""Weights in and out: what is read back, what is refused, and that nothing foreign ever runs."""
from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_var

import nextscale
from nextscale import hub
from nextscale.errors import NextscaleError, WeightsError
from nextscale.systems import folders

FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDINGS = st.sampled_from([".safetensors", ".pth", ".pt", ".bin", ".ckpt", ""])


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
                           max_leaves=8)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never ask the hub for anything."""
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_checkpoint_never_runs(ending: str, writer: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / f"weights{ending}"
    content = {"head.weight": torch.zeros(2), "extra": Payload(mark)}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(WeightsError, match="can't be read as weights"):
        hub.read_tensors(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(content))
    assert mark.exists()  # the payload was live


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_truncated_files_are_refused_at_any_length(ending: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40.0), "b": torch.ones(3, 5)}
    whole = tmp_path / f"whole{ending}"
    hub.save_tensors(tensors, whole) if ending == ".safetensors" else torch.save(tensors, whole)
    content, path = whole.read_bytes(), tmp_path / f"cut{ending}"
    assert set(hub.read_tensors(whole)) == {"a", "b"}
    for length in range(0, len(content) - 1, max(1, len(content) // 25)):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError) as caught:
            hub.read_tensors(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    for ending in (".safetensors", ".pth", ".bin"):
        path = tmp_path / f"picture{ending}"
        Image.new("RGB", (8, 8)).save(path, "PNG")
        with pytest.raises(WeightsError):
            hub.read_tensors(path)
    for value in (torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, 5, {}):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match="state dict"):
            hub.read_tensors(tmp_path / "other.pth")


def test_nested_training_checkpoints_give_their_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "trainer": {"var_wo_ddp": {"head.bias": torch.ones(4)}, "lr": 0.1}}, tmp_path / "ar.pth")
    assert torch.equal(hub.read_tensors(tmp_path / "ar.pth")["head.bias"], torch.ones(4))


# Shards


def sharded(folder: Path, ending: str, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    """Tensors shared out over files, with the index that transformers writes; returns the index."""
    folder.mkdir()
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    files = {name: f"{stem}-{1 + i % shards:05d}-of-{shards:05d}{ending}" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        hub.save_tensors(part, folder / file) if ending == ".safetensors" else torch.save(part, folder / file)
    index = folder / f"{stem}{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


TENSORS = {name: torch.arange(float(n + 2)) for n, name in enumerate("abcde")}


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_folder_of_shards_is_read_whole_or_not_at_all(ending: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", ending, TENSORS)
    for where in (tmp_path / "w", index):
        found = hub.read_tensors(where)
        assert found.keys() == TENSORS.keys() and all(torch.equal(found[n], t) for n, t in TENSORS.items())
    second = sorted(index.parent.glob(f"*{ending}"))[1]
    content = second.read_bytes()
    second.write_bytes(content[:len(content) // 2])
    with pytest.raises(WeightsError, match=f"{second.name} can't be read as weights"):
        hub.read_tensors(index.parent)
    second.unlink()
    with pytest.raises(WeightsError, match=f"names {second.name}, which is not beside it; copy all shards"):
        hub.find_weights(index.parent)


def test_code_in_a_shard_never_runs(tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", ".bin", TENSORS)
    torch.save({"a": torch.zeros(2), "extra": Payload(tmp_path / "it ran")}, sorted(index.parent.glob("*.bin"))[0])
    with pytest.raises(WeightsError, match="can't be read as weights"):
        hub.read_tensors(index)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/secret.bin", "sub/secret.bin", "..\\s.bin", "..", "x.py", ""])
def test_an_index_names_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "secret.bin")
    index = sharded(tmp_path / "w", ".bin", TENSORS)
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match="shards are files beside it"):
        hub.read_tensors(tmp_path / "w")


@FUZZ
@given(value=st.one_of(json_values, st.dictionaries(st.just("weight_map"), json_values)))
def test_any_index_gives_tensors_or_a_weights_error(value: Any, tmp_path: Path) -> None:
    (tmp_path / "model.bin.index.json").write_text(json.dumps(value))
    with pytest.raises(WeightsError) as caught:
        hub.read_tensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_of_two_models_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path / "w", ".safetensors", TENSORS)
    first, second, _ = sorted(index.parent.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(WeightsError, match="which another shard of"):
        hub.read_tensors(index)
    hub.save_tensors({"z": torch.zeros(1)}, second)
    with pytest.raises(WeightsError, match="names b, e, which none of its shards holds"):
        hub.read_tensors(index)
    (tmp_path / "w" / "other.index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"2 index\.json"):
        hub.read_tensors(tmp_path / "w")


def test_folders_of_the_hub_are_fetched_with_all_their_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    index, asked = sharded(tmp_path / "folder", ".bin", TENSORS), []

    def give(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError("404")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    assert hub.find_weights("owner/name/folder@v1") == index
    assert asked[0] == ("owner/name", "folder/model.safetensors.index.json", "v1") and len(asked) == 5
    with pytest.raises(WeightsError, match="the hub did not give it"):
        hub.find_weights("owner/name/other")
    monkeypatch.undo()


def test_averaged_weights_of_a_training_are_preferred(tmp_path: Path) -> None:
    for averaged in ("model_ema", "gpt_ema_fsdp"):
        trainer = {"gpt_fsdp": {"head.bias": torch.zeros(4)}, averaged: {"head.bias": torch.ones(4)}}
        torch.save({"trainer": trainer, "epoch": 3}, tmp_path / "ar.pth")
        assert torch.equal(hub.read_tensors(tmp_path / "ar.pth")["head.bias"], torch.ones(4))


@FUZZ
@given(content=st.binary(max_size=300), ending=ENDINGS)
def test_any_bytes_are_tensors_or_a_weights_error(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"fuzz{ending}"
    path.write_bytes(content)
    try:
        assert isinstance(hub.read_tensors(path), dict)
    except NextscaleError as error:
        assert "\n" not in str(error)


@FUZZ
@given(data=st.data(), ending=st.sampled_from([".safetensors", ".pth"]))
def test_damaged_bytes_are_tensors_or_a_weights_error(data: st.DataObject, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"good{ending}"
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    hub.save_tensors(tensors, path) if ending == ".safetensors" else torch.save(tensors, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / f"damaged{ending}"
    damaged.write_bytes(bytes(content))
    try:
        hub.read_tensors(damaged)
    except NextscaleError as error:
        assert "\n" not in str(error)


@FUZZ
@given(content=st.one_of(st.binary(max_size=60), json_values.map(lambda v: json.dumps(v).encode())))
def test_any_bytes_are_a_configuration_or_a_weights_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(hub.read_json(path), dict)
    except NextscaleError as error:
        assert "config.json" in str(error)


@FUZZ
@given(st.text(max_size=40))
def test_any_name_of_weights_is_a_file_or_a_weights_error(where: str) -> None:
    try:
        assert hub.find_weights(where).is_file()
    except NextscaleError as error:
        assert str(error)


@pytest.mark.parametrize("where", ["", ".", "nowhere.pth", "owner/name", "owner/name/../../etc/x.pth", "a\0b.pth",
                                   "owner/name/file.exe", "r" * 300, "~nobody-here/x.pth",
                                   "two\nlines.pth", "owner/name/file.pth@" + "r" * 4000])
def test_names_that_mean_nothing_are_refused(where: str) -> None:
    with pytest.raises(WeightsError) as caught:
        hub.find_weights(where)
    assert "\n" not in str(caught.value)


def test_hub_names_are_split_into_repository_file_and_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str | None]] = []

    def give(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", give)
    hub.find_weights("FoundationVision/var/var_d16.pth")
    hub.find_weights("owner/name/folder/file.safetensors@main")
    assert asked == [("FoundationVision/var", "var_d16.pth", None), ("owner/name", "folder/file.safetensors", "main")]
    monkeypatch.undo()


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 3).to(torch.bfloat16),
               "t": torch.ones(2, 3).T}
    hub.save_tensors(tensors, tmp_path / "new" / "w.safetensors", {"part": "test"})
    found = hub.read_tensors(tmp_path / "new" / "w.safetensors")
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    hub.save_json({"name": "ä", "sides": [1, 2]}, tmp_path / "c.json")
    assert hub.read_json(tmp_path / "c.json") == {"name": "ä", "sides": [1, 2]}


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(moment: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    weights, config = tmp_path / "w.safetensors", tmp_path / "c.json"
    hub.save_tensors({"a": torch.ones(3)}, weights)
    hub.save_json({"old": True}, config)

    def full(*args: Any, **kwargs: Any) -> None:
        if moment == "write":  # save_file(tensors, path) and path.write_text(text)
            Path(args[0] if isinstance(args[0], Path) else args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WeightsError, match=r"can't be written.*No space left"):
        hub.save_tensors({"a": torch.zeros(3)}, weights)
    with pytest.raises(WeightsError, match="can't be written"):
        hub.save_json({"old": False}, config)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "w.safetensors"]
    assert torch.equal(hub.read_tensors(weights)["a"], torch.ones(3)) and hub.read_json(config) == {"old": True}


def test_a_folder_that_cannot_be_made_is_a_weights_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError):
        hub.save_tensors({"a": torch.zeros(1)}, tmp_path / "file" / "w.safetensors")
    with pytest.raises(WeightsError):
        hub.save_json({}, tmp_path / "file" / "c.json")


def test_a_saved_model_draws_the_same_pictures(tmp_path: Path) -> None:
    system = tiny_var(grids=((1, 1), (2, 3), (4, 4)), shared_modulation=True, classes=(4, 2))
    folders.save(system, tmp_path / "model", torch.float32)
    again = nextscale.load(str(tmp_path / "model"), device="cpu")
    assert again.config == system.config and not again.training
    for n, p in system.state_dict().items():
        assert torch.equal(p, again.state_dict()[n]), n
    a, b = (s.generate([(1, 0), (3, 1)], seed=1, output="torch") for s in (system, again))
    assert all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))


def test_a_model_saved_in_bf16_loads_in_float32_and_half_the_size(tmp_path: Path) -> None:
    system = tiny_var()
    folders.save(system, tmp_path / "half")
    folders.save(system, tmp_path / "full", torch.float32)
    sizes = [(tmp_path / f / "generator.safetensors").stat().st_size for f in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    again = folders.load(tmp_path / "half")
    assert again.head.weight.dtype == torch.float32
    torch.testing.assert_close(again.head.weight, system.head.weight, rtol=0.01, atol=0.01)


def test_broken_model_folders_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folders.save(tiny_var(), folder)
    good = {p.name: p.read_bytes() for p in folder.iterdir()}
    cut = {name: content[:len(content) // 2] for name, content in good.items()}
    for name in good:
        (folder / name).write_bytes(cut[name])
        with pytest.raises(NextscaleError, match=name.replace(".", r"\.")):
            nextscale.load(str(folder), device="cpu")
        (folder / name).unlink()
        with pytest.raises(NextscaleError, match=name.replace(".", r"\.")):
            nextscale.load(str(folder), device="cpu")
        (folder / name).write_bytes(good[name])
    config = json.loads(good["config.json"])
    for change in ({"classes": [9]}, {"classes": "many"}, {"colour": 1}, {"system": "llamagen"},
                   {"tokenizer": {**config["tokenizer"], "vocabulary": 7}}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(NextscaleError):
            nextscale.load(str(folder), device="cpu")


def test_names_are_mapped_by_the_first_whole_match() -> None:
    names = ((r"blocks\.(\d+)\.w", r"layers.\1.weight"), (r"blocks\..*", None), (r"x", "y"))
    tensors = {n: torch.zeros(1) for n in ("blocks.3.w", "blocks.3.w2", "x", "xx")}
    renamed, unknown = hub.rename(tensors, names)
    assert set(renamed) == {"layers.3.weight", "y"} and unknown == ["xx"]


def test_weights_that_are_read_from_files_are_not_drawn_first(tmp_path: Path) -> None:
    folders.save(tiny_var(), tmp_path / "model", torch.float32)
    state = torch.get_rng_state()
    loaded = folders.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny_var().parameters(), strict=True))
    torch.nn.Linear(2, 2)
    assert not torch.equal(torch.get_rng_state(), state)
