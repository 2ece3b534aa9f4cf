"""`nextscale evaluate`: the same figures whatever the batch, the shards or the kills, and a page that holds them."""
from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_task import draw_pictures
from tiny import AUTOENCODER, GRIDS, fill, tiny_var

from nextscale.cli.main import run
from nextscale.control.car import TowerConfig
from nextscale.data import open_dataset
from nextscale.data.controls import make_controls
from nextscale.errors import InputError
from nextscale.evaluation import sets
from nextscale.evaluation.blocks import Blocks, Shard
from nextscale.evaluation.sets import match_labels
from nextscale.generators.var import VARGeneratorConfig
from nextscale.sampling.diversevar import DiverseVAR
from nextscale.sampling.generation import Settings
from nextscale.systems import folders
from nextscale.systems.car import CAR, CARConfig
from nextscale.systems.system import System
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.features import ClassifierConfig, PictureClassifier, save_classifier
from nextscale.training.tokenizer_recipe import save_tokenizer

CLASSES = ("class0", "class1", "class2")
DRAWN = 70  # two blocks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a model of them, its tokenizer, and a judge that knows the same classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluation")
    draw_pictures(folder / "pictures", each=40)
    system = tiny_var(classes=(3,))
    system.config = dataclasses.replace(system.config, class_names=(CLASSES,),
                                        settings={"pictures": Settings(), "fid": Settings(guidance_scale=1.5)})
    folders.save(system, folder / "model")
    save_tokenizer(system.tokenizer, folder / "tokenizer")
    judge = PictureClassifier(ClassifierConfig(2, (8, 16), (1, 1), (3,), (CLASSES,), dropout=0.0))
    for parameter in judge.parameters():
        parameter.data.uniform_(-0.4, 0.4)
    save_classifier(judge, folder / "judge")
    return folder


def evaluate(place: Path, out: Path, *more: str, model: str = "model") -> int:
    return run(["evaluate", "--model", str(place / model), "--data", str(place / "pictures"), "--split", "train",
                "--train-split", "validation", "--features", str(place / "judge"), "--count", str(DRAWN),
                "--likelihood", "20", "--reconstruction", "30", "--out", str(out), *more])


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    assert evaluate(place, place / "whole", "--npz", str(place / "samples.npz")) == 0
    return figures(place / "whole")


def figures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "figures.json").read_text())
    del found["seconds"], found["wanted"]["batch_size"]
    return found


def test_every_figure_is_there_and_named(place: Path, whole: dict[str, Any]) -> None:
    of = whole["features"]["judge"]
    for role in ("samples", "real_training_pictures", "reconstruction"):
        few = of[role]["pictures"] < 10
        assert "too few" in of[role]["note"] if few else "(judge" in of[role]["frechet_distance"]["name"]
    samples = of["samples"]
    assert samples["pictures"] == DRAWN and samples["frechet_distance"]["bias"] > 0
    assert samples["frechet_distance"]["at_infinity"] < samples["frechet_distance"]["value"]
    assert {"precision", "recall", "density", "coverage"} <= set(samples["overlap"])
    assert 1 <= samples["classifier_score"]["mean"] <= 3 and samples["agreement"]["matched_by"] == "name"
    likelihood = whole["likelihood"]["reference"]
    steps = likelihood["nats_a_token_by_step"]
    rows = np.array([1, 4, 9, 16])
    assert likelihood["nats_a_token"] == pytest.approx(float((np.array(steps) * rows).sum() / rows.sum()))
    assert likelihood["bits_a_dimension"] == pytest.approx(sum(likelihood["bits_a_dimension_by_step"]))
    assert "the picture's label (matched by name)" == likelihood["condition"]
    tokenizer = whole["tokenizer"]
    assert tokenizer["bits_a_picture"] == 30 * 5 and len(tokenizer["usage"]) == 5
    assert whole["copies"]["judge"]["median_ratio"] > 0
    for way in ("pixels", "judge"):
        found = whole["diversity"][way]
        assert set(found) == {"samples", "reference", "training"} and found["samples"]["labels"] == 3
        assert found["samples"]["mean"] > 0
    assert "FID" not in json.dumps(whole)


