"""The judge of pictures and phrases, and what is measured with it."""
from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from tiny import emoji, fill
from torch import Tensor

from nextscale import hub
from nextscale.conditions.text_words import hashed_grams
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.text_agreement import (
    clip_score,
    draw_others,
    phrase_diversity,
    rank_phrases,
    text_figures,
    wilson,
)
from nextscale.evaluation.text_judge import (
    TextJudge,
    TextJudgeConfig,
    contrastive_loss,
    load_text_judge,
    open_text_judge,
    save_text_judge,
    words_of,
)

SMALL = TextJudgeConfig(size=16, patch=2, widths=(16, 24), blocks=(0, 1), cell_width=4, width=24, buckets=256,
                        gram_width=16, hidden=24, dropout=0.0)


def judge(seed: int = 0) -> TextJudge:
    made = TextJudge(SMALL).eval()
    fill(made, seed)
    with torch.no_grad():
        made.log_scale.fill_(math.log(20))
    return made


class Known:
    """A judge whose vectors are given: what a phrase says is its number."""

    name, fingerprint = "known", "0"

    def __init__(self, vectors: Tensor):
        self.vectors = F.normalize(vectors, dim=1)

    def pictures(self, pictures: Tensor, batch: int = 64) -> Tensor:
        return self.vectors[pictures[:, 0, 0, 0].long()]

    def phrases(self, phrases: Sequence[str], batch: int = 64) -> Tensor:
        return self.vectors[torch.tensor([int(phrase) for phrase in phrases])]


def numbers(count: int) -> tuple[list[str], list[list[str]]]:
    """Phrases 0 ... count - 1, and 99 others of each."""
    return [str(i) for i in range(count)], [[str(i) for i in row] for row in draw_others(range(count), range(count))]


