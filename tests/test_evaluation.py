"""Judges, copies, coverage and reconstruction figures keep their definitions."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_task import draw_pictures
from torch import Tensor

from nextscale.data import ClassBalancedOrder, Loader, open_dataset
from nextscale.errors import InputError, WeightsError
from nextscale.evaluation.classifier import Opinion, agreement, judge, macro_average, whole_set
from nextscale.evaluation.copies import coverage, nearest, pixel_rmse
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.reconstruction import after_each_scale, code_usage, psnr, reconstruct, thumbnails
from nextscale.generators.var import VARGeneratorConfig
from nextscale.objectives.reconstruction import FeatureDistance
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.features import (
    ClassifierConfig,
    FeatureMaps,
    PictureClassifier,
    load_classifier,
    load_features,
    save_classifier,
)
from nextscale.training import TrainConfig, Trainer
from nextscale.training.classifier import Augmentation, ClassifierRecipe, ClassifierTask

SMALL = ClassifierConfig(2, (8, 16), (1, 0), (3,), (("disc", "box", "line"),), dropout=0.0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny_system() -> VAR:
    tokenizer = TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle"),
                                   grids=((1, 1), (2, 2), (3, 3), (4, 4)), vocabulary=32)
    return VAR(VARConfig(tokenizer, VARGeneratorConfig.of_depth(2), (5,))).eval()


def test_nearest_equals_naive_search_and_is_exact_for_copies() -> None:
    references = torch.rand(50, 3, 8, 8) * 2 - 1
    queries = torch.cat([references[[7, 31]], torch.rand(9, 3, 8, 8) * 2 - 1])
    found = nearest(queries, references, k=3, batch=4)
    naive = torch.cdist(queries.flatten(1).double(), references.flatten(1).double())
    assert torch.equal(found.index_Nk, naive.topk(3, largest=False).indices)
    torch.testing.assert_close(found.distance_Nk.double(), naive.topk(3, largest=False).values, atol=1e-5, rtol=1e-5)
    assert found.index_Nk[:2, 0].tolist() == [7, 31] and found.distance_Nk[:2, 0].max() < 1e-6
    off_by_two = pixel_rmse(torch.tensor((2 / 127.5) * (3 * 8 * 8) ** 0.5), references)
    assert float(off_by_two) == pytest.approx(2, rel=1e-5)


def test_nearest_refuses_other_widths_and_too_many_neighbours() -> None:
    with pytest.raises(InputError, match="4 values each, references 5"):
        nearest(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(InputError, match="3 references"):
        nearest(torch.zeros(2, 4), torch.zeros(3, 4), k=4)


def naive_coverage(real: Tensor, made: Tensor, k: int) -> tuple[float, float, float, float]:
    def radius(points: Tensor, i: int) -> float:
        return float(sorted(float((points[i] - points[j]).norm()) for j in range(len(points)) if j != i)[k - 1])

    def inside(x: Tensor, centres: Tensor) -> bool:
        return any(float((x - centres[i]).norm()) <= radius(centres, i) for i in range(len(centres)))

    precision = sum(inside(x, real) for x in made) / len(made)
    balls = sum(float((real[i] - y).norm()) <= radius(real, i) for i in range(len(real)) for y in made)
    recall = sum(inside(x, made) for x in real) / len(real)
    covered = sum(min(float((real[i] - y).norm()) for y in made) <= radius(real, i) for i in range(len(real)))
    return precision, recall, covered / len(real), balls / (k * len(made))


def test_recall_and_coverage_equal_their_definitions() -> None:
    real, made = torch.randn(16, 4, dtype=torch.float64), torch.randn(13, 4, dtype=torch.float64) * 0.7 + 0.3
    for k in (1, 3, 5):
        assert tuple(coverage(real, made, k)) == pytest.approx(naive_coverage(real, made, k))


def test_recall_and_coverage_on_known_cases() -> None:
    real = torch.randn(40, 3)
    assert tuple(coverage(real, real.clone()))[:3] == (1, 1, 1)
    assert tuple(coverage(real, real + 100)) == (0, 0, 0, 0)
    one_mode = real[:1] + torch.randn(40, 3) * 1e-3
    fallen = coverage(real, one_mode)
    assert fallen.precision == 1 and fallen.recall <= 0.1 and fallen.coverage < 0.5
    with pytest.raises(InputError, match="more than 3 pictures"):
        coverage(real[:3], real)


def test_pairwise_distance_is_the_mean_over_labels_of_the_mean_over_pairs() -> None:
    pictures = torch.randn(7, 3, 2, 2)
    labels = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 0], [2, 1], [0, 0], [1, 1]])
    groups = [[0, 1, 2], [3, 5]]
    pairs = [[float((pictures[i] - pictures[j]).norm()) for i in group for j in group if i < j] for group in groups]
    found = pairwise_distance(pictures, labels)
    assert found.mean == pytest.approx(sum(sum(each) / len(each) for each in pairs) / 2)
    assert (found.labels, found.pairs) == (2, 4)
    assert pairwise_distance(pictures, labels, most=2).pairs == 2
    assert pairwise_distance(torch.ones(4, 5), torch.zeros(4, 1)).mean == 0, "samples that are all alike"
    alone = pairwise_distance(pictures[:2], torch.tensor([[0], [1]]))
    assert alone.pairs == 0 and alone.mean != alone.mean
    with pytest.raises(InputError, match="give one each"):
        pairwise_distance(pictures, labels[:3])


def test_agreement_averages_over_classes_and_leaves_flags_out() -> None:
    asked = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [2, 1]])
    guesses = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 1], [2, 0], [2, 0]])
    found = agreement(Opinion(guesses, torch.zeros(6, 1)), asked, [["fruit", "tool", "flag"], ["flat", "round"]])
    assert found["class"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert found["class_without_flags"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["class_plain"] == pytest.approx(4 / 6)
    assert found["style"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    with pytest.raises(InputError, match="no class is left"):
        macro_average(torch.ones(2), torch.tensor([1, 1]), leave_out=[1])


def test_psnr_inside_the_mask_ignores_what_is_outside() -> None:
    x, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    y = x.clone()
    y[..., :2, :] += 0.2
    y[..., 2:, :] += 1.0
    assert float(psnr(x, y, mask)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(x, y)) == pytest.approx(float(10 * torch.log10(torch.tensor(4 / 0.52))), abs=1e-4)


def test_classifier_saves_and_loads_in_half_the_bytes(tmp_path: Path) -> None:
    classifier = PictureClassifier(SMALL).eval()
    for parameter in classifier.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    save_classifier(classifier, tmp_path / "judge")
    loaded = load_classifier(tmp_path / "judge")
    assert loaded.config == SMALL and not loaded.training
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name
    (tmp_path / "judge" / "classifier.safetensors").write_bytes(b"cut short")
    with pytest.raises(WeightsError, match="can't be read as weights"):
        load_classifier(tmp_path / "judge")
    with pytest.raises(WeightsError, match="no classifier at nowhere"):
        load_classifier("nowhere")


def test_classifier_learns_and_its_features_stay_frozen(tmp_path: Path) -> None:
    dataset = open_dataset(draw_pictures(tmp_path / "pictures", each=12), 16, "all")
    pictures = whole_set(dataset)
    recipe = ClassifierRecipe(SMALL, Augmentation(blur=0.2), label_weights=(1.0,), label_smoothing=0.0)
    task = ClassifierTask(recipe, (pictures.pictures, pictures.labels))
    loader = Loader(dataset, ClassBalancedOrder(dataset.labels[:, 0]), 24)
    config = TrainConfig(steps=40, batch_size=24, learning_rate=2e-2, warmup_steps=5, precision="fp32", device="cpu",
                         ema_decay=0.8, log_every=10)
    trainer = Trainer(task, loader, config, tmp_path / "run")
    trainer.train()
    classifier = trainer.averaged_modules()["classifier"]
    assert isinstance(classifier, PictureClassifier)
    opinion = judge(classifier, pictures.pictures, batch=7)
    assert agreement(opinion, pictures.labels, pictures.class_names)["class"] > 0.6
    assert torch.equal(opinion.guesses_Nn, judge(classifier, pictures.pictures).guesses_Nn)

    features = FeatureMaps(classifier).train()
    assert not features.classifier.training
    x = pictures.pictures[:2].clone()
    y = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    assert [tuple(found.shape) for found in features(x)] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    measure = FeatureDistance(features)
    distance = measure(x, y)
    distance.backward()
    assert distance > 0 and y.grad is not None and y.grad.abs().sum() > 0
    assert all(parameter.grad is None or not parameter.requires_grad for parameter in features.parameters())
    assert float(measure(x, x)) == 0


def test_augmentation_without_strength_changes_nothing() -> None:
    picture = torch.rand(4, 3, 16, 16) * 2 - 1
    none = Augmentation(shift=0, scale=0, degrees=0, brightness=0, blur=0)
    torch.testing.assert_close(none(picture), picture, atol=1e-5, rtol=0)
    changed = Augmentation(shift=0.5)(torch.full((8, 3, 16, 16), -1.0))
    assert changed.max() > 0.5, "white comes in at the edges"


def test_reconstruction_figures_agree_with_the_system() -> None:
    system = tiny_system()
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    found = reconstruct(system, pictures, batch=2)
    torch.testing.assert_close(found.pictures, system.decode(system.encode(pictures)), atol=1e-5, rtol=0)
    errors = after_each_scale(system, pictures, found.tokens, batch=2)
    whole = (found.pictures - pictures).square().flatten(1).mean(1)
    assert errors.shape == (5, 4)
    torch.testing.assert_close(errors[:, -1], whole, atol=1e-5, rtol=1e-4)


def test_code_usage_counts_codes_scale_by_scale() -> None:
    usage = code_usage([torch.tensor([[3], [3]]), torch.tensor([[0, 1], [2, 3]])], vocabulary=8)
    assert [(u.codes, u.share) for u in usage] == [(1, 0.125), (4, 0.5), (4, 0.5)]
    assert usage[0].perplexity == pytest.approx(1) and usage[1].perplexity == pytest.approx(4)


def test_thumbnails_of_flat_pictures_lose_nothing_but_bytes() -> None:
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert (thumbnails(flat, 8) - flat).abs().max() <= 1 / 255 + 1e-6


def test_shipped_judge_knows_held_out_pictures_and_is_not_the_features() -> None:
    judging, features = load_classifier("emoji-judge"), load_features()
    assert features.classifier.config != judging.config
    assert [found.shape[-1] for found in features(torch.zeros(1, 3, 64, 64))] == [32, 16, 8, 4]
    held_out = whole_set(open_dataset("emoji", 64, "concept-test"))
    some = held_out.part(torch.arange(0, len(held_out), 5))
    found = agreement(judge(judging, some.pictures), some.labels, some.class_names)
    assert found["class_plain"] > 0.25 and found["style"] > 0.35, "chance is 0.02 and 0.2"
