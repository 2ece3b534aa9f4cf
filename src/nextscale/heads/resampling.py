"""Drawing a step's tokens again and keeping the likelier ones, a corrector step (SRDD, arXiv 2509.22636)."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from nextscale.errors import InputError
from nextscale.heads.categorical import CategoricalHead, Evaluate, Filter, Guidance
from nextscale.run import At, Call, Run, Sample


class Resampling:
    """A ``CategoricalHead`` that draws tokens again, in ``rounds`` rounds, from the same guided and filtered logits.

    A token is drawn again while its probability is below ``below``, and keeps the likelier of both: with 1 all tokens
    are (simple resampling), with less the unlikely ones (mask resampling). Rounds see no more of the picture than the
    first draw did, so this sharpens the distribution as a soft nucleus would. A token's log-probability remains the one
    under the logits, not that of coming out of the rounds.

    each: called with (step, round, which positions were drawn, sample) after every round. Raises InputError for
    negative rounds, and a threshold outside 0 to 1.
    """

    def __init__(self, head: CategoricalHead, rounds: int, below: float = 1.0,
                 each: Callable[[int, int, Tensor, Sample], None] | None = None):
        if rounds < 0 or not 0 <= below <= 1:
            raise InputError(f"resampling: {rounds} rounds below a probability of {below}; rounds must be at least 0, "
                             "the probability from 0 to 1")
        self.head, self.rounds, self.below, self.each = head, rounds, below, each

    @property
    def replays(self) -> Hashable:
        return None if self.each is not None else (self.head, self.rounds, self.below)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        outputs = self.head.outputs(evaluate(call)[:, call.predicts], run.branches)
        logits = self.head.distribution(outputs, run.at, guidance, filters)
        sample = self.head.choose(logits, run.uniform("token"), run.exact)
        again = torch.ones_like(sample.tokens, dtype=torch.bool)
        each = self.each or (lambda *_: None)
        each(run.cursor, 0, again, sample)
        for round in range(1, self.rounds + 1):
            assert sample.confidence is not None and sample.log_prob is not None
            again = sample.confidence < self.below
            drawn = self.head.choose(logits, run.uniform("token", round), run.exact)
            assert drawn.confidence is not None and drawn.log_prob is not None
            better = again & (drawn.confidence > sample.confidence)
            sample = Sample(torch.where(better, drawn.tokens, sample.tokens),
                            torch.where(better, drawn.log_prob, sample.log_prob),
                            torch.where(better, drawn.confidence, sample.confidence))
            each(run.cursor, round, again, sample)
        if soft is None:
            return sample
        return Sample(sample.tokens, sample.log_prob, sample.confidence, soft(logits, run.at, run))
