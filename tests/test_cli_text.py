"""The command line with a model that text steers: every command works, or says in one line why not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_infinity import tiny
from tiny import emoji, fill

import nextscale
from nextscale.cli.evaluate import open_judge
from nextscale.cli.main import run
from nextscale.conditions.text_words import WordConfig
from nextscale.data.images import resize_crop, to_pil
from nextscale.data.pictures_out import read_settings
from nextscale.errors import WeightsError
from nextscale.evaluation import text_judge
from nextscale.evaluation.prompted import Prompts, agreement, things_in, things_of
from nextscale.evaluation.text_judge import TextJudge, TextJudgeConfig, save_text_judge
from nextscale.systems import folders
from nextscale.systems.infinity import Infinity
from nextscale.training.family import measure

WORDS = WordConfig(width=24, depth=1, heads=2, buckets=64, bucket_width=16, max_tokens=8)
NOUNS = ("cat", "house", "arrow", "moon", "apple", "boat")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with words of its own, pictures with captions beside them, and a judge."""
    folder = tmp_path_factory.mktemp("text")
    config = tiny().config
    network = replace(config.generator, text_width=WORDS.width, longest_text=WORDS.max_tokens + 1)
    system = Infinity(replace(config, words=WORDS, generator=network))
    fill(system)
    folders.save(system, folder / "model", torch.float32)
    (folder / "pictures").mkdir()
    for i, picture in enumerate(emoji(24, 16)):
        to_pil(picture).save(folder / "pictures" / f"{i:02d}.png")
        style = ("flat", "noto")[i % 2]
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"{NOUNS[i % 6]} {i // 6}, {style} style")
    judge = TextJudge(TextJudgeConfig(16, 2, (16, 24), (0, 1), 4, 24, 256, 16, hidden=24, dropout=0.0))
    fill(judge)
    judge.log_scale.data.fill_(math.log(20))
    save_text_judge(judge, folder / "judge")
    return folder


