"""The command line as a user meets it: what each command writes, and one clear line where something is wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import nextscale
from nextscale import registry
from nextscale.cli import edit as edit_command
from nextscale.cli import generate as generate_command
from nextscale.cli.main import app, run
from nextscale.data.pictures_out import read_settings
from nextscale.errors import NextscaleError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.systems import folders, var, var_published
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig

CLASSES, STYLES = ("animal-mammal", "plant", "flag", "sport"), ("noto", "twemoji")
STEPS = 4


def tiny_config() -> var.VARConfig:
    tokenizer = TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle"),
                                   grids=((1, 1), (2, 2), (3, 3), (4, 4)), vocabulary=32)
    return var.VARConfig(tokenizer, VARGeneratorConfig.of_depth(2), (4, 2), (CLASSES, STYLES))


def published_tiny(name: str) -> var.VARConfig:
    """Stands in for a published size, small enough to convert in a test."""
    return var_published.published_config(*published_constructors().values())


def published_constructors() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "parity" / "var_tiny.json").read_text())["constructor"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved VAR for 16x16 pictures with two kinds of label."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folders.save(var.VAR(tiny_config()).initialise(0.5), folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a picture of the model's size beside it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shades = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(shades).save(tmp_path / "picture.png")
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], arguments: str | list[str]) -> str:
    """The one line with which a command line is refused."""
    code = run(shlex.split(arguments) if isinstance(arguments, str) else arguments)
    line = capsys.readouterr().err
    assert code == 2, f"exit code {code}: {line}"
    assert line.startswith("nextscale: ") and line.count("\n") == 1 and "Traceback" not in line
    return line


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def close(one: np.ndarray, two: np.ndarray) -> bool:
    """Equal but for the rounding that differs between batch sizes."""
    return one.shape == two.shape and int(np.abs(one.astype(int) - two.astype(int)).max()) <= 2


# What the commands write


def test_help_does_not_import_torch() -> None:
    script = "import sys; from nextscale.cli import main; main.run(['edit', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("False")


def commands() -> list[tuple[str, ...]]:
    found = []
    for name, command in typer.main.get_command(app).commands.items():
        found += [(name, inner) for inner in getattr(command, "commands", {})] or [(name,)]
    return found


@pytest.mark.parametrize("name", commands(), ids=" ".join)
def test_every_help_shows_an_example_that_the_parser_accepts(
    name: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*name, "--help"]) == 0
    lines = [line.strip().removeprefix("Example: ") for line in capsys.readouterr().out.splitlines()]
    examples = [line for line in lines if line.startswith("nextscale ")]
    own = [line for line in examples if line.startswith(f"nextscale {' '.join(name)}")]
    assert own
    for line in examples:
        command, words = typer.main.get_command(app), shlex.split(line)[1:]
        while hasattr(command, "resolve_command"):
            context = command.make_context("nextscale", list(words), resilient_parsing=True)
            _, command, words = command.resolve_command(context, words)
        command.make_context("nextscale", list(words))


def test_sheet_can_be_drawn_again_from_its_own_metadata(model: Path, work: Path) -> None:
    assert run(shlex.split(f"generate --model {model} --label plant/noto --label 2/1 --count 2 --seed 5 --top-p 0.9 "
                           "--temperature 1.1 --guidance-scale 2 --out a/first.png")) == 0
    about = read_settings(work / "a" / "first.png")
    assert about["model"] == "tiny" and about["version"] == nextscale.__version__
    assert about["labels"] == [["plant", "noto"]] * 2 + [["flag", "twemoji"]] * 2 and about["seeds"] == [5, 6, 7, 8]
    labels = " ".join(f"--label {'/'.join(label)}" for label in about["labels"])
    assert run(shlex.split(
        f"generate --model {model} {labels} --seeds {','.join(map(str, about['seeds']))} --columns 2 "
        f"--temperature {about['temperature']} --top-k {about['top_k']} --top-p {about['top_p']} --guidance-scale "
        f"{about['guidance_scale']} --guidance-schedule {about['guidance_schedule']} --out b.png")) == 0
    assert np.array_equal(pixels(work / "a" / "first.png"), pixels(work / "b.png"))
    assert files_in(work) == ["a", "a/first.png", "b.png"]


def test_folder_npz_and_sheet_hold_the_same_pictures_whatever_the_batch(model: Path, work: Path) -> None:
    common = f"generate --model {model} --label sport --count 3 --seed 1"
    assert run(shlex.split(f"{common} --out single")) == 0
    assert run(shlex.split(f"{common} --out all.npz --batch-size 2")) == 0
    assert run(shlex.split(f"{common} --out sheet.png")) == 0
    names = [f"{i:05d}-sport.png" for i in range(3)]
    assert sorted(path.name for path in (work / "single").iterdir()) == [*names, "sheet.png"]
    with np.load("all.npz") as arrays:
        for i, name in enumerate(names):
            assert close(arrays["arr_0"][i], pixels(work / "single" / name))
            assert read_settings(work / "single" / name)["seeds"] == [1 + i]
    assert close(pixels(work / "single" / "sheet.png"), pixels(work / "sheet.png"))


def test_files_of_a_folder_hang_neither_on_the_batch_nor_on_a_memory_limit(model: Path, work: Path) -> None:
    common = f"generate --model {model} --label sport --count 5 --seed 1"
    assert run(shlex.split(f"{common} --batch-size 1 --out a")) == 0
    assert run(shlex.split(f"{common} --batch-size 1 --memory-limit 100GB --out b")) == 0
    assert files_in(work / "a") == files_in(work / "b")
    assert all((work / "a" / name).read_bytes() == (work / "b" / name).read_bytes() for name in files_in(work / "a"))


def test_a_memory_limit_splits_the_batch_and_says_so_in_one_line(
    model: Path, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import nextscale
    from nextscale.sampling.memory_plan import needs

    system = nextscale.load(str(model))
    need = needs(system, system.plan, 2)
    limit = need.weights + 2 * max(need.drawing, need.decoder) + 100
    assert run(shlex.split(f"generate --model {model} --label 0 --count 5 --memory-limit {limit} --out a.png")) == 0
    assert len(caplog.records) == 1 and "of 5 pictures are drawn at once" in caplog.text


@pytest.mark.parametrize(
    "options, told", [("--memory-limit 1kB", "one picture takes"), ("--memory-limit lots", "give a size such as 6GB"),
                      ("--memory-limit 0", "give a size"), ("--threads 0", "--threads")])
def test_limits_that_cannot_be_are_one_line(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], options: str, told: str
) -> None:
    assert run(shlex.split(f"generate --model {model} --label 0 {options} --out a.png")) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1 and files_in(work) == []


def test_networks_are_compiled_before_the_first_batch(model: Path, work: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(var.VAR, "compile_networks", lambda self, backend: compiled.append(backend))
    command = f"generate --model {model} --label 0 --count 3 --batch-size 2"
    assert run(shlex.split(f"{command} --out a.png")) == 0 and not compiled
    assert run(shlex.split(f"{command} --compile --out b.png")) == 0 and compiled == ["inductor"]
    assert np.array_equal(pixels(work / "a.png"), pixels(work / "b.png"))
    capsys.readouterr()
    assert "use --device cuda" in refused(capsys, f"{command} --graphs --device cpu --out c.png")


def test_threads_are_pinned(model: Path, work: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert run(shlex.split(f"generate --model {model} --label 0 --threads {before + 1} --out a.png")) == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animation_shows_every_step(model: Path, work: Path, suffix: str) -> None:
    assert run(shlex.split(f"generate --model {model} --label plant --count 5 --batch-size 2 --out a.{suffix}")) == 0
    with Image.open(work / f"a.{suffix}") as image:
        assert image.n_frames == STEPS
        first = image.convert("RGB").copy()
        image.seek(STEPS - 1)
        last = np.asarray(image.convert("RGB")).astype(int)
    assert not np.array_equal(np.asarray(first), last)
    assert run(shlex.split(f"generate --model {model} --label plant --count 5 --out still.png")) == 0
    assert np.abs(last - pixels(work / "still.png")).mean() < 30


def test_without_labels_a_model_with_styles_shows_each_class_in_each_style(model: Path) -> None:
    system = nextscale.load(str(model))
    labels, columns = generate_command.choose_labels(system, [], None, None, 0)
    assert columns == len([name for name in CLASSES if name in generate_command.SHOWN_CLASSES])
    assert len(set(labels)) == len(labels) == columns * len(STYLES)
    drawn, _ = generate_command.choose_labels(system, [], 9, None, 0)
    assert drawn == generate_command.choose_labels(system, [], 9, None, 0)[0] and len(drawn) == 9
    assert drawn != generate_command.choose_labels(system, [], 9, None, 1)[0]


def test_shown_classes_are_classes_of_the_emoji_set() -> None:
    from nextscale.data.emoji_classes import CLASS_TABLE

    assert set(generate_command.SHOWN_CLASSES) <= set(CLASS_TABLE)


def test_edit_changes_the_region_and_nothing_else(model: Path, work: Path) -> None:
    picture = work.parent / "picture.png"
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 4))
    mask.save("mask.png")
    common = f"edit --model {model} --picture {picture} --label flag/noto --seed 3"
    assert run(shlex.split(f"{common} --mask mask.png --out mask-edit.png")) == 0
    assert run(shlex.split(f"{common} --box 0,0,16,4 --out box.png")) == 0
    assert run(shlex.split(f"{common} --box 0,0,16,4 --count 3 --out variants.png")) == 0
    assert np.array_equal(pixels(work / "mask-edit.png"), pixels(work / "box.png"))
    assert pixels(work / "variants.png").shape == (20, 3 * 18 + 2, 3)
    original, edited, variants = pixels(picture), pixels(work / "box.png"), pixels(work / "variants.png")[2:18]
    assert np.array_equal(edited[4:], original[4:]) and not close(edited[:4], original[:4])
    assert close(variants[:, 2:18], edited) and not close(variants[:, 20:36], edited)
    assert run(shlex.split(f"{common} --box 0,0,16,4 --no-paste --out drawn.png")) == 0
    drawn = pixels(work / "drawn.png")
    assert np.array_equal(drawn[:4], edited[:4]) and not close(drawn[4:], original[4:])
    assert read_settings(work / "box.png")["box"] == "0,0,16,4"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.8, 0.99])
def test_outpainting_keeps_whole_cells_in_the_middle(share: float) -> None:
    image = Image.new("RGB", (64, 64), (200, 0, 0))
    frame, region = edit_command.surround(image, share, (8, 8))
    kept = np.asarray(region) == 0
    rows = np.flatnonzero(kept.any(1))
    assert rows[0] % 8 == 0 and (rows[-1] + 1) % 8 == 0 and rows[0] == 63 - rows[-1] >= 8
    assert (np.asarray(frame)[kept] == (200, 0, 0)).all() and (np.asarray(frame)[~kept] == 255).all()


def test_outpaint_and_resize_take_a_large_picture(model: Path, work: Path) -> None:
    Image.new("RGB", (40, 30), (10, 200, 30)).save("large.png")
    assert run(shlex.split(f"edit --model {model} --picture large.png --outpaint 0.5 --resize --out around.png")) == 0
    assert run(shlex.split(f"edit --model {model} --picture large.png --box 0,0,20,30 --resize --out half.png")) == 0
    assert pixels(work / "around.png").shape == pixels(work / "half.png").shape == (16, 16, 3)


def test_reconstruct_shows_every_scale_and_skips_broken_files(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "in").mkdir()
    for i in range(2):
        shutil.copy(work.parent / "picture.png", work / "in" / f"{i}.png")
    (work / "in" / "broken.png").write_bytes((work / "in" / "0.png").read_bytes()[:60])
    assert run(shlex.split(f"reconstruct in --model {model} --out sheet.png")) == 0
    said = capsys.readouterr()
    assert said.out.count(" dB") == 3 and "mean of 2" in said.out
    assert said.err.count("skipped: ") == 1 and "broken.png" in said.err
    sheet = pixels(work / "sheet.png")
    assert sheet.shape == (2 * 18 + 2, (STEPS + 1) * 18 + 2, 3)
    assert np.array_equal(sheet[2:18, 2:18], pixels(work.parent / "picture.png"))
    assert len(read_settings(work / "sheet.png")["psnr_db"]) == 2


def test_convert_writes_a_folder_that_generates_what_the_published_files_do(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "parity"))
    import run as parity

    golden = json.loads((Path(__file__).parent / "parity" / "var_tiny.json").read_text())
    weights = parity.fill(golden)
    torch.save(weights["vae"], "vae.pth")
    torch.save({"trainer": {"var_wo_ddp": weights["var"]}}, "var.pth")
    monkeypatch.setitem(registry._PUBLISHED, "var-tiny", f"{__name__}:published_tiny")
    assert run(shlex.split("convert var-tiny --tokenizer vae.pth --weights var.pth --out folder")) == 0
    assert files_in(work / "folder") == ["config.json", "generator.safetensors", "tokenizer.safetensors"]
    assert run(shlex.split("generate --model folder --label 1 --count 2 --out a.png")) == 0
    published = "--weights var.pth --tokenizer-weights vae.pth"
    assert run(shlex.split(f"generate --model var-tiny {published} --label 1 --count 2 --out b.png")) == 0
    assert np.array_equal(pixels(work / "a.png"), pixels(work / "b.png"))
    assert run(shlex.split("convert var-tiny --tokenizer vae.pth --weights var.pth --out half --dtype bf16")) == 0
    sizes = [(work / name / "generator.safetensors").stat().st_size for name in ("folder", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert run(shlex.split("convert var-tiny --tokenizer vae.pth --weights var.pth --out int8 --dtype int8")) == 2
    assert not (work / "int8").exists()


def test_own_pictures_train_a_model_that_draws(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = work / "photos" / ("warm" if i % 2 else "cold")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    train = textwrap.dedent("""
        [train]
        steps = 2
        batch_size = 4
        precision = "fp32"
        sample_every = 0
        checkpoint_every = 2
        device = "cpu"
        """)
    (work / "tokenizer.toml").write_text(textwrap.dedent("""
        threads = 1
        [data]
        size = 16
        held_out = 4
        [tokenizer.model]
        grids = [[1, 1], [2, 2], [4, 4]]
        vocabulary = 32
        [tokenizer.model.autoencoder]
        width = 32
        multipliers = [1, 1, 2]
        encoder_blocks = 1
        decoder_blocks = 1
        latent_width = 8
        """) + train)
    (work / "generator.toml").write_text(
        "threads = 1\n[data]\nsize = 16\nheld_out = 0\n[generator]\ndepth = 2\nwidth = 64\nheads = 2\n" + train)
    tokenizer = "train tokenizer --recipe tokenizer.toml --data photos"
    assert run(shlex.split(f"{tokenizer} --out runs/t --set train.seed=1")) == 0
    assert run(shlex.split("train generator --recipe generator.toml --data photos --tokenizer runs/t/tokenizer "
                           "--out runs/g")) == 0
    assert run(shlex.split("generate --model runs/g/model --label warm --count 2 --out own.png")) == 0
    assert "photos [train]: 11 pictures, 2 classes" in capsys.readouterr().out
    assert pixels(work / "own.png").shape == (20, 38, 3)
    # A second run into the same folder must neither destroy nor silently continue the first.
    assert "resume" in refused(capsys, f"{tokenizer} --out runs/t")
    # Refused before any checkpoint is written.
    line = refused(capsys, f"{tokenizer} --out runs/n --set data.size=24")
    assert "schedule" in line and "24" in line and not (work / "runs" / "n").exists()


def test_data_show_counts_classes_and_names_broken_files(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cats", "dogs"):
        (work / "set" / name).mkdir(parents=True)
        shutil.copy(work.parent / "picture.png", work / "set" / name / "1.png")
    (work / "set" / "dogs" / "bad.png").write_text("no picture")
    assert run(shlex.split("data show set --size 16 --sheet classes.png")) == 0
    said = capsys.readouterr().out
    assert "2 pictures" in said and "cats" in said and "1 skipped" in said and "bad.png" in said
    assert pixels(work / "classes.png").shape[0] == 20


def test_models_and_systems_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    said = capsys.readouterr().out
    assert "emoji-text-64" in said and "310M + 109M tokenizer" in said
    assert run(["systems"]) == 0
    said = capsys.readouterr().out
    assert "130 systems" in said and "Scale-wise core" in said and "2404.02905  VAR; licence: MIT" in said
    assert run(["systems", "VAR"]) == 0
    said = capsys.readouterr().out
    assert "licence  MIT" in said and "eprint = {2404.02905}" in said
    assert run(["systems", "--status", "built"]) == 0
    assert " planned " not in capsys.readouterr().out


@pytest.mark.slow
def test_listed_sizes_are_those_of_the_networks() -> None:
    from nextscale.cli.models import _sizes, count_sizes

    assert _sizes() == count_sizes(), "write the table anew: python -m nextscale.cli.models"


def test_version_and_bare_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"nextscale {nextscale.__version__}\n"
    assert run([]) == 0
    assert "Example: nextscale generate" in capsys.readouterr().out


# What is refused

BAD_LINES = [
    ("generate --model {model} --label plnat --out a.png", "did you mean 'plant'"),
    ("generate --model {model} --label plant/nota --out a.png", "did you mean 'noto'"),
    ("generate --model {model} --label 4 --out a.png", "use 0 to 3"),
    ("generate --model {model} --label plant/noto/flag --out a.png", "has 3 parts"),
    ("generate --model {model} --label flag --count 0 --out a.png", "--count"),
    ("generate --model {model} --label flag --seeds 1,x --out a.png", "--seeds"),
    ("generate --model {model} --label flag --seeds 1,2 --count 3 --out a.png", "2 seeds were given for 3 pictures"),
    ("generate --model {model} --label flag --temperature 0 --out a.png", "temperature"),
    ("generate --model {model} --label flag --top-p 2 --out a.png", "top_p"),
    ("generate --model {model} --label flag --top-k -1 --out a.png", "top_k"),
    ("generate --model {model} --label flag --guidance-scale inf --out a.png", "guidance_scale"),
    ("generate --model {model} --out a.jpg", "cannot write .jpg"),
    ("generate --model {model} --out {picture}/a.png", "is a file, not a folder"),
    ("generate --model {model} --out /proc/a.png", "cannot be written"),
    ("generate --model emoji-text-46 --out a.png", "did you mean 'emoji-text-64'"),
    ("generate --model var --out a.png", "no model or folder"),
    ("generate --model os:getcwd --out a.png", "no model or folder"),
    ("generate --model ../../etc/passwd --out a.png", "no model or folder"),
    ("generate --model . --out a.png", "config.json"),
    ("generate --model var-d16 --out a.png", "comes without weights"),
    ("generate --model var-d16 --weights no.pth --tokenizer-weights no.pth --out a.png", "no weights file at 'no.pth'"),
    ("generate --model {model} --weights {picture} --out a.png", "can't be read as weights"),
    ("generate --model {model} --device tpu --out a.png", "device"),
    ("generate --model {model} --device cuda:99 --out a.png", "device"),
    ("generate --model {model} --colums 3 --out a.png", "--colum"),
    ("generate --model {model} --precision fp8 --out a.png", "fp8"),
    ("edit --model {model} --picture no.png --outpaint 0.5 --out a.png", "no such file"),
    ("edit --model {model} --picture {model}/config.json --outpaint 0.5 --out a.png", "cannot be opened"),
    ("edit --model {model} --picture {truncated} --outpaint 0.5 --out a.png", "is broken"),
    ("edit --model {model} --picture {floats} --outpaint 0.5 --out a.png", "floating-point"),
    ("edit --model {model} --picture {large} --outpaint 0.5 --out a.png", "--resize"),
    ("edit --model {model} --picture {picture} --mask {large} --out a.png", "must be of the picture's size"),
    ("edit --model {model} --picture {picture} --mask {black} --out a.png", "nothing to draw anew"),
    ("edit --model {model} --picture {picture} --box 0,0,17,4 --out a.png", "does not lie inside"),
    ("edit --model {model} --picture {picture} --box 1,2,3 --out a.png", "four numbers"),
    ("edit --model {model} --picture {picture} --box 4,4,4,8 --out a.png", "does not lie inside"),
    ("edit --model {model} --picture {picture} --out a.png", "exactly one of"),
    ("edit --model {model} --picture {picture} --outpaint 1.5 --out a.png", "between 0 and 1"),
    ("edit --model {model} --picture {picture} --outpaint nan --out a.png", "between 0 and 1"),
    ("edit --model {model} --picture {picture} --box 0,0,4,4 --out a.gif", "PNG"),
    ("edit --model {model} --picture {picture} --box 0,0,4,4 --label x --out a.png", "unknown class 'x'"),
    ("reconstruct {large} --model {model} --out a.png", "--resize"),
    ("reconstruct {empty} --model {model} --out a.png", "holds no pictures"),
    ("reconstruct {truncated} --model {model} --out a.png", "is broken"),
    ("data show {empty}", "holds no pictures"),
    ("data show no-such-set", "no such folder or parquet file"),
    ("data show {picture}", "cannot be read as parquet"),
    ("data show emoji --split tset", "has no split 'tset'"),
    ("data settings {picture}", "no settings inside"),
    ("data build-emoji --size 4 --out a.parquet", "size 4"),
    ("train tokenizer --recipe ../../secret --out run", "no recipe"),
    ("train tokenizer --recipe no.toml --out run", "no such file"),
    ("train tokenizer --set train.stpes=3 --out run", "did you mean 'steps'"),
    ("train tokenizer --set train.steps --out run", "key=value"),
    ("train tokenizer --set train=3 --set train.steps=2 --out run", "not a table"),
    ("train tokenizer --data {empty} --out run", "holds no pictures"),
    ("train generator --tokenizer {empty} --out run", "config.json"),
    ("train tokenizer --out {picture}", "is a file"),
    ("convert var-d17 --weights {picture} --tokenizer {picture} --out folder", "not a published size"),
    ("convert var-d16 --weights {picture} --tokenizer {picture} --out folder", "can't be read as weights"),
    ("convert var-d16 --weights no.pth --tokenizer {picture} --out folder", "can't be read as weights"),
    ("convert var-d16 --weights no.pth --tokenizer no.pth --out {model}", "not an empty folder"),
    ("systems vra", "did you mean"),
    ("systems --status bulit", "did you mean 'built'"),
    ("genrate", "generate"),
    ("train", "Missing command"),
    ("data", "Missing command"),
]


@pytest.mark.parametrize(("line", "phrase"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    line: str, phrase: str, model: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"picture": tmp_path / "picture.png", "model": model, "empty": tmp_path / "empty"}
    names["empty"].mkdir()
    for name, image in (
        ("large", Image.new("RGB", (40, 30))),
        ("black", Image.new("L", (16, 16))),
        ("floats", Image.new("F", (16, 16))),
    ):
        names[name] = tmp_path / f"{name}.tiff"
        image.save(names[name])
    names["truncated"] = tmp_path / "truncated.png"
    names["truncated"].write_bytes(names["picture"].read_bytes()[:200])
    before = files_in(tmp_path)
    said = refused(capsys, line.format(**names))
    assert phrase in said
    assert files_in(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_says_so(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, f"generate --model {model} --device cuda --out a.png")
    assert "'cuda' is not there" in said and "--device cpu" in said


def damage_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "generator.safetensors")
    tensors.pop("head.bias")
    save_file(tensors, folder / "generator.safetensors")


def pickle_code(folder: Path) -> None:
    import pickle

    (folder / "generator.safetensors").write_bytes(pickle.dumps(print))


BAD_MODELS = [
    ("truncated weights", cut("generator.safetensors", 5000), "generator.safetensors can't be read"),
    ("empty weights", cut("tokenizer.safetensors", 0), "tokenizer.safetensors can't be read"),
    ("pickled weights", pickle_code, "can't be read"),
    ("a tensor missing", drop_a_tensor, "missing: head.bias"),
    ("weights missing", lambda folder: (folder / "generator.safetensors").unlink(), "no weights file"),
    ("configuration missing", lambda folder: (folder / "config.json").unlink(), "config.json"),
    ("configuration cut", cut("config.json", 50), "config.json can't be read"),
    ("unknown key", damage_config(lambda c: c.update(depht=3)), "unknown key 'depht'"),
    ("another width", damage_config(lambda c: c["generator"].update(width=64)), "wrong shape"),
    ("another schedule", damage_config(lambda c: c["tokenizer"].update(grids=[[1, 1], [2, 2], [4, 4]])), "wrong shape"),
    ("a text for a number", damage_config(lambda c: c["generator"].update(depth="2")), "depth"),
    ("no depth", damage_config(lambda c: c["generator"].update(depth=-1)), "config.json"),
    ("no heads", damage_config(lambda c: c["generator"].update(heads=0)), "config.json"),
    ("no grids", damage_config(lambda c: c["tokenizer"].update(grids=[])), "config.json"),
    ("a falling schedule", damage_config(lambda c: c["tokenizer"].update(grids=[[4, 4], [0, 0]])), "config.json"),
]


@pytest.mark.parametrize(("damage", "phrase"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
def test_a_damaged_model_folder_is_one_clear_line(
    damage: Callable[[Path], None], phrase: str, model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, work.parent / "bad")
    damage(work.parent / "bad")
    assert phrase in refused(capsys, "generate --model ../bad --label plant --out a.png")
    assert files_in(work) == []


@given(st.data())
@settings(max_examples=40)
def test_damaged_model_files_load_or_are_refused(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(["config.json", "generator.safetensors", "tokenizer.safetensors"]))
    damaged = bytearray(path.read_bytes())
    # Headers are where structure lies, so half of the damage falls there.
    places = st.one_of(st.integers(0, min(len(damaged), 1200) - 1), st.integers(0, len(damaged) - 1))
    for place in data.draw(st.lists(places, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))])
    try:
        nextscale.load(str(folder), device="cpu")
    except NextscaleError as error:
        assert "\n" not in str(error)


def test_a_wrong_published_checkpoint_names_the_tensors(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"conv.weight": torch.zeros(3)}, "other.pth")
    said = refused(capsys, f"generate --model {model} --weights other.pth --label plant --out a.png")
    assert "other.pth doesn't fit" in said and "conv.weight" in said
    assert files_in(work) == ["other.pth"]


def test_a_class_name_that_is_a_path_stays_in_the_folder(model: Path, work: Path) -> None:
    shutil.copytree(model, work.parent / "evil")
    damage_config(lambda c: c.update(class_names=[["../../up", "/tmp/x", "..", "a/b"], list(STYLES)]))(
        work.parent / "evil")
    before = sorted(path.name for path in work.parent.iterdir())
    assert run(shlex.split("generate --model ../evil --label 0 --label 1 --label 2 --label a/b --out inside")) == 0
    assert sorted(path.name for path in work.parent.iterdir()) == before
    assert len(list((work / "inside").iterdir())) == 5


def test_a_full_disk_is_one_line_and_leaves_nothing(model: Path, work: Path) -> None:
    """A real limit on the size of files, in a process of its own: every write fails half-way."""
    outs = ["a.png", "a.npz", "folder", "a.gif", "a.webp"]
    script = textwrap.dedent(f"""
        import resource
        from nextscale.cli.main import run
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        for out in {outs}:
            assert run(["generate", "--model", "{model}", "--label", "plant", "--count", "9", "--out", out]) == 2
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=work)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(outs)
    for out, line in zip(outs, lines, strict=True):
        assert re.fullmatch(rf"nextscale: {out}\S* cannot be written \(.+\); .+ MB are free there", line)
    assert files_in(work) == []


def test_errors_reach_the_shell_as_exit_code_2(work: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "nextscale.cli.main", "systems", "no such"], capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("nextscale: unknown system 'no such'") and done.stderr.count("\n") == 1
