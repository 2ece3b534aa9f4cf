"""The benchmark of VAR's claim compares two working models, and its raster model is a real next-token model."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, fill
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextscale.conditions.class_label import ClassCondition
from nextscale.generators.var import VARGeneratorConfig
from nextscale.sampling.score import score
from nextscale.systems.var import VARConfig
from nextscale.tokenizers.config import TokenizerConfig

CONFIG = VARConfig(TokenizerConfig(AUTOENCODER, GRIDS, vocabulary=32),
                   VARGeneratorConfig.of_depth(2, width=48, heads=3), classes=(5,))


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "var_against_raster.py"
    spec = importlib.util.spec_from_file_location("var_against_raster", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["var_against_raster"] = module
    spec.loader.exec_module(module)
    return module


def test_both_models_draw_with_the_same_blocks(benchmark: ModuleType) -> None:
    torch.manual_seed(0)
    models = benchmark.contestants(CONFIG)
    raster, var = models["raster"], models["var"]
    assert raster.generator.blocks is var.generator.blocks and raster.head is var.head
    assert [len(m.plan) for m in (raster, var)] == [16, 4]
    assert [tuple(torch.cat(m.draw(3).tokens, 1).shape) for m in (raster, var)] == [(3, 16), (3, 30)]


def test_raster_loop_equals_its_one_call_pass(benchmark: ModuleType) -> None:
    """What the 16 passes with memory draw has the probability that one masked pass over all rows gives it."""
    torch.manual_seed(0)
    raster = benchmark.contestants(CONFIG)["raster"]
    fill(raster)
    run = raster.draw(2)
    assert len(torch.cat(run.tokens, 1).unique()) > 5
    before = [raster.codec.embed(tokens) for tokens in run.tokens[:-1]]
    assert all(torch.equal(read, code) for read, code in zip(run.reads[1:], before, strict=True))
    condition = ClassCondition(raster.labels, torch.arange(2)[:, None])
    with torch.no_grad():
        found = score(raster, raster.plan, run.tokens, run.reads, condition, benchmark.GUIDANCE, run.branches)
    assert torch.allclose(found.token, torch.cat(run.log_probs, 1), atol=1e-4)


@pytest.mark.parametrize("name", ["raster", "var"])
def test_operations_are_those_that_run(benchmark: ModuleType, name: str) -> None:
    model = benchmark.contestants(CONFIG)[name]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels aren't counted
        model.draw(3)
    counts = counter.get_flop_counts()["Global"]
    assert benchmark.flops(model, 3) == sum(n for op, n in counts.items() if "convolution" not in str(op))


def test_figures_are_written_and_a_wrong_depth_is_refused(benchmark: ModuleType, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--depth", "0"]) == 2
    assert "--depth is 0" in capsys.readouterr().err
    monkeypatch.setattr(benchmark, "configuration", lambda model, depth: CONFIG)
    file = tmp_path / "figures.json"
    assert benchmark.main(["--batch", "2", "--dtype", "bf16", "--threads", "1", "--repeats", "1", "--clock", "cpu",
                           "--device", "cpu", "--json", str(file)]) == 0
    assert "4.0 times the passes" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["passes"] == {"raster": 16, "var": 4} and result["rows"] == {"raster": 16, "var": 30}
