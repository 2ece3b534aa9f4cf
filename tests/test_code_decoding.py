"""CoDe: two networks on one run, what crosses the border, what it costs, and the training of both parts."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, emoji, empty_canvas, fill, labels, random_tokens, tiny_var
from torch import Tensor

import nextscale
from nextscale.acceleration.code_decoding import Only, check_pair, hooks_of, relative_cost, sample_collaboratively
from nextscale.cli import main, options
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context, Hook
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.var import VARGeneratorConfig
from nextscale.noise import Keyed
from nextscale.objectives.distillation import divergence
from nextscale.plan import OWN_STEP, Plan
from nextscale.run import Call, Rows, Run
from nextscale.sampling.editing import KnownLatent, partial_canvases
from nextscale.sampling.filters import make_filters
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import folders
from nextscale.systems.code_decoding import CollaborativeSystem, pair, preset_config
from nextscale.systems.var import VAR, VARConfig
from nextscale.systems.var import preset_config as var_preset
from nextscale.tokenizers.config import TokenizerConfig

QUIET: dict[str, Any] = {"output": "torch", "progress": False}


def narrow(seed: int = 1, tokenizer: VAR | None = None, **changes: Any) -> VAR:
    """A smaller network than ``tiny_var``'s, on the same tokenizer."""
    system = VAR(VARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), VARGeneratorConfig(1, 32, 2), (5,), **changes))
    fill(system, seed)
    system.tokenizer.load_state_dict((tokenizer or tiny_var()).tokenizer.state_dict())
    return system.eval()


def tiny_pair(draft_steps: int = 2, depth: int = 2) -> CollaborativeSystem:
    wide = tiny_var(depth=depth)
    return pair(wide, narrow(tokenizer=wide, settings=wide.config.settings), draft_steps)


@pytest.mark.parametrize("settings", [
    {"top_k": 1, "top_p": None},
    {"top_k": (3, 5, 9, 20), "temperatures": (1.1, 1.1, 0.9, 1.0), "temperature_last": True}])
def test_one_network_in_both_roles_draws_what_it_draws_alone_for_every_number_of_drafted_steps(settings: Any) -> None:
    system = tiny_var()
    alone = system.generate([1, 2, 3], seed=4, **settings, **QUIET)
    both = pair(system, system, 1)
    for steps in range(len(GRIDS) + 1):
        drawn = both.generate([1, 2, 3], seed=4, draft_steps=steps, **settings, **QUIET)
        assert all(torch.equal(a, b) for a, b in zip(alone.tokens, drawn.tokens, strict=True)), steps
        torch.testing.assert_close(drawn.log_prob, alone.log_prob, atol=2e-3, rtol=0)


def test_the_entry_call_equals_the_steps_that_it_takes_the_place_of() -> None:
    """Works means 2: one masked call over the prefix, and the cached calls one by one."""
    system, tokens = tiny_var(), random_tokens(tiny_var().plan, 2)
    guidance, hidden = ClassifierFree(2.0), []
    run = system.start(labels(2), guidance, Keyed.from_seeds([0, 1]))
    with torch.no_grad():
        for given in tokens:
            call = system.generator.call(run)
            hidden.append(evaluator(system.generator, run, check=True)(call))
            run.force(given)
            if not run.done:
                other = run.hand_over(run.condition)
                entry = system.generator.call(other)
                found = evaluator(system.generator, other, check=True)(entry)
                assert entry.predicts == slice(run.plan.starts[run.cursor], run.plan.starts[run.cursor + 1])
                torch.testing.assert_close(found[:, :entry.predicts.start], torch.cat(hidden, 1), atol=2e-5, rtol=1e-5)


