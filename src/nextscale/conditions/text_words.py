"""The text encoder that needs no download: words as sums of their parts, learned with the model that reads them."""
from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_prompts import CutNotice, check_prompts
from nextscale.errors import InputError
from nextscale.layers.attention import attention
from nextscale.layers.linear import Linear
from nextscale.layers.mlp import MLP
from nextscale.layers.norms import RMSNorm, rms_norm

LONGEST_WORD = 32
"""Letters of a word that count."""


@dataclass(frozen=True)
class WordConfig:
    """A word encoder; the defaults have 1.9 million parameters.

    kind: ``words``, or ``bytes``: every byte of the text in UTF-8 is a token. width W of the features; depth and heads
    of its transformer, mlp_ratio times the width inside its MLPs; buckets: rows of the table that pieces of words share
    (bytes have a row each), bucket_width numbers a row; max_tokens: words or bytes that are read, without the end.
    """

    kind: Literal["words", "bytes"] = "words"
    width: int = 256
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 3.0
    buckets: int = 4096
    bucket_width: int = 128
    max_tokens: int = 48

    def __post_init__(self) -> None:
        if self.kind not in ("words", "bytes"):
            raise InputError(f"kind is {self.kind!r}; text is read as words or as bytes")
        for name in ("width", "depth", "heads", "buckets", "bucket_width", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise InputError(f"width {self.width} can't be shared by {self.heads} heads; choose a multiple of them")


class WordEncoder(nn.Module):
    """Words as bags of character n-grams, then a small transformer over them; an end token closes every prompt, the
    empty one too.

    A word's vector is the sum of the vectors of itself and of its n-grams of 3 to 5 letters between boundary marks
    (fastText, arXiv 1607.04606, section 3.2), each found in one table by its CRC-32. So there is no vocabulary: words
    that training never saw are made of parts that it did see. Projected and normalised, with a position added, it goes
    through ``depth`` pre-norm blocks where every token sees all of its prompt:

        x += attention(norm(x));  x += MLP(norm(x));  values = norm(x)

    The end token's row is the pooled vector. Training splits the work: ``tokenise`` on the CPU makes integers, calling
    the module gives features with gradients; ``encode`` does both without.
    """

    def __init__(self, config: WordConfig | None = None):
        super().__init__()
        self.config = c = config or WordConfig()
        self.name: str = c.kind
        self.width = self.pooled_width = c.width
        pieces = c.buckets if c.kind == "words" else 256
        self.end = pieces + 1
        self.pieces = nn.EmbeddingBag(pieces + 2, c.bucket_width, mode="sum", padding_idx=0)
        self.project = Linear(c.bucket_width, c.width)
        self.position = nn.Parameter(torch.empty(c.max_tokens + 1, c.width))
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.depth))
        self.norm = RMSNorm(c.width)
        nn.init.normal_(self.position, std=0.2)
        self._cut = CutNotice(f"the text encoder '{self.name}'", c.max_tokens, c.kind)

    def tokenise(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to the rows of the table that their tokens are sums of, (B, T, G) int64 on the CPU, filled up with 0.

        T: tokens of the longest prompt with its end; G: most pieces of a word. Batches are joined by filling up with 0.
        Raises InputError for what are no prompts.
        """
        found = [self._rows(prompt) for prompt in check_prompts(prompts)]
        most = max(len(token) for rows in found for token in rows)
        tokens_BTG = np.zeros((len(found), max(map(len, found)), most), np.int64)
        for tokens_TG, rows in zip(tokens_BTG, found, strict=True):
            for i, token in enumerate(rows):
                tokens_TG[i, : len(token)] = token
        return torch.from_numpy(tokens_BTG)

    def _rows(self, prompt: str) -> list[np.ndarray]:
        """Rows of the table, of every token and the end."""
        most = self.config.max_tokens
        if self.config.kind == "bytes":
            rows = [np.array([byte + 1]) for byte in prompt[: most + 1].encode()[: most + 1]]
        else:
            rows = [_pieces(word[:LONGEST_WORD], self.config.buckets) for word in islice(words(prompt), most + 1)]
        if len(rows) > most:
            self._cut(prompt)
        return [*rows[:most], np.array([self.end])]

    def forward(self, tokens_BTG: Tensor) -> TextFeatures:
        """Features of ``tokenise``'s integers, with gradients. Raises InputError for rows that are too long."""
        b, t, _ = tokens_BTG.shape
        if t > len(self.position):
            raise InputError(f"text: {t} tokens, but this encoder reads {len(self.position)} with the end")
        valid_BT = tokens_BTG[:, :, 0] != 0
        x = rms_norm(self.project(self.pieces(tokens_BTG.flatten(0, 1)).unflatten(0, (b, t)))) + self.position[:t]
        for block in self.blocks:
            x = block(x, valid_BT[:, None, None])
        values = self.norm(x) * valid_BT[..., None]
        return TextFeatures(values, valid_BT, values[torch.arange(b, device=x.device), valid_BT.sum(1) - 1])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, where the module lies, without gradients."""
        return self(self.tokenise(prompts).to(self.position.device))


class _Block(nn.Module):
    """A pre-norm transformer block in which every token sees the valid ones."""

    def __init__(self, config: WordConfig):
        super().__init__()
        self.heads = config.heads
        self.norm_attention, self.norm_mlp = RMSNorm(config.width), RMSNorm(config.width)
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.mlp = MLP(config.width, config.mlp_ratio)
        for last in (self.out, self.mlp.contract):  # so that a deep stack begins near the identity
            nn.init.normal_(last.weight, std=(2 * config.depth * last.in_features) ** -0.5)

    def forward(self, x: Tensor, sees_B11T: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(attention(q, k, v, sees_B11T).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def words(prompt: str) -> Iterator[str]:
    """The lower-cased words of a text: runs of letters with their accents; digits, punctuation marks, symbols and
    ideographs each for itself. Spaces, control characters and what joins emoji go."""
    word = ""
    for character in unicodedata.normalize("NFKC", prompt).lower():
        kind = unicodedata.category(character)[0]
        alone = "\u3400" <= character <= "\u9fff" or character >= "\U00020000"
        if (kind == "L" and not alone) or (kind == "M" and word):
            word += character
            continue
        if word:
            yield word
            word = ""
        if kind in "LNPS":
            yield character
    if word:
        yield word


@lru_cache(maxsize=1 << 16)
def _pieces(word: str, buckets: int) -> np.ndarray:
    """Rows of a word and of its n-grams, 1 to ``buckets``."""
    return np.array([row + 1 for row in hashed_grams(word, buckets)])


@lru_cache(maxsize=1 << 16)
def hashed_grams(word: str, buckets: int, shortest: int = 3, longest: int = 5) -> tuple[int, ...]:
    """Rows, 0 to ``buckets - 1``, of a word between boundary marks and of its character n-grams (fastText, arXiv
    1607.04606, section 3.2), each once, by their CRC-32: no list of words is needed."""
    marked = f"<{word}>"
    grams = {marked: None, **{marked[i : i + n]: None for n in range(shortest, longest + 1)
                              for i in range(len(marked) - n + 1)}}
    return tuple(zlib.crc32(gram.encode()) % buckets for gram in grams)