def test_a_perfect_judge_ranks_first_a_shuffled_one_by_chance_and_a_blind_one_last() -> None:
    vectors = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    asked, others = numbers(400)
    known = Known(vectors)
    perfect = rank_phrases(known, known.vectors, asked, others)
    assert perfect.rank_N.tolist() == [1] * 400 and perfect.candidates == 100
    assert torch.allclose(perfect.cosine_N, torch.ones(400), atol=1e-5)
    shuffled = known.vectors[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    chance = rank_phrases(known, shuffled, asked, others)
    low, high = chance.top(5).low, chance.top(5).high
    assert low < 0.05 < high and 40 < float(chance.rank_N.float().mean()) < 61
    # All phrases alike: nothing was recognised, so nothing may count as right.
    blind = rank_phrases(Known(torch.ones(400, 4)), torch.ones(400, 4) / 2, asked, others)
    assert blind.rank_N.tolist() == [100] * 400 and blind.top(5).rate == 0.0
    worst = rank_phrases(known, -known.vectors, asked, others)
    assert worst.rank_N.float().mean() > 99


def test_wrong_phrases_are_of_other_concepts_and_hang_on_what_is_asked_alone() -> None:
    concepts = [i // 3 for i in range(390)]  # three phrases of each of 130 concepts
    drawn = draw_others([7, 200, 7], concepts, 99, seed=3)
    for position, row in zip([7, 200, 7], drawn, strict=True):
        of = [concepts[i] for i in row]
        assert len(set(of)) == 99 and concepts[position] not in of
    assert drawn[0] != drawn[2]  # a second picture of a phrase meets other phrases
    assert draw_others([200], concepts, 99, seed=3) == drawn[1:2] and draw_others([200], concepts, seed=4) != drawn[1:2]
    counts = torch.zeros(390)
    for row in draw_others(range(390), concepts, 30):
        counts[row] += 1
    # 390 x 30 draws of 390 phrases, 30 each on average: none is left out or preferred.
    assert counts.min() > 8 and counts.max() < 60
    with pytest.raises(InputError, match="99 wrong phrases need 100 concepts, the list has 50"):
        draw_others([0], list(range(50)))


def test_intervals_are_wilsons_and_of_phrases_not_of_pictures() -> None:
    assert wilson(0.5, 10)[1:] == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10)[1:] == pytest.approx((0.0, 0.2775), abs=1e-4)
    asked, others = numbers(120)
    known = Known(torch.randn(120, 8, generator=torch.Generator().manual_seed(0)))
    once = rank_phrases(known, known.vectors, asked, others)
    twice = rank_phrases(known, known.vectors.repeat(2, 1), asked * 2, others * 2)
    assert once.phrases == twice.phrases == 120 and once.top(5) == twice.top(5)


def test_numbers_that_do_not_fit_are_refused() -> None:
    known = Known(torch.eye(4))
    with pytest.raises(InputError, match="2 pictures have 1 asked phrases"):
        rank_phrases(known, known.vectors[:2], ["0"], [["1"]])
    with pytest.raises(InputError, match="equally many others"):
        rank_phrases(known, known.vectors[:2], ["0", "1"], [["1"], ["2", "3"]])
    with pytest.raises(InputError, match="not numbers"):
        rank_phrases(known, known.vectors[:1] * float("nan"), ["0"], [["1"]])


def test_figures_name_the_judge_and_tell_equal_pictures_from_varied_ones() -> None:
    made, pictures = judge(), emoji(6)
    asked = ["red apple, flat style"] * 3 + ["blue car, noto style"] * 3
    others = [[f"thing {i}, flat style" for i in range(9)]] * 6
    found = text_figures(made, pictures, asked, others, [["red apple, noto style"]] * 6)
    assert found["fingerprint"] == made.fingerprint and found["styles"]["candidates"] == 2
    assert found["phrases"]["candidates"] == 10 and found["phrases"]["phrases"] == 2
    assert "top_5" not in found["styles"] and found["diversity"]["pairs"] == 6
    vectors = made.pictures(pictures)
    same = phrase_diversity(pictures[[0, 0, 0]], vectors[[0, 0, 0]], ["a"] * 3)
    assert same["pixels"] == pytest.approx(0, abs=1e-4) and same["judge"] == pytest.approx(0, abs=1e-4)
    assert found["diversity"]["pixels"] > 10 and found["diversity"]["judge"] > 0.01
    assert math.isnan(phrase_diversity(pictures, vectors, list("abcdef"))["judge"])
    cosines = torch.tensor([0.4, -0.4])
    assert clip_score(cosines) == pytest.approx(2.5 * 0.4 / 2)


def test_contrastive_loss_is_symmetric_cross_entropy_and_shares_among_all_that_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, phrases = (F.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2))
    logits, target = 7.0 * pictures @ phrases.T, torch.arange(5)
    wanted = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(contrastive_loss(pictures, phrases, torch.eye(5).bool(), 7.0), wanted)
    assert torch.allclose(contrastive_loss(phrases, pictures, torch.eye(5).bool(), 7.0), wanted)
    # Two pictures of one phrase: the best that can be reached is the entropy of a fair coin, half of the sum.
    pictures, phrases = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 1]]
    fits = torch.tensor([[True, False], [True, False], [False, True]])
    reached = contrastive_loss(pictures, phrases, fits, 100.0)
    assert torch.allclose(reached, torch.tensor(math.log(2) / 4), atol=1e-4)
    # A phrase that fits nothing is a wrong answer, and asks for nothing itself.
    more = torch.cat([phrases, pictures[:1]])
    wrong = contrastive_loss(pictures, more, F.pad(fits, (0, 1)), 100.0)
    assert torch.allclose(wrong - reached, torch.tensor(2 / 3 * math.log(2) / 2), atol=1e-4)
    with pytest.raises(InputError, match="fits none"):
        contrastive_loss(pictures, phrases, fits & fits[0], 1.0)


