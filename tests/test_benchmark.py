"""The speed benchmark compares like with like: its baseline draws what the library draws."""
from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextscale.generators.var import VARGeneratorConfig
from nextscale.sampling.filters import make_filters
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def var_speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("var_speed", BENCHMARKS / "var_speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["var_speed"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(var_speed: ModuleType) -> VAR:
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "level"),
                                   grids=((1, 1), (2, 2), (3, 3), (4, 4)), vocabulary=1200)
    return var_speed.liven(VAR(VARConfig(tokenizer, VARGeneratorConfig.of_depth(2), classes=(10,))).eval())


def test_baseline_and_library_draw_the_same_tokens_and_picture(var_speed: ModuleType, tiny: VAR) -> None:
    baseline = var_speed.baseline_of(tiny)
    for seed in range(3):
        wanted, tokens = baseline.sample(torch.tensor([7]), var_speed.uniforms_of(tiny.plan, seed), 1.5, 900, 0.96)
        drawn = tiny.generate(7, 1, seed=seed, guidance_scale=2.5, guidance_schedule="ramp", top_k=900, top_p=0.96,
                              output="torch", progress=False)
        assert all(torch.equal(a, b) for a, b in zip(drawn.tokens, tokens, strict=True))
        assert torch.allclose(drawn.images, wanted, atol=1e-4)
        assert len(torch.cat(tokens, 1).unique()) > 10


def test_filters_cut_the_distribution(var_speed: ModuleType, tiny: VAR) -> None:
    """Agreement would be empty if nothing were filtered out or nothing left to choose."""
    torch.manual_seed(1)
    logits = tiny.head(torch.randn(1, 16, 128))
    for narrow in make_filters(top_k=900, top_p=0.96):
        logits = narrow(logits, None)
    left = (logits > -torch.inf).sum(-1)
    assert int(left.max()) < 900 and int(left.min()) > 10


def test_phases_add_up_and_operations_match_the_known_count(var_speed: ModuleType, tiny: VAR) -> None:
    clock = var_speed.Clock(time.perf_counter)
    began = clock.now()
    var_speed.draw_ours(tiny, clock)
    spent = clock.now() - began
    assert set(clock.seconds) == set(var_speed.PHASES)
    assert 0 < sum(clock.seconds.values()) <= spent
    assert tiny.generator.forward.__name__ == "forward"  # the clocks are gone again
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny.tokenizer.decoder(torch.zeros(1, 8, 4, 4))
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    assert var_speed.flops(tiny)["decode"] == convolutions
