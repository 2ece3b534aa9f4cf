"""Where VAR's attention could be computed in almost quadratic time (arXiv 2501.04377), n being the latent's side.

The paper: attention over a pyramid of Theta(n^2) rows costs n^(4 + o(1)). If the entries of its inputs are bounded by
R = o(sqrt(log n)), low-rank attention comes within 1 / poly(n) of it in n^(2 + o(1)); at R = Theta(sqrt(log n)) nothing
does in n^(4 - Omega(1)), under SETH. It gives no construction for a given model; here the polynomial one it rests on is
written out, and a diagnostic tells for a trained model where it would pay. With logits |q . k| <= s and even degree g:

    exp(q . k) ~ T_g(q . k) = sum_(j <= g) (q . k)^j / j! = phi(q) . phi(k),   phi_a(x) = x^a / sqrt(a!),  |a| <= g
    out = phi(q) S / (phi(q) . z),   S = sum_k phi(k) v^T,   z = sum_k phi(k)

Even degrees keep T_g above 0. |T_g / exp - 1| <= e^(2 s) s^(g + 1) / (g + 1)! =: the bound, and phi has C(m + g, g)
entries for heads of width m. S and z are all that is remembered: a step adds its keys to them, then reads.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Attend, Context, Hook, overrides
from nextscale.devices import resident
from nextscale.errors import InputError
from nextscale.plan import Plan, Span
from nextscale.run import Rows

State = tuple[Tensor, Tensor]
MOST_ENTRIES = 20_000
"""Largest number of features that is built; degrees beyond it are reported only."""


# The reference

def rank(width: int, degree: int) -> int:
    """Entries of phi for heads of that width: C(m + g, g)."""
    return math.comb(width + degree, degree)


@lru_cache(maxsize=64)
def _monomials(width: int, degree: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every degree: which monomial of the degree below each is made of, by which variable, over what root."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    below: dict[tuple[int, ...], int] = {(): 0}
    for j in range(1, degree + 1):
        here = list(itertools.combinations_with_replacement(range(width), j))
        root = torch.tensor([m.count(m[-1]) for m in here], dtype=torch.float64).rsqrt()
        found.append((torch.tensor([below[m[:-1]] for m in here]), torch.tensor([m[-1] for m in here]), root))
        below = {m: i for i, m in enumerate(here)}
    return found


def features(x: Tensor, degree: int) -> Tensor:
    """phi of vectors (..., m), (..., C(m + g, g)): phi(q) . phi(k) = T_g(q . k)."""
    parts = [torch.ones_like(x[..., :1])]
    for parent, variable, root in _monomials(x.shape[-1], degree):
        parts.append(parts[-1][..., resident(parent, x.device)] * x[..., resident(variable, x.device)]
                     * resident(root, x.device).to(x.dtype))
    return torch.cat(parts, -1)


def streamed(q: Tensor, k: Tensor, v: Tensor, degree: int, state: State | None = None) -> tuple[Tensor, State]:
    """One step: its keys and values join S (..., r, E) and z (..., r), then its queries read them.

    q, k (..., L, m), v (..., L, E), the softmax's scale being in q. Returns (..., L, E) and the new state.
    """
    phi_k, phi_q = features(k, degree), features(q, degree)
    total, weight = phi_k.transpose(-1, -2) @ v, phi_k.sum(-2)
    if state is not None:
        total, weight = state[0] + total, state[1] + weight
    return phi_q @ total / (phi_q @ weight[..., None]), (total, weight)


def one_pass(q: Tensor, k: Tensor, v: Tensor, degree: int, spans: Sequence[Span]) -> Tensor:
    """All steps at once, each seeing itself and those before it: sums a step, then running sums over the steps."""
    phi_k, phi_q = features(k, degree), features(q, degree)
    total = torch.stack([phi_k[..., s.lo:s.hi, :].transpose(-1, -2) @ v[..., s.lo:s.hi, :] for s in spans]).cumsum(0)
    weight = torch.stack([phi_k[..., s.lo:s.hi, :].sum(-2) for s in spans]).cumsum(0)
    return torch.cat([phi_q[..., s.lo:s.hi, :] @ total[i] / (phi_q[..., s.lo:s.hi, :] @ weight[i][..., None])
                      for i, s in enumerate(spans)], -2)


# Error and cost

def relative_error(s: float, degree: int) -> float:
    """Largest |T_g(x) / e^x - 1| over |x| <= s: at x = -s, where it is the integral of e^u u^g / g! over 0 <= u <= s,
    by the series sum_i s^(g + 1 + i) / (i! g! (g + 1 + i))."""
    if s == 0:
        return 0.0
    term = math.exp((degree + 1) * math.log(s) - math.lgamma(degree + 1)) / (degree + 1)
    total, i = 0.0, 0
    while term > 1e-17 * total:
        total += term
        term *= s / (i + 1) * (degree + 1 + i) / (degree + 2 + i)
        i += 1
    return total


def error_bound(s: float, degree: int) -> float:
    """e^(2 s) s^(g + 1) / (g + 1)!, which the relative error never exceeds."""
    return math.exp(2 * s + (degree + 1) * math.log(s) - math.lgamma(degree + 2)) if s > 0 else 0.0


def degree_for(s: float, error: float) -> int:
    """The smallest even degree whose relative error on |x| <= s is at most ``error``, above 0 and below 1."""
    if not (0 < error < 1 and math.isfinite(s)):
        raise InputError(f"var_limits: no degree for logits up to {s} with an error of {error}; the error must lie "
                         "between 0 and 1")
    degree = 2
    while error_bound(s, degree) > error:
        degree += 2
    while degree > 2 and relative_error(s, degree - 2) <= error:
        degree -= 2
    return degree


def crossover(plan: Plan) -> float:
    """Visible pairs a row: the rank below which low-rank attention over a plan takes fewer multiplications."""
    return plan.pairs / plan.length


# As a hook

@dataclass(frozen=True)
class LowRankAttention(Hook):
    """Polynomial low-rank attention in the place of softmax attention; remembers S and z in the place of K and V.

    degree: of the polynomial, even. A reference to see errors with, in plain operations, not a fast kernel. Raises
    InputError for degrees that are odd or below 2.
    """

    degree: int = 4

    def __post_init__(self) -> None:
        if self.degree < 2 or self.degree % 2:
            raise InputError(f"var_limits: degree is {self.degree}; it must be even and at least 2, so that no weight "
                             "is negative")

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        if plan.visible.previous is not None:
            raise InputError("var_limits: sums over keys can't be masked afterwards, and this plan hides earlier "
                             "steps; leave it out")
        others = [type(hook).__name__ for hook in hooks if hook is not self and overrides(hook, "attend")]
        if others:
            raise InputError(f"var_limits: no keys are kept that {others[0]} could act on; use one of the two")

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        if k is None or v is None:
            raise InputError(f"var_limits: attention at {address} reads keys back, and none are kept; leave it out")
        if rank(q.shape[-1], self.degree) > MOST_ENTRIES:
            raise InputError(f"var_limits: heads of width {q.shape[-1]} would need {rank(q.shape[-1], self.degree):,} "
                             f"features for degree {self.degree}; lower it")
        dtype, (q, k, v) = v.dtype, (t.float() for t in (q * ctx.scale(address), k, v))
        steps = rows.by_step()
        if ctx.memory is None:
            return one_pass(q, k, v, self.degree, rows.spans or ()).to(dtype)
        state, name, parts = ctx.memory.state, f"var_limits.{address}", []
        held = (state[f"{name}.s"], state[f"{name}.z"]) if f"{name}.s" in state else None
        for at, part in steps:
            if part.keep not in (0, len(part)):
                raise InputError("var_limits: a step whose rows stay in part can't be summed; leave it out")
            out, new = streamed(q[:, :, at], k[:, :, at], v[:, :, at], self.degree, held)
            parts.append(out)
            if part.keep:
                held = new
                state[f"{name}.s"], state[f"{name}.z"] = new
        return torch.cat(parts, 2).to(dtype)


# The diagnostic

@dataclass(frozen=True)
class HeadLimits:
    """One head of one layer at one step.

    bound: what its logits can't exceed, from the weights, infinite where these don't say; logit: the largest |q . k|
    that was measured among what the step's rows see, NaN without pictures; entry: the largest |entry| of q, k and v,
    the paper's R, the softmax's scale being shared by q and k; lost: the largest part of a logit that projecting to
    fewer directions takes away, 0 without; degree, rank, error: the smallest even degree for the wanted error of a
    weight, phi's entries, the error with what is lost; keys: rows that the step sees; approximate: fewer features than
    keys, and no more than the wanted error. The logit decides, or the bound where nothing was measured.
    """

    address: str
    head: int
    step: int
    bound: float
    logit: float
    entry: float
    lost: float
    degree: int
    rank: int
    error: float
    keys: int
    approximate: bool


@dataclass
class _Measure(Hook):
    """Of every attention, head and step, over all calls: the largest logit, entry and loss to a projection (H, K);
    and the sum over rows of q q^T + k k^T, (H, E, E). directions (H, E, m): what is projected to, by address."""

    steps_seen: int
    directions: dict[str, Tensor] = field(default_factory=dict)
    most: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    gram: dict[str, Tensor] = field(default_factory=dict)

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        if k is None or v is None or rows.spans is None:
            raise InputError(f"var_limits: attention at {address} isn't over the rows of whole steps")
        root, previous = ctx.scale(address)**0.5, rows.visible.previous
        one, two = q.float() * root, k.float() * root
        gram = torch.einsum("rhle,rhlf->hef", one, one) + torch.einsum("rhle,rhlf->hef", two, two)
        self.gram[address] = self.gram.get(address, 0) + gram
        most = self.most.setdefault(address, {
            name: one.new_zeros(q.shape[1], self.steps_seen) for name in ("logit", "entry", "lost")})
        for at in rows.spans:
            first = min(s.lo for s in rows.spans if previous is None or s.step >= at.step - previous)
            own, seen = one[:, :, at.lo:at.hi], two[:, :, first:at.hi]
            logits, values = own @ seen.transpose(2, 3), {}
            if address in self.directions:
                basis = self.directions[address]
                fewer = own @ basis @ (seen @ basis).transpose(2, 3)
                values["lost"], logits = logits - fewer, fewer
            values |= {"logit": logits, "entry": torch.cat([t[:, :, at.lo:at.hi] for t in (one, two, v.float())], 2)}
            for name, value in values.items():
                most[name][:, at.step] = torch.maximum(most[name][:, at.step], value.abs().amax((0, 2, 3)))
        return inner(q, k, v, rows)


def limits(system: Any, pictures: Tensor | None = None, labels: Any = None, error: float = 0.01,
           directions: int | None = None, batch_size: int = 16) -> list[HeadLimits]:
    """Where a trained model's logits are small enough for low-rank attention: layer by layer, head by head and step by
    step.

    pictures (B, 3, S, S) in [-1, 1] with labels: measured under teacher forcing; without, the weights' own bounds are
    told, which only attention with unit queries and keys has: min(exp(scale), 100) a head. error: of an attention
    weight, relative. directions: first project queries and keys of every head to that many, those that hold most of
    both; needs pictures. Raises InputError without pictures where they are needed.
    """
    plan, measured = system.plan, _Measure(len(system.plan))
    bounds = _bounds(system.generator)
    if pictures is None and (directions or not bounds):
        why = "directions" if directions else "logits whose queries and keys have no unit length"
        raise InputError(f"var_limits: {why} are measured on pictures; give some")
    for projected in (False, True) if directions else (False,):
        if projected and directions:
            measured = _Measure(len(plan), {address: torch.linalg.eigh(gram).eigenvectors[..., -directions:]
                                            for address, gram in measured.gram.items()})
        for start in range(0, 0 if pictures is None else len(pictures), batch_size):
            part = slice(start, start + batch_size)
            system.log_prob(pictures[part], labels[part] if isinstance(labels, list) else labels,  # type: ignore[index]
                            hooks=[measured])
    made = []
    for address in measured.most or bounds:
        most, (own, width) = measured.most.get(address), bounds.get(address, ([], 0))
        width = min(directions or 1 << 30, width if most is None else len(measured.gram[address][0]))
        for head, k in itertools.product(range(len(own) if most is None else len(most["logit"])), range(len(plan))):
            bound = own[head] if own else math.inf
            logit, entry, lost = (math.nan, math.nan, 0.0) if most is None else (
                float(most[name][head, k]) for name in ("logit", "entry", "lost"))
            s = bound if most is None else logit
            degree = degree_for(s, error)
            whole = (1 + relative_error(s, degree)) * math.exp(lost) - 1
            first = 0 if plan.visible.previous is None else max(0, k - plan.visible.previous)
            keys = plan.starts[k + 1] - plan.starts[first]
            made.append(HeadLimits(address, head, k, bound, logit, entry, lost, degree, rank(width, degree), whole,
                                   keys, rank(width, degree) < keys and whole <= error * (1 + 1e-9)))
    return made


def _bounds(network: Any) -> dict[str, tuple[list[float], int]]:
    """Of every attention of unit queries and keys: the largest logit of each head, and the heads' width."""
    found = {}
    for i, block in enumerate(getattr(network, "blocks", ())):
        scale = getattr(getattr(block, "attention", None), "scale_1H11", None)
        if scale is not None:
            width = network.config.width // network.config.heads
            found[f"{network.name}.{i}.kv"] = (scale.detach().float().exp().clamp_max(100.0).flatten().tolist(), width)
    return found


