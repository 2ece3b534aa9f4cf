"""Scaling laws of a family of runs: loss against parameters, compute and data, the best size for a compute, a forecast.

After Henighan et al. (arXiv 2010.14701): N counts parameters without embeddings, E the tokens seen in training,

    C = 6 N E                     floating point operations (one PF-day is 8.64e19)

L(N) is fitted to the least loss of every size, L(C) to the lower frontier of all learning curves, N_opt(C) to the
convex hull of that frontier. Losses are held-out nats a token.
"""
from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nextscale.errors import DataError, InputError
from nextscale.evaluation.scaling_fit import PowerLaw, fit_power_law

PF_DAY = 8.64e19
FEWEST_ON_HULL = 5


@dataclass(frozen=True)
class ScalingRun:
    """One run of a family.

    parameters: N, without embeddings and tables; tokens_a_step: of all pictures of a batch; curve: (optimiser steps,
    held-out nats a token), rising in steps; dataset_tokens: distinct tokens to train on, 0 where not known; measured:
    single figures of the finished model, such as ``error`` and ``loss_last_scale``.
    """

    name: str
    parameters: int
    tokens_a_step: int
    curve: tuple[tuple[int, float], ...]
    dataset_tokens: int = 0
    seed: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.parameters < 1 or self.tokens_a_step < 1:
            raise InputError(f"run {self.name!r}: parameters ({self.parameters}) and tokens_a_step "
                             f"({self.tokens_a_step}) must be at least 1")
        steps = [step for step, _ in self.curve]
        losses = [loss for _, loss in self.curve]
        if not steps or steps != sorted(set(steps)) or steps[0] < 1:
            raise InputError(f"run {self.name!r}: its curve needs points with rising steps from 1 on")
        if not (np.isfinite(losses).all() and min(losses) > 0):
            raise InputError(f"run {self.name!r}: its curve has losses that aren't finite and above 0")

    @property
    def loss(self) -> float:
        """At the step of the least held-out loss."""
        return min(loss for _, loss in self.curve)

    @property
    def tokens(self) -> int:
        """E at that step."""
        return self.tokens_a_step * min(self.curve, key=lambda point: point[1])[0]

    def compute(self, step: int) -> float:
        """C = 6 N E in FLOP after a step."""
        return 6.0 * self.parameters * self.tokens_a_step * step

    @property
    def trained_compute(self) -> float:
        """Of the whole run."""
        return self.compute(self.curve[-1][0])

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def read_run(where: Path) -> ScalingRun:
    """A run from its ``scaling.json`` (or a folder that holds one). Raises DataError where it isn't one."""
    path = where / "scaling.json" if where.is_dir() else where
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{where} holds no scaling.json; `nextscale scaling` writes one a run") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as a run ({error})") from None
    return _run(found, str(path))


def read_runs(path: Path) -> list[ScalingRun]:
    """Runs from one JSON file: a list of objects with the fields of :class:`ScalingRun`. Raises DataError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as a list of runs ({error})") from None
    if not isinstance(found, list):
        return [_run(found, str(path))]
    return [_run(one, f"{path}, run {i}") for i, one in enumerate(found)]


def _run(found: Any, where: str) -> ScalingRun:
    try:
        return ScalingRun(str(found["name"]), int(found["parameters"]), int(found["tokens_a_step"]),
                          tuple((int(step), float(loss)) for step, loss in found["curve"]),
                          int(found.get("dataset_tokens", 0)), int(found.get("seed", 0)),
                          {str(k): float(v) for k, v in found.get("measured", {}).items()})
    except InputError as error:
        raise DataError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} lacks or misuses {error}; a run has name, parameters, tokens_a_step and "
                        "curve [[step, loss], ...]") from None


# Frontier and hull

def frontier(runs: Sequence[ScalingRun]) -> list[tuple[float, float, int]]:
    """The lower frontier of all learning curves: (compute, loss, parameters) where no cheaper point is as good."""
    points = sorted((run.compute(step), loss, run.parameters) for run in runs for step, loss in run.curve)
    found: list[tuple[float, float, int]] = []
    for point in points:
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def hull(points: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The corners of the lower convex hull of a frontier, in log compute and loss.

    Not log loss: a power law with any floor is strictly convex in these axes, and scaling sizes maps them affinely, so
    every size of an exact family is a corner and the edges between sizes lie exactly on N_opt(C).
    """
    found: list[tuple[float, float, int]] = []
    for point in points:
        while len(found) > 1 and _turn(found[-2], found[-1], point) <= 0:
            found.pop()
        found.append(point)
    return found


def _turn(a: tuple[float, float, int], b: tuple[float, float, int], c: tuple[float, float, int]) -> float:
    (ax, ay), (bx, by), (cx, cy) = ((np.log(p[0]), p[1]) for p in (a, b, c))
    return float((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))


