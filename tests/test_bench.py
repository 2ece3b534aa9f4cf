"""``nextscale bench`` counts what really has to be done, and its baseline draws what the library draws."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graphs import Recorders
from tiny import AUTOENCODER, tiny_var
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextscale.cli.main import run
from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.evaluation.bench import cold, machine
from nextscale.evaluation.bench import drawing as bench
from nextscale.evaluation.bench import measure as measuring
from nextscale.evaluation.bench.baseline import baseline_of, liven, uniforms_of
from nextscale.evaluation.bench.clock import Clock, now_of
from nextscale.evaluation.bench.drawing import Drawing, Settings, count_plan, count_run
from nextscale.evaluation.bench.measure import agreement, count, measure, psnr
from nextscale.evaluation.bench.recorder import PHASES, recorded
from nextscale.evaluation.bench.report import report
from nextscale.evaluation.bench.work import Ledger, Work, counted
from nextscale.generators.var import VARGeneratorConfig
from nextscale.plan import Plan
from nextscale.run import Rows
from nextscale.sampling import filters
from nextscale.sampling.filters import make_filters
from nextscale.sampling.graphs import CapturedSteps
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers.config import TokenizerConfig

TINY = "var-d2-16px"


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells the machine's rates takes seconds at its own size."""
    monkeypatch.setitem(machine.SIDES, "cpu", 128)


RANDOM = Settings(model=TINY, batch=2, repeats=1)


@cache
def lively(shared: bool = False, classes: tuple[int, ...] = (10,)) -> VAR:
    """A VAR that the published loop can draw, with enough codes for the filters to cut."""
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(replace(AUTOENCODER, attention="level"), ((1, 1), (2, 2), (3, 3), (4, 4)), 1200)
    system: VAR = liven(VAR(VARConfig(tokenizer, VARGeneratorConfig.of_depth(2, shared_modulation=shared), classes)))
    return system.eval().to_precision("fp32")


