"""Distances between two sets of pictures, measured between their features.

The Fréchet distance and its estimate for endlessly many samples are here because they must work from saved statistics;
the kernel distance and the classifier score are torchmetrics'.
"""
from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextscale import hub
from nextscale.errors import DataError, InputError, MissingExtraError


@dataclass(frozen=True)
class Statistics:
    """What a Fréchet distance needs of a set: mean (D,) and covariance (D, D) of its features in float64.

    features: name of the extractor; count: how many pictures, 0 where a foreign file doesn't say; features_ND: the
    features themselves, where they were kept.
    """

    mean_D: Tensor
    covariance_DD: Tensor
    count: int
    features: str
    features_ND: Tensor | None = None

    @classmethod
    def of(cls, features_ND: Tensor, features: str) -> Statistics:
        """Mean and unbiased covariance. Raises InputError for fewer than two pictures."""
        if len(features_ND) < 2:
            raise InputError(f"{len(features_ND)} pictures have no covariance; give at least 2")
        exact_ND = features_ND.double()
        mean_D = exact_ND.mean(0)
        centred_ND = exact_ND - mean_D
        covariance_DD = centred_ND.T @ centred_ND / (len(features_ND) - 1)
        return cls(mean_D, covariance_DD, len(features_ND), features, features_ND.float())


def write_statistics(statistics: Statistics, path: Path) -> Path:
    """Save as safetensors, features included. Raises WeightsError where it can't be written."""
    tensors = {"mean": statistics.mean_D, "covariance": statistics.covariance_DD,
               "count": torch.tensor(statistics.count)}
    if statistics.features_ND is not None:
        tensors["features"] = statistics.features_ND
    return hub.save_tensors(tensors, path, {"features": statistics.features})


def read_statistics(path: Path, features: str | None = None) -> Statistics:
    """Statistics that ``write_statistics`` wrote, or a published ``.npz`` with ``mu`` and ``sigma`` (ADM's layout).

    features: the extractor they must come from; a ``.npz`` doesn't name its own and is taken to be the Inception's.

    Raises:
        DataError: no such file, damaged, not of this kind, or of another extractor.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of statistics; give a .safetensors of ours or a .npz with mu and sigma")
    try:
        found = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    except DataError:
        raise
    except Exception as error:  # numpy and safetensors have a dozen error types for damaged files
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path} can't be read as statistics ({type(error).__name__}: {reason})") from None
    size = len(found.mean_D)
    if found.mean_D.shape != (size,) or found.covariance_DD.shape != (size, size):
        raise DataError(f"{path}: a mean of shape {tuple(found.mean_D.shape)} and a covariance of shape "
                        f"{tuple(found.covariance_DD.shape)} don't belong together")
    if features is not None and found.features != features:
        raise DataError(f"{path} holds statistics of {found.features!r}, not of {features!r}; "
                        "compare features of one extractor only")
    return found


def _read_npz(path: Path) -> Statistics:
    with np.load(path, allow_pickle=False) as arrays:
        if "mu" not in arrays or "sigma" not in arrays:
            raise DataError(f"{path} holds {', '.join(arrays.files)[:80]}, not mu and sigma")
        return Statistics(torch.from_numpy(arrays["mu"].astype(np.float64)),
                          torch.from_numpy(arrays["sigma"].astype(np.float64)), 0, "inception")


def _read_safetensors(path: Path) -> Statistics:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        name = (file.metadata() or {}).get("features")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if name is None or not {"mean", "covariance", "count"} <= set(tensors):
        raise DataError(f"{path} holds {', '.join(tensors)[:80]}, not statistics that `nextscale evaluate` wrote")
    return Statistics(tensors["mean"], tensors["covariance"], int(tensors["count"]), name, tensors.get("features"))


@torch.no_grad()
def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared 2-Wasserstein distance of two Gaussians
    (Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500).

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), which stays real and exact for
    covariances without full rank. Raises InputError where the two come from different extractors.
    """
    if a.features != b.features or len(a.mean_D) != len(b.mean_D):
        raise InputError(f"features of {a.features!r} ({len(a.mean_D)}) can't be compared with those of "
                         f"{b.features!r} ({len(b.mean_D)})")
    return _frechet(a.mean_D, a.covariance_DD, b.mean_D, b.covariance_DD, _root(b.covariance_DD))


def _frechet(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor, root_b: Tensor) -> float:
    """The same with the second root given, for many first arguments: eigenvalues of root_b S_a root_b."""
    product = root_b @ covariance_a @ root_b
    root_trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    found = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * root_trace
    return max(float(found), 0.0)  # of equal sets rounding leaves a little less than nothing


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Extrapolation(NamedTuple):
    """A line through Fréchet distances of growing sets: distance = at_infinity + slope / N.

    bias: how much the distance of all N exceeds ``at_infinity``; r_squared: of the line; counts, distances: its points;
    full_rank: False where the smallest set has no more pictures than features, so that the line is a rough guess.
    """

    at_infinity: float
    slope: float
    bias: float
    r_squared: float
    full_rank: bool
    counts: list[int]
    distances: list[float]