def best_sizes(corners: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """(compute, best size) where the hull passes from one size to the next.

    A size is the best over a stretch of compute; the edges of the stretch, unlike its corners, don't depend on where
    the family ends. There the best size lies between the two, at their geometric mean.
    """
    found = []
    for (c0, _, n0), (c1, _, n1) in itertools.pairwise(corners):
        if n1 > n0:
            found.append((float(np.sqrt(c0 * c1)), float(np.sqrt(n0 * n1))))
    return found


# The whole analysis

@dataclass(frozen=True)
class ScalingReport:
    """Laws by name (``loss(parameters)``, ``loss(compute)``, ...), the forecast, the runs, and what could not be fitted
    and why."""

    laws: dict[str, PowerLaw]
    points: dict[str, list[tuple[float, float]]]
    forecast: dict[str, Any]
    missing: dict[str, str]
    runs: list[ScalingRun]

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        laws = {name: {**law.describe(), "residuals": self.residuals(name)} for name, law in self.laws.items()}
        return {"laws": laws, "points": self.points, "forecast": self.forecast, "not_fitted": self.missing,
                "pf_day": PF_DAY, "runs": [run.describe() for run in self.runs]}

    def residuals(self, name: str) -> list[float]:
        """log y - log of the law, of every point."""
        law = self.laws[name]
        return [float(np.log(y) - np.log(law(x))) for x, y in self.points[name]]


def analyse(runs: Sequence[ScalingRun], held_out: int = 1, samples: int = 400, seed: int = 0) -> ScalingReport:
    """Fit every law that the runs support.

    held_out: how many of the largest sizes stay out of the forecast's fit and are predicted by it; the laws themselves
    use all runs. Laws: loss against parameters, compute and, where runs differ in it, data, each with a floor and
    as a pure power law; the measured figures (``error``, ``loss_last_scale``, ...) as pure power laws of parameters
    and compute, as VAR reports them; the best size and amount of data for a compute.

    Raises InputError for fewer than three sizes.
    """
    runs = sorted(runs, key=lambda run: (run.parameters, run.name))
    sizes = sorted({run.parameters for run in runs})
    if len(sizes) < 3:
        raise InputError(f"a scaling law needs runs of at least 3 sizes, got {len(sizes)}")
    points: dict[str, list[tuple[float, float]]] = {}
    points["loss(parameters)"] = _best(runs, lambda run: run.parameters, lambda run: run.loss)
    edge = frontier(runs)
    corners = hull(edge)
    points["loss(compute)"] = [(c, loss) for c, loss, _ in edge]
    if len({run.dataset_tokens for run in runs} - {0}) > 1:
        points["loss(data)"] = _best([run for run in runs if run.dataset_tokens], lambda run: run.dataset_tokens,
                                     lambda run: run.loss)
    laws: dict[str, PowerLaw] = {}
    missing: dict[str, str] = {}

    def fit(name: str, over: str, **how: Any) -> None:
        points.setdefault(name, points[over])
        try:
            laws[name] = fit_power_law([x for x, _ in points[name]], [y for _, y in points[name]], samples=samples,
                                       seed=seed, **how)
        except InputError as error:
            missing[name] = str(error)

    for over in [name for name in points if name.startswith("loss(")]:
        fit(over, over, below=over == "loss(compute)")
        fit(f"{over}, no floor", over, floor=False)
    for figure in sorted(set.intersection(*(set(run.measured) for run in runs))):
        for x, of in (("parameters", lambda run: run.parameters), ("compute", lambda run: run.trained_compute)):
            points[f"{figure}({x})"] = _best(runs, of, lambda run, f=figure: run.measured[f])
            fit(f"{figure}({x})", f"{figure}({x})", floor=False)
    best = best_sizes(corners)
    on_hull = len({n for _, _, n in corners})
    tokens = [(c, c / (6 * n)) for c, n in best]
    for name, values in (("best_parameters(compute)", best), ("best_tokens(compute)", tokens)):
        if on_hull < FEWEST_ON_HULL:
            missing[name] = f"only {on_hull} sizes are on the hull; {FEWEST_ON_HULL} are needed"
        else:
            points[name] = values
            fit(name, name, floor=False)
    return ScalingReport(laws, points, _forecast(runs, sizes, held_out, samples, seed), missing, list(runs))


def _best(runs: Sequence[ScalingRun], x: Any, y: Any) -> list[tuple[float, float]]:
    """The least y at every x: runs of one size differ by seed or length."""
    found: dict[float, float] = {}
    for run in runs:
        found[float(x(run))] = min(found.get(float(x(run)), float("inf")), float(y(run)))
    return sorted(found.items())


def _forecast(runs: Sequence[ScalingRun], sizes: Sequence[int], held_out: int, samples: int,
              seed: int) -> dict[str, Any]:
    """Loss of the largest sizes, foretold from the smaller ones alone, with a floor where there are points enough."""
    if not held_out:
        return {}
    kept, unseen = sizes[:-held_out], sizes[-held_out:]
    if len(kept) < 2:
        return {"note": f"{len(kept)} sizes are left to forecast from; at least 2 are needed"}
    known = _best([run for run in runs if run.parameters in kept], lambda run: run.parameters, lambda run: run.loss)
    floor = len(kept) >= 4
    law = fit_power_law([x for x, _ in known], [y for _, y in known], floor=floor, samples=samples, seed=seed)
    found = []
    for size in unseen:
        measured = float(min(run.loss for run in runs if run.parameters == size))
        predicted = float(law(size))
        found.append({"parameters": size, "predicted": predicted, "measured": measured,
                      "relative_error": predicted / measured - 1})
    return {"from_sizes": kept, "with_floor": floor, "law": law.describe(), "held_out": found}


def per_picture(nats_a_token: float, tokens_a_picture: int, dimensions: int) -> dict[str, float]:
    """Nats a token as nats a picture and bits a dimension of a picture with so many colour values."""
    nats = nats_a_token * tokens_a_picture
    return {"nats_a_picture": nats, "bits_a_dimension": nats / (np.log(2) * dimensions)}
