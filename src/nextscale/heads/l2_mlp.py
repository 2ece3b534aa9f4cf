"""A head that says the mean of a token, with the network of MAR's diffusion head: what that head is measured against.

    loss(x, h) = mean_c (x - f(h))^2,    whose best f is f(h) = E[x | h]

A token drawn so is no sample but the mean of all that fit: pictures lose what differs between them (arXiv 2406.11838,
section 3.1, on losses for vectors that are no distributions).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.heads.categorical import Evaluate, Filter, Guidance
from nextscale.heads.diffusion_mlp import DenoisingMLP, initialise_network
from nextscale.layers.linear import Linear, initialise_products
from nextscale.run import Call, Run, Sample


class L2MLPHead(nn.Module):
    """Hidden state (..., hidden_width) to the mean of the token (..., C), by a network of ``width`` and ``depth``."""

    def __init__(self, hidden_width: int, token_width: int, width: int, depth: int):
        super().__init__()
        self.token_width = token_width
        self.condition = Linear(hidden_width, width)
        self.network = DenoisingMLP(token_width, width, depth)

    def forward(self, hidden: Tensor) -> Tensor:
        """The means, in float32. There is nothing noisy to look at: the network's input is 0."""
        condition = self.condition(hidden.to(self.condition.weight.dtype))
        mean: Tensor = self.network(condition.new_zeros(*condition.shape[:-1], self.token_width), condition)[0]
        return mean

    def loss(self, hidden_BLC: Tensor, target_BLC: Tensor) -> Tensor:
        """Squared error of every token, (B, L), the mean over its channels."""
        return (self(hidden_BLC) - target_BLC.float()).square().mean(-1)

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance, filters: Sequence[Filter] = (),
               soft: Any = None) -> Sample:
        """The guided means of every predicted position of a call, (B, L, C): nothing is drawn."""
        outputs = self(evaluate(call)[:, call.predicts]).chunk(len(run.branches))
        guided = guidance(dict(zip(run.branches, outputs, strict=True)), run.at)
        for narrow in filters:
            guided = narrow(guided, run.at)
        return Sample(guided, None)

    @torch.no_grad()
    def initialise(self) -> None:
        """The start of the diffusion head, so that the first mean is 0."""
        initialise_products(self)
        initialise_network(self.network)