def test_the_entry_call_is_masked_step_by_step_and_later_ones_are_not() -> None:
    """Works means 3: rows of scale i see e[i] keys; then nothing is hidden."""
    seen: list[Rows] = []

    class Watch(Hook):
        def inputs(self, run: Run, call: Call) -> Call:
            seen.append(call.rows)
            return call

    tiny_pair(2).generate([1], hooks=[Only("refiner", Watch())], **QUIET)
    plan, (entry, last) = tiny_var().plan, seen
    assert len(entry) == plan.starts[3] and entry.masked and not last.masked
    sees = entry.visible.sees(entry.step[0, :, None], entry.step[0, None])
    assert sees.sum(1).tolist() == [plan.starts[k + 1] for k in plan.step_of_row[:len(entry)].tolist()]


def test_the_drafter_draws_the_first_scales_and_the_refiner_the_others() -> None:
    system, used = tiny_pair(2), {"seed": 5, **QUIET}
    wide, small = (system.generate([1, 2], draft_steps=n, **used).tokens for n in (4, 0))
    drawn = system.generate([1, 2], **used).tokens
    assert all(torch.equal(a, b) for a, b in zip(drawn[:2], wide[:2], strict=True))
    assert not torch.equal(torch.cat(drawn[2:], 1), torch.cat(wide[2:], 1))
    assert not torch.equal(torch.cat(drawn, 1), torch.cat(small, 1))
    assert [preview.step for preview in system.stream([1, 2], **{"seed": 5, "output": "torch"})] == [0, 1, 2, 3]
    *_, last = system.stream([1, 2], seed=5, output="torch")
    assert torch.equal(last.images, system.generate([1, 2], **used).images)


def test_log_prob_is_that_of_what_was_drawn_and_of_each_network_for_its_scales() -> None:
    system = tiny_pair(2)
    used = system.settings_for("pictures", {"guidance_scale": 3.0})
    drawn = system.generate([1, 2], seed=5, guidance_scale=3.0, **QUIET)
    found = system.log_prob(drawn.tokens, [1, 2], system.guidance(used), system.filters(used))
    torch.testing.assert_close(found.picture, drawn.log_prob, atol=2e-3, rtol=1e-4)
    plain, parts = system.log_prob(emoji(2), [1, 2]), (tiny_var(), narrow())
    wide, small = (one.log_prob(emoji(2), [1, 2]) for one in parts)
    torch.testing.assert_close(plain.step, torch.cat([wide.step[:, :2], small.step[:, 2:]], 1))
    ends = [system.log_prob(emoji(2), [1, 2], draft_steps=n).step for n in (0, 4)]
    torch.testing.assert_close(ends, [small.step, wide.step])


def test_going_on_from_a_gathered_run_at_any_step_equals_permuting_the_end() -> None:
    system, order = tiny_pair(2), [2, 0, 1]
    used = system.settings_for("pictures", {})
    guidance = system.guidance(used)

    def start() -> Run:
        return system.start(labels(3), guidance, Keyed.from_seeds([3, 4, 5]))

    with torch.no_grad():
        *_, whole = system.sampled(start(), guidance, used)
        for stop in (1, 2, 3):
            run = start()
            for _ in zip(range(stop), system.sampled(run, guidance, used), strict=False):
                pass
            *_, end = system.sampled(run.gather(order), guidance, used)
            assert all(torch.equal(a, b[order]) for a, b in zip(end.tokens, whole.tokens, strict=True)), stop


