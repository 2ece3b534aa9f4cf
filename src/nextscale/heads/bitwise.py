"""The bitwise head: every bit of a token by itself, so a vocabulary of 2^d codes takes 2d outputs (Infinity, arXiv
2412.04431, section 3.2)."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from nextscale.heads.categorical import Evaluate, Filter, Guidance, LogitsHead, token_log_prob
from nextscale.noise import inverse_cdf
from nextscale.run import At, Call, Run, Sample


class BitwiseHead(LogitsHead):
    """A linear layer to two logits a bit, (..., d, 2), which leave it in float32. Channels 2j and 2j + 1 are bit j's.

    reduction: whether a position's loss is the mean or the sum over its bits.
    """

    def __init__(self, width: int, bits: int, reduction: Literal["mean", "sum"] = "mean"):
        super().__init__(width, 2 * bits)
        self.bits, self.reduction = bits, reduction

    @property
    def replays(self) -> Hashable:
        return self

    def forward(self, hidden: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        return super().forward(hidden, bias, gelu).float().unflatten(-1, (self.bits, 2))

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every position in nats, over its bits (B, L, d), and the share of bits that are right, both
        (B, L) float32."""
        logits = self(hidden)
        margin = logits[..., 1] - logits[..., 0]
        wanted = target.to(margin.dtype)
        entropy = F.binary_cross_entropy_with_logits(
            margin, wanted * (1 - label_smoothing) + label_smoothing / 2, reduction="none")
        right = ((margin > 0) == (wanted > 0.5)).float().mean(-1)
        return entropy.mean(-1) if self.reduction == "mean" else entropy.sum(-1), right

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        """Draw every bit of every predicted position by one uniform number each."""
        outputs = self.outputs(evaluate(call)[:, call.predicts], run.branches)
        logits = self.distribution(outputs, run.at, guidance, filters)
        return self.choose(logits, run.uniform("token", width=self.bits), run.exact)

    def choose(self, logits: Tensor, uniform_BLd: Tensor, exact: bool = False) -> Sample:
        """The bits (B, L, d) of one token a position by numbers in (0, 1), (B, L, d)."""
        tokens = inverse_cdf(logits, uniform_BLd, exact).bool()
        log_prob = self.log_prob(logits, tokens)
        return Sample(tokens, log_prob, (log_prob / self.bits).exp())

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability in nats of tokens (B, L, d) under logits (B, L, d, 2), (B, L)."""
        return token_log_prob(logits, tokens.long()).sum(-1)
