"""STAR: corner-aligned places, the empty prompt as the null one, one pass and the loop alike, stable sampling in rounds
and its training, token dropping, published names."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny import AUTOENCODER, emoji, fill
from torch import Tensor

from nextscale import hub
from nextscale.conditions.text_features import TextFeatures
from nextscale.context import Context
from nextscale.errors import InputError, WeightsError
from nextscale.generators.star import CornerSelfAttention, OwnStepAndText, STARGeneratorConfig
from nextscale.heads.stable_sampling import InStableRounds, known_share, reveal_counts
from nextscale.layers.memory import Tags
from nextscale.layers.norms import layer_norm
from nextscale.layers.rope import rotate, rotation
from nextscale.noise import Keyed
from nextscale.objectives.teacher_forcing import teacher_forced, teacher_forcing_call
from nextscale.objectives.token_dropping import TokenDropping, token_dropping_loss
from nextscale.plan import Plan, places
from nextscale.run import At, Run, Sample, conditions
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.guidance import ClassifierFree, Unguided
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import folders
from nextscale.systems.star import ROUNDS_1024, SIZES, STAR, STARConfig, STARSettings, preset_config
from nextscale.tokenizers.config import TokenizerConfig

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDTH, POOLED = 24, 20
PROMPTS = ["a red apple", "sun"]
ROUNDS = (0, 0, 3, 4)


class LettersEncoder:
    """A text encoder without weights: a word's features hang on its letters alone."""

    name, width, pooled_width = "letters", WIDTH, POOLED

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        self.asked += prompts
        rows = [torch.stack([self.vector(w, WIDTH) for w in ["<", *prompt.split(), ">"]]) for prompt in prompts]
        return TextFeatures.pack(rows, torch.stack([self.vector(prompt, POOLED) for prompt in prompts]))

    @staticmethod
    def vector(text: str, width: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def tiny(rounds: tuple[int, ...] = (), seed: int = 0, base_until: int = 0, dropping: TokenDropping | None = None,
         sampler_blocks: int = 2, grids: tuple[tuple[int, int], ...] = GRIDS, **generator: object) -> STAR:
    network = STARGeneratorConfig(3, 48, 3, text_width=WIDTH, pooled_width=POOLED, sampler_blocks=sampler_blocks,
                                  sampled_from=2, **generator)  # type: ignore[arg-type]
    settings = STARSettings(3.0, top_k=20, rounds=rounds, random_rounds=1, base_until=base_until)
    system = STAR(STARConfig(TokenizerConfig(AUTOENCODER, grids, 32), network, {"pictures": settings},
                             dropping or TokenDropping())).eval()
    fill(system, seed)
    system.encoder = LettersEncoder()
    return system


def hidden_of(system: STAR, tokens: list[Tensor], prompts: Sequence[str] = PROMPTS) -> Tensor:
    cond = conditions(system.condition(system.label_rows(prompts)), ("conditional",))
    with torch.no_grad():
        return teacher_forced(system.generator, system.plan, system.inputs(tokens), cond)


# Places

def corner_products(system: STAR, side: float, theta: float) -> Tensor:
    """Products of one query with one key at all corners of two scales, (scales, 4, scales, 4)."""
    attention = CornerSelfAttention(replace(system.config.generator, rope_side=side, rope_theta=theta))
    cell, step = places(system.plan, torch.device("cpu"))
    rows = Run.start(system.plan, system.tokenizer.quantiser, system.condition(system.label_rows(PROMPTS)),
                     ("conditional",), Keyed.from_seeds([0, 1]), 2).rows(0, len(GRIDS))
    turn = attention.turn(rows, Context(None, plan=system.plan), 16)
    corners = [[int(((step[0] == k) & (cell[0, :, 1] == i) & (cell[0, :, 2] == j)).nonzero()) for i in (0, h - 1)
                for j in (0, w - 1)] for k, (h, w) in enumerate(GRIDS) if h > 1]
    generator = torch.Generator().manual_seed(0)
    q, k = (rotate(torch.randn(1, 1, 1, 16, generator=generator).expand(-1, -1, system.plan.length, -1), turn)[0, 0]
            for _ in range(2))
    index = torch.tensor(corners)
    return torch.einsum("acd,bed->aceb", q[index], k[index]).transpose(2, 3)


def test_products_of_corners_hang_on_which_corners_they_are_alone() -> None:
    found = corner_products(tiny(), 64.0, 10000.0)
    for one in range(3):
        for other in range(3):
            torch.testing.assert_close(found[one, :, other], found[0, :, 0], rtol=0, atol=1e-4)
    assert float(found[0, :, 0].std()) > 0.1


def test_a_side_twice_as_long_and_rates_half_as_fast_turn_alike() -> None:
    place = torch.tensor([[0.0, 0.0], [64.0, 21.3], [5.0, 64.0]])
    cos, sin = rotation(place, 16, 100.0)
    half = 16 // 2
    rate = 100.0 ** (-torch.arange(0, half, 2).float() / half) / 2
    angle = (2 * place[..., None] * rate).repeat_interleave(2, -1).flatten(-2)
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-5)


