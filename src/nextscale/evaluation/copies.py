"""Are samples copies, and do they cover what they should? Nearest neighbours, precision, recall and coverage."""
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
    """Shares in [0, 1].

    precision: generated that lie within some real ball; recall: real that lie within some generated ball
    (Kynkaanniemi et al., arXiv 1904.06991); coverage: real balls that hold something generated (Naeem et al.,
    arXiv 2002.09797). A ball reaches to the k-th nearest neighbour of its centre among its own kind.
    """

    precision: float
    recall: float
    coverage: float


@torch.no_grad()
def coverage(real_ND: Tensor, generated_MD: Tensor, k: int = 3) -> Coverage:
    """Precision, recall and coverage of generated features with k neighbours; draw as many of each kind.

    Raises InputError where one kind has k or fewer members.
    """
    if min(len(real_ND), len(generated_MD)) <= k:
        raise InputError(f"k is {k}; it needs more than {k} pictures of each kind, "
                         f"got {len(real_ND)} real and {len(generated_MD)} generated")
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    across_NM = torch.cdist(real_ND, generated_MD)
    real_radius_N = _radius(real_ND, k)
    within_generated_N = (across_NM <= _radius(generated_MD, k)[None]).any(1)
    within_real_M = (across_NM <= real_radius_N[:, None]).any(0)
    covered_N = across_NM.min(1).values <= real_radius_N
    return Coverage(*(float(found.double().mean()) for found in (within_real_M, within_generated_N, covered_N)))


def _radius(points_ND: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other point, (N,)."""
    distance_NN = torch.cdist(points_ND, points_ND)
    distance_NN.fill_diagonal_(float("inf"))
    return distance_NN.kthvalue(k, dim=1).values
