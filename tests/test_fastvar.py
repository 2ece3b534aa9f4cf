"""FastVAR: published counts, what is kept and restored, what it saves, and the systems that carry it."""
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_car
import test_flexvar
import test_flowar
import test_hmar
import test_m_var
import test_mar
import test_nfig
import torch
from tiny import PHRASES, emoji, tiny_var
from torch import Tensor

import nextscale
from nextscale.acceleration.fastvar import (
    PRESETS,
    FastVAR,
    kept_rows,
    largest,
    pivotal_score,
    to_map,
    upsampled,
)
from nextscale.cli import main
from nextscale.context import Context
from nextscale.errors import InputError
from nextscale.evaluation.flops import counted_flops
from nextscale.layers.memory import Memory
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Rows, Run
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.var import PLANS, VAR

INFINITY = Plan.scales(PRESETS["infinity-1m"].sides)
HART = Plan.scales(PRESETS["hart-1024"].sides)
RECTANGLES = ((1, 1), (2, 1), (3, 2), (4, 3), (6, 4))


# Published counts

def test_infinity_keeps_its_published_rows_and_lengths_of_memory() -> None:
    hook = FastVAR(preset="infinity-1m")
    assert INFINITY.length == 10521 and INFINITY.grids[hook.cached_step(INFINITY)] == (24, 24)
    assert hook.rows(INFINITY)[9:] == (615, 800, 0, 0) and hook.steps(INFINITY) == 11
    assert list(hook.pruned_blocks(32)) == list(range(3, 28))
    cost = hook.cost(INFINITY, 32)
    assert cost.lengths[0] == cost.lengths[2] == cost.lengths[28] == 4121
    assert cost.lengths[3] == cost.lengths[10] == cost.lengths[27] == 1497 + 615 + 800 == 2912
    assert 3.3 < FastVAR(0.0).cost(INFINITY, 32).token_layers / cost.token_layers < 3.32


def test_hart_keeps_its_published_rows() -> None:
    hook = FastVAR(preset="hart-1024")
    assert hook.rows(HART)[12:] == (1152, 1024) and hook.steps(HART) == len(HART)
    assert HART.grids[hook.cached_step(HART)] == (36, 36)
    assert list(hook.pruned_blocks(24)) == list(range(24))


@pytest.mark.parametrize("size", [256, 512])
def test_the_port_to_var_caches_before_its_last_two_steps_and_keeps_a_tenth_of_the_blocks_full(size: int) -> None:
    hook, plan = FastVAR(preset=f"var-{size}"), Plan.scales(PLANS[size])
    assert plan.grids[hook.cached_step(plan)] == {256: (10, 10), 512: (18, 18)}[size]
    assert hook.rows(plan)[-2:] == {256: (102, 128), 512: (346, 512)}[size]
    assert [list(hook.pruned_blocks(depth))[::len(hook.pruned_blocks(depth)) - 1] for depth in (16, 30)] == [
        [2, 13], [3, 26]]


def test_steps_are_told_by_their_number_where_widths_would_mislead() -> None:
    """Infinity's schedule at 3:4 has a width of 48 in the middle, and none with 576 cells."""
    sides = ((1, 1), (2, 2), (3, 4), (6, 8), (9, 12), (12, 16), (15, 20), (18, 24), (24, 32), (30, 40), (36, 48),
             (48, 64), (54, 72))
    hook, plan = FastVAR(preset="infinity-1m"), Plan.scales(sides)
    assert hook.cached_step(plan) == 8 and hook.steps(plan) == 11
    assert hook.rows(plan)[9:] == (720, 864, 0, 0)


# Selection and restoration

def test_rows_far_from_the_mean_are_kept_the_farthest_first_for_every_row_of_the_batch() -> None:
    x = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(0)) + 5
    distance = (x - x.mean(1, keepdim=True)).norm(dim=-1)
    assert torch.equal(largest(pivotal_score(x), 11), distance.argsort(1, descending=True)[:, :11])
    assert kept_rows(1024, 0.4) == 615 and kept_rows(3, 0.3) == 3