def test_the_column_turns_the_first_half_and_a_side_of_one_cell_nothing() -> None:
    attention = CornerSelfAttention(STARGeneratorConfig(1, 48, 3))
    plan = Plan.scales([1, (1, 5), 3])
    cell, step = places(plan, torch.device("cpu"))
    rows = type("Rows", (), {"cell": cell, "step": step})()
    found = attention.places(plan, rows)[0].tolist()  # type: ignore[arg-type]
    assert found[:6] == [[0, 0], [0, 0], [16, 0], [32, 0], [48, 0], [64, 0]]
    assert found[6:] == [[32.0 * j, 32.0 * i] for i in range(3) for j in range(3)]
    early = CornerSelfAttention(STARGeneratorConfig(1, 48, 3, rope_side=32.0, rope_theta=100.0))
    assert early.places(plan, rows)[0, -1].tolist() == [32, 32] and early.theta == 100  # type: ignore[arg-type]


# One pass and the loop

@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("broadcast", [False, True])
def test_the_loop_gives_tokens_the_probability_that_one_pass_gives_them(guided: bool, broadcast: bool) -> None:
    system = tiny(broadcast_first=broadcast)
    rows = system.prompts(PROMPTS, negative="a blue thing there" if guided else None)
    guidance = ClassifierFree(3.0) if guided else Unguided()
    drawn = system.generate(rows, seed=3, output="torch", guidance=guidance, top_k=None)
    scored = system.log_prob(drawn.tokens, rows, guidance)
    torch.testing.assert_close(scored.picture, drawn.log_prob, atol=1e-3, rtol=1e-4)


def test_what_a_scale_is_given_reaches_no_earlier_scale() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    others = [*tokens[:2], (tokens[2] + 1) % 32, tokens[3]]
    before, after = hidden_of(system, tokens), hidden_of(system, others)
    start = system.plan.starts[3]
    assert torch.equal(before[:, :start], after[:, :start])
    assert bool((before[:, start:] != after[:, start:]).any(-1).all())


def test_the_text_reaches_all_rows_and_padding_none() -> None:
    system = tiny()
    tokens = system.encode(emoji(2))
    one, other = hidden_of(system, tokens), hidden_of(system, tokens, ["a red apple", "moon"])
    assert torch.equal(one[0], other[0]) and bool((one[1] != other[1]).any(-1).all())
    features = system.features(PROMPTS)
    noisy = replace(features, values=features.values.masked_fill(~features.valid[..., None], 7.0))
    drawn = system.generate(features, seed=1, output="torch", guidance_scale=1.0)
    assert all(torch.equal(a, b) for a, b in zip(
        drawn.tokens, system.generate(noisy, seed=1, output="torch", guidance_scale=1.0).tokens, strict=True))


def test_keys_and_queries_of_the_text_have_length_one() -> None:
    system = tiny()
    attention = system.generator.blocks[0].text
    rows = conditions(system.condition(system.label_rows(PROMPTS)), ("conditional",))
    k, _ = attention.keys_values(rows)
    torch.testing.assert_close(k.norm(dim=-1), rows.valid[:, None].expand(-1, 3, -1).float())
    assert attention.kv.weight.shape == (96, WIDTH) and attention.scale_1H11.shape == (1, 3, 1, 1)


# Prompts

