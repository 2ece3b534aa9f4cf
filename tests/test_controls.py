"""Control maps: what each kind shows, and that they lie beside the very tokens that they were cut with."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_task import draw_pictures
from tiny import emoji, tiny_var

from nextscale.cli.main import run
from nextscale.data import ShuffledOrder, open_dataset
from nextscale.data.controls import CONTROLS, canny, distance, make_controls, plane_count
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.data.token_shards import TokenJob, job_fingerprint, shard_file
from nextscale.errors import DataError, InputError, WeightsError
from nextscale.training.tokens import tokenize


def square(side: int = 32, low: int = 8, high: int = 24) -> np.ndarray:
    """A dark square on white, with its mask: (1, 4, side, side)."""
    pixels = np.full((1, 4, side, side), 255, np.uint8)
    pixels[:, 3] = 0
    pixels[:, :, low:high, low:high] = [[[[20]], [[40]], [[60]], [[255]]]]
    return pixels


def real(count: int = 4, size: int = 64) -> np.ndarray:
    return ((emoji(count, size) + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("kind", CONTROLS)
def test_every_kind_gives_its_planes_for_every_picture_by_itself(kind: str) -> None:
    pixels = np.concatenate([np.concatenate([real(2), square(64)[:, 3:].repeat(2, 0)], 1), square(64)])
    found = make_controls(pixels, [kind])
    assert found.dtype == np.uint8 and found.shape == (3, plane_count([kind]), 64, 64)
    assert np.array_equal(found[1:2], make_controls(pixels[1:2], [kind]))
    assert len(np.unique(found)) > 1


def test_canny_is_one_pixel_wide_closed_and_where_the_colour_changes() -> None:
    (found,) = canny(square())[0] > 0
    assert found[:7].sum() == found[10:22, 10:22].sum() == 0
    assert (found[12:20, :16].sum(1) == 1).all() and (found[:16, 12:20].sum(0) == 1).all()
    faint = square()
    faint[:, :3, 8:24, 8:24] = 245
    assert canny(faint).sum() == 0


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny depth network of transformers, with random weights, and how its pictures are prepared."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False)
    folder: Path = tmp_path_factory.mktemp("depth")
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    settings = {"image_processor_type": "DPTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
                "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_depth_of_a_network_spans_all_values_and_is_the_same_alone_or_in_a_batch(depth_folder: Path) -> None:
    kind = f"depth:{depth_folder}"
    found = make_controls(real(3, 48), [kind])
    assert found.shape == (3, 1, 48, 48) and found.dtype == np.uint8 and plane_count([kind, "small"]) == 4
    assert (found.min((1, 2, 3)) == 0).all() and (found.max((1, 2, 3)) == 255).all()
    assert np.array_equal(found[1:2], make_controls(real(3, 48)[1:2], [kind]))
    assert not np.array_equal(found[0], found[1])


def test_a_depth_network_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="can't be loaded as a depth network"):
        make_controls(real(1), [f"depth:{tmp_path}"])
    with pytest.raises(InputError, match="control 'depth' is unknown"):
        make_controls(real(1), ["depth"])


def test_canny_keeps_weak_edges_only_where_they_touch_strong_ones() -> None:
    pixels = np.full((1, 3, 16, 64), 100, np.uint8)
    ramp = np.linspace(20, 90, 64).astype(np.uint8)
    pixels[:, :, 8:] += ramp  # a step that grows from too weak over weak to strong
    grown, strong = canny(pixels)[0, 0].any(0), canny(pixels, low=200)[0, 0].any(0)
    assert strong.sum() < grown.sum() and grown[strong].all()
    assert canny(np.minimum(pixels, 145)).sum() == 0, "a step of 45 is weak everywhere"


def test_distance_is_euclidean_and_largest_in_the_middle() -> None:
    pixels = square(32, 8, 25)
    found = distance(pixels)[0, 0]
    assert found[16, 16] == 255 and found[7].max() == 0 and found[8, 16] == round(255 / 9)
    assert found[10, 10] == round(255 * 3 / 9)


def test_controls_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'canny'"):
        make_controls(real(), ["cany"])
    with pytest.raises(InputError, match="alpha masks"):
        make_controls(real(), ["mask"])
    with pytest.raises(InputError, match="there twice"):
        make_controls(real(), ["edges", "edges"])


# Beside cached tokens

def test_cached_maps_are_those_of_the_crop_and_mirroring_that_was_encoded(tmp_path: Path) -> None:
    system, pictures = tiny_var(classes=(3,)), open_dataset(draw_pictures(tmp_path / "pictures"), 16, "all")
    assert tokenize(system.tokenizer, pictures, tmp_path / "cache", flips=True, shard_pictures=8,
                    control=("edges", "small"))
    cache = TokenDataset(tmp_path / "cache")
    places = np.array([3, 29, 9])
    pixels, _ = pictures.read(places)
    for version, shown in ((0, pixels), (1, pixels[..., ::-1])):
        wanted = torch.from_numpy(make_controls(shown, ["small", "edges"]))
        assert torch.equal(cache.read_control(places, ["small", "edges"], version), wanted)
        assert torch.equal(cache.read_control(places, ["edges"], version), wanted[:, 3:])
    loader = TokenLoader(cache, ShuffledOrder(len(cache), 0), 4, control=["edges"])
    batch = loader.batch_at(2)
    rows = np.array([list(cache.rows).index(i) for i in batch["id"].tolist()])
    versions = loader.versions(batch["epoch"].numpy(), batch["id"].numpy())
    assert torch.equal(batch["control"], cache.read_control(rows, ["edges"], versions))
    assert "control" not in TokenLoader(cache, ShuffledOrder(len(cache), 0), 4).batch_at(2)
    with pytest.raises(InputError, match="no maps of 'canny'"):
        TokenLoader(cache, ShuffledOrder(len(cache), 0), 4, control=["canny"])
    path = tmp_path / "cache" / shard_file(0)
    tensors = load_file(path)
    tensors["control"][0, 0, 0, 0, 0] ^= 1
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    save_file(tensors, path, about)
    with pytest.raises(DataError, match="checksum"):
        TokenDataset(tmp_path / "cache")


def test_a_cache_of_before_there_were_maps_keeps_its_fingerprint() -> None:
    job = TokenJob("a", ((1, 1),), 8, (4, 4), "b", "train", 3, "c")
    assert job_fingerprint(job) == "56bda3bf267b40f1"


def test_the_command_line_keeps_maps_beside_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny_var().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    command = ["tokenize", "--data", "pictures", "--tokenizer", "tokenizer", "--split", "all"]
    assert run([*command, "--out", "tokens", "--control", "canny", "--control", "lines"]) == 0
    assert "with maps of canny, lines" in capsys.readouterr().out
    assert run([*command, "--out", "others", "--control", "mask"]) == 2
    assert "no alpha masks" in capsys.readouterr().err
