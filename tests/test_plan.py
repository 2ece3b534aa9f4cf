"""Plans: everything that is derived from the steps agrees with everything else."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextscale.errors import InputError
from nextscale.plan import ALL_PREVIOUS, OWN_STEP, PREVIOUS_ONLY, Plan, Step, Visibility, parse_grids

sides = st.integers(1, 6)
plans = st.builds(
    Plan.scales,
    st.lists(st.tuples(sides, sides), min_size=1, max_size=6),
    st.one_of(st.just(ALL_PREVIOUS), st.builds(Visibility, st.integers(0, 3))),
    st.integers(1, 2),
)


@settings(max_examples=60)
@given(plans)
def test_spans_cells_steps_and_length_agree(plan: Plan) -> None:
    sizes = [step.maps * step.grid[0] * step.grid[1] for step in plan]
    assert plan.length == sum(sizes) == len(plan.cells) == len(plan.step_of_row) == plan.starts[-1]
    for span in plan.spans(0, len(plan)):
        rows = plan.span(span.step, span.step + 1)
        assert (rows.start, rows.stop) == (span.lo, span.hi)
        assert span.hi - span.lo == sizes[span.step]
        assert (plan.step_of_row[rows] == span.step).all()
        cells = plan.cells[rows].tolist()
        h, w = plan.steps[span.step].grid
        assert cells == [[m, y, x] for m in range(plan.steps[span.step].maps) for y in range(h) for x in range(w)]


@settings(max_examples=60)
@given(plans, st.data())
def test_spans_of_a_part_count_from_its_first_row(plan: Plan, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(plan)))
    last = data.draw(st.integers(first, len(plan)))
    rows, spans = plan.span(first, last), plan.spans(first, last)
    assert [s.step for s in spans] == list(range(first, last))
    ends = [0, *(s.hi for s in spans)]
    assert [s.lo for s in spans] == ends[:-1] and ends[-1] == rows.stop - rows.start


@settings(max_examples=60)
@given(plans)
def test_mask_counts_the_visible_pairs_and_no_row_is_blind(plan: Plan) -> None:
    mask = plan.mask()
    assert int(mask.sum()) == plan.pairs
    assert mask.any(1).all() and mask.diagonal().all()
    step = plan.step_of_row
    reach = len(plan) if plan.visible.previous is None else plan.visible.previous
    for query in range(0, plan.length, max(1, plan.length // 7)):
        lag = step[query] - step
        assert torch.equal(mask[query], (lag >= 0) & (lag <= reach))


@settings(max_examples=30)
@given(plans, st.data())
def test_mask_of_some_steps_is_a_part_of_the_whole(plan: Plan, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(plan) - 1))
    last = data.draw(st.integers(first + 1, len(plan)))
    rows = plan.span(first, last)
    assert torch.equal(plan.mask(first, last), plan.mask()[rows, rows])


def test_the_published_plan_has_680_rows_and_sees_62_percent_of_its_pairs() -> None:
    plan = Plan.scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert plan.length == 680
    assert round(plan.pairs / 680**2, 3) == 0.619
    assert Plan.scales((1, 2, 3, 4, 6, 9, 13, 18, 24, 32)).length == 2240
    assert Plan.scales((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)).length == 9451


def test_named_visibilities_are_bidirectional_within_a_step() -> None:
    steps = torch.arange(4)
    for visible, reach in ((ALL_PREVIOUS, 9), (PREVIOUS_ONLY, 1), (OWN_STEP, 0)):
        seen = visible.sees(steps[:, None], steps[None])
        assert torch.equal(seen, (steps[:, None] >= steps) & (steps[:, None] - steps <= reach))


def test_plans_are_values() -> None:
    assert Plan.scales([1, (2, 2)]) == Plan.scales([(1, 1), 2])
    assert len({Plan.scales([1, 2]), Plan.scales([1, 2]), Plan.scales([1, 2], PREVIOUS_ONLY)}) == 2


@settings(max_examples=50)
@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5))
def test_schedules_are_read_back(grids: list[tuple[int, int]]) -> None:
    assert parse_grids(",".join(f"{h}x{w}" for h, w in grids)) == tuple(grids)


def test_schedules_take_sides_spaces_and_capitals() -> None:
    assert parse_grids("1, 2 ,3X4") == ((1, 1), (2, 2), (3, 4))


@pytest.mark.parametrize("text", ["", "1,,2", "1,a", "0", "1,-2", "2x3x4", "2x", "x", "1.5", "²"])
def test_unreadable_schedules_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="schedule"):
        parse_grids(text)


@settings(max_examples=100)
@given(st.text("0123456789xX,-+.² ٣a", max_size=12))
def test_any_text_is_a_schedule_or_an_input_error(text: str) -> None:
    try:
        assert all(h > 0 and w > 0 for h, w in parse_grids(text))
    except InputError:
        pass


def test_impossible_plans_are_refused() -> None:
    for make in (lambda: Plan(()), lambda: Plan.scales([1, 0]), lambda: Plan((Step((2, 2), maps=0),)),
                 lambda: Visibility(-1)):
        with pytest.raises(InputError):
            make()