def table(found: Sequence[HeadLimits], plan: Plan) -> str:
    """The report as text: a line a head with its logits at every step, and what the last step would take."""
    lines = [f"largest logits at steps of {', '.join(_grid(plan, k) for k in range(len(plan)))}; degree, features and "
             "error at the last; where fewer features than keys"]
    for (address, head), group in itertools.groupby(found, lambda one: (one.address, one.head)):
        steps = list(group)
        last = steps[-1]
        where = [_grid(plan, one.step) for one in steps if one.approximate]
        logits = "" if math.isnan(last.logit) else " ".join(f"{one.logit:5.2f}" for one in steps) + "; "
        logits += f"{last.lost:.2f} lost; " if last.lost else ""
        features = f"{last.rank:,}" if last.rank < 1e6 else f"{last.rank:.1e}"
        lines.append(f"{address} head {head}: at most {last.bound:.2f}; {logits}degree {last.degree}, {features} "
                     f"features, error {last.error:.0e}; {', '.join(where) or 'exact everywhere'}")
    few, side = sum(one.approximate for one in found), math.sqrt(plan.grid[0] * plan.grid[1])
    entries = [one.entry for one in found if not math.isnan(one.entry)]
    lines.append(f"{few} of {len(found)} heads and steps qualify: the wanted error by fewer features than keys; "
                 f"over the whole plan low rank pays below {crossover(plan):.0f} features")
    if entries:
        lines.append(f"the largest entry of queries, keys and values is {max(entries):.2f}; sqrt(ln n) is "
                     f"{math.sqrt(math.log(side)):.2f} for a side of n = {side:g}")
    return "\n".join(lines)


def _grid(plan: Plan, step: int) -> str:
    h, w = plan.steps[step].grid
    return f"{h}x{w}"
