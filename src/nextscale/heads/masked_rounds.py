"""The head of HMAR (arXiv 2506.04421): a step's tokens are drawn at once, then the least confident ones again."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.heads.categorical import CategoricalHead, Evaluate, Filter, Guidance
from nextscale.layers.resize import resize
from nextscale.run import At, Call, Run, Sample


class MaskedRoundsHead(nn.Module):
    """Two linear layers: of the next-scale module, and of the mask module, which redraws parts of a step in rounds.

    Likelihood and loss are the next-scale module's.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.next = CategoricalHead(width, vocabulary)
        self.mask = CategoricalHead(width, vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.next(hidden)
        return logits

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.next.loss(hidden, target, label_smoothing)

    def outputs(self, hidden: Tensor, branches: Sequence[str]) -> dict[str, Tensor]:
        return self.next.outputs(hidden, branches)

    def distribution(self, outputs: dict[str, Tensor], at: At, guidance: Guidance,
                     filters: Sequence[Filter] = ()) -> Tensor:
        return self.next.distribution(outputs, at, guidance, filters)

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return self.next.log_prob(logits, tokens)

    @property
    def replays(self) -> Hashable:
        return self

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        """All tokens of a step at once, by the next-scale module."""
        return self.next.sample(evaluate, call, run, guidance, filters, soft)

    def in_rounds(self, counts: Sequence[Sequence[int]], sighted: bool = True) -> InRounds:
        """This head under a schedule: how many tokens of every step are settled in each of its rounds."""
        return InRounds(self, counts, sighted=sighted)


class InRounds:
    """A ``MaskedRoundsHead`` that samples by a schedule of rounds, lists of numbers of tokens, one list a step.

    Round 0 draws all tokens of a step with the next-scale module under guidance. The least confident of them, all
    but the first number, are then masked and drawn by the mask module without guidance; all but the second number
    of these are masked again, and so on. Confidence is the probability that a token was drawn with, after filters.
    Tokens that were settled are never drawn again. Where hooks know some of a picture's tokens at a step (editing),
    all others are masked in the first of the later rounds, of which there is at least one, so that they are drawn
    in sight of the known ones; not with ``sighted`` False, as the next-scale module draws in any case. each: called
    with (step, round, which positions were drawn, sample) after every round.
    """

    def __init__(self, head: MaskedRoundsHead, counts: Sequence[Sequence[int]],
                 each: Callable[[int, int, Tensor, Sample], None] | None = None, sighted: bool = True):
        self.head, self.counts, self.each, self.sighted = head, counts, each, sighted

    @property
    def replays(self) -> Hashable:
        return None if self.each is not None else (self.head, tuple(map(tuple, self.counts)), self.sighted)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        sample = self.head.next.sample(evaluate, call, run, guidance, filters, soft)
        editing = call.known is not None and self.sighted and run.cursor > 0
        if call.known is not None:
            sample = call.known(sample)
        counts = self.counts[run.cursor]
        assert sample.confidence is not None
        masked = ~sample.confidence.isinf()
        edited = ~masked.all(1, keepdim=True)
        each = self.each or (lambda *_: None)
        each(run.cursor, 0, masked, sample)
        for round in range(1, max(len(counts), 1 + editing)):
            assert sample.confidence is not None
            again = masked & least(sample.confidence.masked_fill(~masked, torch.inf), sum(counts[round:]))
            masked = torch.where(edited, masked, again) if editing and round == 1 else again
            own = resize(run.canvas.contribution(run.cursor, sample.tokens), run.plan.steps[run.cursor].grid, "area")
            if call.again is None:
                raise InputError("masked rounds: the network makes no calls of later rounds; give it HMAR's generator")
            hidden = evaluate(call.again(own.flatten(2).transpose(1, 2), masked))
            outputs = self.head.mask.outputs(hidden, run.branches)
            at = replace(run.at, round=round)
            logits = self.head.distribution(outputs, at, lambda found, at: found[run.branches[0]], filters)
            drawn = self.head.mask.choose(logits, run.uniform("token", round), run.exact)
            assert drawn.confidence is not None and drawn.log_prob is not None and sample.log_prob is not None
            sample = Sample(torch.where(masked, drawn.tokens, sample.tokens),
                            torch.where(masked, drawn.log_prob, sample.log_prob),
                            torch.where(masked, drawn.confidence, sample.confidence))
            each(run.cursor, round, masked, sample)
        return sample


def least(confidence_BL: Tensor, count: int) -> Tensor:
    """Which positions are the ``count`` least confident of each picture, (B, L) bool."""
    places = confidence_BL.argsort(dim=-1, stable=True)[:, :count]
    return torch.zeros_like(confidence_BL, dtype=torch.bool).scatter_(1, places, True)