def test_the_drafters_memory_is_given_up_at_the_hand_over_whoever_holds_the_run() -> None:
    system = tiny_pair(2)
    held: list[Any] = []

    def callback(step: int, run: Run) -> None:
        held.append((run, weakref.ref(run.memory), run.memory.bytes()))

    class Entry(Hook):
        def inputs(self, run: Run, call: Call) -> Call:
            gc.collect()
            assert held[-1][1]() is None, "the drafter's keys and values are alive while the refiner works"
            return call

    class First(Hook):
        def inputs(self, run: Run, call: Call) -> Call:
            if run.cursor == 2:
                Entry().inputs(run, call)
            return call

    system.generate([1, 2], callback=callback, hooks=[First()], **QUIET)
    plan, rows = system.plan, 2 * 2
    assert [size for *_, size in held] == [4 * rows * plan.starts[k + 1] * 2 * (2 * 48 if k < 2 else 32)
                                           for k in range(4)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_have_room_for_what_each_network_holds_at_most_and_no_more(steps: int, precision: str) -> None:
    """The drafter's for the rows up to the hand-over; at each network's end they are full."""
    system, rooms = tiny_pair(steps).to_precision(precision), []

    def callback(step: int, run: Run) -> None:
        held = [t for groups in run.memory.groups.values() for g in groups for t in (g.k, g.v)]
        rooms.append((sum(t.untyped_storage().nbytes() for t in held), run.memory.bytes()))

    system.generate([1, 2], callback=callback, **QUIET)
    starts, element = system.plan.starts, 4 if precision == "fp32" else 2
    drafter, refiner = ((2 * 2) * depth * 2 * width * rows * element
                        for depth, width, rows in ((2, 48, starts[steps]), (1, 32, starts[4])))
    assert [room for room, _ in rooms] == [drafter] * steps + [refiner] * (4 - steps)
    assert rooms[steps - 1][1] == drafter and rooms[-1][1] == refiner


def test_the_cost_is_that_of_the_sheet() -> None:
    """Works means 5, by the published sizes: var-d30 drafts, var-d16 refines."""
    plan, sizes = Plan.scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), ((30, 1920), (16, 1024))
    found = {n: relative_cost(plan, *sizes, n) for n in (6, 7, 8, 9)}
    assert [round(found[n].flops, 3) for n in found] == [0.286, 0.380, 0.527, 0.775]
    assert [round(found[n].memory, 3) for n in found] == [0.284, 0.284, 0.375, 0.624]
    assert 1 / found[8].flops >= 1.7 and found[8].memory <= 0.4
    assert relative_cost(plan, *sizes, 10) == (1, 1) and relative_cost(plan, *sizes, 0).memory == found[6].memory


@pytest.mark.parametrize("steps", [1, 3])
def test_what_a_run_costs_is_what_the_formula_says(steps: int) -> None:
    system, wide = tiny_pair(steps), tiny_var()
    found, alone = (cost_of(one, [1, 2]) for one in (system, wide))
    share = relative_cost(system.plan, (2, 48), (1, 32), steps)
    assert found.memory_bytes / alone.memory_bytes == pytest.approx(share.memory)
    assert found.evaluations == 4 and found.rows == 4 * (system.plan.starts[steps] + system.plan.length)


def test_hooks_act_on_both_networks_or_on_one() -> None:
    class Count(Hook):
        def __init__(self) -> None:
            self.rows: list[int] = []

        def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
            if address == "base.0":
                self.rows.append(len(rows))
            return inner(x, rows)

    both, first, last = Count(), Count(), Count()
    tiny_pair(2).generate([1], hooks=[both, Only("drafter", first), Only("refiner", last)], **QUIET)
    assert (both.rows, first.rows, last.rows) == ([1, 4, 14, 16], [1, 4], [14, 16])
    assert hooks_of("drafter", [both, Only("refiner", last)]) == [both]
    with pytest.raises(InputError, match="no refiner: a hook for one of two networks is for pairs"):
        tiny_var().generate([1], hooks=[Only("refiner", last)], **QUIET)
    with pytest.raises(InputError, match="a drafter and a refiner"):
        Only("teacher", both)  # type: ignore[arg-type]


def test_the_command_line_gives_a_hook_to_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nextscale, "hook", lambda name, **settings: (name, settings))
    both, (first,) = options.make_hooks(["a", "b share=0.5"]), options.make_hooks(["drafter/b share=0.5"])
    assert both == [("a", {}), ("b", {"share": 0.5})] and (first.role, first.hook) == ("drafter", both[1])
    with pytest.raises(InputError, match="a hook for 'painter'"):
        options.make_hooks(["painter/b"])


def test_what_a_hook_of_the_refiner_refuses_is_refused_before_anything_is_drawn() -> None:
    class Refuses(Hook):
        def prepare(self, *_: Any) -> None:
            raise InputError("not on this network")

        def inputs(self, run: Run, call: Call) -> Call:
            raise AssertionError("drawn")

    with pytest.raises(InputError, match="not on this network"):
        tiny_pair(2).generate([1], hooks=[Only("refiner", Refuses()), Refuses()], **QUIET)