@dataclass(frozen=True)
class Half(Hook):
    """Lets the first half of a step's rows alone through every MLP."""

    def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        if kind != "mlp":
            return inner(x, rows)
        half = -(-x.shape[1] // 2)
        index = torch.arange(half, device=x.device).expand(len(x), -1)
        return torch.cat([inner(x[:, :half], rows.select(index)), x[:, half:]], 1)


# The baseline

@pytest.mark.parametrize(("shared", "labels"), [(False, [(7,)]), (True, [(1, 0), (2, 3), (0, 1)])])
def test_baseline_and_library_draw_the_same_tokens_and_pictures(shared: bool, labels: list[tuple[int, ...]]) -> None:
    system = lively(shared, (10, 4)[:len(labels[0])])
    baseline, seeds = baseline_of(system), list(range(3, 3 + len(labels)))
    wanted, tokens = baseline.sample(torch.tensor(labels), uniforms_of(system.plan, seeds), 1.5, 900, 0.96, 0.8)
    drawn = system.generate(labels, seeds=seeds, guidance_scale=2.5, guidance_schedule="ramp", top_k=900, top_p=0.96,
                            temperature=0.8, output="torch", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(drawn.tokens, tokens, strict=True))
    assert torch.allclose(drawn.images, wanted, atol=1e-4)
    assert len(torch.cat(tokens, 1).unique()) > 10


def test_filters_cut_the_distribution() -> None:
    """Agreement would be empty if nothing were filtered out or nothing left to choose."""
    torch.manual_seed(1)
    system = lively()
    logits = system.head(torch.randn(1, 16, 128))
    for narrow in make_filters(top_k=900, top_p=0.96):
        logits = narrow(logits, None)  # type: ignore[arg-type]
    left = (logits > -torch.inf).sum(-1)
    assert int(left.max()) < 900 and int(left.min()) > 10


# Counts

@cache
def planned(dtype: str) -> Work:
    config = bench.config_of(RANDOM)
    work = count_plan(RANDOM, config, Drawing(RANDOM, config), dtype)
    assert work is not None
    return work


def test_operations_of_the_plan_are_torch_s_count_and_the_formula() -> None:
    config, work, system = bench.config_of(RANDOM), planned("fp32"), bench.open_model(RANDOM)
    drawing = Drawing(RANDOM, config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        drawing(system)
    assert work.flops() == counter.get_total_flops()

    # By hand: R rows of two branches of both pictures, through blocks of 4 C^2 and MLPs of 8 C^2 weights.
    width, depth, plan, branches = config.generator.width, config.generator.depth, config.tokenizer.plan, 4
    rows = branches * plan.length
    assert work.flops("mlp") == 2 * rows * 8 * width**2 * depth
    assert work.flops("attention") == 2 * rows * 4 * width**2 * depth + 4 * width * branches * plan.pairs * depth
    assert work.flops("head") == 2 * rows * width * config.tokenizer.vocabulary
    assert work.rows == {"attention": rows * depth, "mlp": rows * depth}
    assert work.pairs == work.computed_pairs == branches * plan.pairs * depth * config.generator.heads
    assert work.memory == branches * plan.length * 2 * width * depth * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_ran_is_what_was_planned(dtype: str) -> None:
    config = bench.config_of(RANDOM)
    drawing = Drawing(RANDOM, config)
    ran = count_run(bench.open_model(RANDOM).to_precision(dtype), drawing, ())
    for name in ("flops", "bytes", "rows", "pairs", "memory", "weights"):
        assert planned(dtype).describe()[name] == ran.describe()[name], name


def test_a_plan_is_counted_at_any_schedule_without_weights() -> None:
    grids = ((1, 1), (3, 4))
    found = count(replace(RANDOM, model="var-d16", schedule=grids))["work"]["fp32"]["plain"]
    assert found["pairs"] == 4 * 16 * 16 * Plan.scales(grids).pairs
    assert found["memory"] == 4 * 16 * 13 * 2 * 1024 * 4 and found["alive"]["decode"] > 0


def test_hooks_are_counted_by_what_ran() -> None:
    system = tiny_var()
    given = replace(RANDOM, hooks=("half",))
    drawing = Drawing(given, system.config)
    plain, half = count_run(system, drawing, ()), count_run(system, drawing, [Half()])
    rows = [4 * 2 * sum(step.rows if whole else -(-step.rows // 2) for step in system.plan) for whole in (True, False)]
    assert (plain.rows["mlp"], half.rows["mlp"]) == tuple(rows) and half.rows["attention"] == plain.rows["attention"]
    assert half.flops("mlp") / plain.flops("mlp") == rows[1] / rows[0]
    assert half.flops("attention") == plain.flops("attention") and half.pairs == plain.pairs


def test_masked_pairs_count_only_where_they_are_seen() -> None:
    """A prefill of several steps computes all pairs and sees those of the plan."""
    system = tiny_var()
    tokens = system.generate([1], seed=0, output="torch", progress=False).tokens
    ledger = Ledger()
    with torch.no_grad(), counted(system, ledger) as work:
        system.log_prob(tokens, [1])
    assert work.pairs == system.plan.pairs * 2 * 3
    assert work.computed_pairs == system.plan.length**2 * 2 * 3


@pytest.mark.parametrize("name", ["hmar-d16"])
def test_other_systems_are_counted_from_shapes(name: str) -> None:
    given = Settings(model=name, schedule=((1, 1), (2, 2)), settings={"top_k": 10})
    config = bench.config_of(given)
    generator = replace(config.generator, depth=1, **({"mask_blocks": 1} if hasattr(config.generator, "mask_blocks")
                                                      else {}))
    config = replace(config, generator=generator)
    work = count_plan(given, config, Drawing(given, config), "fp32")
    assert work is not None and {"attention", "mlp", "head", "decode"} <= set(work.phases)
    assert work.rows["mlp"] == 2 * 5


# Time

def test_phases_add_up_and_the_clocks_are_gone_again() -> None:
    system, now = lively(), now_of("wall", 1)
    began, clock = now(), Clock(now_of("wall", 1), torch.device("cpu"))
    with recorded(system, clock):
        system.generate([1], seed=0, output="torch", progress=False)
    seconds = clock.stop()
    assert set(seconds) <= set(PHASES) and {"embedding", "attention", "mlp", "sampling", "decode"} <= set(seconds)
    assert 0 < sum(seconds.values()) <= now() - began and min(seconds.values()) >= 0
    assert system.generator.forward.__name__ == "forward" and Context.residual.__name__ == "residual"
    assert "sample" not in vars(system.head) and "residual" in vars(Context)


def test_contestants_take_turns_and_agree() -> None:
    given = replace(RANDOM, compare=("baseline",), dtypes=("fp32", "bf16"), repeats=2, alone=True, clock="cpu")
    result = measure(given)
    assert list(result["contestants"]) == ["baseline", "nextscale fp32", "nextscale bf16"]
    fp32 = result["contestants"]["nextscale fp32"]
    assert fp32["against"]["tokens"] == {"equal": 60, "of": 60, "first_step": None}
    assert fp32["against"]["psnr"] is None or fp32["against"]["psnr"] > 80
    for name, floors in result["floor"]["seconds"].items():
        assert floors["total"]["floor"] >= max(floors["total"]["arithmetic"], floors["total"]["bandwidth"]), name
        assert floors["mlp"]["alone"] > 0 and floors["total"]["ratio"] > 0
    assert result["work"]["bf16"]["plain"]["memory"] * 2 == result["work"]["fp32"]["plain"]["memory"]
    text = report(json.loads(json.dumps(result)))
    assert "60 of 60 tokens equal" in text and "time/floor" in text


def test_hooks_stand_beside_the_plain_run() -> None:
    result = measure(replace(RANDOM, hooks=("half",), compare=("plain",)), [Half()])
    assert list(result["contestants"]) == ["plain fp32", "hooks fp32"]
    assert result["contestants"]["hooks fp32"]["against"]["name"] == "plain fp32"
    works = result["work"]["fp32"]
    assert works["hooks"]["flops"]["mlp"] < works["plain"]["flops"]["mlp"]
    assert "hooks over plain" in report(result)


def test_a_compiled_contestant_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs alone: making code of them takes a compiler and its time."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, backend: plain(module, backend="eager"))
    result = measure(replace(RANDOM, compile=True))
    found = result["contestants"]["compiled fp32"]
    assert found["against"]["tokens"]["equal"] == 60 and "phases" not in found
    assert list(result["floor"]["seconds"]) == ["nextscale fp32"]
    plain, loop = (result["floor"]["shares"][f"{name} fp32"] for name in ("nextscale", "compiled"))
    assert (plain["of"], loop["of"]) == ("transformer", "loop")
    phases = result["contestants"]["nextscale fp32"]["phases"]
    assert plain["seconds"] == sum(phases.get(name, 0) for name in ("attention", "scan", "mlp", "network"))
    assert 0 < loop["share"] and loop["seconds"] == found["loop"] < found["seconds"] * 2
    assert found["pictures_per_second"] == 2 / found["seconds"] and "pictures a second" in report(result)


def test_captured_contestants_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder in the place of a GPU's graphs."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, backend: plain(module, backend="eager"))
    monkeypatch.setattr(measuring, "CapturedSteps", lambda: CapturedSteps(Recorders()))
    monkeypatch.setattr(filters, "_by_numpy", lambda logits: False)
    given = replace(RANDOM, compile=True)
    object.__setattr__(given, "graphs", True)
    result = measure(given)
    assert list(result["contestants"])[1:] == ["captured fp32", "compiled fp32", "compiled-captured fp32"]
    for name in list(result["contestants"])[1:]:
        assert result["contestants"][name]["against"]["tokens"]["equal"] == 60
        assert result["floor"]["shares"][name]["of"] == "loop"


def test_agreement_and_psnr() -> None:
    a = [torch.tensor([[1]]), torch.tensor([[1, 2, 3]])]
    assert agreement(a, a)["first_step"] is None
    assert agreement([a[0], torch.tensor([[1, 0, 3]])], a) == {"equal": 3, "of": 4, "first_step": 1}
    assert agreement(a[:1], a) == {"equal": 1, "of": 4, "first_step": 1}
    zero = torch.zeros(2, 3, 4, 4)
    assert psnr(zero, zero) is None and psnr(zero + 0.2, zero) == pytest.approx(20.0)


# The command

def test_command_counts_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "counts.json"
    assert run(["bench", "--model", TINY, "--count", "--batch", "3", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["batch"] == 3 and found["work"]["fp32"]["plain"]["flops"]["total"] > 0
    assert "token-layer evaluations" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "line"), [
    (["--compare", "plain"], "no --hook was given"),
    (["--model", "hmar-d16", "--compare", "baseline"], "VAR's published loop, the model is a hmar"),
    (["--model", "var-d16", "--compare", "baseline", "--schedule", "1,2x3"], "square scales"),
    (["--model", "emoji-text-6"], "did you mean 'emoji-text-64'?"),
    (["--hook", "nothing-of-the-kind"], "unknown hook"),
    (["--count", "--alone"], "--count measures no time"),
    (["--json", "/proc/none/x.json", "--count"], "cannot be written"),
    (["--model", TINY, "--schedule", "1,x"], "cannot read 'x'"),
    (["--weights", "some.pth"], "both, or neither"),
    (["--device", "cpu", "--graphs"], "steps are captured as CUDA graphs"),
])
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert line in told and "\n" not in told


def test_cold_start_is_a_fresh_process_without_compiler_and_readers_of_data_sets(monkeypatch: pytest.MonkeyPatch
                                                                                 ) -> None:
    unneeded = ("torch._dynamo", "sympy", "pyarrow", "nextscale.data.datasets")
    check = f"\nassert not [name for name in {unneeded} if name in sys.modules]\n"
    monkeypatch.setattr(cold, "_SCRIPT", cold._SCRIPT + check)
    seconds = cold.measure_cold(TINY, "cpu", 1, 1, "cpu")["seconds"]
    assert set(seconds) == {"import", "torch", "model", "draw", "first_picture"}
    assert seconds["first_picture"] == pytest.approx(sum(seconds.values()) - seconds["first_picture"])
    with pytest.raises(InputError, match="no-such-model"):
        cold.measure_cold("no-such-model", "cpu", 1, 1)
