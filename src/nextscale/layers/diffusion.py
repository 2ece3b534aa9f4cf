"""Diffusion in discrete time: a chain of noise levels, its forward and reverse steps, and the terms of its loss.

A chain (DDPM, arXiv 2006.11239) takes x_0 to noise in steps that keep the share abar_i of it:
x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) e. Tables are float64 and gathered to float32. Below, x is (..., C) or any
tensor whose leading dimensions are those of ``index``, the step of the chain that it stands at.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from nextscale.devices import resident
from nextscale.errors import InputError

STEPS = 1000
"""Steps of the chain that models are trained with."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Noise levels from clean to noisy. times (S,): the step of the training chain that each is, which the network is
    told; kept_S: abar, the share of the signal's variance that is left at each, float64."""

    times: Tensor
    kept_S: Tensor

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def kept_before_S(self) -> Tensor:
        """abar of the step before, 1 before the first."""
        return torch.cat([self.kept_S.new_ones(1), self.kept_S[:-1]])

    @cached_property
    def beta_S(self) -> Tensor:
        """Share of variance that a step replaces by noise."""
        return 1 - self.kept_S / self.kept_before_S

    @cached_property
    def posterior_variance_S(self) -> Tensor:
        """Variance of q(x_(i-1) | x_i, x_0); 0 for the first step, which is deterministic."""
        return self.beta_S * (1 - self.kept_before_S) / (1 - self.kept_S)

    @cached_property
    def log_least_variance_S(self) -> Tensor:
        """log of the posterior variance, the second step's for the first one too."""
        variance = self.posterior_variance_S.clone()
        variance[0] = variance[1] if len(self) > 1 else self.beta_S[0]
        return variance.log()

    @cached_property
    def signal_S(self) -> Tensor:
        """sqrt(abar)."""
        return self.kept_S.sqrt()

    @cached_property
    def noise_S(self) -> Tensor:
        """sqrt(1 - abar)."""
        return (1 - self.kept_S).sqrt()

    @cached_property
    def inverse_signal_S(self) -> Tensor:
        """sqrt(1 / abar)."""
        return (1 / self.kept_S).sqrt()

    @cached_property
    def noise_over_signal_S(self) -> Tensor:
        """sqrt(1 / abar - 1)."""
        return (1 / self.kept_S - 1).sqrt()

    @cached_property
    def posterior_of_clean_S(self) -> Tensor:
        """Weight of x_0 in the posterior mean."""
        return self.beta_S * self.kept_before_S.sqrt() / (1 - self.kept_S)

    @cached_property
    def posterior_of_noisy_S(self) -> Tensor:
        """Weight of x_i in the posterior mean."""
        return (1 - self.kept_before_S) * (1 - self.beta_S).sqrt() / (1 - self.kept_S)

    @cached_property
    def log_beta_S(self) -> Tensor:
        """log beta, the greatest variance."""
        return self.beta_S.log()

    @cached_property
    def log_large_variance_S(self) -> Tensor:
        """log beta, for the first step the least: DDPM's "fixed large" variance."""
        log = self.log_beta_S.clone()
        log[0] = self.log_least_variance_S[0]
        return log


@lru_cache(maxsize=32)
def cosine_chain(kept: int | tuple[int, ...] = STEPS) -> Chain:
    """The cosine chain of 1000 steps (arXiv 2102.09672, eq. 17), or some of its steps.

    f(t) = cos^2((t + 0.008) / 1.008 pi / 2), beta_i = min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999). kept: how many
    steps, evenly spread; several numbers keep so many of each of as many equal sections, from the clean end.
    """
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    beta_S = torch.tensor([min(1 - f((i + 1) / STEPS) / f(i / STEPS), 0.999) for i in range(STEPS)],
                          dtype=torch.float64)
    times = torch.tensor(spread(STEPS, (kept,) if isinstance(kept, int) else kept))
    return Chain(times, (1 - beta_S).cumprod(0)[times])


def spread(steps: int, sections: Sequence[int]) -> list[int]:
    """Steps to keep: so many of every section of equal size, first and last among them (published respacing rule).

    Raises InputError where none is left, or a section has fewer.
    """
    size, extra = divmod(steps, len(sections))
    kept, start = [], 0
    for i, count in enumerate(sections):
        length = size + (i < extra)
        if not 0 <= count <= length:
            raise InputError(f"diffusion: {count} steps can't be kept of {length}")
        stride, place = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # a running sum: its rounding errors decide which of two steps is kept
        start += length
    if not kept:
        raise InputError(f"diffusion: no step of {steps} is kept; keep at least 1")
    return kept