def test_no_prompt_is_the_empty_prompt_encoded_the_same_way() -> None:
    system = tiny()
    rows = conditions(system.condition(system.label_rows(PROMPTS)), ("conditional", "unconditional"))
    empty = system.features([""])
    assert torch.equal(rows.vector[2:], empty.pooled.expand(2, -1))  # type: ignore[union-attr]
    assert rows.valid.sum(1).tolist() == [5, 3, 2, 2] and torch.equal(rows.tokens[2, :2], empty.values[0])
    torch.manual_seed(0)
    dropped = system.dropped(["a red apple"] * 200, 0.25, 0.0)
    gone = (dropped.vector == empty.pooled).all(1)  # type: ignore[union-attr]
    assert 30 < int(gone.sum()) < 70 and bool((dropped.valid.sum(1) == torch.where(gone, 2, 5)).all())
    assert system.encoder.asked.count("") == 2, "once by the system, once by this test"


def test_given_features_need_no_encoder_but_where_the_empty_prompt_is_asked_for() -> None:
    system = tiny()
    features, empty = system.features(PROMPTS), system.features([""])
    wanted = system.generate(PROMPTS, seed=4, output="torch")
    system.encoder, system._empty, system.config = None, None, replace(system.config, encoder="clip")
    found = system.generate(system.prompts(features, negative=empty), seed=4, output="torch")
    assert all(torch.equal(a, b) for a, b in zip(wanted.tokens, found.tokens, strict=True))
    system.generate(features, seed=4, output="torch", guidance_scale=1.0)
    with pytest.raises(InputError, match="'clip' needs its weights"):
        system.generate(features, seed=4)
    with pytest.raises(InputError, match="7 wide and the pooled ones 7, this model takes 24 and 20"):
        system.generate(TextFeatures.pack([torch.zeros(2, 7)]), guidance_scale=1.0)


def test_a_vector_that_the_encoder_does_not_give_is_the_mean_of_its_tokens() -> None:
    system = STAR(STARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), STARGeneratorConfig(1, 48, 3, text_width=WIDTH)))
    features = TextFeatures.pack([torch.ones(1, WIDTH), torch.arange(3.0)[:, None].expand(-1, WIDTH)])
    assert system.text(features).vector[:, 0].tolist() == [1, 1]


def test_a_picture_hangs_on_its_own_prompt_alone() -> None:
    for system in (tiny(), tiny(ROUNDS), tiny(ROUNDS, base_until=3, broadcast_first=True)):
        together = system.generate(["sun", "a red apple on a table", "leaf"], seed=7, output="torch")
        alone = system.generate("a red apple on a table", seed=8, output="torch")
        assert all(torch.equal(a[1:2], b) for a, b in zip(together.tokens, alone.tokens, strict=True))
        other = system.generate("a green apple on a table", seed=8, output="torch")
        assert not all(torch.equal(a, b) for a, b in zip(alone.tokens, other.tokens, strict=True))


def test_a_gathered_run_goes_on_as_its_pictures_would_in_either_precision() -> None:
    for precision in ("fp32", "bf16"):
        system = tiny().to_precision(precision)
        guidance, head = ClassifierFree(3.0), InStableRounds(system.head, ROUNDS)
        model = type("Model", (), {"generator": system.generator, "head": head})()
        run = system.start(system.label_rows(PROMPTS), guidance, Keyed.from_seeds([0, 1]))
        with torch.no_grad():
            steps = sample_steps(model, run, guidance)
            next(steps), next(steps)
            child = run.gather([1, 0])
            for rest in (steps, sample_steps(model, child, guidance)):
                assert len(list(rest)) == 2
        assert all(torch.equal(a[[1, 0]], b) for a, b in zip(run.tokens, child.tokens, strict=True))


def test_the_published_broadcast_is_the_intended_form_without_guidance_and_guides_by_the_start_alone() -> None:
    plain, quirk = tiny(), tiny(broadcast_first=True)
    drawn = [system.generate("sun", seed=2, output="torch", guidance_scale=1.0) for system in (plain, quirk)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0].tokens, drawn[1].tokens, strict=True))
    features, empty = plain.features(["sun"]), plain.features([""])
    same_start = replace(empty, pooled=features.pooled)

    def step_zero(system: STAR) -> Tensor:
        run = system.start(system.prompts(features, same_start), ClassifierFree(3.0), Keyed.from_seeds([0]))
        with torch.no_grad():
            return evaluator(system.generator, run)(system.generator.call(run))

    one, two = step_zero(plain), step_zero(quirk)
    assert not torch.allclose(one[0], one[1]) and torch.allclose(two[0], two[1], atol=1e-5)
    assert torch.allclose(one[0], two[0], atol=1e-5)


