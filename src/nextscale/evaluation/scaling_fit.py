"""Power laws fitted to points, with bootstrap intervals (Henighan et al., arXiv 2010.14701, eq. 1.1).

    L(x) = L_inf + (x0 / x)^alpha        with a floor: the entropy of the data, as the paper reads it
    y(x) = (x0 / x)^alpha                without: what VAR (arXiv 2404.02905, section 4.1) fits to loss and error

x is anything positive (parameters, compute, data), the other side nats a token or an error rate.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextscale.errors import InputError

Array = np.ndarray
# Of logarithms of the loss; beyond it a residual counts linearly, so that one bad run doesn't bend the fit.
HUBER = 1e-3
ABOVE = 30.0  # how much more a residual weighs on the wrong side of a frontier
ITERATIONS = 120


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + (scale / x)^exponent.

    intervals: 95% (or another level) bootstrap intervals by parameter name; correlation: Pearson's r of log x and
    log (y - floor); lowest, highest: of the x that were fitted: beyond them the law is a forecast; points: how many.
    """

    floor: float
    scale: float
    exponent: float
    intervals: dict[str, tuple[float, float]]
    correlation: float
    lowest: float
    highest: float
    points: int

    def __call__(self, x: float | Array) -> Any:
        return self.floor + np.exp(self.exponent * (math.log(self.scale) - np.log(x)))

    def needed(self, y: float) -> float:
        """The x at which the law reaches y, in nats of L - floor above it. Raises InputError at or below the floor."""
        if y <= self.floor:
            raise InputError(f"the law never reaches {y:.4g}: its floor is {self.floor:.4g}")
        return float(self.scale * (y - self.floor) ** (-1 / self.exponent))

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"form": "floor + (scale / x)^exponent", "floor": self.floor, "scale": self.scale,
                "exponent": self.exponent, "intervals": {k: list(v) for k, v in self.intervals.items()},
                "correlation": self.correlation, "range": [self.lowest, self.highest], "points": self.points}


def fit_power_law(x: Sequence[float], y: Sequence[float], floor: bool = True, below: bool = False,
                  samples: int = 400, level: float = 0.95, seed: int = 0) -> PowerLaw:
    """Fit by Huber's loss on differences of log y, from many starts.

    floor: fit L_inf too, in [0, min y); otherwise it is 0 and the fit is a straight line of the logarithms by least
    squares. below: keep the curve under the points, as the paper does for a frontier. Intervals: ``samples`` times the
    residuals of log (y - floor) are drawn anew with replacement, widened for the fitted parameters, and fitted again;
    they show how sure the law is if its form is right, and are wide where x spans little. None are given where there
    are no more points than parameters.

    Raises InputError for fewer different sizes than parameters, and for values that have no logarithm.
    """
    log_x, values = _checked(x, y, 3 if floor else 2)

    def fit(of_SN: Array, starts_S3: Array | None = None) -> Array:
        if not floor:
            slope, intercept = np.polyfit(log_x, np.log(of_SN).T, 1)
            return np.stack([np.zeros(len(of_SN)), slope, intercept], 1)
        return _fit_floor(log_x, of_SN, below, starts_S3)

    parameters = fit(values[None])[0]
    lowest, slope, intercept = (float(p) for p in parameters)
    fitted = intercept + slope * log_x
    residuals = np.log(values - lowest) - fitted
    # Residuals of a fit are smaller than the noise, by the parameters that were fitted.
    spare = len(values) - (3 if floor else 2)
    widened = residuals * math.sqrt(len(values) / max(spare, 1))
    intervals: dict[str, tuple[float, float]] = {}
    if spare > 0 and samples:
        draws = np.random.default_rng(seed).choice(widened, (samples, len(values)))
        again = fit(lowest + np.exp(fitted + draws), np.repeat(parameters[None], samples, 0))
        edges = (50 * (1 - level), 50 * (1 + level))
        named = [_named(*p) for p in again]
        for name in named[0]:
            low, high = np.percentile([one[name] for one in named], edges)
            intervals[name] = (float(low), float(high))
    known = _named(lowest, slope, intercept)
    correlation = float(np.corrcoef(log_x, np.log(values - lowest))[0, 1])
    return PowerLaw(known["floor"], known["scale"], known["exponent"], intervals, correlation,
                    float(np.exp(log_x.min())), float(np.exp(log_x.max())), len(values))