def _at(table_S: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Entries of a table in float32, to be broadcast over what of x lies behind the index's dimensions."""
    return resident(table_S, index.device)[index].float().reshape(*index.shape, *(1,) * (x.ndim - index.ndim))


def diffuse(chain: Chain, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) e."""
    return _at(chain.signal_S, index, clean) * clean + _at(chain.noise_S, index, clean) * noise


def denoised(chain: Chain, x: Tensor, epsilon: Tensor, index: Tensor) -> Tensor:
    """x_0 = x_i / sqrt(abar_i) - sqrt(1 / abar_i - 1) e."""
    return _at(chain.inverse_signal_S, index, x) * x - _at(chain.noise_over_signal_S, index, x) * epsilon


def posterior_mean(chain: Chain, clean: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """Mean of q(x_(i-1) | x_i, x_0)."""
    return _at(chain.posterior_of_clean_S, index, x) * clean + _at(chain.posterior_of_noisy_S, index, x) * x


def learned_log_variance(chain: Chain, share: Tensor, index: Tensor) -> Tensor:
    """f log beta + (1 - f) log posterior variance, f = (share + 1) / 2 (arXiv 2102.09672, eq. 15); share: -1 to 1."""
    f = (share + 1) / 2
    return f * _at(chain.log_beta_S, index, share) + (1 - f) * _at(chain.log_least_variance_S, index, share)


def large_log_variance(chain: Chain, x: Tensor, index: Tensor) -> Tensor:
    """The fixed log variance of networks that predict the noise alone."""
    return _at(chain.log_large_variance_S, index, x).expand_as(x)


def reverse_step(chain: Chain, x: Tensor, epsilon: Tensor, log_variance: Tensor, noise: Tensor, index: Tensor,
                 temperature: float = 1.0, clip: float = 0.0) -> Tensor:
    """x_(i-1) = mean(x_0(x_i, e), x_i) + temperature sqrt(variance) noise, without noise at the first step
    (arXiv 2006.11239, algorithm 2). clip: bound of the denoised values, 0 for none."""
    clean = denoised(chain, x, epsilon, index)
    mean = posterior_mean(chain, clean.clamp(-clip, clip) if clip else clean, x, index)
    noisy = (index != 0).float().reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return mean + noisy * (0.5 * log_variance).exp() * noise * temperature


def variational_bits(chain: Chain, clean: Tensor, x: Tensor, epsilon: Tensor, share: Tensor, index: Tensor) -> Tensor:
    """The step's term of the variational bound, in bits a channel (arXiv 2102.09672, L_vlb): of x (..., C), (...).

    KL(q(x_(i-1) | x_i, x_0) || p(x_(i-1) | x_i)); at the first step -log p(x_0 | x_1) of bins of width 2 / 255, open
    below -0.999 and above 0.999. It teaches the variance alone: no gradient reaches epsilon.
    """
    log_variance = learned_log_variance(chain, share, index)
    mean = posterior_mean(chain, denoised(chain, x, epsilon.detach(), index), x, index)
    true_mean = posterior_mean(chain, clean, x, index)
    true_log_variance = _at(chain.log_least_variance_S, index, x)
    divergence = 0.5 * (-1 + log_variance - true_log_variance + (true_log_variance - log_variance).exp()
                        + (true_mean - mean).square() * (-log_variance).exp())
    nats = torch.where((index == 0)[..., None], _bin_nats(clean, mean, 0.5 * log_variance), divergence)
    return nats.mean(-1) / math.log(2)


def _bin_nats(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """-log of the probability that a normal distribution gives the bin of x."""
    precision = (-log_deviation).exp()
    above, below = (_normal_cdf(precision * (x - mean + side / 255)) for side in (1, -1))
    inside = (above - below).clamp_min(1e-12).log()
    return -torch.where(x < -0.999, above.clamp_min(1e-12).log(),
                        torch.where(x > 0.999, (1 - below).clamp_min(1e-12).log(), inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The published approximation of the normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