def test_a_few_steps_teach_the_judge_its_pictures() -> None:
    """The whole chain learns: without either tower's gradient the phrases stay at chance."""
    torch.manual_seed(0)
    made, pictures = TextJudge(SMALL), emoji(16)
    phrases = [f"{word} {noun}" for word in ("red", "big", "old", "new") for noun in ("cat", "house", "arrow", "moon")]
    before = contrastive_loss(made.picture_vectors(pictures), made.phrase_vectors(made.bags(phrases)),
                              torch.eye(16).bool(), made.scale)
    optimiser = torch.optim.AdamW(made.parameters(), 5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = contrastive_loss(made.picture_vectors(pictures), made.phrase_vectors(made.bags(phrases)),
                                torch.eye(16).bool(), made.scale)
        loss.backward()
        assert all(p.grad is not None for p in made.parameters())
        optimiser.step()
    assert before > 2.0 and loss < 0.4
    ranking = rank_phrases(made, made.pictures(pictures), phrases,
                           [[other for other in phrases if other != phrase] for phrase in phrases])
    assert ranking.top(1).rate > 0.9


def test_phrases_are_read_as_words_without_case_or_form_of_unicode() -> None:
    made = judge()
    assert words_of("Flag: Côte d’Ivoire, 3D!") == ["flag", "côte", "d", "ivoire", "3d"]
    same = made.phrases(["Red  apple, FLAT style", "red apple flat style", "style flat: apple (red)"])
    assert torch.allclose(same[0], same[1], atol=1e-6) and torch.allclose(same[0], same[2], atol=1e-6)
    composed, decomposed = made.phrases(["pi\u00f1ata", "pin\u0303ata"])
    assert torch.equal(composed, decomposed)
    apart = made.phrases(["red apple", "green apple", "", "☃"])
    assert (apart[0] - apart[1]).norm() > 0.05 and torch.equal(apart[2], apart[3]) and apart.isfinite().all()
    # A word shares n-grams with its relatives: what was learned of one helps the other (fastText).
    grams = [set(hashed_grams(word, 1 << 20)) for word in ("welder", "welders", "onion")]
    assert len(grams[0] & grams[1]) > 8 and not grams[0] & grams[2]
    assert set(hashed_grams("cat", 3072)) == {76, 2751, 1593, 348, 1960, 3007}


def test_a_phrase_and_a_picture_have_the_same_vector_in_any_batch() -> None:
    made, pictures = judge(), emoji(5)
    phrases = ["red apple", "", "a very long phrase of many words", "cat"]
    alone = torch.cat([made.phrases([phrase]) for phrase in phrases])
    assert torch.allclose(made.phrases(phrases), alone, atol=1e-6)
    assert torch.allclose(made.pictures(pictures, 2), made.pictures(pictures), atol=1e-5)
    assert torch.allclose(made.pictures(pictures).norm(dim=1), torch.ones(5), atol=1e-5)
    large = F.interpolate(pictures, size=(48, 32), mode="bicubic")
    assert made.pictures(large).shape == (5, SMALL.width)
    with pytest.raises(InputError, match="expected pictures"):
        made.pictures(pictures[:, :1])


def test_a_saved_judge_is_the_same_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    made = judge()
    save_text_judge(made, tmp_path / "mine", torch.float32)
    again = open_text_judge(str(tmp_path / "mine"))
    assert again.name == "mine" and again.fingerprint == made.fingerprint
    assert torch.equal(again.phrases(["a cat"]), made.phrases(["a cat"]))
    assert torch.equal(again.pictures(emoji(2)), made.pictures(emoji(2)))
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"width": 32}))
    with pytest.raises(WeightsError, match="wrong shape"):
        load_text_judge(tmp_path / "mine")
    with pytest.raises(WeightsError, match="no text judge at"):
        load_text_judge(tmp_path / "nothing")
    with pytest.raises(InputError, match="did you mean 'emoji-text-judge'"):
        open_text_judge("emoji-text-juge")
    for wrong in ({"size": 20}, {"grams": (4, 3)}, {"buckets": 0}, {"dropout": 1.0}, {"widths": (10,), "blocks": (0,)}):
        with pytest.raises(InputError):
            TextJudgeConfig(**wrong)  # type: ignore[arg-type]


def test_the_default_judge_takes_about_a_megabyte(tmp_path: Path) -> None:
    save_text_judge(TextJudge(TextJudgeConfig()), tmp_path)
    assert (tmp_path / "judge.safetensors").stat().st_size < 1_060_000


