"""Are samples copies, and do they cover what they should? Nearest neighbours; precision, recall, density, coverage."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nextscale.errors import InputError


class Neighbours(NamedTuple):
    """The nearest references of N queries, nearest first: Euclidean distances (N, k) and positions (N, k)."""

    distance_Nk: Tensor
    index_Nk: Tensor


@torch.no_grad()
def nearest(queries_ND: Tensor, references_MD: Tensor, k: int = 1, batch: int = 256,
            each: Callable[[int], None] | None = None) -> Neighbours:
    """The k nearest references of every query, by exact search.

    Anything with a leading dimension will do (pictures are flattened). ``each`` is called with how many queries are
    done. Raises InputError where widths differ or there are fewer than k references.
    """
    queries_ND, references_MD = queries_ND.flatten(1).float(), references_MD.flatten(1).float()
    if queries_ND.shape[1] != references_MD.shape[1]:
        raise InputError(f"queries have {queries_ND.shape[1]} values each, references {references_MD.shape[1]}")
    if not 1 <= k <= len(references_MD):
        raise InputError(f"k is {k}; it must be from 1 to the {len(references_MD)} references")
    # Distances come from a matrix product, which loses digits where vectors are long and close: both are centred, a few
    # more than k are taken, and those are measured again exactly.
    centre_D = references_MD.mean(0)
    references_MD = references_MD - centre_D
    squares_M = references_MD.square().sum(1)
    candidates = min(k + 4, len(references_MD))
    distances, indices = [], []
    for start in range(0, len(queries_ND), batch):
        part_BD = queries_ND[start:start + batch] - centre_D
        score_BM = torch.addmm(squares_M[None], part_BD, references_MD.T, alpha=-2)
        index_BC = score_BM.topk(candidates, largest=False).indices
        exact_BC = torch.stack([(part_BD - references_MD[index_B]).norm(dim=1) for index_B in index_BC.T], 1)
        order = exact_BC.sort(dim=1, stable=True)
        distances.append(order.values[:, :k])
        indices.append(index_BC.gather(1, order.indices)[:, :k])
        if each is not None:
            each(min(start + batch, len(queries_ND)))
    return Neighbours(torch.cat(distances), torch.cat(indices))


def pixel_rmse(distance: Tensor, pictures: Tensor) -> Tensor:
    """Distances between pictures in [-1, 1] as root mean square errors in grey levels of 0 to 255."""
    return distance * (127.5 / pictures[0].numel() ** 0.5)


class Coverage(NamedTuple):
    """How far two clouds of features overlap.

    precision: share of generated that lie within some real ball; recall: share of real within some generated ball
    (Kynkaanniemi et al., arXiv 1904.06991); coverage: share of real balls that hold something generated; density: how
    many real balls hold a generated one on average, over k (Naeem et al., arXiv 2002.09797), which may exceed 1.
    A ball reaches to the k-th nearest neighbour of its centre among its own kind.
    """

    precision: float
    recall: float
    coverage: float
    density: float


@torch.no_grad()
def coverage(real_ND: Tensor, generated_MD: Tensor, k: int = 3, batch: int = 1024) -> Coverage:
    """Precision, recall, coverage and density of generated features with k neighbours; draw as many of each kind.

    Published: k = 3 for precision and recall, 5 for density and coverage. Memory is that of ``batch`` rows of
    distances. Raises InputError where one kind has k or fewer members.
    """
    if min(len(real_ND), len(generated_MD)) <= k:
        raise InputError(f"k is {k}; it needs more than {k} pictures of each kind, "
                         f"got {len(real_ND)} real and {len(generated_MD)} generated")
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    real_radius_N, generated_radius_M = _radius(real_ND, k, batch), _radius(generated_MD, k, batch)
    recalled = covered = 0
    balls_M = torch.zeros(len(generated_MD), dtype=torch.int64, device=generated_MD.device)
    for start in range(0, len(real_ND), batch):
        rows = slice(start, start + batch)
        across_BM = torch.cdist(real_ND[rows], generated_MD)
        inside_BM = across_BM <= real_radius_N[rows, None]
        recalled += int((across_BM <= generated_radius_M[None]).any(1).sum())
        covered += int(inside_BM.any(1).sum())
        balls_M += inside_BM.sum(0)
    return Coverage(float((balls_M > 0).double().mean()), recalled / len(real_ND), covered / len(real_ND),
                    float(balls_M.double().mean()) / k)


def _radius(points_ND: Tensor, k: int, batch: int) -> Tensor:
    """Distance to the k-th nearest other point, (N,)."""
    found = []
    for start in range(0, len(points_ND), batch):
        distance_BN = torch.cdist(points_ND[start:start + batch], points_ND)
        rows = torch.arange(len(distance_BN))
        distance_BN[rows, start + rows] = float("inf")
        found.append(distance_BN.kthvalue(k, dim=1).values)
    return torch.cat(found)
