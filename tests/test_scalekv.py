"""ScaleKV and the baselines beside it: budgets to the row, what stays, what attention then sees; calibration."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from policies import against_masked, drawn
from tiny import tiny_var

import nextscale
from nextscale.acceleration.budgets import by_identity, read_budgets, uniform_rows
from nextscale.acceleration.calibration import Observed, grid_of, measure
from nextscale.acceleration.observation import patch_centres, window
from nextscale.acceleration.scalekv import PRESETS, ScaleKV, find_drafters
from nextscale.cli.main import run as command
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context
from nextscale.errors import DataError, InputError
from nextscale.generators.hmar import HMARGenerator
from nextscale.layers.memory import Memory
from nextscale.noise import Keyed
from nextscale.plan import PREVIOUS_ONLY, Plan
from nextscale.run import Rows, Run
from nextscale.sampling.guidance import Unguided
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.var import PLANS

INFINITY = Plan.scales((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
SMALL = {"budgets": [None, None, None, [8, 10], [11, 20]], "window": 4}


@pytest.mark.parametrize("name", ["scalekv", "snapkv", "pyramidkv", "sliding-window"])
def test_a_full_budget_is_the_model_itself_bit_for_bit(name: str) -> None:
    settings = {"share": 1.0} if name == "sliding-window" else {"share": 1.0, "window": 4}
    if name == "pyramidkv":
        settings["beta"] = 1.0
    _, with_it = drawn([nextscale.hook(name, **settings)])
    _, without = drawn([])
    assert torch.equal(with_it.canvas.value, without.canvas.value)
    for one, other in zip(with_it.log_probs, without.log_probs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scoring", ["published", "paper"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_attention_after_shrinking_is_full_attention_with_the_dropped_rows_masked(scoring: str, pooling: str) -> None:
    masked, _, _ = against_masked(ScaleKV(SMALL, scoring=scoring, pooling=pooling))
    assert masked.worst < 1e-5 and masked.compared == 4, "two layers read a shrunk memory in two steps"


def test_every_layer_keeps_its_budget_of_the_next_step_and_the_window_stays() -> None:
    for steps, lengths in ((2, [5, 5]), (3, [8, 10])):
        _, run = drawn([ScaleKV(SMALL)], until=steps)
        assert [group.length for (group,) in run.memory.groups.values()] == lengths
    _, run = drawn([ScaleKV(SMALL)], until=4)
    for layer, budget in ((0, 11), (1, 20)):
        (group,) = run.memory.groups[f"base.{layer}.kv"]
        assert group.length == budget and group.tags is not None
        assert group.tags.step.shape == (4, 3, budget), "rows of the batch and heads choose for themselves"
        own = group.tags.cell[..., 1] * 5 + group.tags.cell[..., 2]
        for place in patch_centres((4, 5), 4):
            assert bool(((own == place) & (group.tags.step == 3)).any(-1).all()), "the window stays"
        assert bool((group.tags.step.diff(dim=-1) >= 0).all())


def test_the_window_is_made_of_patch_centres_at_the_steps_own_grid() -> None:
    assert patch_centres((8, 8), 16)[:5] == [0, 2, 4, 6, 16]
    assert patch_centres((24, 24), 16)[:2] == [2 * 24 + 2, 2 * 24 + 8]
    wide = Plan.scales(((4, 9),)).steps[0]
    assert window(wide, 36, 4) == [0 * 9 + 1, 0 * 9 + 5, 2 * 9 + 1, 2 * 9 + 5]
    assert window(wide, 20, 4) == [0, 6, 13, 19], "rows that something selected are strided"
    assert window(Plan.scales((1,)).steps[0], 1, 16) == [0]


@pytest.mark.parametrize("name", ["infinity-2b", "infinity-8b"])
def test_published_budgets_average_650_rows_at_every_scale_that_has_any(name: str) -> None:
    budgets = PRESETS[name]
    assert [budgets.mean(k) for k in range(13)] == [None] * 8 + [650.0] * 5
    drafter = budgets.rows[12][0]
    assert INFINITY.starts[12] == 6425 and drafter < budgets.rows[11][0] + 48 * 48
    table = {f"Scale {k + 1}": {**{f"Block {i}": int(n == max(row)) for i, n in enumerate(row)}, "Max": max(row),
                                "Min": min(row), "High": row.count(max(row)), "Limit": INFINITY.starts[k]}
             for k, row in enumerate(budgets.rows) if row is not None}
    assert read_budgets(json.loads(json.dumps(table)), "published") == budgets
    assert read_budgets(json.loads(json.dumps(budgets.to_json())), "ours") == budgets


@pytest.mark.parametrize(("plan", "layers"), [
    (INFINITY, 32), (Plan.scales(PLANS[256]), 16), (Plan.scales(PLANS[512]), 36), (Plan.scales((1, 2, 3, 4, 6, 8)), 6)],
    ids=["1M", "256", "512", "emoji"])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_the_budget_identity_holds_at_every_step(plan: Plan, layers: int, share: float) -> None:
    uniform = uniform_rows(plan, share)
    budgets = by_identity(plan, layers, uniform, {k: (0, layers // 2) for k in range(len(plan))})
    needed = [k for k in range(len(plan)) if plan.starts[k] > uniform]
    assert [k for k, row in enumerate(budgets.rows) if row is not None] == needed
    held = [plan.starts[needed[0] - 1]] * layers
    for k in needed:
        row = budgets.rows[k]
        assert sum(row) == uniform * layers
        assert all(0 < n <= held[layer] + plan.steps[k - 1].rows for layer, n in enumerate(row)), "more than it had"
        assert row[0] > row[1]
        held = list(row)


def test_cached_bytes_before_the_last_scale_of_1024_pixels_are_a_tenth() -> None:
    """The published 2B budgets over the real schedule of 10,521 rows, at a tiny width: memory is what is counted."""
    hook, layers, rows = ScaleKV("infinity-2b"), 32, 1
    network = type("Network", (), {"remembered": tuple(f"base.{i}.kv" for i in range(layers))})()
    memory = Memory(INFINITY.length)
    generator = torch.Generator().manual_seed(0)
    for k, span in enumerate(INFINITY.spans(0, 13)[:12]):
        n = span.hi - span.lo
        step = torch.full((1, n), k)
        part = Rows(INFINITY.cells[None, span.lo:span.hi], step, INFINITY.spans(k, k + 1), n, INFINITY.visible, False)
        ctx = Context(memory, [hook], plan=INFINITY, network=network)
        for address in network.remembered:
            q = torch.randn(rows, 1, n, 2, generator=generator)
            ctx.offer("bare query", lambda q=q: q, part)
            memory.append(address, q, q, part.tags, n)
            hook.after(ctx, address, network.remembered.index(address), q, part)
        memory.settle(n, part.tags)
    full = layers * 6425 * rows * 2 * 2 * 4
    assert memory.bytes() / full == pytest.approx(650 / 6425, rel=0.02)
    assert full / memory.bytes() >= 9


@pytest.mark.parametrize(("name", "settings"), [("snapkv", {"window": 4}), ("pyramidkv", {"window": 4, "beta": 4.0}),
                                                ("sliding-window", {"sinks": 3})])
def test_baselines_keep_their_share_and_attend_as_masked(name: str, settings: dict[str, float]) -> None:
    masked, _, run = against_masked(nextscale.hook(name, share=0.3, **settings), until=5)
    assert masked.worst < 1e-5 and masked.compared >= 3
    _, run = drawn([nextscale.hook(name, share=0.3, **settings)], until=4)
    lengths = [group.length for groups in run.memory.groups.values() for group in groups]
    assert sum(lengths) == 2 * round(0.3 * 34)
    if name == "sliding-window":
        (group,) = run.memory.groups["base.0.kv"]
        assert group.tags.step[0].tolist() == [0, 1, 1] + [3] * 7
    if name == "pyramidkv":
        assert lengths[0] > lengths[1] >= 4


def test_under_previous_only_visibility_hidden_rows_are_the_first_to_go() -> None:
    system = tiny_var(((1, 1), (2, 2), (3, 3), (4, 4)))
    plan = replace(system.plan, visible=PREVIOUS_ONLY)
    run = Run.start(plan, system.tokenizer.quantiser, ClassCondition(system.labels, torch.zeros(1, 1).long()),
                    ("conditional",), Keyed.from_seeds([0]), 1)
    hook = ScaleKV({"budgets": [None, None, None, [10, 10]], "window": 4}, kernel=1)
    with torch.no_grad():
        for _ in sample_steps(system, run, Unguided(), (), [hook], until=3, check=True):
            pass
    assert int(run.memory.groups["base.0.kv"][0].tags.step.min()) == 1, "the first step's row, no longer seen, is gone"


def test_drafters_are_the_pairs_of_lowest_selectivity_within_their_step() -> None:
    plan = Plan.scales((1, 2, 3, 4))
    index = torch.tensor([[0.0, 0.5, 0.9, 0.1], [0.0, 0.5, 0.1, 0.2], [0.0, 0.5, 0.8, 0.3]]).double()
    assert find_drafters(index, plan, 4, 0.01) == {2: [1], 3: [0]}
    assert find_drafters(index, plan, 99, 0.01) == {}


def test_measurements_are_means_over_pictures_whatever_the_batch() -> None:
    system = tiny_var()

    def own(seen: Observed) -> torch.Tensor:
        assert seen.probabilities.sum(-1).allclose(torch.ones(()))
        assert seen.of_branch(seen.output, "unconditional").shape[0] * 2 == len(seen.output)
        return seen.probabilities[..., -seen.own:].sum(-1).mean((1, 2))

    labels = [0, 1, 2]
    found = [grid_of(measure(system, {"own": own}, labels, batch_size=size)["own"], 2, 4) for size in (1, 3)]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert found[0][:, 0].tolist() == pytest.approx([1, 1])


def test_calibration_writes_budgets_that_the_command_line_draws_with(tmp_path: Path) -> None:
    out, model = tmp_path / "budgets.json", str(tmp_path / "model")
    folders.save(tiny_var(), Path(model))
    settings = ["--set", "share=0.5", "--set", "window=4"]
    assert command(["calibrate", "scalekv", "--model", model, "--count", "2", *settings, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    budgets = read_budgets(found, str(out))
    assert budgets.mean(3) == 7 and budgets.window == 4 and len(found["selectivity"]) == 2
    picture = tmp_path / "x.png"
    assert command(["generate", "--model", model, "--hook", f"scalekv budgets={out}", "--label", "1", "--out",
                    str(picture)]) == 0
    assert picture.is_file()
    assert command(["calibrate", "scalekw", "--model", model, "--out", str(out)]) == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"budgets": "infinity2b"}, "did you mean 'infinity-2b'"), ({"share": 0.0}, "must lie above 0"),
    ({"kernel": 4}, "must be odd"), ({"budgets": {"budgets": [None, [1, 2], [3]]}}, "for every layer"),
    ({"budgets": {"heads": 3}}, "these are no budgets"), ({"window": 0}, "at least one row")])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nextscale.hook("scalekv", **settings)


def test_a_file_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="no calibration that can be read"):
        nextscale.hook("scalekv", budgets="nowhere/budgets.json")


@pytest.mark.parametrize(("hook", "message"), [
    (ScaleKV("infinity-2b"), "13 steps of 32 layers, this model has 5 of 2"), (ScaleKV(share=0.1), "no room beside"),
    (ScaleKV(share=0.9, drafters=(2,)), "layers are 0 to 1")], ids=["preset", "small", "drafters"])
def test_budgets_that_dont_fit_the_model_are_refused_before_the_first_step(hook: ScaleKV, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drawn([hook])


def test_a_model_that_remembers_no_keys_is_refused() -> None:
    generator = HMARGenerator.__new__(HMARGenerator)
    with pytest.raises(InputError, match="HMARGenerator remembers no keys"):
        ScaleKV().prepare(SimpleNamespace(generator=generator), INFINITY, ())
