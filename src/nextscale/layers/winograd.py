"""3x3 convolutions with a quarter of the products, by Winograd's minimal filtering F(4x4, 3x3).

Lavin and Gray, 2015 (arXiv 1509.09308): the 4x4 outputs of a tile are A^T [(G g G^T) * (B^T d B)] A, where d is the 6x6
inputs that the tile reads and g the kernel. The product in the middle is cell by cell, and over channels it is 36
matrix products, one a cell; so an output takes 36 / 16 multiplications a channel and not 9. What the transforms cost is
shared by all channels.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.layers.kept import KeepsForm

TILE, SEEN = 4, 6
LEAST_CHANNELS, LEAST_CELLS = 96, 4096
"""Below these the transforms take what the products save, or the kernels' room (four times the weights') isn't worth
it."""
TILES, MOST_TILES = 128, 512
"""Tiles at a time, a thread and in all: two pieces of memory of 36 maps of them, up to 47 MB of 320 channels."""

# The points at which polynomials are compared are 0, 1, -1, 2, -2 and infinity.
_B = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
                   [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]], dtype=torch.float64)
_G = torch.tensor([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
                   [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]], dtype=torch.float64)
_A = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
                  dtype=torch.float64)

def transformed(weight_OI33: Tensor) -> Tensor:
    """The kernel G g G^T, (36, I, O) in float32."""
    by_points = _G.to(weight_OI33.device)
    found = torch.einsum("ia,ocab,jb->ijco", by_points, weight_OI33.double(), by_points)
    return found.flatten(0, 1).float().contiguous()


def convolve(x_BCHW: Tensor, kernel_KIO: Tensor, bias_O: Tensor, tiles: int = TILES) -> Tensor:
    """A 3x3 convolution with one row and column of zeros around the map (B, C, H, W), in float32 and channels-last.

    kernel_KIO: of :func:`transformed`. tiles: about as many of them are worked on at a time, a few rows of a picture,
    so that all of it stays in the cache. Every picture is computed by itself, so a batch doesn't change it.
    """
    b, c, h, w = x_BCHW.shape
    down, across, width = -(-h // TILE), -(-w // TILE), kernel_KIO.shape[2]
    rows = max(1, min(down, tiles // across))
    x = x_BCHW.permute(0, 2, 3, 1)
    out = x.new_empty(b, TILE * down, TILE * across, width)
    padded = x.new_zeros(TILE * rows + 2, TILE * across + 2, c)
    y, z = padded.stride()[:2]
    windows = padded.as_strided((SEEN, SEEN, rows, across, c), (y, z, TILE * y, TILE * z, 1))
    # Two pieces of memory in turn: what a stage reads is in one, what it writes in the other.
    here, there = (x.new_empty(SEEN * SEEN * rows * across * max(c, width)) for _ in range(2))
    cells, half = (room[:36 * rows * across * c].view(SEEN, SEEN, -1, c) for room in (here, there))
    products = there[:36 * rows * across * width].view(SEEN, SEEN, -1, width)
    first_half = here[:24 * rows * across * width].view(TILE, SEEN, -1, width)
    outputs = there[:16 * rows * across * width].view(TILE, TILE, rows, across, width)
    multiplied = list(zip(cells.flatten(0, 1), kernel_KIO, products.flatten(0, 1), strict=True))
    seen_by, drawn_by = _B.to(x), _A.to(x)
    for picture, drawn in zip(x, out, strict=True):
        for first in range(0, down, rows):
            # Rows that the strip sees, from one above it to one below it.
            top, bottom = TILE * first - 1, min(TILE * (first + rows) + 1, h)
            above, seen = max(0, -top), picture[max(0, top):bottom]
            padded[:above].zero_()
            padded[above:above + len(seen), 1:w + 1].copy_(seen)
            padded[above + len(seen):].zero_()
            cells.view_as(windows).copy_(windows)
            _both_ways(seen_by, cells, half, cells)
            for one, matrix, product in multiplied:
                torch.mm(one, matrix, out=product)
            _both_ways(drawn_by, products, first_half, outputs)
            outputs.add_(bias_O)
            new = min(rows, down - first)
            strip = drawn[TILE * first:TILE * (first + new)].view(new, TILE, across, TILE, width)
            strip.permute(1, 3, 0, 2, 4).copy_(outputs[:, :, :new])
    return out[:, :h, :w].permute(0, 3, 1, 2)


def _both_ways(matrix_ON: Tensor, values_NN: Tensor, half_ON: Tensor, out_OO: Tensor) -> None:
    """M v M^T of the first two dimensions, by way of M v."""
    o, n = matrix_ON.shape
    torch.mm(matrix_ON, values_NN.view(n, -1), out=half_ON.view(o, -1))
    torch.bmm(matrix_ON.expand(o, o, n), half_ON.view(o, n, -1), out=out_OO.view(o, o, -1))


class Convolution3x3(KeepsForm, nn.Conv2d):
    """A 3x3 convolution that keeps the map's size; by :func:`convolve` on a CPU in float32 where no gradient is asked
    for and the map is large, by torch's own otherwise. The two differ by rounding (about 1e-5 of the outputs' size).
    """

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not self._pays(x):
            return super().forward(x)
        assert self.bias is not None
        tiles = min(TILES * torch.get_num_threads(), MOST_TILES)
        return convolve(x, self.kept(self.weight, transformed), self.bias, tiles)

    def kept_bytes(self) -> int:
        """Bytes of the transformed kernel, 0 where it is never made."""
        return self.weight.nbytes * 36 // 9 if self._may() and self.weight.device.type == "cpu" else 0

    def _may(self) -> bool:
        return self.weight.dtype == torch.float32 and min(self.in_channels, self.out_channels) >= LEAST_CHANNELS

    def _pays(self, x: Tensor) -> bool:
        return (self._may() and x.device.type in ("cpu", "meta") and x.dtype == torch.float32
                and x.shape[-2] * x.shape[-1] >= LEAST_CELLS
                and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference()))
