"""The categorical head: hidden states to one of V codes a position, positions independent of each other."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.noise import Recorded, inverse_cdf
from nextscale.run import At, Call, Run, Sample

Evaluate = Callable[[Call], Tensor]
Guidance = Callable[[dict[str, Tensor], At], Tensor]
Filter = Callable[[Tensor, At], Tensor]


class CategoricalHead(nn.Linear):
    """A linear layer to logits (.., V), which leave it in float32.

    soft: None, or what turns guided logits into code vectors that are written instead of the sampled codes (VAR's
    smooth mode); it is called as ``soft(logits, at, run)``.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).float()

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of every position, (B, L), in nats."""
        logits = self(hidden)
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none",
                               label_smoothing=label_smoothing).view(target.shape)

    def outputs(self, hidden: Tensor, branches: Sequence[str]) -> dict[str, Tensor]:
        """The logits of every branch, (B, L, V), from hidden states of all of them, branch-major."""
        return dict(zip(branches, self(hidden).chunk(len(branches)), strict=True))

    def distribution(self, outputs: dict[str, Tensor], at: At, guidance: Guidance,
                     filters: Sequence[Filter] = ()) -> Tensor:
        """Guided and filtered logits (B, L, V): what tokens are drawn from and scored under."""
        logits = guidance(outputs, at)
        for narrow in filters:
            logits = narrow(logits, at)
        return logits

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        """Draw every predicted position of a call by the inverse CDF of one uniform number each."""
        outputs = self.outputs(evaluate(call)[:, call.predicts], run.branches)
        logits = self.distribution(outputs, run.at, guidance, filters)
        span = run.plan.span(run.cursor, run.cursor + 1)
        step_1L = call.rows.step[:1, call.predicts]
        uniform_BL = run.noise.uniform("token", step_1L, 0, run.order[:, span])[..., 0]
        tokens = inverse_cdf(logits, uniform_BL, exact=isinstance(run.noise, Recorded))
        log_prob = token_log_prob(logits, tokens)
        return Sample(tokens, log_prob, log_prob.exp(), None if soft is None else soft(logits, run.at, run))


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability in nats of tokens (B, L) under logits (B, L, V); -inf where a filter ruled the token out."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0].float()
    return chosen - torch.logsumexp(logits.float(), -1)