@pytest.fixture
def work(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command line is refused with."""
    capsys.readouterr()
    assert run(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_edit_draws_a_prompt_into_a_region_and_varies_a_picture_from_a_scale_on(
        work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = ["edit", "--picture", "pictures/03.png", "--model", "model", "--out"]
    box = ["--box", "0,0,16,4", "--seed", "3"]
    for name, more in (("sun", ["sun"]), ("again", ["sun"]), ("cat", ["cat"]), ("away", ["sun", "--negative", "moon"])):
        assert run([*edit, f"{name}.png", *box, *more]) == 0
    sun, cat, away = pixels("sun.png"), pixels("cat.png"), pixels("away.png")
    assert np.array_equal(sun, pixels("again.png")) and np.array_equal(sun[4:], pixels("pictures/03.png")[4:])
    assert not np.array_equal(sun, cat) and not np.array_equal(sun, away)
    about = read_settings(Path("away.png"))
    assert about["labels"] == ["sun"] and about["negatives"] == ["moon"]
    assert run([*edit, "kept.png", "sun", "--keep-scales", "4"]) == 0
    system: Any = nextscale.load("model")
    original = torch.from_numpy(pixels("pictures/03.png").copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    coded = system.decode(system.encode(original))
    wanted = ((coded[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(pixels("kept.png").astype(float) - wanted).max() <= 1
    assert run([*edit, "varied.png", "sun", "--keep-scales", "2", "--count", "2"]) == 0
    assert not np.array_equal(pixels("varied.png")[2:18, 2:18], pixels("varied.png")[2:18, 20:36])
    for more, message in ((["sun", *box, "--label", "3"], "give prompts instead"),
                          (["sun", *box, "--keep-scales", "2"], "exactly one of"), (["--keep-scales", "9"], "1 to 4"),
                          (["--keep-scales", "2", "--rule", "latent"], "of a region")):
        assert message in told(capsys, *edit, "x.png", *more)
    other = ["edit", "sun", "--picture", "pictures/03.png", *box, "--model", "var-d2-16px", "--out", "x.png"]
    assert "takes no prompts" in told(capsys, *other)


def test_pictures_are_edited_in_the_shape_that_a_ratio_means(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = ["edit", "sun", "--picture", "pictures/03.png", "--model", "model", "--ratio", "2", "--out"]
    box = ["--box", "0,0,16,8"]
    assert run([*edit, "wide.png", *box, "--resize"]) == 0
    fitted = np.asarray(resize_crop(Image.open("pictures/03.png"), (12, 24)))
    wide = pixels("wide.png")
    assert np.array_equal(wide[8:], fitted[8:]) and not np.array_equal(wide[:6], fitted[:6])
    for name, where in (("around.png", ["--outpaint", "0.5"]), ("kept.png", ["--keep-scales", "2"])):
        assert run([*edit, name, *where, "--resize"]) == 0
        assert pixels(name).shape == (12, 24, 3)
    assert "takes 24x12; add --resize" in told(capsys, *edit, "x.png", *box)
    assert "ratio is 'wide'" in told(capsys, *edit, "x.png", *box, "--ratio", "wide")
    assert "takes no prompts" in told(capsys, "edit", *edit[2:], "x.png", *box, "--model", "var-d2-16px")


def test_sizes_in_pixels_are_drawn_but_where_a_prompt_has_a_ratio(work: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    Path("one-wide.jsonl").write_text('{"prompt": "sun", "ratio": 2}\n{"prompt": "moon"}\n')
    draw = ["generate", "--model", "model", "--prompts", "one-wide.jsonl", "--out"]
    assert run([*draw, "sized", "--size", "20x12"]) == 0
    assert [pixels(f"sized/{name}").shape[:2] for name in ("00000-sun.png", "00001-moon.png")] == [(12, 24), (20, 12)]
    for more, message in ((["20"], "give height x width"), (["20x13"], "multiples of 4"),
                          (["20x12", "--ratio", "2"], "give one")):
        assert message in told(capsys, *draw, "x", "--size", *more)
    assert "draws 16x16 pixels only" in told(capsys, "generate", "--model", "var-d2-16px", "--size", "20x12")


def test_calibrations_and_limits_look_at_prompts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "model", "--count", "2", "--out"]
    assert run(["calibrate", "hack", "sun", "red apple", *common, "heads.json"]) == 0
    assert json.loads(Path("heads.json").read_text())["pictures"] == 4
    assert run(["generate", "sun", "--model", "model", "--hook", "hack heads=heads.json", "--out", "hooked.png"]) == 0
    Path("two.txt").write_text("sun\nmoon\n")
    assert run(["calibrate", "litevar", "--prompts", "two.txt", *common, "windows.json"]) == 0
    Path("wide.jsonl").write_text('{"prompt": "sun", "ratio": 2}\n')
    assert "take the ratios out" in told(capsys, "calibrate", "hack", "--prompts", "wide.jsonl", *common, "x.json")
    assert "what to draw is missing" in told(capsys, "calibrate", "hack", *common, "x.json")
    assert "give prompts instead" in told(capsys, "calibrate", "hack", "--label", "3", *common, "x.json")
    limits = ["limits", "--model", "model", "--data", "pictures", "--split", "all", "--count", "3", "--json"]
    assert run([*limits, "limits.json"]) == 0
    assert len(json.loads(Path("limits.json").read_text())["heads"]) == 3 * 3 * 4


def test_a_benchmarks_pictures_lie_where_its_evaluator_looks(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("metadata.jsonl").write_text('{"prompt": "sun", "tag": "one"}\n{"prompt": "moon", "tag": "one"}\n')
    draw = ["generate", "--benchmark", "geneval", "--prompts", "metadata.jsonl", "--model", "model", "--count", "2"]
    assert run([*draw, "--out", "geneval"]) == 0
    files = sorted(str(file.relative_to("geneval")) for file in Path("geneval").rglob("*.*"))
    assert files == [f"0000{n}/{name}" for n in range(2) for name in
                     ("metadata.jsonl", "samples/00000.png", "samples/00001.png")]
    second = pixels("geneval/00001/samples/00001.png")
    # What was there stays, and what is drawn again is the same.
    Path("geneval/00001/samples/00001.png").unlink()
    capsys.readouterr()
    assert run([*draw, "--out", "geneval"]) == 0
    assert "pictures of 1 prompts, 1 were there" in capsys.readouterr().out
    assert np.array_equal(pixels("geneval/00001/samples/00001.png"), second)
    assert run(["generate", "moon", "--model", "model", "--seeds", "3", "--out", "alone.png"]) == 0
    assert np.array_equal(pixels("alone.png")[2:18, 2:18], second)
    for more, message in ((["--out", "x.png"], "go into a folder"), (["sun", "--out", "x"], "leave other prompts"),
                          (["--benchmark", "hpsv2", "--out", "x"], "count is 2; it must be 1"),
                          (["--benchmark", "dpg", "--count", "4", "--out", "x"], "holds no .txt files")):
        assert message in told(capsys, *draw, *more)
    assert "its prompts are missing" in told(capsys, "generate", "--benchmark", "dpg", "--model", "model", "--out", "x")


def test_models_tell_what_reads_their_prompts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "model"]) == 0
    said = capsys.readouterr().out
    assert "an encoder of its own, 8 tokens" in said and "label" not in said
    assert run(["reconstruct", "pictures/03.png", "--model", "model", "--out", "scales.png"]) == 0
    assert run(["bench", "--model", "model", "--count"]) == 0
    assert "VAR's published loop" in told(capsys, "bench", "--model", "model", "--compare", "baseline")
    pair = ["train", "pair", "--drafter", "model", "--refiner", "model", "--draft-steps", "2", "--out", "pair"]
    assert "two plain VARs" in told(capsys, *pair)


TRAIN = ["--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.sample_every=2", "--set",
         "train.precision=fp32", "--set", "base_precision=fp32"]


def test_fine_tuning_learns_from_captions_and_its_adapters_merge(work: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["train", "finetune", "--model", "model", "--out"]
    tokenize = ["tokenize", "--data", "pictures", "--tokenizer", "model", "--captions", "--latents"]
    assert run([*tokenize, "--out", "tokens"]) == 0
    assert run([*tune, "tuned", "--set", "tokens=tokens", "--set", "data.held_out_split=validation", *TRAIN]) == 0
    before, after = (nextscale.load(where).state_dict() for where in ("model", "tuned/model"))
    # Models of a training are written in bf16.
    changed = {name for name, values in before.items() if not name.startswith("tokenizer.")
               and not torch.equal(values.bfloat16().float(), after[name].bfloat16().float())}
    assert {"attention.qkv", "text.kv", "mlp.expand"} <= {".".join(name.split(".")[-3:-1]) for name in changed}
    assert all(name.startswith("generator.blocks.") for name in changed)
    assert run(["train", "merge", "--model", "model", "--adapters", "tuned/adapters", "--dtype", "fp32", "--out",
                "merged"]) == 0
    merged = nextscale.load("merged").state_dict()
    assert all(torch.allclose(values, after[name], atol=0.02) for name, values in merged.items())
    assert run([*tune, "whole", "--recipe", "finetune-full", "--data", "pictures", *TRAIN]) == 0
    whole = nextscale.load("whole/model").state_dict()
    assert not torch.equal(whole["encoder.pieces.weight"], before["encoder.pieces.weight"])
    assert all(torch.equal(values, whole[name]) for name, values in before.items() if name.startswith("tokenizer."))
    assert run(["generate", "sun", "--model", "whole/model", "--out", "tuned.png"]) == 0
    Path("bare").mkdir(exist_ok=True)
    for file in sorted(Path("pictures").glob("*.png"))[:8]:
        (Path("bare") / file.name).write_bytes(file.read_bytes())
    for more, message in ((["--data", "bare", *TRAIN], "have no caption"),
                          (["--data", "pictures", "--set", "classes.keep=false", *TRAIN], "text steers model"),
                          (["--data", "pictures", "--set", 'train_also=["labels"]', *TRAIN], "'labels' names nothing")):
        assert message in told(capsys, *tune, "x", *more)


def evaluate(out: str, *more: str) -> list[str]:
    return ["evaluate", "--model", "model", "--data", "pictures", "--split", "all", "--training", "0", "--count", "30",
            "--likelihood", "4", "--reconstruction", "4", "--out", out, *more]


def test_a_text_models_pictures_are_measured_against_their_prompts(work: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert run(evaluate("report", "--text-judge", "judge")) == 0
    assert "asked prompt among the best 5 of 24 by judge" in capsys.readouterr().out
    found = json.loads(Path("report/figures.json").read_text())
    assert found["prompts"] == {"source": "captions of pictures [all]", "different": 24}
    assert found["likelihood"]["reference"]["condition"] == "the picture's caption"
    of = found["features"]["emoji-judge"]
    assert {"frechet_distance", "overlap"} <= set(of["samples"]) and "agreement" not in of["samples"]
    assert "reference_agreement" not in of
    text = found["text"]
    assert text["samples"]["phrases"]["pictures"] == 30 and text["samples"]["phrases"]["phrases"] == 24
    assert text["reference"]["phrases"]["pictures"] == 24 and text["reference"]["styles"]["candidates"] == 5
    assert text["samples"]["diversity"]["labels"] == 6 == found["diversity"]["pixels"]["samples"]["labels"]
    page = Path("report/report.html").read_text()
    assert "Pictures and prompts, by judge" in page and "asked style the best of five" in page
    # Each picture is of its own prompt, as generate draws it.
    system: Any = nextscale.load("model")
    kept = load_file(next(Path("report/blocks").glob("samples-*/0*.safetensors")))
    asked = Prompts.of_dataset(nextscale.data.open_dataset("pictures", 16, "all"))
    phrases = [asked.different[row][0] for row in kept["labels"][:, 0].tolist()]
    assert sorted(phrases[:24]) == sorted(asked.texts)
    drawn = system.generate(phrases[:2], seed=0, purpose="fid", output="torch").images
    assert torch.equal(((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), kept["pictures"][:2])


def test_prompts_of_a_file_are_drawn_in_turn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "sun"}\n{"prompt": "moon", "negative": "sun"}\n{"prompt": "sun"}\n')
    few = ["--features", "emoji-judge", "--likelihood", "0", "--reconstruction", "0", "--count", "12"]
    assert run(evaluate("file", "--prompts", "prompts.jsonl", "--text-judge", "judge", *few)) == 0
    found = json.loads(Path("file/figures.json").read_text())
    assert found["prompts"]["different"] == 2 and found["wanted"]["labels"] == "even"
    # Fewer than 100 prompts: the data's captions stand beside them.
    assert found["text"]["samples"]["phrases"]["candidates"] == 26 and "styles" not in found["text"]["samples"]
    Path("wide.jsonl").write_text('{"prompt": "sun", "ratio": 2}\n')
    Path("bare").mkdir(exist_ok=True)
    for i in range(2):
        (Path("bare") / f"{i}.png").write_bytes(Path(f"pictures/0{i}.png").read_bytes())
    for more, message in ((["--prompts", "wide.jsonl"], "take the ratios out"), (["--prompts", "no.txt"], "no.txt"),
                          (["--text-judge", "emoji-text-juge"], "did you mean"),
                          (["--data", "bare"], "have no caption")):
        assert message in told(capsys, *evaluate("x", *few, *more))


def test_wrong_answers_are_of_the_whole_set_in_the_asked_style() -> None:
    """The figures of real pictures that the docs state are measured in the same way, see experiments/text_judge.py."""
    dataset = nextscale.data.open_dataset("emoji", 64, "style-test")
    things = things_in(dataset)
    assert len(things) == 1906 and things == things_of(f"{thing}, 3d style" for thing in things)  # type: ignore[arg-type]

    class Listens:
        name, fingerprint = "listens", ""

        def pictures(self, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
            raise NotImplementedError

        def phrases(self, phrases: Any, batch: int = 64) -> torch.Tensor:
            self.heard = list(phrases)
            return torch.eye(len(self.heard), 300)

    judge = Listens()
    agreement(judge, torch.zeros(2, 300), ["red apple, flat style", "red apple"], things)
    assert len(judge.heard) == 1 + 4  # of the style, at last
    found = agreement(judge, torch.zeros(2, 300), ["red apple, flat style"] * 2, things)
    assert found["phrases"]["candidates"] == 100 and found["phrases"]["median_rank"] == 100
    assert "note" in agreement(judge, torch.zeros(1, 300), ["sun"], [])


def test_scaling_laws_of_a_text_model_are_measured_with_its_captions() -> None:
    system, captions = tiny(), [f"{noun} on a hill" for noun in NOUNS]
    tokens = torch.cat(system.encode(emoji(6, 16)), 1)
    found = measure(system, tokens, captions, batch=4)
    log_prob = system.log_prob(system.training_tokens(tokens), captions).picture
    assert found["loss"] == pytest.approx(-float(log_prob.mean()) / system.plan.length, rel=1e-3)


def test_without_a_judge_its_figure_is_left_out_in_one_line(monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    def missing(where: str) -> None:
        raise WeightsError(f"no text judge at {where}; give a folder")

    monkeypatch.setattr(text_judge, "load_text_judge", missing)
    assert open_judge(None, tell=True) is None
    said = capsys.readouterr().err
    assert "is left out: no text judge" in said and "--text-judge" in said and said.count("\n") == 1
    with pytest.raises(WeightsError):
        open_judge("emoji-text-judge", tell=True)