def test_forced_tokens_follow_the_hand_over_and_small_pictures_are_enlarged() -> None:
    system, pictures = tiny_pair(2), emoji(2)
    redraw = torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    given = system.encode(pictures)
    drawn = system.edit(pictures, redraw, [1, 2], **QUIET)
    kept = [torch.arange(16).view(4, 4)[:, :2].flatten()]
    assert torch.equal(drawn.tokens[3][:, kept[0]], given[3][:, kept[0]])
    assert not torch.equal(drawn.tokens[3], given[3])
    large = system.enlarge(pictures[:, :, ::2, ::2], [1, 2], **QUIET)
    assert len(large.tokens) == 4 and large.images.shape == pictures.shape


def test_the_latent_of_known_cells_is_kept_at_every_scale_and_only_there() -> None:
    system, pictures = tiny_pair(2), emoji(2)
    redraw = torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    canvases: list[Tensor] = []
    known = partial_canvases(system.encode(pictures), empty_canvas(system, 2))

    class Watch(Hook):
        def end(self, run: Run, step: int) -> None:
            canvases.append(run.canvas.value)

    keep = torch.zeros(2, 1, 4, 4)
    keep[..., :2] = 1
    drawn = system.generate([1, 2], hooks=[KnownLatent(known, keep), Watch()], **QUIET)
    for k, canvas in enumerate(canvases):
        assert torch.equal(canvas[..., :2], known[:, k, ..., :2]) and not torch.equal(canvas, known[:, k]), k
    edited = system.edit(pictures, redraw, [1, 2], rule="latent", **QUIET)
    assert torch.equal(edited.images, drawn.images)
    again = system.edit(pictures, torch.zeros_like(redraw), [1, 2], rule="latent", **QUIET)
    torch.testing.assert_close(again.images, system.tokenizer.decode(known[:, -1]))
    anew = system.edit(pictures, torch.ones_like(redraw), [1, 2], rule="latent", seed=3, **QUIET)
    assert torch.equal(anew.images, system.generate([1, 2], seed=3, **QUIET).images)
    assert not torch.equal(drawn.images, again.images) and not torch.equal(drawn.images, anew.images)
    with pytest.raises(InputError, match="rule 'pixels' is unknown"):
        system.edit(pictures, redraw, rule="pixels")  # type: ignore[arg-type]


def test_temperature_behind_the_filters_keeps_the_set_and_changes_its_weights() -> None:
    logits = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)) * 3
    at = tiny_var().start(labels(1), ClassifierFree(1.0), Keyed.from_seeds([0])).at

    def narrowed(**settings: Any) -> Tensor:
        found = logits
        for narrow_it in make_filters(**settings):
            found = narrow_it(found, at)
        return found

    plain, last, first = (narrowed(temperature=t, top_p=0.8, temperature_last=behind)
                          for t, behind in ((1.0, False), (2.0, True), (2.0, False)))
    assert torch.equal(plain.isinf(), last.isinf()) and torch.equal(last, plain / 2)
    assert int(first.isinf().sum()) < int(last.isinf().sum())
    assert torch.equal(narrowed(temperatures=(2.0, 1.0, 1.0, 1.0)), narrowed(temperature=2.0))
    assert torch.equal(narrowed(top_k=(3, 9, 9, 9)), narrowed(top_k=3))
    with pytest.raises(InputError, match="temperatures: 2 numbers are given for 4 steps"):
        tiny_var().generate([1], temperatures=(1.0, 1.0), **QUIET)


@pytest.mark.parametrize(("change", "message"), [
    ({"grids": ((1, 1), (2, 2), (4, 4))}, "the drafter's scales are 1,2,4, the refiner's 1,2,3,4"),
    ({"seed": 3}, "different tokenizers"), ({"classes": (4,)}, r"the drafter has \[4\] classes, the refiner \[5\]")])
