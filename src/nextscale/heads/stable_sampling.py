"""The head of STAR (arXiv 2406.10797): a scale's tokens at once, or in rounds, each of which knows what those before it
drew (causal-driven stable sampling)."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nextscale.errors import InputError
from nextscale.heads.categorical import CategoricalHead, Evaluate, Filter, Guidance
from nextscale.layers.norms import layer_norm
from nextscale.run import At, Call, Run, Sample


class StableSamplingHead(nn.Module):
    """A norm and a linear layer to logits; beside them, where there is one, a network that draws tokens given others of
    their scale, with a linear layer of its own.

    network: ``network(plan, codes_BLD, hidden_RLC, cond, cell, step) -> hidden (R, L, C)``, see ``StableSampler``.
    Likelihood and loss are those of the first.
    """

    def __init__(self, width: int, vocabulary: int, network: nn.Module | None = None):
        super().__init__()
        self.base = CategoricalHead(width, vocabulary)
        self.sampler = network
        self.again = None if network is None else CategoricalHead(width, vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.base(layer_norm(hidden))
        return logits

    def loss(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        return self.base.loss(layer_norm(hidden), target, label_smoothing)

    def outputs(self, hidden: Tensor, branches: Sequence[str]) -> dict[str, Tensor]:
        return self.base.outputs(layer_norm(hidden), branches)

    def distribution(self, outputs: dict[str, Tensor], at: At, guidance: Guidance,
                     filters: Sequence[Filter] = ()) -> Tensor:
        return self.base.distribution(outputs, at, guidance, filters)

    def log_prob(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return self.base.log_prob(logits, tokens)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        """All tokens of a step at once."""
        return self.base.sample(lambda call: layer_norm(evaluate(call)), call, run, guidance, filters, soft)


class InStableRounds:
    """A ``StableSamplingHead`` that draws a scale in rounds.

    rounds: of every scale, 0 for all of its tokens at once without the network. In each round every token is drawn,
    and of those that are not known yet ``reveal_counts`` says how many become known: those that were drawn with the
    highest probability, in the first ``random_rounds`` any; what hooks know is known from the start. The network's
    logits are guided by the guidance's full scale, as at its last step, whatever the scale. base_until: at scales
    before this one the random rounds draw from the transformer's own logits under the scale's guidance, and reveal
    the most probable tokens as well, as many, unless they are known (so the published code, which reveals twice).
    each: called with (step, round, which tokens became known, sample) after every round.
    """

    def __init__(self, head: StableSamplingHead, rounds: Sequence[int], random_rounds: int = 5, base_until: int = 0,
                 each: Callable[[int, int, Tensor, Sample], None] | None = None):
        self.head, self.rounds, self.random_rounds, self.base_until = head, rounds, random_rounds, base_until
        self.each = each or (lambda *_: None)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Callable[[Tensor, At, Run], Tensor] | None = None) -> Sample:
        k = run.cursor
        if not self.rounds[k]:
            return self.head.sample(evaluate, call, run, guidance, filters, soft)
        hidden = evaluate(call)[:, call.predicts]
        step, cells = call.rows.step[:1, call.predicts], run.order[:, run.plan.span(k, k + 1)]
        counts = reveal_counts(hidden.shape[1], self.rounds[k])
        base: Tensor | None = None
        if k < self.base_until:
            base = self.head.distribution(self.head.outputs(hidden, run.branches), run.at, guidance, filters)
        size = (run.pictures, hidden.shape[1])
        sample = Sample(torch.zeros(size, dtype=torch.int64, device=hidden.device),
                        *torch.zeros(2, *size, device=hidden.device))
        if call.known is not None:
            sample = call.known(sample)
        assert sample.confidence is not None
        known = sample.confidence.isinf()
        for round, count in enumerate(counts):
            chance = round < self.random_rounds
            drafted = chance and base is not None
            logits = base if drafted else self.logits(run, hidden, call.rows.cond, sample.tokens, known, step, cells,
                                                      guidance, filters, round)
            assert logits is not None
            drawn = self.head.base.choose(logits, run.uniform("token", round), run.exact)
            assert drawn.confidence is not None
            before = known
            if drafted:
                known = known | most(drawn.confidence, count)
            order = run.uniform("reveal", round)[..., 0] if chance else drawn.confidence
            known = known | most(order.masked_fill(known, -1.0), count)
            new = known & ~before
            sample = Sample(*(torch.where(new, ours, theirs) for ours, theirs in (  # type: ignore[arg-type]
                (drawn.tokens, sample.tokens), (drawn.log_prob, sample.log_prob),
                (drawn.confidence, sample.confidence))))
            self.each(k, round, new, sample)
        return sample

    def logits(self, run: Run, hidden: Tensor, cond: object, tokens: Tensor, known: Tensor, step: Tensor,
               cells: Tensor, guidance: Guidance, filters: Sequence[Filter], round: int) -> Tensor:
        """The network's guided and filtered logits (B, L, V) given the known ones of some tokens."""
        network, again = self.head.sampler, self.head.again
        if network is None or again is None:
            raise InputError("rounds: this model has no network that draws in rounds; leave rounds out")
        codes = run.canvas.codec.embed(tokens) * known[..., None]
        x = network(run.plan, codes, hidden, cond, cells, step)
        outputs = again.outputs(layer_norm(x), run.branches)
        at = replace(run.at, round=round)
        last = replace(at, step=at.steps - 1, done=at.total - at.count)
        return again.distribution(outputs, at, lambda found, at: guidance(found, last), filters)


def reveal_counts(tokens: int, rounds: int) -> list[int]:
    """How many tokens become known in each round (published code): proportional to arccos(r), r falling evenly from 1
    to 0, rounded, at least 1 each, the last what is left; in fewer rounds where there are fewer tokens than rounds."""
    rounds = min(tokens, rounds)
    share = torch.arccos(torch.linspace(1, 0, rounds)) if rounds > 1 else torch.ones(1)
    counts = [max(1, int(count)) for count in (share / share.sum() * tokens).round().tolist()]
    counts[-1] += tokens - sum(counts)
    while counts[-1] < 1:  # of small scales, whose rounds of one token are more than they ask for
        largest = max(range(rounds - 1), key=lambda i: counts[i])
        counts[largest], counts[-1] = counts[largest] - 1, counts[-1] + 1
    return counts


def known_share(r: Tensor) -> Tensor:
    """The share of tokens that training shows where r was drawn from 0..1: arccos(r) / (pi / 2)."""
    return torch.arccos(r) / (math.pi / 2)


def most(score_BL: Tensor, count: int) -> Tensor:
    """Which positions have the ``count`` highest scores of each picture, (B, L) bool."""
    places = score_BL.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score_BL, dtype=torch.bool).scatter_(1, places, True)
