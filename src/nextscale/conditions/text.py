"""Text as a condition: what a network takes of a text encoder's features, and the branches of a guidance by text."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.conditions.text_features import TextFeatures
from nextscale.errors import InputError
from nextscale.layers.attention import attention
from nextscale.layers.norms import RMSNorm


class TextRows(NamedTuple):
    """What the rows of a batch are conditioned on: one vector (R, D) of the whole prompt, a vector (R, T, D) of every
    token, to attend to, and which tokens there are, (R, T) bool."""

    vector: Tensor
    tokens: Tensor
    valid: Tensor

    @property
    def device(self) -> torch.device:
        return self.vector.device

    def to(self, dtype: torch.dtype) -> TextRows:
        return TextRows(self.vector.to(dtype), self.tokens.to(dtype), self.valid)

    @classmethod
    def join(cls, parts: list[TextRows]) -> TextRows:
        """Several batches behind each other, padded to the longest prompt."""
        length = max(part.valid.shape[1] for part in parts)
        more = [length - part.valid.shape[1] for part in parts]
        return cls(torch.cat([part.vector for part in parts]),
                   torch.cat([F.pad(part.tokens, (0, 0, 0, n)) for part, n in zip(parts, more, strict=True)]),
                   torch.cat([F.pad(part.valid, (0, n)) for part, n in zip(parts, more, strict=True)]))


class TextProjection(Protocol):
    """What a system makes of features: a module."""

    def __call__(self, features: TextFeatures) -> TextRows: ...

    def nothing(self, features: TextFeatures) -> TextFeatures:
        """The features that mean no prompt was given, in the place of these."""
        ...


@dataclass(frozen=True)
class TextCondition:
    """Prompts bound to the pictures of a run. Branches: ``conditional``, and ``unconditional``: the negative prompts
    where they are given, else what the system takes for none. What a name has behind a slash is about something else.

    prompts: the projection is a module, whose weights may change between runs; features hold one prompt a picture.
    nothing: gives the features that mean no prompt, in the place of others, where it isn't the projection that does.
    """

    projection: TextProjection
    features: TextFeatures
    negative: TextFeatures | None = None
    nothing: Callable[[TextFeatures], TextFeatures] | None = None

    def branch(self, name: str) -> TextRows:
        name = name.partition("/")[0]
        if name == "conditional":
            return self.projection(self.features)
        if name == "unconditional":
            nothing = self.nothing or self.projection.nothing
            return self.projection(nothing(self.features) if self.negative is None else self.negative)
        raise InputError(f"text has no branch {name!r}; it has conditional and unconditional")

    def gather(self, items: Tensor) -> TextCondition:
        return replace(self, features=self.features.gather(items),
                       negative=None if self.negative is None else self.negative.gather(items))


class AttentivePool(nn.Module):
    """One vector of all tokens: a learned query a head attends over them (Infinity, arXiv 2412.04431, published code).

    k, v = W_kv x (+ a bias of v), out = W softmax(q k^T / sqrt(E)) v + b; tokens (B, T, W) to (B, C).
    """

    def __init__(self, text_width: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor, valid_BT: Tensor) -> Tensor:
        k, v = key_value_heads(self.kv(x_BTW), self.v_bias, self.heads)
        q = self.query[:, :, None].to(k.dtype).expand(len(k), -1, -1, -1)
        out = attention(q, k, v, valid_BT[:, None, None])
        found: Tensor = self.projection(out.flatten(1))
        return found


def key_value_heads(kv_BTC: Tensor, v_bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, E) from their product (B, T, 2C); keys have no bias."""
    k, v = kv_BTC.chunk(2, -1)
    k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (k, v + v_bias.to(v.dtype)))
    return k, v


class PlainText(nn.Module):
    """Text as its encoder gives it: tokens and the pooled vector, their mean where there is none. It has no weights.

    Features (B, T, W), pooled (B, P). What is no prompt hangs on the encoder: it is the empty prompt.
    """

    def __init__(self, text_width: int, vector_width: int):
        super().__init__()
        self.text_width, self.vector_width = text_width, vector_width

    def forward(self, features: TextFeatures) -> TextRows:
        vector = features.pooled
        if vector is None:
            vector = (features.values * features.valid[..., None]).sum(1) / features.valid.sum(1, keepdim=True)
        found = features.values.shape[-1], vector.shape[-1]
        if found != (self.text_width, self.vector_width):
            raise InputError(f"text: its features are {found[0]} wide and the pooled ones {found[1]}, this model takes "
                             f"{self.text_width} and {self.vector_width}; use the text encoder it was trained with")
        return TextRows(vector, features.values, features.valid)

    def nothing(self, features: TextFeatures) -> TextFeatures:
        raise InputError("text: what no prompt is hangs on the text encoder; give features of the empty prompt")


class PooledText(nn.Module):
    """Infinity's text conditioning: normalised features, pooled to one vector, and mapped token by token.

    tau = RMSNorm(features); vector = pool(tau); tokens = W_2 GELU(W_1 tau). ``null`` (longest, W) is what training puts
    in the place of dropped prompts, as many of its rows as the prompt has tokens. Features (B, T, W), T at most
    ``longest``.
    """

    def __init__(self, text_width: int, width: int, longest: int, pool_heads: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(longest, text_width))
        self.norm = RMSNorm(text_width)
        self.pool = AttentivePool(text_width, width, pool_heads)
        self.expand, self.project = nn.Linear(text_width, width), nn.Linear(width, width)

    def forward(self, features: TextFeatures) -> TextRows:
        self.check(features)
        tau = self.norm(features.values.to(self.norm.weight.dtype))
        return TextRows(self.pool(tau, features.valid), self.project(F.gelu(self.expand(tau), approximate="tanh")),
                        features.valid)

    def nothing(self, features: TextFeatures) -> TextFeatures:
        self.check(features)
        null_BTW = self.null[:features.valid.shape[1]].expand(len(features), -1, -1)
        return replace(features, values=null_BTW.to(features.values.dtype))

    def check(self, features: TextFeatures) -> None:
        """Raises InputError where features are not what the weights are for."""
        longest, width = self.null.shape
        if features.values.shape[-1] != width:
            raise InputError(f"text: its features are {features.values.shape[-1]} wide, this model takes {width}; use "
                             "the text encoder that it was trained with")
        if features.valid.shape[1] > longest:
            raise InputError(f"text: a prompt has {features.valid.shape[1]} tokens, this model takes {longest}; cut it")
