"""Distances between sets: equal to torchmetrics and to closed forms, and honest about few samples."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from nextscale.errors import DataError, InputError
from nextscale.evaluation.copies import coverage
from nextscale.evaluation.distances import (
    Statistics,
    classifier_score,
    frechet_at_infinity,
    frechet_distance,
    kernel_distance,
    read_statistics,
    structural_similarity,
    write_statistics,
)
from nextscale.evaluation.features import distance_name
from nextscale.objectives.reconstruction import psnr


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Already(nn.Module):
    """torchmetrics takes a network; here the features are there already."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


def gaussian(mean: Tensor, root: Tensor) -> Statistics:
    return Statistics(mean.double(), (root @ root.T).double(), 0, "test")


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    mean_a, mean_b = torch.randn(6), torch.randn(6)
    scales_a, scales_b = torch.rand(6) + 0.1, torch.rand(6) + 0.1
    found = frechet_distance(gaussian(mean_a, scales_a.diag()), gaussian(mean_b, scales_b.diag()))
    assert found == pytest.approx(float((mean_a - mean_b).square().sum() + (scales_a - scales_b).square().sum()))
    # Commuting covariances need not be diagonal: any rotation of both leaves the distance.
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    turned = [Statistics(turn @ m.double(), turn @ s.square().diag().double() @ turn.T, 0, "test")
              for m, s in ((mean_a, scales_a), (mean_b, scales_b))]
    assert frechet_distance(*turned) == pytest.approx(found)


def test_frechet_distance_without_full_rank() -> None:
    """3 points in 5 dimensions: the root of the covariances' product is still real."""
    points = torch.randn(3, 5)
    same = Statistics.of(points, "test")
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
    moved = Statistics.of(points + 2, "test")
    assert frechet_distance(same, moved) == pytest.approx(5 * 4, rel=1e-6)


def test_frechet_distance_equals_torchmetrics() -> None:
    real, made = torch.randn(300, 12) @ torch.randn(12, 12), torch.randn(200, 12) * 1.3 + 0.2
    metric = FrechetInceptionDistance(feature=Already())
    metric.update(real, real=True)
    metric.update(made, real=False)
    found = frechet_distance(Statistics.of(real, "test"), Statistics.of(made, "test"))
    assert found == pytest.approx(float(metric.compute()), rel=1e-5)


def test_few_sample_bias_falls_as_one_over_n_and_is_taken_off() -> None:
    """Samples of the reference's own distribution: the true distance is 0, what is measured is all bias."""
    width = 12
    reference = Statistics(torch.zeros(width).double(), torch.eye(width).double(), 0, "test")
    measured, corrected = [], []
    for seed in range(6):
        features = torch.randn(600, width, generator=torch.Generator().manual_seed(seed))
        line = frechet_at_infinity(features, reference, seed=seed)
        measured.append(frechet_distance(Statistics.of(features, "test"), reference))
        corrected.append(line.at_infinity)
        assert line.full_rank and line.r_squared > 0.8 and line.counts[-1] == 600
        assert line.distances[-1] == pytest.approx(measured[-1], abs=1e-9)
    # First order: (D + D (D + 1) / 4) / N, from the mean and from the covariance.
    expected = (width + width * (width + 1) / 4) / 600
    assert np.mean(measured) == pytest.approx(expected, rel=0.15)
    assert abs(np.mean(corrected)) < 0.2 * np.mean(measured)
    with pytest.raises(InputError, match="too few to extrapolate"):
        frechet_at_infinity(torch.randn(5, 2), reference)