def test_clip_score_is_the_cosine_that_transformers_gives(tmp_path: Path) -> None:
    """A tiny random CLIP with a tiny vocabulary, saved as published ones are."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    tower = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(c + "</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*letters, *specials])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"),
                               model_max_length=12).save_pretrained(tmp_path / "clip")
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": len(letters) + 2, "max_position_embeddings": 12, "bos_token_id": 52,
                     "eos_token_id": 53, "pad_token_id": 53},
        vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=10)
    torch.manual_seed(0)
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path / "clip")
    found = open_text_judge(f"clip:{tmp_path / 'clip'}")
    assert found.name == "clip (clip)"
    pictures, phrases = emoji(3, 64), ["a cat", "red apple on a table of wood", "x"]
    cosine = (found.pictures(pictures, 2) * found.phrases(phrases, 2)).sum(1)
    resized = F.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1)
                 for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    tokens = tokenizer(phrases, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        out = network(pixel_values=((resized + 1) / 2 - mean) / std, **tokens)
        wanted = out.logits_per_image.diagonal() / network.logit_scale.exp()
    assert torch.allclose(cosine, wanted, atol=1e-5)
    assert clip_score(cosine) == pytest.approx(float(2.5 * wanted.clamp_min(0).mean()), abs=1e-5)
    hub.save_json({"model_type": "clip"}, tmp_path / "empty" / "config.json")
    with pytest.raises(WeightsError, match="can't be loaded as CLIPModel"):
        open_text_judge(f"clip:{tmp_path / 'empty'}")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "experiments" / "text_judge.py"
    spec = importlib.util.spec_from_file_location("text_judge_experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SHIPPED = Path(str(files("nextscale").joinpath("weights"))) / "emoji-text-judge"


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the weights of emoji-text-judge are not here")
def test_the_judge_that_ships_tells_real_pictures_that_it_never_saw(experiment: ModuleType) -> None:
    shipped = load_text_judge("emoji-text-judge")
    captions = experiment.Captions.read(Path(experiment.emoji_set_path()))
    pictures, rows = experiment.pictures_of("style-test")
    ranks, styles = experiment.rates(shipped, captions, pictures, rows)
    stated = json.loads((SHIPPED / "accuracy.json").read_text())["style-test, real"]
    assert ranks["top_5"]["rate"] == pytest.approx(stated["phrases"]["top_5"]["rate"], abs=0.02)
    assert ranks["top_5"]["rate"] > 0.8 and styles["top_1"]["rate"] > 0.5


def test_phrases_of_the_set_name_concept_and_style_and_held_out_concepts_are_not_trained(
        experiment: ModuleType) -> None:
    captions = experiment.Captions.read(Path(experiment.emoji_set_path()))
    assert len(captions.names) == 1906 and len(captions.trained) == 1906 - 188
    apple = captions.names.index("red apple")
    assert [captions.phrase(apple, s) for s in range(5)] == [
        f"red apple, {style} style" for style in ("noto", "twemoji", "flat", "gradient", "3d")]
    assert captions.names.index("clown face") not in captions.trained.tolist()
    said = {captions.varied(apple, 2, torch.rand(5).tolist()) for _ in range(300)}
    assert len(said) > 20 and all("flat" in one for one in said) and "a flat drawing of a red apple" in said
    assert not any("style" in captions.varied(apple, None, torch.rand(5).tolist()) for _ in range(50))


def test_a_batchs_phrases_fit_the_pictures_of_their_concept_and_style_alone(experiment: ModuleType) -> None:
    class Plain(experiment.Captions):  # type: ignore[misc, name-defined]
        def varied(self, concept: int, style: int | None, draw: list[float]) -> str:
            return f"{concept} {style}"

    known = experiment.Captions.read(Path(experiment.emoji_set_path()))
    captions = Plain(**vars(known))
    torch.manual_seed(0)
    rows = torch.cat([torch.arange(5), torch.randint(len(known.concept), (27,))])  # the first five are one concept
    phrases, fits = experiment.phrases_of_batch(captions, rows)
    assert fits.shape == (32, 64 + experiment.OTHERS)
    assert fits.diagonal().all() and not fits[:, 32:64].diagonal().any()
    assert len({phrase.split()[1] for phrase in phrases[:5]} - {"None"}) > 1
    for i, row in enumerate(rows.tolist()):
        own = {f"{known.concept[row]} {known.style[row]}", f"{known.concept[row]} None"}
        assert fits[i].tolist() == [phrase in own for phrase in phrases]
    trained = set(known.trained.tolist())
    assert all(int(phrase.split()[0]) in trained for phrase in phrases[64:])