def test_pictures_stream_and_are_edited_from_prompts() -> None:
    system = tiny(ROUNDS)
    drawn = system.generate("sun", seed=2, output="torch")
    last = list(system.stream("sun", seed=2, output="torch"))[-1]
    assert torch.equal(last.images, drawn.images)
    kept = system.edit(emoji(1), torch.zeros(1, 16, 16, dtype=torch.bool), "sun", output="torch")
    assert all(torch.equal(a, b) for a, b in zip(kept.tokens, system.encode(emoji(1)), strict=True))
    with pytest.raises(InputError, match="one shape only"):
        system.stream("sun", ratio=2.0)


def test_known_tokens_of_a_scale_in_rounds_stay_and_steer_the_others() -> None:
    system = tiny(ROUNDS)
    tokens, step = system.encode(emoji(1)), len(ROUNDS) - 1
    assert ROUNDS[step]
    keep = [torch.zeros(1, len(one[0]), dtype=torch.bool) for one in tokens]
    keep[step][:, ::2] = True
    found = []
    for given in (tokens, [*tokens[:step], (tokens[step] + 7) % 32]):
        used = system.settings_for("pictures", {})
        run = system.start(system.label_rows("sun"), system.guidance(used), Keyed.from_seeds([5]))
        list(system.sampled(run, system.guidance(used), used, [ForcedTokens(given, keep)]))
        assert torch.equal(run.tokens[step][keep[step]], given[step][keep[step]])
        found.append(run.log_probs[step][~keep[step]])
    assert not torch.equal(*found)


# Stable sampling

@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 441, 4096])
@pytest.mark.parametrize("rounds", [1, 8, 15])
def test_rounds_reveal_all_tokens_and_each_some(tokens: int, rounds: int) -> None:
    counts = reveal_counts(tokens, rounds)
    assert sum(counts) == tokens and min(counts) >= 1 and len(counts) == min(tokens, rounds)


def test_rounds_reveal_as_published() -> None:
    shares = [math.acos(1 - i / 14) for i in range(15)]
    wanted = [max(1, round(share / sum(shares) * 4096)) for share in shares]
    found = reveal_counts(4096, 15)
    assert found[:-1] == wanted[:-1] and found[0] == 1 and abs(found[-1] - wanted[-1]) < 15
    r = torch.linspace(0, 1, 10001)
    assert float(known_share(r).mean()) == pytest.approx(2 / math.pi, abs=1e-3)


def rounds_of(system: STAR, head: InStableRounds, guidance: object, seed: int = 0) -> Run:
    run = system.start(system.label_rows(PROMPTS), guidance, Keyed.from_seeds([seed, seed + 1]))  # type: ignore
    model = type("Model", (), {"generator": system.generator, "head": head})()
    with torch.no_grad():
        for _ in sample_steps(model, run, guidance):  # type: ignore[arg-type]
            pass
    return run


@pytest.mark.parametrize("base_until", [0, 3])
def test_tokens_once_known_stay_and_all_become_known(base_until: int) -> None:
    system = tiny()
    seen: dict[int, list[tuple[Tensor, Sample]]] = {}
    head = InStableRounds(system.head, ROUNDS, 2, base_until,
                          lambda k, r, new, sample: seen.setdefault(k, []).append((new, sample)))
    run = rounds_of(system, head, ClassifierFree(3.0))
    assert sorted(seen) == [2, 3] and [len(seen[k]) for k in (2, 3)] == [3, 4]
    for k, tokens in ((2, 9), (3, 16)):
        known = torch.zeros(2, tokens, dtype=torch.bool)
        for r, (new, sample) in enumerate(seen[k]):
            count = reveal_counts(tokens, ROUNDS[k])[r]
            assert not bool((known & new).any())
            left, drafted = (~known).sum(1).tolist(), k < base_until and r < 2
            for revealed, unknown in zip(new.sum(1).tolist(), left, strict=True):
                assert min(count, unknown) <= revealed <= (2 * count if drafted else min(count, unknown))
            known = known | new
            assert torch.equal(sample.tokens[known], run.tokens[k][known])
        assert bool(known.all())
    assert bool(torch.cat(run.log_probs, 1).isfinite().all())