def _checked(x: Sequence[float], y: Sequence[float], parameters: int) -> tuple[Array, Array]:
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(xs) != len(ys) or len(np.unique(xs)) < parameters:
        raise InputError(f"a power law of {parameters} parameters needs as many different sizes; got "
                         f"{len(np.unique(xs))} for {len(ys)} values")
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all() and (ys > 0).all()):
        raise InputError("a power law needs finite values above 0; check losses and sizes")
    return np.log(xs), ys


def _named(floor: float, slope: float, intercept: float) -> dict[str, float]:
    """From log (y - floor) = intercept + slope log x."""
    scale = math.exp(min(max(-intercept / slope, -700.0), 700.0)) if slope else math.nan
    return {"floor": float(floor), "scale": scale, "exponent": float(-slope)}


def _fit_floor(log_x: Array, values_SN: Array, below: bool, starts_S3: Array | None) -> Array:
    """(floor, slope, intercept) of S sets of values, (S, 3), all by one batched Levenberg-Marquardt.

    Huber's loss by reweighting. Unknowns are logit(floor / min y), log(-slope) and the height at the mean of log x, so
    that nothing is bounded and the line's two numbers don't depend on each other.
    """
    centre, lowest_S = log_x.mean(), values_SN.min(1)
    u = log_x - centre
    if starts_S3 is None:  # of every set, from many floors
        shares = np.array([0.01, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97, 0.99])
        sets = np.repeat(np.arange(len(values_SN)), len(shares))
        floors = np.tile(shares, len(values_SN)) * lowest_S[sets]
        lines = np.polyfit(u, np.log(values_SN[sets] - floors[:, None]).T, 1)
        p = np.stack([_logit(floors / lowest_S[sets]), np.log(np.maximum(-lines[0], 1e-4)), lines[1]], 1)
    else:
        sets = np.arange(len(values_SN))
        share = np.clip(starts_S3[:, 0] / lowest_S, 1e-6, 1 - 1e-6)
        p = np.stack([_logit(share), np.log(np.maximum(-starts_S3[:, 1], 1e-4)),
                      starts_S3[:, 2] + starts_S3[:, 1] * centre], 1)
    log_y, lowest = np.log(values_SN[sets]), lowest_S[sets][:, None]

    def model(p: Array) -> tuple[Array, Array, Array]:
        """Floor (S, 1), reducible part and residuals (S, N)."""
        floor = lowest / (1 + np.exp(-np.clip(p[:, :1], -30, 30)))
        reducible = np.exp(np.clip(p[:, 2:] - np.exp(np.clip(p[:, 1:2], -30, 5)) * u, -300, 300))
        return floor, reducible, np.log(floor + reducible) - log_y

    def cost(residual: Array) -> Array:
        off = np.abs(np.where(residual > 0, ABOVE * residual, residual) if below else residual)
        found: Array = np.where(off <= HUBER, off * off / 2, HUBER * (off - HUBER / 2)).sum(1)
        return found

    damping = np.full(len(p), 1e-2)
    floor, reducible, residual = model(p)
    best = cost(residual)
    still = 0
    for _ in range(ITERATIONS):
        side = np.where(residual > 0, ABOVE, 1.0) if below else np.ones_like(residual)
        weight = side ** 2 * np.minimum(1.0, HUBER / np.maximum(np.abs(side * residual), 1e-300))
        total = floor + reducible
        jacobian = np.stack([floor * (1 - floor / lowest) / total,
                             -reducible * np.exp(np.clip(p[:, 1:2], -30, 5)) * u / total, reducible / total], 2)
        normal = np.einsum("sni,sn,snj->sij", jacobian, weight, jacobian)
        gradient = np.einsum("sni,sn->si", jacobian, weight * residual)
        diagonal = np.einsum("sii->si", normal)
        damped = normal + (damping[:, None] * diagonal + 1e-14)[..., None] * np.eye(3)
        step = np.clip(np.linalg.solve(damped, gradient[..., None])[..., 0], -2, 2)
        tried = model(p - step)
        now = cost(tried[2])
        better = now < best
        p[better] -= step[better]
        floor, reducible, residual = (np.where(better[:, None], new, old) for new, old in
                                      zip(tried, (floor, reducible, residual), strict=True))
        still = 0 if (best - now > 1e-9 * best).any() else still + 1
        best = np.where(better, now, best)
        if still == 8:
            break
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-9, 1e9)
    slope = -np.exp(np.clip(p[:, 1], -30, 5))
    found = np.stack([floor[:, 0], slope, p[:, 2] - slope * centre], 1)
    chosen = [np.flatnonzero(sets == i)[best[sets == i].argmin()] for i in range(len(values_SN))]
    result: Array = found[chosen]
    return result


def _logit(share: Array) -> Array:
    result: Array = np.log(share / (1 - share))
    return result
