"""Likelihood: one call gives the log-probabilities that the sampling loop had."""
from __future__ import annotations

import math

import pytest
import torch
from tiny import emoji, random_tokens, step_logits, tiny_var
from torch import Tensor

from nextscale.errors import InputError
from nextscale.heads.categorical import token_log_prob
from nextscale.run import Run
from nextscale.sampling.filters import TopK, make_filters
from nextscale.sampling.guidance import ClassifierFree, make_guidance
from nextscale.systems.var import VAR

LABELS = [0, 1]


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


@pytest.mark.parametrize("changes", [
    {"guidance_scale": 1.0, "top_k": None, "top_p": None},
    {"guidance_scale": 3.0, "top_k": None, "top_p": None},
    {"guidance_scale": 2.0, "guidance_schedule": "constant", "temperature": 0.7, "top_k": None, "top_p": None},
    {"guidance_scale": 3.0, "top_k": 12, "top_p": 0.8},
])
def test_log_prob_equals_the_loop_s_own(system: VAR, changes: dict) -> None:
    kept: list[Tensor] = []

    def keep(step: int, run: Run) -> None:
        kept.append(run.log_probs[-1])

    made = system.generate(LABELS, seed=3, callback=keep, **changes)
    used = made.settings
    score = system.log_prob(made.tokens, LABELS, make_guidance(used.guidance_scale, used.guidance_schedule),
                            make_filters(used.temperature, used.top_k, used.top_p))
    torch.testing.assert_close(score.token, torch.cat(kept, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(score.picture, made.log_prob, rtol=0, atol=1e-3)
    assert float(score.token.max()) <= 0 and torch.isfinite(score.token).all()


def test_steps_and_pictures_are_sums_of_tokens(system: VAR) -> None:
    tokens = random_tokens(system.plan, 2)
    score = system.log_prob(tokens, LABELS)
    assert score.token.shape == (2, 30) and score.step.shape == (2, 4) and score.picture.shape == (2,)
    for span in system.plan.spans(0, 4):
        torch.testing.assert_close(score.step[:, span.step], score.token[:, span.lo:span.hi].sum(1))
    torch.testing.assert_close(score.picture, score.token.sum(1))


def test_log_prob_is_the_forced_loop_s(system: VAR) -> None:
    tokens = random_tokens(system.plan, 2)
    logits, _ = step_logits(system, system.plan, tokens, ClassifierFree(2.5))
    wanted = token_log_prob(logits, torch.cat(tokens, 1))
    found = system.log_prob(tokens, LABELS, ClassifierFree(2.5))
    torch.testing.assert_close(found.token, wanted, rtol=0, atol=1e-4)


def test_a_step_s_probabilities_sum_to_one(system: VAR) -> None:
    tokens = random_tokens(system.plan, 1)
    total = 0.0
    for code in range(32):
        changed = [torch.tensor([[code]]), *tokens[1:]]
        total += float(system.log_prob(changed, 0).token[0, 0].exp())
    assert abs(total - 1) < 1e-4


def test_pictures_are_scored_by_their_tokens(system: VAR) -> None:
    by_picture = system.log_prob(emoji(2), LABELS)
    by_tokens = system.log_prob(system.encode(emoji(2)), LABELS)
    assert torch.equal(by_picture.token, by_tokens.token)


def test_a_picture_s_score_does_not_depend_on_its_batch(system: VAR) -> None:
    both, alone = system.log_prob(emoji(2), LABELS), system.log_prob(emoji(2)[1:], [1])
    torch.testing.assert_close(both.token[1:], alone.token, rtol=0, atol=1e-4)


def test_ruled_out_tokens_have_no_probability(system: VAR) -> None:
    tokens = random_tokens(system.plan, 2)
    score = system.log_prob(tokens, LABELS, filters=(TopK(1),))
    logits, _ = step_logits(system, system.plan, tokens, make_guidance(1.0))
    best = logits.argmax(-1) == torch.cat(tokens, 1)
    assert torch.equal(score.token == 0, best) and torch.equal(score.token == -torch.inf, ~best)
    assert (score.picture == -torch.inf).all()


def test_bits_per_dimension(system: VAR) -> None:
    score = system.log_prob(emoji(2), LABELS)
    expected = -score.picture / math.log(2) / (16 * 16 * 3)
    torch.testing.assert_close(score.bits_per_dimension(16 * 16 * 3), expected)
    assert (expected > 0).all()


def test_the_training_loss_is_the_mean_negative_log_prob(system: VAR) -> None:
    tokens = system.encode(emoji(2))
    loss, by_step, _ = system.loss(tokens, torch.tensor([[0], [1]]), label_dropout=0.0)
    score = system.log_prob(tokens, LABELS)
    torch.testing.assert_close(loss.detach(), -score.token.mean(), rtol=1e-4, atol=1e-4)
    rows = torch.tensor([step.rows for step in system.plan])
    torch.testing.assert_close(by_step, -score.step.mean(0) / rows, rtol=1e-4, atol=1e-4)


def test_tokens_that_do_not_fit_are_refused(system: VAR) -> None:
    tokens = random_tokens(system.plan, 2)
    wrong = {
        "one scale short": tokens[:-1],
        "a scale of another length": [*tokens[:-1], tokens[-1][:, :-1]],
        "another vocabulary": [*tokens[:-1], tokens[-1] + 32],
        "negative": [tokens[0] - 33, *tokens[1:]],
    }
    for bad in wrong.values():
        with pytest.raises(InputError, match="tokens"):
            system.log_prob(bad, LABELS)
    with pytest.raises(InputError):
        system.log_prob(tokens, [0, 1, 2])