def test_a_round_with_every_token_known_gives_what_one_pass_gives() -> None:
    system, plan = tiny(), tiny().plan
    tokens, span = system.encode(emoji(2)), tiny().plan.span(3, 4)
    cell, step = (tags[:, span] for tags in places(plan, torch.device("cpu")))
    cond = conditions(system.condition(system.label_rows(PROMPTS)), ("conditional",))
    codes = system.tokenizer.quantiser.embed(tokens[3])
    with torch.no_grad():
        x = system.head.sampler(plan, codes, hidden_of(system, tokens)[:, span], cond, cell, step)
        wanted = system.head.again(layer_norm(x))
        run = system.start(system.label_rows(PROMPTS), Unguided(), Keyed.from_seeds([0, 1]))
        for given in tokens[:3]:
            evaluator(system.generator, run)(system.generator.call(run))
            run.force(given)
        hidden = evaluator(system.generator, run)(system.generator.call(run))
        known = torch.ones(2, 16, dtype=torch.bool)
        found = InStableRounds(system.head, ROUNDS).logits(run, hidden, cond, tokens[3], known, step, cell, Unguided(),
                                                           (), 0)
        hidden_ones = InStableRounds(system.head, ROUNDS).logits(run, hidden, cond, tokens[3], ~known, step, cell,
                                                                 Unguided(), (), 0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, hidden_ones, atol=1e-2)


