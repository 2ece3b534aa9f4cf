"""Feed-forward networks and the dropping of residual branches."""
from __future__ import annotations

from torch import Tensor, nn

from nextscale.layers.linear import Linear
from nextscale.parallel import rand_pictures


class MLP(nn.Module):
    """Linear, GELU (tanh approximation), linear; ``ratio`` times the width inside."""

    def __init__(self, width: int, ratio: float = 4.0):
        super().__init__()
        self.expand = Linear(width, round(width * ratio))
        self.contract = Linear(round(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x, gelu=True))


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): drop a branch for whole pictures, scale the others by 1 / (1 - p)."""
    if not training or probability == 0.0:
        return x
    keep = rand_pictures(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= probability
    return x * (keep / (1 - probability)).to(x.dtype)
