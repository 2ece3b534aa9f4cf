"""Hooks of speed and diversity on the systems of text: at wide and at tall pictures, drawn at once and in rounds."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import test_infinity
import test_star
import torch

from nextscale.acceleration import hack, litevar, scalekv
from nextscale.acceleration.fastvar import FastVAR
from nextscale.acceleration.hack import HACK
from nextscale.acceleration.litevar import LiteVAR
from nextscale.acceleration.scalekv import ScaleKV
from nextscale.context import Hook
from nextscale.sampling.diversevar import DiverseVAR
from nextscale.sampling.generation import Generation
from nextscale.sampling.softcfg import SoftCFG

WIDE = test_infinity.WIDE
SHAPES = {"wide": WIDE, "tall": tuple((w, h) for h, w in WIDE)}
PROMPTS = ["a red apple", "sun"]
SYSTEMS = ("infinity", "star", "star in rounds")
Find = Callable[[Any], dict[str, Any]]
"""What a calibration finds for the system in question."""
WINDOWS = litevar.Calibration(budget=0.4, share_budget=0.0, reaches=(0.1, 0.25), dense=1)
# At a setting that changes what is drawn, and at the one that does nothing.
HOOKS: dict[str, tuple[Callable[[Find], Hook], Callable[[Find], Hook]]] = {
    "fastvar": (lambda find: FastVAR((0.5, 0.4)), lambda find: FastVAR(0.0)),
    "litevar": (lambda find: LiteVAR(calibration=find(WINDOWS)), lambda find: LiteVAR(window=1.0, dense=1)),
    "litevar shared": (lambda find: LiteVAR(share=(1,)), lambda find: LiteVAR(share=())),
    "scalekv": (lambda find: ScaleKV(find(scalekv.Calibration(share=0.3, window=2))),
                lambda find: ScaleKV(share=1.0, window=2)),
    "hack": (lambda find: HACK(find(hack.Calibration()), compression=0.6, queries=3),
             lambda find: HACK(find(hack.Calibration()), compression=0.0, queries=3)),
    "softcfg": (lambda find: SoftCFG(), lambda find: SoftCFG(0.0)),
    "diversevar": (lambda find: DiverseVAR(1.0, 0.5, at_steps=(1, 2)), lambda find: DiverseVAR(0.0, 0.0)),
}


@cache
def system_of(name: str, shape: str) -> Any:
    """An Infinity of squares, which draws other shapes as well, or a STAR of one shape."""
    return test_infinity.tiny() if name == "infinity" else test_star.tiny(grids=SHAPES[shape])


@cache
def found_by(calibration: Any, system: str, shape: str) -> dict[str, Any]:
    """At the shape that the system was made for."""
    found: dict[str, Any] = calibration.run(system_of(system, shape), PROMPTS)
    return found


def draw(system: str, shape: str, *hooks: Hook) -> Generation:
    options: dict[str, Any] = {"rounds": test_star.ROUNDS} if system == "star in rounds" else {}
    return system_of(system, shape).generate(PROMPTS, seed=3, output="torch", progress=False, hooks=hooks,
                                             schedule=list(SHAPES[shape]), **options)


@cache
def plain(system: str, shape: str) -> Generation:
    return draw(system, shape)


def same(one: Generation, other: Generation) -> bool:
    return torch.equal(one.log_prob, other.log_prob) and all(map(torch.equal, one.tokens, other.tokens))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_changes_what_a_text_system_draws_and_nothing_at_its_neutral_setting(name: str, system: str,
                                                                                     shape: str) -> None:
    acting, neutral = (make(lambda calibration: found_by(calibration, system, shape)) for make in HOOKS[name])
    without, found = plain(system, shape), draw(system, shape, acting)
    assert not same(found, without)
    for ours, theirs, (h, w) in zip(found.tokens, without.tokens, SHAPES[shape], strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.shape[1] == h * w
        assert ours.dtype == torch.bool or 0 <= int(ours.min()) <= int(ours.max()) < 32
    assert found.images.shape == without.images.shape and bool(found.log_prob.isfinite().all())
    assert same(draw(system, shape, neutral), without)


@pytest.mark.parametrize("calibration", [scalekv.Calibration(share=0.3, window=2), litevar.Calibration(
    budget=0.4, share_budget=0.9, reaches=(0.1, 0.25), dense=1)], ids=lambda one: type(one).__module__)
def test_a_calibration_measures_at_the_schedule_that_it_is_given(calibration: Any) -> None:
    found = calibration.run(system_of("infinity", "wide"), PROMPTS, schedule=list(WIDE))
    assert [tuple(grid) for grid in found["grids"]] == [tuple(grid) for grid in WIDE]