def test_models_that_cannot_go_on_from_each_other_are_refused(change: Any, message: str) -> None:
    other = tiny_var(**change)
    if "classes" in change:
        other.tokenizer = tiny_var().tokenizer
    with pytest.raises(InputError, match=message):
        pair(other, tiny_var(), 2)


def test_networks_that_look_back_differently_are_refused() -> None:
    one, other = (SimpleNamespace(plan=plan, tokenizer=tiny_var().tokenizer, labels=tiny_var().labels)
                  for plan in (tiny_var().plan, replace(tiny_var().plan, visible=OWN_STEP)))
    with pytest.raises(InputError, match="see all earlier scales, the refiner's 0 earlier scales"):
        check_pair(one, other)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_pair_gives_both_something_to_draw(steps: int) -> None:
    with pytest.raises(InputError, match=f"draft_steps is {steps}; a pair on 4 scales drafts 1 to 3"):
        tiny_pair(steps)
    with pytest.raises(InputError, match="draft_steps is 5; of this schedule's 4 scales 0 to 4"):
        tiny_pair().generate([1], draft_steps=5)


def test_any_two_models_take_part_in_the_function_alone() -> None:
    """Two systems with a plan, a body and a head; a loop in two pieces by hand gives the same."""
    wide, small, guidance = tiny_var(), narrow(), ClassifierFree(2.0)

    def run() -> Run:
        return wide.start(labels(2), guidance, Keyed.from_seeds([0, 1]))

    def go(loop: Iterator[Run]) -> Run:
        *_, last = loop
        return last

    with torch.no_grad():
        one = go(sample_collaboratively(wide, small, run(), 3, lambda c: replace(c, table=small.labels), guidance,
                                        check=True))
        half = go(sample_steps(wide, run(), guidance, until=3))
        other = go(sample_steps(small, half.hand_over(ClassCondition(small.labels, labels(2))), guidance))
    assert all(torch.equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))


def test_a_run_whose_first_scales_were_given_goes_to_the_network_whose_turn_it_is() -> None:
    system, tokens = tiny_pair(2), random_tokens(tiny_var().plan, 2)
    used = system.settings_for("pictures", {})
    guidance = system.guidance(used)
    ends = []
    for one in (system, narrow()):
        run = one.start(labels(2), guidance, Keyed.from_seeds([0, 1]))
        for step in tokens[:3]:
            run.force(step)
        with torch.no_grad():
            *_, last = one.sampled(run, guidance, used)
        ends.append(last.tokens[3])
    assert torch.equal(*ends)


# Training