def frechet_at_infinity(features_ND: Tensor, reference: Statistics, points: int = 12, seed: int = 0) -> Extrapolation:
    """The Fréchet distance that endlessly many samples would have (Chong and Forsyth, arXiv 1911.07023, section 4).

    A finite set's distance is too large by about slope / N, and by another slope for every model. The distance is
    measured for ``points`` evenly spaced sizes, at each as the mean over disjoint random subsets; the line's value at
    1/N = 0 is the estimate. It corrects the samples' share of the bias; the reference's own share stays. Raises
    InputError below 10 pictures.
    """
    count, width = features_ND.shape
    if count < 10:
        raise InputError(f"{count} pictures are too few to extrapolate from; give at least 10")
    least = min(max(count // 10, 2 * width), count // 2)
    counts = sorted({round(n) for n in np.linspace(least, count, points)})
    generator = torch.Generator().manual_seed(seed)
    root_b = _root(reference.covariance_DD)
    distances = []
    for n in counts:
        order = torch.randperm(count, generator=generator)
        parts = [Statistics.of(features_ND[order[i * n:(i + 1) * n]], reference.features) for i in range(count // n)]
        distances.append(float(np.mean([_frechet(part.mean_D, part.covariance_DD, reference.mean_D,
                                                 reference.covariance_DD, root_b) for part in parts])))
    inverse, found = 1 / np.array(counts, dtype=np.float64), np.array(distances)
    slope, intercept = np.polyfit(inverse, found, 1)
    left = float(((found - slope * inverse - intercept) ** 2).sum())
    spread = float(((found - found.mean()) ** 2).sum())
    r_squared = 1 - left / spread if spread > 0 else 1.0
    return Extrapolation(float(intercept), float(slope), distances[-1] - float(intercept), r_squared,
                         least > width, counts, distances)


class MeanAndSpread(NamedTuple):
    """A mean over subsets and their standard deviation."""

    mean: float
    std: float


def kernel_distance(real_ND: Tensor, generated_MD: Tensor, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 0) -> MeanAndSpread:
    """KID: the unbiased squared MMD under the kernel (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401), by
    torchmetrics, over random subsets of at most ``subset_size``."""
    size = min(subset_size, len(real_ND), len(generated_MD))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns that it keeps all features
        torch.manual_seed(seed)  # it draws its subsets from torch's own generator
        metric = _torchmetrics("image.kid").KernelInceptionDistance(
            feature=torch.nn.Identity(), subsets=subsets, subset_size=size)
        metric.update(real_ND.double(), real=True)
        metric.update(generated_MD.double(), real=False)
        mean, std = metric.compute()
    return MeanAndSpread(float(mean), float(std))


def classifier_score(logits_NV: Tensor, splits: int = 10, seed: int = 0) -> MeanAndSpread:
    """exp(E KL(p(y|x) | p(y))) of a classifier's opinion (Salimans et al., arXiv 1606.03498), by torchmetrics.

    Called Inception score only where the classifier is the published Inception. From 1 to the number of classes.
    """
    splits = max(1, min(splits, len(logits_NV) // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        metric = _torchmetrics("image.inception").InceptionScore(feature=torch.nn.Identity(), splits=splits)
        metric.update(logits_NV.double())
        mean, std = metric.compute()
    return MeanAndSpread(float(mean), 0.0 if math.isnan(float(std)) else float(std))


def structural_similarity(pictures: Tensor, others: Tensor) -> Tensor:
    """SSIM of pairs of pictures (N, 3, S, S') in [-1, 1], (N,), by torchmetrics: 11 x 11 Gaussian window of sigma 1.5
    (Wang et al., 2004)."""
    functional = _torchmetrics("functional.image")
    _, map_NCHW = functional.structural_similarity_index_measure(
        (others.double() + 1) / 2, (pictures.double() + 1) / 2, data_range=1.0, return_full_image=True)
    # Windows that reach over the edge don't count, as in the original and in scikit-image.
    edge = 5 if min(map_NCHW.shape[-2:]) > 10 else 0
    found: Tensor = map_NCHW[..., edge:map_NCHW.shape[-2] - edge, edge:map_NCHW.shape[-1] - edge].mean((1, 2, 3))
    return found


def check_metrics() -> None:
    """Raises MissingExtraError where the packages that measure are missing, before any long work."""
    _torchmetrics("image")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "draw the curves of a report") from None


def _torchmetrics(module: str):  # type: ignore[no-untyped-def]
    import importlib

    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except ImportError:
        raise MissingExtraError("torchmetrics", "eval", "measure distances between sets of pictures") from None