def test_likelihood_is_the_systems(place: Path, whole: dict[str, Any]) -> None:
    system = folders.load(place / "model")
    dataset = open_dataset(place / "pictures", 16, "train")
    chosen = np.linspace(0, len(dataset) - 1, 20).round().astype(int)
    pictures = torch.stack([dataset[int(i)].picture for i in chosen]).float() / 127.5 - 1
    log_prob = system.log_prob(pictures, [tuple(dataset[int(i)].labels) for i in chosen]).picture
    assert whole["likelihood"]["reference"]["nats_a_token"] == pytest.approx(-float(log_prob.mean()) / 30, rel=1e-4)


def test_page_stands_alone(place: Path, whole: dict[str, Any]) -> None:
    page = (place / "whole" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert page.count("data:image/png;base64,") == 5, "curves, samples, reconstructions, two sheets of neighbours"
    assert "none of these figures is an FID" in page and "Nearest training pictures by pixels" in page


def test_shards_and_batches_and_kills_change_nothing(place: Path, whole: dict[str, Any],
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "shards"
    assert evaluate(place, out, "--shard", "1/2", "--batch-size", "7") == 0
    assert "blocks are missing" in capsys.readouterr().out and not (out / "figures.json").exists()
    files = sorted(out.glob("blocks/samples-*/*-*.safetensors"))
    assert [f.name for f in files] == ["00000064-00000070.safetensors"]
    files[0].write_bytes(files[0].read_bytes()[:-100])  # killed by something that doesn't rename
    assert evaluate(place, out, "--shard", "0/2") == 0
    assert evaluate(place, out) == 0
    first, second = ([load_file(f)["pictures"] for f in sorted((place / name).glob("blocks/samples-*/0*"))]
                     for name in ("whole", "shards"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert _close(figures(out), whole)


def _close(a: Any, b: Any) -> bool:
    """Equal, numbers within rounding: another batch size adds up in another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=1e-3, abs=1e-5) if isinstance(a, float) else a == b


def test_more_pictures_go_on_with_those_that_are_there(place: Path, whole: dict[str, Any]) -> None:
    folder = next((place / "whole" / "blocks").glob("samples-*"))
    before = (folder / "00000000-00000064.safetensors").stat().st_mtime_ns
    assert evaluate(place, place / "whole", "--count", "80") == 0
    assert (folder / "00000000-00000064.safetensors").stat().st_mtime_ns == before
    assert {f.name for f in folder.glob("0*")} == {"00000000-00000064.safetensors", "00000064-00000070.safetensors",
                                                   "00000064-00000080.safetensors"}
    a, b = (load_file(folder / f"00000064-000000{n}.safetensors")["pictures"] for n in (70, 80))
    assert torch.equal(a, b[:6])


def test_compiled_and_captured_drawing_goes_on_with_what_was_drawn_without(
        place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(System, "compile_networks", lambda self: compiled.append("networks"))
    monkeypatch.setattr("nextscale.cli.options.check_graphs", lambda system: compiled.append("graphs"))
    folder = next((place / "whole" / "blocks").glob("samples-*"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*")}
    assert evaluate(place, place / "whole", "--compile", "--graphs") == 0 and compiled == ["networks", "graphs"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("0*")} == before
    assert "hooks" not in figures(place / "whole")["sampling"]


def test_samples_leave_as_the_published_evaluator_reads_them(place: Path, whole: dict[str, Any]) -> None:
    with np.load(place / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (DRAWN, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8


def test_saved_statistics_stand_for_the_data(place: Path, whole: dict[str, Any]) -> None:
    saved = place / "whole" / "statistics" / "judge.safetensors"
    assert run(["evaluate", "--model", str(place / "model"), "--statistics", str(saved), "--features",
                str(place / "judge"), "--count", "20", "--out", str(place / "by-statistics")]) == 0
    found = figures(place / "by-statistics")
    assert found["features"]["judge"]["samples"]["kernel_distance"] and "likelihood" not in found
    assert found["wanted"]["labels"] == "even"


def test_a_hook_acts_on_the_samples_and_on_their_distance(place: Path, whole: dict[str, Any],
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--hook", "diversevar suppression=2.0 amplification=0.0 at_steps=[1,2]", "--likelihood", "0")
    assert evaluate(place, place / "whole", *more) == 0
    assert "distance of samples of one label by pixels" in capsys.readouterr().out
    found = figures(place / "whole")
    assert found["sampling"]["hooks"] == [repr(DiverseVAR(2.0, 0.0, at_steps=(1, 2)))]
    assert found["diversity"]["judge"]["samples"]["mean"] != whole["diversity"]["judge"]["samples"]["mean"]
    assert found["diversity"]["judge"]["reference"] == whole["diversity"]["judge"]["reference"]
    assert "Distance between pictures of one label" in (place / "whole" / "report.html").read_text()
    assert evaluate(place, place / "of-tokenizer", "--hook", "softcfg", model="tokenizer") == 2
    assert "it draws nothing; leave it out" in capsys.readouterr().err


def test_a_controlled_model_is_measured_by_the_maps_of_held_out_pictures(
        place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    system = CAR(CARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), VARGeneratorConfig(2, 48, 3), (3,), (CLASSES,),
                           control=TowerConfig(("edges",), (8, 16, 32)))).eval()
    fill(system)
    folders.save(system, place / "car")
    system = folders.load(place / "car")
    few = ("--count", "6", "--likelihood", "4", "--reconstruction", "0", "--training", "0")
    assert evaluate(place, place / "plain", *few, model="car") == 0
    assert "car is measured without a map" in (said := capsys.readouterr().err) and "--control edges" in said
    assert evaluate(place, place / "steered", *few, "--control", "edges", model="car") == 0
    assert "without a map" not in capsys.readouterr().err
    found, plain = figures(place / "steered"), figures(place / "plain")
    assert "and its edges map" in found["likelihood"]["reference"]["condition"]
    dataset = open_dataset(place / "pictures", 16, "train")
    places = sets.places_to_draw(6, dataset, 0)
    control = torch.from_numpy(make_controls(dataset.read(places.numpy())[0], ["edges"]))
    drawn = load_file(next((place / "steered").glob("blocks/samples-*/0*")))
    assert torch.equal(drawn["labels"], dataset.labels[places])
    wanted = system.generate([tuple(row) for row in drawn["labels"].tolist()], seeds=list(range(6)), purpose="fid",
                             control=control, output="torch", progress=False)
    assert torch.equal(drawn["pictures"], sets.to_bytes(wanted.images))
    scored = sets.of_dataset(dataset, 4)
    spread = sets.places_of(dataset, 4)
    maps = torch.from_numpy(make_controls(dataset.read(spread)[0], ["edges"]))
    log_prob = system.log_prob(scored.read(range(4)), [tuple(row) for row in dataset.labels[spread].tolist()],
                               control=maps).picture
    assert found["likelihood"]["reference"]["nats_a_token"] == pytest.approx(-float(log_prob.mean()) / 30, rel=1e-4)
    assert found["likelihood"]["reference"]["nats_a_token"] != plain["likelihood"]["reference"]["nats_a_token"]
    for model, more, message in (("car", ("--control", "canny"), "car takes edges"),
                                 ("model", ("--control", "edges"), "model takes none"),
                                 ("car", ("--control", "edges", "--labels", "even"), "labels are 'even'")):
        assert evaluate(place, place / "refused", *more, model=model) == 2
        assert message in capsys.readouterr().err


def test_tokenizer_alone(place: Path) -> None:
    assert evaluate(place, place / "of-tokenizer", model="tokenizer") == 0
    found = figures(place / "of-tokenizer")
    assert "samples" not in found["features"]["judge"] and "likelihood" not in found
    assert found["features"]["judge"]["reconstruction"]["frechet_distance"]["value"] > 0
    assert len(found["tokenizer"]["psnr_after_scale"]) == 4


def test_identity_tokenizer_is_perfect(place: Path, tmp_path: Path) -> None:
    from nextscale.evaluation.reconstruction import reconstruction_blocks

    class Identity:
        """Codes are the grey levels themselves."""

        def encode(self, pictures: torch.Tensor) -> list[torch.Tensor]:
            return [sets.to_bytes(pictures).flatten(1).long()]

        def decode(self, tokens: Any) -> torch.Tensor:
            return tokens[0].float().view(-1, 3, 16, 16) / 127.5 - 1

    subject = sets.Subject("identity", "x", Identity(), (16, 16), 256, 8.0 * 768)
    pictures = sets.of_dataset(open_dataset(place / "pictures", 16, "train"), 12)
    blocks, make = reconstruction_blocks(tmp_path, subject, pictures, 5)
    blocks.compute(Shard(), make)
    found = blocks.gather()
    assert float(found["ssim"].min()) == pytest.approx(1) and float(found["psnr"].min()) > 100


@pytest.mark.parametrize(("more", "message"), [
    (("--shard", "2/2"), "shard 2/2 is not one"), (("--shard", "x"), "not of the form i/n"),
    (("--features", "resnet20:no.safetensors"), "no weights file"), (("--data", "nowhere"), "nowhere"),
    (("--train", "", "--labels", "odd"), "--labels"), (("--purpose", "pictures", "--top-k", "-1"), "top"),
])
def test_bad_input_is_one_line_before_any_work(place: Path, tmp_path: Path, more: tuple[str, ...], message: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(place, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out" / "figures.json").exists()


def test_nothing_to_compare_with_is_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--model", str(place / "model"), "--features", str(place / "judge"),
                "--out", str(tmp_path / "out")]) == 2
    assert "give --data, or --statistics" in capsys.readouterr().err


def test_labels_translate_by_name_by_index_or_not() -> None:
    by_name = match_labels([["dog", "cat"]], [["bird", "cat", "dog"]])
    assert by_name is not None and by_name.rows(torch.tensor([[0], [1]])).tolist() == [[2], [1]]
    assert by_name.how == "name"
    by_index = match_labels([["0", "1", "2"]], [["bird", "cat", "dog"]])
    assert by_index is not None and by_index.how == "index"
    assert match_labels([["0", "1"]], [], (1000,)) is not None
    assert match_labels([["dog", "cow"]], [["bird", "cat", "dog"]]) is None
    assert match_labels([["dog"], ["red"]], [["dog"]]) is None


def test_labels_to_draw(place: Path) -> None:
    subject = sets.Subject("x", "", None, (16, 16), 1, 1.0, None, (3, 2), (CLASSES, ("flat", "round")))  # type: ignore[arg-type]
    even = sets.labels_to_draw("even", 12, subject, None, 0)
    assert sorted(map(tuple, even.tolist())) == sorted([(i, j) for i in range(3) for j in range(2)] * 2)
    assert sets.labels_to_draw("none", 2, subject, None, 0).tolist() == [[3, 2], [3, 2]]
    with pytest.raises(InputError, match="need --data"):
        sets.labels_to_draw("data", 2, subject, None, 0)
    with pytest.raises(InputError, match="are not the model's"):
        sets.labels_to_draw("data", 2, subject, open_dataset(place / "pictures", 16, "train"), 0)


def test_blocks_of_another_request_are_not_read(tmp_path: Path) -> None:
    one, other = (Blocks(tmp_path, "x", {"seed": seed}, 3) for seed in (0, 1))
    one.compute(Shard(), lambda block: {"v": torch.zeros(len(block))})
    assert not one.missing() and other.missing()
