"""Budgets: how many rows a layer may remember when a step is generated, and the identity that shares them out.

ScaleKV's identity (arXiv 2505.19602, section 3.3), step by step: the budgets of all layers sum to L times a uniform
budget; layers that look at few rows ("refiners") get less and less of it, what they save goes to those that look at
many ("drafters").
"""
from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nextscale.errors import DataError, InputError
from nextscale.plan import Plan

Drafters = Mapping[int, Collection[int]]
"""The layers that draft, by step."""


@dataclass(frozen=True)
class Budgets:
    """Rows that each layer may remember when step k is generated: ``rows[k][layer]``, None where nothing is dropped.

    base: a layer that was never shrunk is left alone up to so many rows; window: how many rows of a step look at the
    others and stay, None for the policy's own number.
    """

    rows: tuple[tuple[int, ...] | None, ...]
    base: int = 0
    window: int | None = None

    @cached_property
    def layers(self) -> int:
        """How many layers there are; 0 where nothing is ever dropped."""
        return next((len(row) for row in self.rows if row is not None), 0)

    def check(self, plan: Plan, layers: int, who: str) -> None:
        """Raises InputError where these are budgets of another number of steps or layers."""
        if len(self.rows) != len(plan) or self.layers not in (0, layers):
            raise InputError(f"{who}: the budgets are for {len(self.rows)} steps of {self.layers} layers, this model "
                             f"has {len(plan)} of {layers}; calibrate it (nextscale calibrate)")

    def mean(self, step: int) -> float | None:
        """Rows a layer at a step, on average over the layers."""
        row = self.rows[step]
        return None if row is None else sum(row) / len(row)

    def to_json(self) -> dict[str, Any]:
        """As ``read_budgets`` takes them back."""
        return {"budgets": [None if row is None else list(row) for row in self.rows], "base": self.base,
                "window": self.window}


def by_identity(plan: Plan, layers: int, uniform: int, drafters: Drafters = {}, refiner: float = 0.92,  # noqa: B006
                decay: float = 0.108, least: int = 1) -> Budgets:
    """Budgets whose mean over the layers is ``uniform`` at every step that needs any.

    drafters: the layers that draft, by step; refiner, decay: a refiner gets uniform (refiner - decay n) rows at the
    n-th step that needs budgets, n = 0, 1, ..., at least ``least``; drafters share what is left, up to what they can
    hold (what they held, and one map more), and what they can't goes back to the refiners.
    """
    rows: list[tuple[int, ...] | None] = []
    held, needed = [0] * layers, 0
    for k in range(len(plan)):
        most = [min(plan.starts[k], rows_held + (plan.steps[k - 1].rows if k else 0)) for rows_held in held]
        if plan.starts[k] <= uniform:
            rows.append(None)
            held = most
            continue
        total, chosen = uniform * layers, sorted(set(drafters.get(k, ())))
        others = [layer for layer in range(layers) if layer not in chosen]
        wanted = max(least, round(uniform * (refiner - decay * needed))) if chosen else uniform
        given = _spread(total - wanted * len(others), [most[layer] for layer in chosen])
        rest = _spread(total - sum(given), [most[layer] for layer in others])
        by_layer = dict(zip([*chosen, *others], [*given, *rest], strict=True))
        held, needed = [by_layer[layer] for layer in range(layers)], needed + 1
        rows.append(tuple(held))
    return Budgets(tuple(rows), uniform)


def _spread(total: int, most: Sequence[int]) -> list[int]:
    """``total`` shared out evenly, no share above its ``most``."""
    shares, free = [0] * len(most), list(range(len(most)))
    while total > 0 and free:
        each, extra = divmod(total, len(free))
        for n, i in enumerate(free):
            given = min(most[i] - shares[i], each + (n < extra))
            shares[i], total = shares[i] + given, total - given
        free = [i for i in free if shares[i] < most[i]]
    return shares


def uniform_rows(plan: Plan, share: float) -> int:
    """A share of the rows that are remembered when the last step is generated, at least 1."""
    return max(1, round(share * plan.starts[-2]))


def read_json(path: str) -> Mapping[str, Any]:
    """What ``nextscale calibrate`` wrote. Raises DataError where it can't be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no calibration that can be read ({error}); nextscale calibrate writes one") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: it holds no table of names; nextscale calibrate writes one")
    return found


def read_budgets(found: Mapping[str, Any], where: str) -> Budgets:
    """Budgets from JSON: this library's, or ScaleKV's published tables ("Scale 9": {"Block 0": 1, ..., "Max", "Min"}).

    Raises InputError where they are neither.
    """
    try:
        if any(key.startswith("Scale ") for key in found):
            return _published(found)
        rows = tuple(None if row is None else tuple(int(n) for n in row) for row in found["budgets"])
        window = found.get("window")
        budgets = Budgets(rows, int(found.get("base", 0)), None if window is None else int(window))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: these are no budgets ({type(error).__name__}: {error})") from None
    if len({len(row) for row in rows if row is not None}) > 1 or any(n < 1 for row in rows for n in row or ()):
        raise InputError(f"{where}: every step must have a budget of at least 1 for every layer, or none at all")
    return budgets


def _published(found: Mapping[str, Any]) -> Budgets:
    by_scale: dict[int, tuple[int, ...]] = {}
    for name, table in found.items():
        blocks = sum(key.startswith("Block ") for key in table)
        by_scale[int(name.removeprefix("Scale ")) - 1] = tuple(
            int(table["Max"] if table[f"Block {i}"] else table["Min"]) for i in range(blocks))
    last = by_scale[max(by_scale)]
    rows = tuple(by_scale.get(k) for k in range(max(by_scale) + 1))
    return Budgets(rows, sum(last) // len(last))


def of_drafters(steps: int, layers: int, table: Mapping[int, tuple[Collection[int], int, int]]) -> Budgets:
    """Budgets from a published table: by step the drafters, their rows, and the others' rows."""
    rows = [None if k not in table else tuple(table[k][1] if layer in table[k][0] else table[k][2]
                                              for layer in range(layers)) for k in range(steps)]
    last = rows[-1]
    assert last is not None
    return Budgets(tuple(rows), round(sum(last) / layers))
