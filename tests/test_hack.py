"""HACK: head classes, budgets by class, what stays, merging, and the reordering of heads."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from policies import against_masked, drawn, plan_rows
from tiny import PHRASES, fill, tiny_var

import nextscale
from nextscale.acceleration.calibration import Observed
from nextscale.acceleration.hack import HACK, Calibration, classify, column_variance, group_heads, merge_evicted
from nextscale.cli.main import run as command
from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.layers.memory import Memory
from nextscale.plan import Plan
from nextscale.run import Rows
from nextscale.systems import folders
from nextscale.systems.var import PLANS

INFINITY = Plan.scales((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
HEADS = {"contextual": [[True, False, False], [True, False, True]]}  # half of the heads, unequally many a layer
ROWS = 1 + 4 + 9 + 20 + 36


def test_nothing_compressed_is_the_model_itself_bit_for_bit() -> None:
    _, with_it = drawn([HACK(HEADS, compression=0.0)])
    _, without = drawn([])
    assert torch.equal(with_it.canvas.value, without.canvas.value)
    for one, other in zip(with_it.log_probs, without.log_probs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, {"kernel": 3, "stored": 0.7}], ids=["hack", "hack++"])
def test_attention_is_full_attention_with_each_heads_dropped_rows_masked(settings: dict[str, float]) -> None:
    masked, _, _ = against_masked(HACK(HEADS, compression=0.5, merge=False, **settings))
    assert masked.worst < 1e-5 and masked.compared == 6, "two layers read less than everything in three steps"


def test_heads_keep_the_mean_budget_and_structural_ones_their_first_scales() -> None:
    """70 rows, half of them: contextual heads 12, structural ones 58, once both have more than that."""
    hook = HACK(HEADS, compression=0.5, merge=False)
    masked, system, run = against_masked(hook)
    few, many = hook.budgets(system.plan, 0.5)
    assert (few, many) == (12, 58) and (few + many) / 2 == ROWS / 2
    lengths = [n for address in ("base.0.kv", "base.1.kv") for n in masked.lengths[address][-1]]
    assert sorted(lengths) == [few] * 3 + [many] * 3
    held = run.memory.bytes() / (run.memory.groups["base.0.kv"][0].k.shape[0] * 2 * 3 * ROWS * 16 * 2 * 4)
    assert held == pytest.approx(0.5, rel=0.02)
    for layer, row in enumerate(HEADS["contextual"]):
        structural = run.memory.groups[f"base.{layer}.kv"][1]
        rows = plan_rows(structural.tags, system.plan, 4, row.count(False))
        assert rows[..., :5].tolist() == torch.arange(5).expand_as(rows[..., :5]).tolist()
        assert int((rows >= 34).sum(-1).min()) == 36, "all of the last map is kept, too"


def test_a_last_map_larger_than_the_budget_is_kept_in_part() -> None:
    """VAR-d30 at 70%: 204 rows a head, fewer than the last map's 256."""
    hook = HACK({"contextual": [[False, False, False]] * 2}, compression=0.6)
    system, run = drawn([hook])
    (group,) = run.memory.groups["base.0.kv"]
    rows = plan_rows(group.tags, system.plan, 4, 3)
    assert rows.shape[-1] == round(0.4 * ROWS) == 28
    assert (rows[..., :5] == torch.arange(5)).all() and (rows[..., 5:] >= 34).all()
    assert HACK({"contextual": [[False]]}).budgets(Plan.scales(PLANS[256]), 0.7)[1] == 204


def test_budgets_average_to_what_was_asked_for() -> None:
    for plan in (INFINITY, Plan.scales(PLANS[256])):
        for alpha in (1, 3, 5):
            hook = HACK({"contextual": [[h < alpha for h in range(6)]]})
            for compression in (0.1, 0.3, 0.5, 0.7, 0.9):
                few, many = hook.budgets(plan, compression)
                mean = (alpha * few + (6 - alpha) * many) / 6
                assert abs(mean - (1 - compression) * plan.length) < 1 and few <= many <= plan.length


def test_1024_pixels_at_70_percent_hold_3_times_less_and_score_2_times_fewer_pairs() -> None:
    """Counted over the schedule of 10,521 rows, 68.5 million pairs a head."""
    hook, table = HACK({"contextual": [[True, False]] * 2}), 2
    few, many = hook.budgets(INFINITY, 0.7)
    full = reduced = held = 0
    lengths = {few: 0, many: 0}
    for step in INFINITY:
        for budget in (few, many):
            lengths[budget] = min(budget, lengths[budget] + step.rows)
            reduced += step.rows * lengths[budget]
        full += table * step.rows * INFINITY.starts[INFINITY.steps.index(step) + 1]
        held = sum(lengths.values())
    assert full / table == pytest.approx(68.5e6, rel=0.01) and full == table * INFINITY.pairs
    assert table * INFINITY.length / held > 3 and full / reduced > 2