def test_restored_cells_are_means_of_the_cells_they_overlap() -> None:
    rows = torch.randn(2, 2 * 4 * 3, 5, generator=torch.Generator().manual_seed(0))
    found = upsampled(to_map(rows, 2, (4, 3)), 2, (6, 5)).unflatten(1, (2, 6, 5))
    small = rows.unflatten(1, (2, 4, 3))
    for i in range(6):
        for j in range(5):
            part = small[:, :, i * 4 // 6:math.ceil((i + 1) * 4 / 6), j * 3 // 5:math.ceil((j + 1) * 3 / 5)]
            torch.testing.assert_close(found[:, :, i, j], part.mean((2, 3)))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("maps", [1, 2])
def test_a_cache_of_the_true_output_restores_every_row(ratio: float, maps: int) -> None:
    plan = Plan.scales([(3, 4), (3, 4)], maps=maps)
    network = SimpleNamespace(name="base", config=SimpleNamespace(depth=1))
    ctx = Context(Memory(plan.length), [FastVAR(ratio)], plan=plan, network=network)
    x, seen = torch.randn(2, 12 * maps, 6, generator=torch.Generator().manual_seed(0)), []

    def f(x: Tensor, rows: Rows) -> Tensor:
        seen.append(x.shape[1])
        return x.sin()

    step = plan.step_of_row[None]
    rows = Rows(plan.cells[None], step, plan.spans(0, 2), plan.length, plan.visible, masked=True)
    for _, part in rows.by_step():
        out = ctx.residual("base.0", "mlp", x, f, part)
        torch.testing.assert_close(out, x + x.sin())
    assert seen == [12 * maps, kept_rows(12 * maps, ratio)]


# What it saves

def started(system: VAR, pictures: int = 2) -> Run:
    return system.start(torch.arange(pictures)[:, None], ClassifierFree(2.0), Keyed.from_seeds(range(pictures)))


def flops_of(system: VAR, hooks: list[FastVAR]) -> tuple[Run, int]:
    run = started(system)
    with torch.no_grad(), counted_flops() as flops:
        for _ in sample_steps(system, run, ClassifierFree(2.0), (), hooks):
            pass
    return run, flops.total


@pytest.mark.parametrize("hook", [FastVAR((0.4, 0.5), (0, 1)), FastVAR(0.75, (1, 0)), FastVAR((0.25, 0.25, 0.9))],
                         ids=["two", "one", "three"])
def test_memory_and_arithmetic_are_what_the_plan_says(hook: FastVAR) -> None:
    system = tiny_var(RECTANGLES, depth=3)
    run, flops = flops_of(system, [hook])
    without, all_flops = flops_of(system, [])
    cost, whole = (one.cost(system.plan, 3, 48) for one in (hook, FastVAR(0.0)))
    assert tuple(run.memory.groups[f"base.{i}.kv"][0].length for i in range(3)) == cost.lengths
    assert tuple(without.memory.groups[f"base.{i}.kv"][0].length for i in range(3)) == whole.lengths
    assert all_flops - flops == 4 * (whole.flops - cost.flops)  # two pictures, two branches


@pytest.mark.parametrize("hook", [FastVAR((0.4, 0.5), (0, 1)), FastVAR(0.75, (1, 0)), FastVAR((0.5, 1.0), (0, 1)),
                                  FastVAR((0.25, 0.25, 0.9), restore="zero")], ids=["two", "one", "left out", "three"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_have_room_for_the_rows_that_are_computed_and_no_more(hook: FastVAR, precision: str) -> None:
    """From the first step on, layer by layer; at the end they are full."""
    system = tiny_var(RECTANGLES, depth=3).to_precision(precision)
    lengths, element = hook.cost(system.plan, 3).lengths, 4 if precision == "fp32" else 2
    with torch.no_grad():
        for run in sample_steps(system, started(system), ClassifierFree(2.0), (), [hook]):
            held = [(group.k, group.v) for (group,) in run.memory.groups.values()]
            rooms = [sum(t.untyped_storage().nbytes() for t in both) for both in held]
            assert rooms == [2 * 2 * 2 * 48 * rows * element for rows in lengths]
    assert run.cursor == hook.steps(system.plan)
    assert run.memory.bytes() == sum(rooms) + sum(t.nbytes for t in run.memory.state.values())


def test_a_run_that_was_stopped_gets_room_for_the_steps_that_it_goes_on_to() -> None:
    system, hook = tiny_var(RECTANGLES, depth=3), FastVAR((0.4, 0.5), (0, 1))
    with torch.no_grad():
        *_, whole = sample_steps(system, started(system), ClassifierFree(2.0), (), [hook])
        run = started(system)
        for until in (2, 4, 5):
            for _ in sample_steps(system, run, ClassifierFree(2.0), (), [hook], until=until):
                pass
            held = [(group.k.shape[2], group.length) for (group,) in run.memory.groups.values()]
            assert all(room == length for room, length in held), until
    assert all(torch.equal(a, b) for a, b in zip(run.tokens, whole.tokens, strict=True))


def test_a_step_left_out_leaves_its_arithmetic_out_and_the_picture_as_it_was_before_it() -> None:
    system = tiny_var(RECTANGLES, depth=3)
    options: dict[str, Any] = {"output": "torch", "seed": 5}
    *_, before, _ = system.stream([1, 2], **options)
    found = system.generate([1, 2], hooks=[FastVAR(1.0)], progress=False, **options)
    assert len(found.tokens) == len(RECTANGLES) - 1
    assert torch.equal(found.images, before.images)
    assert FastVAR((0.5, 1.0)).cost(system.plan, 3).rows == (1, 2, 6, 6, 0)


# What carries it

def drawn(system: Any, hook: FastVAR | None, **options: Any) -> list[Tensor]:
    hooks = [] if hook is None else [hook]
    found: list[Tensor] = system.generate([1, 2, 3], seed=3, hooks=hooks, output="torch", progress=False,
                                          **options).tokens
    return found


SYSTEMS: dict[str, Callable[[], Any]] = {
    "var": lambda: tiny_var(RECTANGLES), "flexvar": test_flexvar.tiny, "nfig": test_nfig.tiny,
    "m_var": test_m_var.tiny, "flowar": test_flowar.tiny, "hmar": lambda: test_hmar.tiny(((1,), (4,), (9,), (8, 8))),
    "car": test_car.tiny}


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_carry_it_and_are_themselves_where_nothing_is_pruned(name: str) -> None:
    system = SYSTEMS[name]()
    options = {"control": test_car.maps(3)} if name == "car" else {}
    base = drawn(system, None, **options)
    for neutral in (FastVAR(0.0, (0, 0)), FastVAR((0.0, 0.001), (0, 0))):
        same = drawn(system, neutral, **options)
        assert all(torch.equal(a, b) for a, b in zip(base, same, strict=True))
    pruned = drawn(system, FastVAR(0.6, (0, 0)), **options)
    assert all(torch.equal(a, b) for a, b in zip(base[:-1], pruned[:-1], strict=True))
    assert not torch.equal(base[-1], pruned[-1])
    assert len(drawn(system, FastVAR((0.5, 1.0), (0, 0)), **options)) == len(base) - 1


def test_it_works_in_bfloat16() -> None:
    system = tiny_var(RECTANGLES).to_precision("bf16")
    pruned, base = drawn(system, FastVAR((0.5, 0.5))), drawn(system, None)
    assert all(torch.equal(a, b) for a, b in zip(pruned[:3], base[:3], strict=True))
    assert not torch.equal(pruned[-1], base[-1])


def test_other_rows_and_nothing_restored_draw_other_pictures() -> None:
    system = tiny_var(RECTANGLES)
    found = [drawn(system, FastVAR((0.5, 0.5), score=score, restore=restore))[-1]
             for score in ("pivotal", "random") for restore in ("cached", "zero")]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@torch.no_grad()
def test_cached_restoration_keeps_the_shipped_model_closer_to_itself_than_what_it_is_compared_with() -> None:
    system = nextscale.load("emoji-text-64")
    used = system.settings_for("pictures", {})
    guidance = system.guidance(used)

    def latent(hooks: list[FastVAR]) -> Tensor:
        labels = system.label_rows(PHRASES)
        *_, run = system.loop(system.start(labels, guidance, Keyed.from_seeds(range(8))), guidance, used, hooks, None)
        return run.canvas.value

    base = latent([])
    cached, zero, chance = (float((latent([hook]) - base).square().mean())
                            for hook in (FastVAR(0.5), FastVAR(0.5, restore="zero"), FastVAR(0.5, score="random")))
    assert 0 < cached < zero and cached < chance


def test_the_command_line_draws_with_it(tmp_path: Path) -> None:
    folders.save(tiny_var(RECTANGLES), tmp_path / "model")
    out = [str(tmp_path / name) for name in ("a.png", "b.png")]
    plain = ["generate", "--model", str(tmp_path / "model"), "--label", "1", "--out"]
    assert main.run([*plain, out[0]]) == main.run([*plain, out[1], "--hook", "fastvar ratio=[0.5,0.5]"]) == 0
    assert Path(out[0]).read_bytes() != Path(out[1]).read_bytes()


# What it refuses

@pytest.mark.parametrize(("settings", "message"), [
    ({"ratio": 1.2}, "from 0 to 1"), ({"ratio": ()}, "from 0 to 1"), ({"ratio": (1.0, 0.5)}, "must come last"),
    ({"preset": "infinity-2m"}, "did you mean 'infinity-1m'"), ({"score": "all"}, "pivotal or random"),
    ({"restore": "none"}, "cached or zero"), ({"full_blocks": (-1, 0)}, "at least 0")])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FastVAR(**settings)


@pytest.mark.parametrize(("hooks", "message"), [
    ([FastVAR(0.5), FastVAR(0.4)], "twice"), ([FastVAR((0.5,) * 5)], "none to run in full"),
    ([FastVAR(preset="var-256")], "is for 10 steps, this plan has 5"),
    ([FastVAR(0.5, (1, 1))], "none of 2 blocks is left")])
def test_what_cannot_be_is_refused_before_the_first_step(hooks: list[FastVAR], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_var(RECTANGLES).generate([1], hooks=hooks, progress=False)


def test_parts_of_grids_and_passes_without_memory_are_refused() -> None:
    with pytest.raises(InputError, match="predicts a part of its grid"):
        test_mar.tiny().generate([1], hooks=[FastVAR(0.5)], progress=False)
    with pytest.raises(InputError, match="needs a run's memory"):
        tiny_var().log_prob(emoji(1), [1], hooks=[FastVAR(0.5)])


def test_a_hook_that_comes_behind_the_cached_step_is_refused() -> None:
    system = tiny_var(RECTANGLES)
    run = started(system)
    with torch.no_grad():
        list(sample_steps(system, run, ClassifierFree(2.0), (), (), until=4))
        with pytest.raises(InputError, match="nothing is remembered of step 3"):
            list(sample_steps(system, run, ClassifierFree(2.0), (), [FastVAR(0.5)]))
