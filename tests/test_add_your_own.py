"""The example of a method in a package of its own: found by its entry points, trained, drawn from, and short."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_task import draw_pictures
from tiny import AUTOENCODER, CLASSES, GRIDS, fill, labels

import nextscale
from nextscale.cli.main import run
from nextscale.noise import Keyed
from nextscale.run import Run
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer_recipe import save_tokenizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "add_your_own"
SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """Folders that have the package: its module, and the metadata that an installation would write."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
              for group, points in project["entry-points"].items()]
    (metadata / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    return [str(metadata.parent), str(EXAMPLE)]


def test_it_is_found_trained_and_drawn_from_by_the_command_line(
        tmp_path: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, GRIDS, 32))
    fill(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "data.held_out=0", "train.precision=fp32", "train.minutes=5", "generator.depth=2", "generator.width=32",
            "generator.heads=2", "generator.previous=2", "settings.guidance_scale=3", "settings.guided_until=0.5"]

    # Training by a process of its own, to which nothing but the environment says where the package is.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*installed, str(SOURCE)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nextscale.cli.main", "train", "generator", "--system", "window_var",
         "--data", "pictures", "--tokenizer", "tokenizer", "--out", "run",
         *(part for one in sets for part in ("--set", one))],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    monkeypatch.chdir(tmp_path)
    for folder in installed:
        monkeypatch.syspath_prepend(folder)

    def command(*words: str) -> str:
        assert run([*words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "from the package nextscale-window-var" in command("systems", "window_var")
    command("generate", "--model", "run/model", "--count", "2", "--out", "a.png")
    assert (tmp_path / "a.png").is_file()
    assert "guidance-interval" in command("hooks") and "since: float = 0.0" in command("hooks", "guidance-interval")
    command("generate", "--model", "run/model", "--count", "2", "--out", "b.png", "--hook",
            "guidance-interval since=0.4 until=0.6")
    command("generate", "--model", "run/model", "--count", "2", "--out", "c.png", "--hook", "guidance-interval")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "guidance-interval since=0.4 until=0.6" in command("data", "settings", "b.png")

    trained, small = nextscale.load(str(tmp_path / "run" / "model")), nextscale.load("window-var-d2-16px")
    assert type(trained).__name__ == type(small).__name__ == "WindowVAR"
    assert trained.plan.visible.previous == 2 and trained.config.settings["pictures"].guided_until == 0.5


def test_rows_see_so_many_scales_and_the_loop_is_the_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import window_var

    network = window_var.WindowGeneratorConfig(2, 48, 3, previous=1)
    system = window_var.WindowVAR(window_var.WindowVARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), network,
                                                             (CLASSES,))).eval()
    fill(system)
    drawn = system.generate([1, 2], guidance_scale=1, top_k=None, top_p=None, output="torch", progress=False)
    scored = system.log_prob(drawn.tokens, [1, 2])
    torch.testing.assert_close(scored.picture, drawn.log_prob, rtol=1e-4, atol=1e-3)
    wider = window_var.WindowVAR(window_var.WindowVARConfig(
        TokenizerConfig(AUTOENCODER, GRIDS, 32), window_var.WindowGeneratorConfig(2, 48, 3, previous=2), (CLASSES,)))
    wider.load_state_dict(system.state_dict())
    same = (wider.eval().log_prob(drawn.tokens, [1, 2]).step == scored.step).all(0)
    assert same.tolist() == [True, True, False, False]


def test_guidance_outside_of_its_interval_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import window_var

    system = window_var.model("window-var-d2-16px")
    fill(system)

    def draw(*hooks: window_var.GuidanceInterval) -> Run:
        guidance = ClassifierFree(6.0, "constant")
        run = system.start(labels(2), guidance, Keyed.from_seeds([1, 2]))
        with torch.no_grad():
            list(sample_steps(system, run, guidance, hooks=hooks))
        return run

    everywhere, never = draw(), draw(window_var.GuidanceInterval(0.4, 0.6))
    assert all(torch.equal(a, b) for a, b in zip(draw(window_var.GuidanceInterval()).tokens, everywhere.tokens,
                                                 strict=True))
    plain = system.generate([0, 1], seeds=[1, 2], guidance_scale=1, top_k=None, top_p=None, output="torch",
                            progress=False)
    assert all(torch.equal(a, b) for a, b in zip(never.tokens, plain.tokens, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(everywhere.tokens, plain.tokens, strict=True))


def test_it_is_under_150_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in EXAMPLE.rglob("*.py")) < 150