def naive_kernel_distance(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within = ((kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (n * (n - 1))
              + (kernel(y, y).sum() - kernel(y, y).diagonal().sum()) / (m * (m - 1)))
    return float(within - 2 * kernel(x, y).mean())


def test_kernel_distance_is_the_unbiased_one() -> None:
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, 5, dtype=torch.float64) + 0.5
    assert kernel_distance(x, y, subsets=1, subset_size=60).mean == pytest.approx(naive_kernel_distance(x, y))
    same = [kernel_distance(torch.randn(80, 5), torch.randn(80, 5), subsets=4, subset_size=40).mean for _ in range(12)]
    assert min(same) < 0 < max(same), "an unbiased estimate of 0 falls on both sides of it"
    assert kernel_distance(x, y, 3, 20, seed=7) == kernel_distance(x, y, 3, 20, seed=7)


def test_classifier_score_lies_between_one_and_the_number_of_classes() -> None:
    sure = 50 * torch.eye(10).repeat(20, 1)
    assert classifier_score(sure, splits=1).mean == pytest.approx(10)
    assert classifier_score(torch.zeros(50, 10)).mean == pytest.approx(1)


def test_density_counts_balls_and_memory_does_not_change_it() -> None:
    real, made = torch.randn(30, 4), torch.randn(25, 4)
    k = 5
    distance = torch.cdist(real.double(), real.double())
    radius = distance.sort(1).values[:, k]  # itself comes first
    inside = torch.cdist(real.double(), made.double()) <= radius[:, None]
    found = coverage(real, made, k)
    assert found.density == pytest.approx(float(inside.double().sum()) / (k * len(made)))
    assert found == coverage(real, made, k, batch=7)


def test_ssim_and_psnr_equal_their_references() -> None:
    """SSIM by scipy's filter, as scikit-image computes it (gaussian_weights, sigma 1.5, truncate 3.5, no padding)."""
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    a, b = ((t.double().numpy() + 1) / 2 for t in (x, y))

    def blurred(v: np.ndarray) -> np.ndarray:
        return gaussian_filter(v, 1.5, truncate=3.5)

    wanted = []
    for i in range(2):
        channels = []
        for p, q in zip(a[i], b[i], strict=True):
            mp, mq = blurred(p), blurred(q)
            vp, vq, vpq = blurred(p * p) - mp**2, blurred(q * q) - mq**2, blurred(p * q) - mp * mq
            local = ((2 * mp * mq + 1e-4) * (2 * vpq + 9e-4)) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
            channels.append(local[5:-5, 5:-5].mean())
        wanted.append(np.mean(channels))
    assert structural_similarity(x, y).tolist() == pytest.approx(wanted, abs=1e-4)
    assert structural_similarity(x, x).tolist() == pytest.approx([1, 1])
    from torchmetrics.functional.image import peak_signal_noise_ratio

    for i in range(2):
        wanted_db = float(peak_signal_noise_ratio(y[i], x[i], data_range=2.0))
        assert float(psnr(x, y)[i]) == pytest.approx(wanted_db, rel=1e-5)


def test_statistics_are_kept_and_strangers_refused(tmp_path: Path) -> None:
    kept = Statistics.of(torch.randn(20, 4), "judge")
    read = read_statistics(write_statistics(kept, tmp_path / "s.safetensors"), "judge")
    assert torch.equal(read.covariance_DD, kept.covariance_DD) and read.count == 20
    assert read.features_ND is not None and torch.equal(read.features_ND, kept.features_ND)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="of 'judge', not of 'inception'"):
        read_statistics(tmp_path / "s.safetensors", "inception")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    published = read_statistics(tmp_path / "adm.npz", "inception")
    assert published.mean_D.shape == (2048,) and published.features_ND is None and published.count == 0
    for name, content in (("cut.safetensors", (tmp_path / "s.safetensors").read_bytes()[:200]), ("bad.npz", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="can't be read as statistics"):
            read_statistics(tmp_path / name)
    np.savez(tmp_path / "pictures.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="holds arr_0, not mu and sigma"):
        read_statistics(tmp_path / "pictures.npz")


def test_only_the_published_protocol_is_called_fid() -> None:
    assert distance_name("inception", True, 50_000) == "FID (50,000 samples)"
    for name, published, count in (("inception", True, 49_999), ("emoji-judge", False, 50_000)):
        assert "FID" not in distance_name(name, published, count)
