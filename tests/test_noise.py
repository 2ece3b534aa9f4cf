"""Addressed noise: known answers, the right distributions, and numbers that depend on their address alone."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextscale.errors import InputError
from nextscale.noise import Keyed, Recorded, inverse_cdf, philox
from nextscale.plan import Plan

PLAN = Plan.scales([1, 2, (3, 4), 8])


def words(value: int, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for _ in range(count))


def draw(noise: Keyed, step: int, what: str = "token", round: int = 0, width: int = 1) -> Tensor:
    span = PLAN.span(step, step + 1)
    return noise.uniform(what, PLAN.step_of_row[span][None], round, PLAN.cells[span][None], width)


@pytest.mark.parametrize(("word", "answer"), [
    (0, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
    (0xFFFFFFFF, ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
])
def test_philox_gives_the_known_answers(word: int, answer: tuple[str, ...]) -> None:
    found = philox(words(word, 4), (words(word, 2)[0], words(word, 2)[1]))
    assert tuple(f"{int(w):08x}" for w in found) == answer


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    u = draw(Keyed.from_seeds(range(400)), 3, width=4).flatten()
    assert 0 < float(u.min()) and float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    expected = len(u) / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi squared, 19 degrees: 0.1 % lie above 43.8
    assert len(u.unique()) > 0.99 * len(u)


def test_normal_numbers_have_the_moments_of_a_normal() -> None:
    noise, span = Keyed.from_seeds(range(200)), PLAN.span(3, 4)
    x = noise.normal("field", PLAN.step_of_row[span][None], 0, PLAN.cells[span][None], width=3).double()
    assert x.shape == (200, 64, 3)
    n = x.numel()
    assert abs(float(x.mean())) < 4 / n**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    assert abs(float((x[..., 0] * x[..., 1]).mean())) < 4 / (n / 3) ** 0.5


@settings(max_examples=30)
@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5, unique=True), st.integers(0, 3))
def test_a_picture_s_numbers_do_not_depend_on_its_batch(seeds: list[int], step: int) -> None:
    together = draw(Keyed.from_seeds(seeds), step, width=3)
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i], draw(Keyed.from_seeds([seed]), step, width=3)[0])


def test_one_draw_for_the_plan_equals_the_draws_step_by_step() -> None:
    noise = Keyed.from_seeds([3, 4])
    whole = noise.uniform("token", PLAN.step_of_row[None], 0, PLAN.cells[None])
    assert torch.equal(whole, torch.cat([draw(noise, k) for k in range(len(PLAN))], 1))


def test_every_part_of_the_address_counts() -> None:
    noise = Keyed.from_seeds([1])
    first = draw(noise, 3)
    others = [draw(Keyed.from_seeds([2]), 3), draw(Keyed.from_seeds([1 + 2**40]), 3), draw(noise, 3, what="gumbel"),
              draw(noise, 3, round=1)]
    span = PLAN.span(3, 4)
    others.append(noise.uniform("token", PLAN.step_of_row[span][None] - 1, 0, PLAN.cells[span][None]))
    moved = PLAN.cells[span].clone()
    moved[:, 0] = 1
    others.append(noise.uniform("token", PLAN.step_of_row[span][None], 0, moved[None]))
    for other in others:
        assert not torch.isclose(first, other).any()


def test_a_wider_draw_begins_with_the_narrower_one() -> None:
    noise = Keyed.from_seeds([5])
    assert torch.equal(draw(noise, 2, width=9)[..., :4], draw(noise, 2, width=4))


def test_gathering_without_repeats_keeps_the_numbers() -> None:
    noise = Keyed.from_seeds([7, 8, 9])
    picked = noise.gather(torch.tensor([2, 0]))
    assert torch.equal(draw(picked, 3), draw(noise, 3)[[2, 0]])


def test_copies_get_numbers_of_their_own_and_the_first_keeps_its() -> None:
    noise = Keyed.from_seeds([7, 8])
    before = noise.key_B2.clone()
    copies = noise.gather(torch.tensor([0, 0, 1, 0]))
    u, old = draw(copies, 3), draw(noise, 3)
    assert torch.equal(u[0], old[0]) and torch.equal(u[2], old[1])
    assert len({tuple(row.flatten().tolist()) for row in u}) == 4
    assert torch.equal(noise.key_B2, before)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_keys_stay_distinct_over_generations_of_copies(generations: list[list[int]]) -> None:
    noise = Keyed.from_seeds([1, 2, 3, 4])
    retired: set[tuple[int, ...]] = set()
    for items in generations:
        chosen = torch.tensor([i % len(noise.key_B2) for i in items])
        kept = {tuple(noise.key_B2[i].tolist()) for i in chosen.tolist()}
        alive = {tuple(key) for key in noise.key_B2.tolist()}
        noise = noise.gather(chosen)
        keys = [tuple(key) for key in noise.key_B2.tolist()]
        assert len(set(keys)) == len(keys)
        # A new key was never used before, by a picture that lives or by one that was dropped.
        assert not (set(keys) - kept) & (alive | retired)
        retired |= alive


def golden_rule(p: np.ndarray, u: float) -> int:
    """The replay rule of recorded draws, in its own words."""
    total = np.cumsum(p.astype(np.float64))
    return min(int((total / total[-1] <= u).sum()), int(np.flatnonzero(p > 0)[-1]))


@settings(max_examples=60)
@given(st.lists(st.one_of(st.floats(-20, 20), st.just(-np.inf)), min_size=1, max_size=40), st.floats(0, 1))
def test_inverse_cdf_is_the_replay_rule(values: list[float], u: float) -> None:
    if not np.isfinite(values).any():
        values[0] = 0.0
    logits = torch.tensor(values, dtype=torch.float64)
    p = torch.softmax(logits, -1).numpy()
    found = int(inverse_cdf(logits[None, None], torch.tensor([[u]], dtype=torch.float64), exact=True))
    total = np.cumsum(p) / p.sum()
    if np.abs(total - u).min() > 1e-12:
        assert found == golden_rule(p, u)
    assert p[found] > 0


def test_inverse_cdf_never_draws_what_is_ruled_out() -> None:
    logits = torch.full((1, 3, 10), -torch.inf)
    logits[..., 4] = 0.0
    logits[0, 1, 7] = -30.0
    edges = torch.tensor([[1 - 2.0**-25, 1.0, 2.0**-25]])
    for exact in (False, True):
        drawn = inverse_cdf(logits, edges, exact)
        assert torch.isfinite(logits.gather(-1, drawn[..., None])).all()


def test_inverse_cdf_draws_in_proportion() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    u = draw(Keyed.from_seeds(range(300)), 3)[..., 0]
    drawn = inverse_cdf(p.log().expand(*u.shape, 4), u)
    share = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    assert torch.allclose(share, p, atol=0.02) and share[1] == 0


def test_recorded_noise_gives_what_was_recorded_and_names_what_was_not() -> None:
    values = torch.rand(2, 4)
    noise = Recorded({("token", 1, 0): values})
    span = PLAN.span(1, 2)
    step, cells = PLAN.step_of_row[span][None], PLAN.cells[span][None]
    assert torch.equal(noise.uniform("token", step, 0, cells)[..., 0], values)
    assert torch.equal(noise.gather(torch.tensor([1, 1])).uniform("token", step, 0, cells)[..., 0], values[[1, 1]])
    with pytest.raises(InputError, match="gumbel"):
        noise.uniform("gumbel", step, 0, cells)