def test_cached_bytes_of_1024_pixels_are_30_percent() -> None:
    classes = [[h < (layer % 3) for h in range(2)] for layer in range(6)]
    hook = HACK({"contextual": classes}, compression=0.7)
    network = type("Network", (), {"remembered": tuple(f"base.{i}.kv" for i in range(6))})()
    memory, generator = Memory(INFINITY.length), torch.Generator().manual_seed(0)
    for k, span in enumerate(INFINITY.spans(0, 13)):
        n = span.hi - span.lo
        part = Rows(INFINITY.cells[None, span.lo:span.hi], torch.full((1, n), k), INFINITY.spans(k, k + 1), n,
                    INFINITY.visible, False)
        ctx = Context(memory, [hook], plan=INFINITY, network=network)
        for layer, address in enumerate(network.remembered):
            q = torch.randn(1, 2, n, 2, generator=generator)
            ctx.scratch["scale", address] = 1.0
            memory.append(address, q, q, part.tags, n)
            if k < 12:
                hook.before(ctx, address, layer, q, part)
            else:
                HACK({"contextual": classes}, compression=0.7, merge=False).before(ctx, address, layer, q, part)
        memory.settle(n, part.tags)
    assert memory.bytes() / (6 * 2 * INFINITY.length * 2 * 2 * 4) == pytest.approx(0.3, rel=0.02)


def test_dropped_rows_are_averaged_into_the_kept_ones_most_like_them() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.2], [0.1, 3.0], [0.3, 0.9]])[None, None]
    v = torch.arange(5.0)[:, None].expand(5, 2)[None, None]
    keys, values = merge_evicted(k, v, torch.tensor([[[0, 3]]]))
    torch.testing.assert_close(keys[0, 0], torch.stack([k[0, 0, [0, 2]].mean(0), k[0, 0, [1, 3, 4]].mean(0)]))
    assert values[0, 0, :, 0].tolist() == pytest.approx([1.0, 8 / 3])


def test_merging_acts_on_contextual_heads_in_the_last_step_alone() -> None:
    _, merged = drawn([HACK(HEADS, compression=0.5)])
    _, plain = drawn([HACK(HEADS, compression=0.5, merge=False)])
    for one, other in zip(merged.log_probs[:-1], plain.log_probs[:-1], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(merged.log_probs[-1], plain.log_probs[-1])
    assert torch.equal(merged.memory.groups["base.0.kv"][1].k, plain.memory.groups["base.0.kv"][1].k)


@pytest.mark.parametrize("l2", [True, False])
def test_reordering_heads_changes_nothing_but_float_noise(l2: bool) -> None:
    grids = ((1, 1), (2, 2), (3, 3), (4, 4))
    system, moved = (tiny_var(grids, l2_attention=l2) for _ in range(2))
    classes = ((False, True, False), (False, False, True))
    assert group_heads(moved.generator, classes) == ((True, False, False), (True, False, False))
    before, after = (model.generator.blocks[0].attention.qkv.weight for model in (system, moved))
    assert not torch.equal(before, after)
    tokens = [torch.randint(32, (2, n), generator=torch.Generator().manual_seed(n)) for n in (1, 4, 9, 16)]
    one, other = (model.log_prob(tokens, [1, 2]).token for model in (system, moved))
    assert float((one - other).abs().max()) < 1e-5
    pictures = [model.generate([1, 2], output="torch", progress=False, hooks=[HACK({"contextual": [list(row) for row in
                table]}, compression=0.5)]).tokens for model, table in ((system, classes),
                (moved, ((True, False, False),) * 2))]
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))
    with pytest.raises(InputError, match="not that of this network"):
        group_heads(moved.generator, classes[:1])


def test_variance_is_taken_over_the_queries_of_a_key_and_heads_are_ranked_over_all_layers() -> None:
    stripes = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 4)
    diagonal = torch.eye(4) * 0.8 + 0.05
    seen = Observed.__new__(Observed)
    object.__setattr__(seen, "__dict__", {"probabilities": torch.stack([stripes, diagonal])[None]})
    low, high = column_variance(seen)[0].tolist()
    assert low == pytest.approx(0, abs=1e-6) and high > 0.1
    table = classify(torch.tensor([[0.1, 0.2], [0.3, 0.05], [0.9, 0.8]]), 0.5)
    assert table == [[True, True], [False, True], [False, False]], "not as many in every layer"


def test_calibration_tells_the_shipped_models_heads_apart_and_draws_with_them(tmp_path: Path) -> None:
    system = nextscale.load("emoji-text-64")
    batch, more = (torch.tensor(Calibration().run(system, phrases, progress=False)["variance"])
                   for phrases in (PHRASES[:4], PHRASES[4:]))
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (batch, more)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
    small, out = tiny_var(), tmp_path / "heads.json"
    fill(small, 3)
    folders.save(small, tmp_path / "model")
    model = str(tmp_path / "model")
    assert command(["calibrate", "hack", "--model", model, "--count", "2", "--out", str(out)]) == 0
    assert sum(sum(row) for row in json.loads(out.read_text())["contextual"]) == 3
    assert command(["generate", "--model", model, "--hook", f"hack heads={out} compression=0.5", "--label", "1",
                    "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "heads are missing"), ({"heads": HEADS, "compression": 1.0}, "below 1"),
    ({"heads": {"contextual": [[1, 0]]}}, "true or false"), ({"heads": HEADS, "stored": 0.1}, "below compression"),
    ({"heads": HEADS, "kernel": 2}, "kernel odd"), ({"heads": "emoji"}, "unknown heads")])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nextscale.hook("hack", **settings)


def test_heads_of_another_model_and_budgets_too_small_are_refused() -> None:
    with pytest.raises(InputError, match="those of 1 layers, this model has 2"):
        drawn([HACK({"contextual": [[True, False, False]]})])
    with pytest.raises(InputError, match="are 2 in the table, 3 here"):
        drawn([HACK({"contextual": [[True, False]] * 2})])
    with pytest.raises(InputError, match="fewer than the 5 of the first 2 steps"):
        drawn([HACK({"contextual": [[False, False, False]] * 2}, compression=0.95)])