def test_the_divergence_is_that_of_enumerated_distributions_in_both_directions() -> None:
    student, teacher = torch.randn(2, 2, 3, 7, generator=torch.Generator().manual_seed(1))
    p, q = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
    torch.testing.assert_close(divergence(student, teacher), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(divergence(student, teacher, "teacher-student"), torch.distributions.kl_divergence(q, p))


def test_the_refiners_loss_fades_the_drafted_scales_out_and_the_teacher_learns_nothing() -> None:
    system, tokens = tiny_pair(2), tiny_var().encode(emoji(4))
    system.train_part("refiner")
    wide, small = (one.generator for one in (tiny_var(), narrow()))
    found = {}
    for progress in (0.0, 0.5, 1.0):
        system.progress = progress
        loss, by_step, right = system.loss(tokens, labels(4), 0.0)
        found[progress] = float(loss.detach())
    loss.backward()
    assert all(p.grad is None for p in system.drafter.parameters())
    assert sum(float(p.grad.abs().sum()) for p in system.generator.parameters() if p.grad is not None) > 0
    nats = -torch.cat([narrow().log_prob(tokens, labels(4).flatten().tolist()).token], 1).mean(0)
    torch.testing.assert_close(by_step, torch.stack([nats[s.lo:s.hi].mean() for s in system.plan.spans(0, 4)]),
                               atol=1e-4, rtol=1e-4)
    rows = torch.tensor([1.0, 4, 9, 16])
    early, late = (found[0.0] * rows.sum() - found[1.0] * rows[2:].sum()) / rows[:2].sum(), found[1.0]
    expected = (0.5 * early * rows[:2].sum() + late * rows[2:].sum()) / (0.5 * rows[:2].sum() + rows[2:].sum())
    assert found[0.5] == pytest.approx(float(expected), rel=1e-4)
    assert wide is not small and 0 <= float(right.min()) <= 1


def test_the_refiner_comes_nearer_to_its_teacher() -> None:
    torch.manual_seed(0)
    system, tokens = tiny_pair(1), tiny_var().encode(emoji(8))
    system.train_part("refiner")
    system.progress = 0.0
    optimiser, found = torch.optim.AdamW([p for p in system.parameters() if p.requires_grad], lr=3e-3), []
    for _ in range(25):
        loss, *_ = system.loss(tokens, labels(8), 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.8 * found[0]


def test_the_drafter_is_trained_on_its_own_scales_alone() -> None:
    system, tokens = tiny_pair(2), tiny_var().encode(emoji(4))
    system.train_part("drafter")
    loss, by_step, right = system.loss(tokens, labels(4), 0.0)
    plain, steps, _ = tiny_var().loss(tokens[:2], labels(4), 0.0)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(by_step[:2], steps)
    assert by_step[2:].isnan().all() and right[2:].isnan().all() and len(by_step) == 4
    loss.backward()
    position = system.drafter.generator.position.grad
    assert position is not None and bool(position[:, :5].any()) and not bool(position[:, 5:].any())
    assert all(p.grad is None for p in (*system.generator.parameters(), *system.head.parameters()))
    with pytest.raises(InputError, match="has the parts refiner, drafter"):
        system.train_part("teacher")


# Files and the command line

def test_a_folder_gives_the_same_pair_back(tmp_path: Path) -> None:
    system = tiny_pair(3)
    folders.save(system, tmp_path / "pair", torch.float32)
    assert sorted(p.name for p in (tmp_path / "pair").iterdir()) == [
        "config.json", "drafter.safetensors", "generator.safetensors", "tokenizer.safetensors"]
    again = nextscale.load(str(tmp_path / "pair"))
    assert again.config == system.config and again.config.draft_steps == 3
    one, other = (each.generate([1, 2], **QUIET) for each in (system, again))
    assert other.describe(0)["draft_steps"] == 3 and again.scored_with() == {"draft_steps": 3}
    assert torch.equal(one.images, other.images)
    assert nextscale.load(str(tmp_path / "pair"), precision="bf16").drafter.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [6, 7, 8, 9])
def test_published_pairs_have_the_published_settings(steps: int) -> None:
    config = preset_config(f"code-n{steps}")
    assert config.draft_steps == steps
    assert (config.drafter, config.generator) == tuple(var_preset(f"var-d{d}").generator for d in (30, 16))
    fid = config.settings["fid"]
    assert (fid.guidance_scale, fid.top_k, fid.top_p, fid.temperature_last) == (2.5, 600, 0.96, True)
    assert fid.temperatures == (1.1,) * 7 + (1.0,) * 3 and config.settings["pictures"].guidance_scale == 5.0


def test_published_pairs_load_by_name() -> None:
    with torch.device("meta"):
        system = CollaborativeSystem(preset_config("code-n8"))
    published = {depth: published_names(depth) for depth in (30, 16)}
    assert round(sum(p.numel() for p in system.drafter.parameters()) / 1e9, 1) == 2.0
    folders.load_published(system, generator=published[16], drafter=published[30])
    with pytest.raises(WeightsError, match="wrong shape"):
        folders.load_published(system, drafter=published[16] | {
            k: v for k, v in published[30].items() if k not in published[16]})
    with pytest.raises(WeightsError, match="missing"):
        folders.load_published(system, drafter={k: v for k, v in published[30].items() if k != "head.bias"})


def published_names(depth: int) -> dict[str, Tensor]:
    """The list of tensors of a published VAR of 256 pixels."""
    width = 64 * depth
    shapes: dict[str, tuple[int, ...]] = {
        "pos_start": (1, 1, width), "pos_1LC": (1, 680, width), "lvl_1L": (1, 680),
        "attn_bias_for_masking": (1, 1, 680, 680), "word_embed.weight": (width, 32), "word_embed.bias": (width,),
        "class_emb.weight": (1001, width), "lvl_embed.weight": (10, width), "head.weight": (4096, width),
        "head.bias": (4096,), "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,)}
    block = {"attn.scale_mul_1H11": (1, depth, 1, 1), "attn.q_bias": (width,), "attn.v_bias": (width,),
             "attn.zero_k_bias": (width,), "attn.mat_qkv.weight": (3 * width, width),
             "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ffn.fc1.weight": (4 * width, width),
             "ffn.fc1.bias": (4 * width,), "ffn.fc2.weight": (width, 4 * width), "ffn.fc2.bias": (width,),
             "ada_lin.1.weight": (6 * width, width), "ada_lin.1.bias": (6 * width,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_command_line_pairs_trains_both_parts_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    from small_task import draw_pictures

    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    names = (tuple(f"class{i}" for i in range(3)),)
    for name, one in (("wide", tiny_var(classes=(3,))), ("small", narrow())):
        one.config = replace(one.config, classes=(3,), class_names=names)
        if name == "small":
            one.labels = type(one.labels)((3,), 32)
        folders.save(one, tmp_path / name, torch.float32)
    assert main.run(["train", "pair", "--drafter", "wide", "--refiner", "small", "--draft-steps", "2", "--dtype",
                     "fp32", "--out", "plain"]) == 0
    assert main.run(["generate", "--model", "plain", "--count", "2", "--set", "draft_steps=3", "--out", "a.png"]) == 0
    sets = ["train.steps=3", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=3", "data.size=16",
            "data.held_out=4", "data.held_out_split=validation", "train.precision=fp32", "train.minutes=5",
            "checkpointing=true"]
    command = ["train", "generator", "--system", "code_decoding", "--data", "pictures"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--set", "start=small", "--set", "drafter=wide", "--set", "draft_steps=2",
                     "--set", "direction=teacher-student", "--out", "one"]) == 0
    assert main.run([*command, "--set", "part=drafter", "--set", "start=one/model", "--out", "two"]) == 0
    plain, one, two = (nextscale.load(name) for name in ("plain", "one/model", "two/model"))
    assert two.config.draft_steps == 2 and two.config.direction == "teacher-student"

    def weight(network: Any) -> Tensor:
        return network.generator.blocks[0].mlp.expand.weight.bfloat16()

    assert torch.equal(weight(plain.drafter), weight(one.drafter)) and not torch.equal(weight(plain), weight(one))
    assert torch.equal(weight(one), weight(two)) and not torch.equal(weight(one.drafter), weight(two.drafter))
    assert main.run(["generate", "--model", "two/model", "--count", "2", "--out", "b.png"]) == 0
    (tmp_path / "pictures/one.png").write_bytes(next((tmp_path / "pictures/class0").iterdir()).read_bytes())
    assert main.run(["edit", "--model", "two/model", "--picture", "pictures/one.png", "--box", "8,0,16,16", "--rule",
                     "latent", "--out", "c.png"]) == 0
    capsys.readouterr()
    for wrong, message in ((["--set", "start=small"], "drafter is missing"), ([], "start is missing"),
                           (["--set", "start=small", "--set", "drafter=wide", "--set", "draft_steps=4"],
                            "drafts 1 to 3")):
        assert main.run([*command, *wrong, "--out", "wrong"]) == 2
        assert message in capsys.readouterr().err
    assert main.run(["train", "finetune", "--model", "two/model", "--data", "pictures", "--out", "wrong"]) == 2
    assert "is a pair of networks" in capsys.readouterr().err
    assert main.run(["generate", "--model", "code-n8", "--weights", "a", "--tokenizer-weights", "b"]) != 0
    assert "give --drafter-weights" in capsys.readouterr().err