def test_in_training_scales_see_themselves_and_the_prompt_alone() -> None:
    """A row's first look at the others is the same whether scales pass together or one by one."""
    system, plan = tiny(sampler_blocks=1), tiny().plan
    tokens = system.encode(emoji(2))
    hidden, codes = hidden_of(system, tokens), system.tokenizer.quantiser.embed(torch.cat(tokens, 1))
    cond = conditions(system.condition(system.label_rows(PROMPTS)), ("conditional",))
    cell, step = places(plan, torch.device("cpu"))

    def passed(part: slice, apart: bool = False) -> Tensor:
        found: Tensor = system.head.sampler(plan, codes[:, part], hidden[:, part], cond, cell[:, part], step[:, part],
                                            apart)
        return found

    with torch.no_grad():
        apart = torch.cat([passed(plan.span(2, 3)), passed(plan.span(3, 4))], 1)
        torch.testing.assert_close(passed(plan.span(2, 4), True), apart, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(passed(plan.span(2, 4)), apart, atol=1e-3)
    rule, tags = OwnStepAndText(), torch.tensor([0, 2, 2, 3])
    seen = rule.sees(Tags(tags[:, None], tags), Tags(tags[None], tags))
    assert seen.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_the_network_is_guided_by_the_full_scale_and_the_transformer_by_the_ramp() -> None:
    system, asked = tiny(), []

    class Watched(ClassifierFree):
        def __call__(self, outputs: dict[str, Tensor], at: At) -> Tensor:
            asked.append((at.round, self.share(at), at.grid))
            return super().__call__(outputs, at)

    rounds_of(system, InStableRounds(system.head, ROUNDS, 1, base_until=3), Watched(3.0))
    assert [round(share, 3) for _, share, _ in asked] == [0, 0.333, 0.667, 1, 1, 1, 1, 1, 1]
    assert [grid for _, _, grid in asked] == [(1, 1), (2, 2), (3, 3), (3, 3), (3, 3), *[(4, 4)] * 4]


@pytest.mark.parametrize(("rounds", "blocks", "message"), [
    ((0, 0, 3), 2, "given for 4 scales"), ((0, 2, 3, 4), 2, "from index 2 on"), ((0, 0, 3, -1), 2, "0 for all"),
    (ROUNDS, 0, "no network that draws in rounds")])
def test_rounds_that_cannot_be_are_refused(rounds: tuple[int, ...], blocks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(sampler_blocks=blocks).generate("sun", rounds=rounds)


# Training

def learn(system: STAR, tokens: list[Tensor], steps: int = 10) -> list[float]:
    features = system.features(["apple", "sun", "sun", "leaf"] * 2)
    wanted = [p for p in system.parameters() if p.requires_grad]
    optimiser, found = torch.optim.AdamW(wanted, lr=8e-3), []
    for step in range(steps):
        torch.manual_seed(step)
        loss, *_ = system.loss(tokens, features)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert all(p.grad is not None for p in wanted)
    return found


def test_the_base_and_the_network_are_trained_apart() -> None:
    torch.manual_seed(0)
    system = tiny()
    system.initialise()
    system.tokenizer.requires_grad_(False)
    tokens = system.encode(emoji(8))
    system.train_part("base")
    system.tokenizer.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    found = learn(system, tokens)
    assert found[0] == pytest.approx(math.log(32), abs=0.1), "of a head that knows nothing"
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    of_sampler = ("head.sampler.", "head.again.")
    assert all(torch.equal(p, before[n]) for n, p in system.named_parameters() if n.startswith(of_sampler))
    system.train_part("sampler")
    trained = {name for name, p in system.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if name.startswith(of_sampler)}
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    found = learn(system, tokens)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    assert all(torch.equal(p, before[n]) for n, p in system.named_parameters() if not n.startswith(of_sampler))
    with pytest.raises(InputError, match=r"generator\.sampler_blocks"):
        tiny(sampler_blocks=0).train_part("sampler")


def test_the_network_learns_hidden_tokens_alone() -> None:
    system = tiny()
    tokens, features = system.encode(emoji(2)), tiny().features(PROMPTS)
    known = torch.zeros(2, 25, dtype=torch.bool)
    known[:, :9] = True
    _, by_step, right = system.sampler_loss(tokens, features, 0.0, known_BL=known)
    assert bool(by_step[:3].isnan().all()) and bool(right[:3].isnan().all()) and bool(by_step[3:].isfinite().all())
    known[:, 9:] = True
    known[0, 9] = False
    loss, *_ = system.sampler_loss(tokens, features, 0.0, known_BL=known)
    other = [*tokens[:3], tokens[3].clone()]
    other[3][0, 0] = (other[3][0, 0] + 1) % 32
    changed, *_ = system.sampler_loss(other, features, 0.0, known_BL=known)
    logits = float(loss.detach()), float(changed.detach())
    assert logits[0] != pytest.approx(logits[1]), "the one hidden token is what is learned"
    torch.manual_seed(0)
    shown = known_share(torch.rand(4000, 1))
    assert float((torch.rand(4000, 25) < shown).float().mean()) == pytest.approx(2 / math.pi, abs=0.02)


def test_rows_that_are_dropped_leave_the_others_their_places_levels_and_labels() -> None:
    dropping = TokenDropping(keep=20, first=3)
    system = tiny(dropping=dropping)
    plan, tokens = system.plan, system.encode(emoji(2))
    torch.manual_seed(0)
    kept = dropping.kept(plan)
    assert kept is not None and len(kept) == 20 and kept[:14].tolist() == list(range(14))
    assert len(kept.unique()) == 20 and bool((kept[1:] > kept[:-1]).all())
    reads, cond = system.inputs(tokens), system.dropped(system.features(PROMPTS), 0.0, 0.0)
    seen: dict[str, Tensor] = {}

    def look(_: object, args: tuple, hidden: Tensor) -> None:
        seen.update(hidden=hidden, cell=args[0].rows.cell, step=args[0].rows.step)

    handle = system.generator.register_forward_hook(look)
    with torch.no_grad():
        loss, by_step, _ = token_dropping_loss(system.generator, system.head, plan, tokens, reads, cond, kept)
    handle.remove()
    cell, step = places(plan, torch.device("cpu"))
    assert torch.equal(seen["cell"], cell[:, kept]) and torch.equal(seen["step"], step[:, kept])
    whole = hidden_of(system, tokens)
    torch.testing.assert_close(seen["hidden"][:, :14], whole[:, :14], rtol=1e-4, atol=1e-4)
    # Among the kept rows of the last scale attention is that of a pass in which the others are hidden.
    hide = torch.ones(plan.length, dtype=torch.bool)
    hide[kept] = False
    rule = Hidden(tuple(map(tuple, cell[0, hide].tolist())))
    call = teacher_forcing_call(system.generator, plan, reads, cond)
    with torch.no_grad():
        masked = system.generator(replace(call, rows=call.rows.narrow(rule)), Context(None, plan=plan))
        entropy, _ = system.head.loss(masked[:, kept], torch.cat(tokens, 1)[:, kept])
    torch.testing.assert_close(seen["hidden"], masked[:, kept], rtol=1e-4, atol=1e-4)
    assert float(loss) == pytest.approx(float(entropy.mean()), abs=1e-5)
    assert float(by_step[3]) == pytest.approx(float(entropy[:, 14:].mean()), abs=1e-5)


@dataclass(frozen=True)
class Hidden:
    """Hides some cells of the last step from the others."""

    cells: tuple[tuple[int, ...], ...]

    def sees(self, query: Tags, key: Tags) -> Tensor:
        gone = torch.zeros_like(key.step == 3)
        for cell in self.cells:
            gone = gone | ((key.cell == torch.tensor(cell)).all(-1) & (key.step == 3))
        return ~gone | (query.step != query.step)


def test_every_row_kept_is_teacher_forcing_and_dropping_is_for_training() -> None:
    system, features = tiny(), tiny().features(PROMPTS)
    tokens, plan = system.encode(emoji(2)), system.plan
    with torch.no_grad():
        whole = system.loss(tokens, features, 0.0, step_weights=[1.0, 2.0, 1.0, 0.5])
        all_kept = token_dropping_loss(system.generator, system.head, plan, tokens, system.inputs(tokens),
                                       system.dropped(features, 0.0, 0.0), torch.arange(plan.length),
                                       [1.0, 2.0, 1.0, 0.5])
    for one, other in zip(whole, all_kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    dropping = tiny(dropping=TokenDropping(20, 3), drop_path=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        still, train = dropping.loss(tokens, features, 0.0)[0], dropping.train().loss(tokens, features, 0.0)[0]
    assert float(still) == pytest.approx(float(system.loss(tokens, features, 0.0)[0].detach()), abs=1e-5)
    assert float(train) != pytest.approx(float(still), abs=1e-5)
    assert TokenDropping(20, 3).kept(replace(plan, steps=plan.steps[:3])) is None
    with pytest.raises(InputError, match="have 14 rows, which all stay"):
        TokenDropping(14, 3).kept(plan)
    published = preset_config("star-1024-d30")
    kept = published.dropping.kept(published.tokenizer.plan)
    assert kept is not None and len(kept) == 8800 and published.tokenizer.plan.length == 9451


# Published weights

def published_shapes(depth: int, scales: int, blocks: int) -> dict[str, tuple[int, ...]]:
    c = 64 * depth
    block = {"attn.scale_mul_1H11": (1, depth, 1, 1), "attn.mat_qkv.weight": (3 * c, c), "attn.q_bias": (c,),
             "attn.v_bias": (c,), "attn.zero_k_bias": (c,), "attn.proj.weight": (c, c), "attn.proj.bias": (c,),
             "ffn.fc1.weight": (4 * c, c), "ffn.fc1.bias": (4 * c,), "ffn.fc2.weight": (c, 4 * c), "ffn.fc2.bias": (c,)}
    cross = {"scale_mul_1H11": (1, depth, 1, 1), "mat_kv.weight": (2 * c, 1024), "mat_q.weight": (c, c), "q_bias": (c,),
             "v_bias": (c,), "zero_k_bias": (c,), "proj.weight": (c, c), "proj.bias": (c,)}
    shapes: dict[str, tuple[int, ...]] = {
        "pos_start": (1, 1, c), "class_emb.weight": (1001, c), "word_embed.weight": (c, 32), "word_embed.bias": (c,),
        "lvl_embed.weight": (scales, c), "head_logits.weight": (4096, c), "head_logits.bias": (4096,),
        "encoder_proj.weight": (c, 1024), "encoder_proj.bias": (c,)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blocks.{i}.cross_attn.{name}": shape for name, shape in cross.items()}
    if blocks:
        shapes |= {f"feat_extract_blocks.{i}.{name}": shape for name, shape in block.items() for i in range(blocks)}
        shapes |= {"word_embed_head.weight": (c, 32), "word_embed_head.bias": (c,), "lvl_embed_2.weight": (scales, c),
                   "encoder_proj2.weight": (c, 1024), "encoder_proj2.bias": (c,), "pos_start_last": (1, 1, c),
                   "head_proj.weight": (c, 2 * c), "head_proj.bias": (c,), "head_logits2.weight": (4096, c),
                   "head_logits2.bias": (4096,)}
    return shapes


@pytest.mark.parametrize("name", list(SIZES))
def test_published_sizes_have_the_published_parameters_and_names(name: str) -> None:
    config = preset_config(name)
    width, scales = config.generator.width, len(config.tokenizer.grids)
    with torch.device("meta"):
        system = STAR(config)
    shapes = published_shapes(config.generator.depth, scales, config.generator.sampler_blocks)
    count = sum(p.numel() for part in (system.generator, system.head, system.text) for p in part.parameters())
    with_classes = {"star-256-d16": 274_934_272, "star-256-d30": 1_678_731_016}
    listed = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith("zero_k_bias"))
    assert count + 1001 * width == listed == with_classes.get(name, listed)
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, generator=published)
    for lost in ("lvl_embed.weight", "blocks.3.cross_attn.q_bias"):
        with pytest.raises(WeightsError, match="missing"):
            folders.load_published(system, generator={k: v for k, v in published.items() if k != lost})
    with pytest.raises(WeightsError, match="unknown: pos_1LC"):
        folders.load_published(system, generator={**published, "pos_1LC": torch.empty(1, device="meta")})
    used = config.settings["pictures"]
    assert (used.guidance_scale, used.top_k, used.top_p) == (5.0, 600, 0.8)
    assert len(used.rounds) == (scales if config.generator.sampler_blocks else 0)
    if used.rounds:
        assert used.rounds == ROUNDS_1024 and sum(r > 0 for r in ROUNDS_1024) == 5
        system.check_rounds(used.rounds, system.plan)


def test_a_file_as_published_is_read_and_a_model_is_saved_and_found_again(tmp_path: Path) -> None:
    network = {"class_emb.weight": torch.zeros(2, 3), "pos_start": torch.ones(1, 1, 3)}
    torch.save({"epoch": 1, "iter": 0, "trainer": {"config": {"patch_nums": (1, 2)}, "var_wo_ddp": network,
                                                   "vae_local": {"a": torch.zeros(1)}}}, tmp_path / "star.pth")
    assert hub.read_tensors(tmp_path / "star.pth").keys() == network.keys()
    system = tiny(ROUNDS)
    folders.save(system, tmp_path / "model", torch.float32)
    again = folders.load(tmp_path / "model")
    again.encoder = LettersEncoder()  # type: ignore[attr-defined]
    one, other = (model.generate(PROMPTS, seed=1, output="torch") for model in (system, again))
    assert all(torch.equal(*pair) for pair in zip(one.tokens, other.tokens, strict=True))
    torch.testing.assert_close(one.images, other.images, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="did you mean 'star-256-d16'"):
        preset_config("star-256-d18")


def test_the_command_line_trains_both_parts_with_words_and_draws_in_rounds(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures

    import nextscale
    from nextscale.cli import main
    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    save_tokenizer(tiny().tokenizer, tmp_path / "tokenizer")
    draw_pictures(tmp_path / "pictures")
    sets = ["train.steps=2", "train.batch_size=8", "train.sample_every=0", "train.checkpoint_every=2", "data.size=16",
            "generator.depth=2", "generator.width=32", "generator.heads=2", "generator.sampler_blocks=1",
            "generator.sampled_from=2", "data.held_out=0", "train.precision=fp32", "train.minutes=5",
            "text.words.width=32", "text.words.depth=1", "text.words.heads=2", "text.words.buckets=64",
            "text.words.bucket_width=8"]
    command = ["train", "generator", "--system", "star", "--data", "pictures", "--tokenizer", "tokenizer"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "base"]) == 0
    assert main.run([*command, "--out", "both", "--set", "part=sampler", "--set", "start=base/model",
                     "--set", f"settings.rounds={list(ROUNDS)}", "--set", "settings.guidance_scale=3"]) == 0
    first, both = nextscale.load("base/model"), nextscale.load("both/model")
    assert both.config.settings["pictures"].rounds == ROUNDS
    assert torch.equal(first.generator.blocks[0].mlp.expand.weight, both.generator.blocks[0].mlp.expand.weight)
    assert not torch.equal(both.head.again.weight, first.head.again.weight)
    assert both.generate("a red square", 2, output="numpy").images.shape == (2, 16, 16, 3)
