"""The categorical head: hidden states to one of V codes a position, positions independent of each other."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from nextscale.heads.cross_entropy import LinearCrossEntropy, cross_entropy
from nextscale.layers.bf16_training import trains_in_bf16_on_cpu
from nextscale.layers.linear import Linear
from nextscale.noise import inverse_cdf
from nextscale.run import At, Call, Run, Sample

Evaluate = Callable[[Call], Tensor]
Guidance = Callable[[dict[str, Tensor], At], Tensor]
Filter = Callable[[Tensor, At], Tensor]


class LogitsHead(Linear):
    """A linear layer to logits, one row a position: what heads share that draw from a distribution."""

    @property
    def replays(self) -> Hashable:
        """What tells whether two heads do the same work in a step of the same plan, so that one may be replayed in the
        place of the other: no values asked for, nothing but ``Run.uniform`` drawn. None: it must be done anew."""
        return None

    def outputs(self, hidden: Tensor, branches: Sequence[str]) -> dict[str, Tensor]:
        """The logits of every branch, (B, L, ..., V), from hidden states of all of them, branch-major."""
        return dict(zip(branches, self(hidden).chunk(len(branches)), strict=True))

    def distribution(self, outputs: dict[str, Tensor], at: At, guidance: Guidance,
                     filters: Sequence[Filter] = ()) -> Tensor:
        """Guided and filtered logits (B, L, ..., V): what tokens are drawn from and scored under."""
        logits = guidance(outputs, at)
        for narrow in filters:
            logits = narrow(logits, at)
        return logits


class CategoricalHead(LogitsHead):
    """A linear layer to logits (.., V), which leave it in float32.

    soft: None, or what turns guided logits into code vectors that are written instead of the sampled codes (VAR's
    smooth mode); it is called as ``soft(logits, at, run)``.
    """

    @property
    def replays(self) -> Hashable:
        return self

    def forward(self, hidden: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
        return super().forward(hidden, bias, gelu).float()

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every position in nats, and 1 where no other code is likelier than the target, else 0;
        both (B, L) float32."""
        rows, targets = hidden.flatten(0, -2), target.flatten()
        # An adapted layer lends itself to this method, but its weight is not its product.
        if isinstance(self, CategoricalHead) and trains_in_bf16_on_cpu(hidden):
            entropy, right = LinearCrossEntropy.apply(rows, self.weight, self.bias, targets, label_smoothing)
        else:
            entropy, right = cross_entropy(self(rows), targets, label_smoothing)
        return entropy.view(target.shape), right.view(target.shape)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        """Draw every predicted position of a call by the inverse CDF of one uniform number each."""
        outputs = self.outputs(evaluate(call)[:, call.predicts], run.branches)
        logits = self.distribution(outputs, run.at, guidance, filters)
        sample = self.choose(logits, run.uniform("token"), run.exact)
        return sample if soft is None else replace(sample, codes=soft(logits, run.at, run))

    def choose(self, logits: Tensor, uniform_BL1: Tensor, exact: bool = False) -> Sample:
        """One token a position from logits (B, L, V), by numbers in (0, 1), (B, L, 1)."""
        tokens = inverse_cdf(logits, uniform_BL1[..., 0], exact)
        log_prob = self.log_prob(logits, tokens)
        return Sample(tokens, log_prob, log_prob.exp())

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What ``token_log_prob`` says."""
        return token_log_prob(logits, tokens)


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability in nats of tokens (B, L) under logits (B, L, V); -inf where a filter ruled the token out."""
    return F.log_softmax(logits.float(), -1).gather(-1, tokens[..., None])[..., 0]
