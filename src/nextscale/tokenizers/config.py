"""The configuration of every tokenizer: the autoencoder, the schedule, and the kind of its quantiser."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.tokenizers.autoencoder import AutoencoderConfig

Kind = Literal["vq", "l2-vq", "bsq", "lfq", "fsq", "kl"]
Bands = Literal["none", "paper", "nyquist", "soft"]

SCALES_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
MOST_INDEX_BITS = 62
"""Bits that an index may hold: tokens are int64."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Everything that makes a tokenizer; the defaults are VAR's published one for 256 pixels.

    grids: the schedule, coarse to fine, as (h, w) pairs; its last grid is the latent's size at the trained resolution.
    One grid makes a single-scale tokenizer.

    kind: the quantiser.

    - ``vq``: VAR's residual pyramid over one codebook, each scale passed through a convolution phi.
    - ``l2-vq``: length-normalised codes, in LlamaGen's single map or FlexVAR's schedule of whole drafts, each of which
      replaces the one before.
    - ``bsq``: binary spherical quantisation, the signs of a unit vector (Infinity), over one map or a pyramid.
    - ``lfq``: lookup-free quantisation, the signs of the vector itself (MAGVIT-v2), over one map or a pyramid.
    - ``fsq``: finite scalar quantisation, every channel rounded to one of its ``levels``, over a single map.
    - ``kl``: no codes at all, but vectors: the encoder gives every cell a Gaussian (latent diffusion's autoencoder,
      arXiv 2112.10752). A step's tokens are the latent resized to its grid, each scale replacing the one before.

    vocabulary: codes of ``vq`` and ``l2-vq``. Of the others it follows (2^latent_width, the product of the levels, 0 of
    ``kl``): leave it alone there.

    For ``vq`` alone. phi_count: 0 gives every scale its own phi, 1 shares one, n > 1 shares n over the schedule.
    phi_ratio: share of the convolution in phi(h) = (1 - ratio) h + ratio conv(h). cosine: look codes up by angle.
    codebook_update: ``"gradient"`` as published, or ``"ema"``, an exponential moving average of what each code was
    used for, which ``codebook_decay`` sets.

    codebook_decay is that of the usage record too, for every kind. levels: of ``fsq``, one number a channel.
    tokens: what ``bsq`` and ``lfq`` emit, an ``"index"`` a cell or its ``"bits"``; both decode.
    latent_scale: of ``kl``, what latents are multiplied by so that they vary by about 1 (0.2325 for the published
    KL-16); 0 measures it while the tokenizer is trained. coarse: of ``kl``, what the coarser grids of a token cache
    hold: nothing, for they follow from the ``"latent"``, or the latents of the ``"picture"`` reduced to their sizes.

    patch: of ``bsq`` and ``lfq``, how many cells a side of the autoencoder's map make one cell of the grids (2 in
    Infinity's factor-8 tokenizer): a token is the bits of all of them.

    bands: which frequencies of the latent each scale aims at, for kinds whose scales add up; the last scale aims at
    all of them. ``none``: at all of them from the first scale on (VAR). The others are NFIG's: ``paper`` shares the
    distance from zero to the highest frequency out by the scales' tokens, ``nyquist`` gives every scale what its grid
    can hold, ``soft`` has the same edges with a Gaussian roll-off.

    Raises InputError on values that don't fit each other.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    grids: tuple[tuple[int, int], ...] = tuple((g, g) for g in SCALES_SIDES)
    vocabulary: int = 4096
    phi_count: int = 4
    phi_ratio: float = 0.5
    cosine: bool = False
    codebook_update: Literal["gradient", "ema"] = "gradient"
    codebook_decay: float = 0.99
    kind: Kind = "vq"
    levels: tuple[int, ...] = ()
    tokens: Literal["index", "bits"] = "index"
    latent_scale: float = 0.0
    bands: Bands = "none"
    coarse: Literal["latent", "picture"] = "latent"
    patch: int = 1

    def __post_init__(self) -> None:
        if self.kind == "fsq" and len(self.grids) != 1:
            raise InputError("kind 'fsq' codes a single map (a rounded tanh doesn't say how much of the latent is left "
                             f"over), but grids has {len(self.grids)} scales; give the last one alone, or use another")
        if not 0 <= self.codebook_decay < 1:
            raise InputError(f"codebook_decay is {self.codebook_decay}; it must be at least 0 and below 1")
        if self.codebook_update == "ema" and self.kind != "vq":
            raise InputError(f"codebook_update 'ema' is for kind 'vq'; {self.kind!r} has no such codebook")
        if self.tokens == "bits" and self.kind not in ("bsq", "lfq"):
            raise InputError(f"tokens 'bits' are for kinds bsq and lfq; {self.kind!r} has indices only")
        if self.bands != "none" and self.kind not in ("vq", "bsq", "lfq"):
            raise InputError(f"bands {self.bands!r} are for kinds whose scales add up: vq, bsq and lfq, not "
                             f"{self.kind!r}")
        if (self.kind == "fsq") != bool(self.levels):
            raise InputError("kind 'fsq' needs levels, such as [8, 5, 5, 5]" if self.kind == "fsq"
                             else f"levels are for kind 'fsq', not {self.kind!r}")
        if self.patch < 1 or (self.patch > 1 and self.kind not in ("bsq", "lfq")):
            raise InputError(f"patch is {self.patch}; it must be at least 1, and 1 but for kinds bsq and lfq")
        if self.levels and (min(self.levels) < 3 or len(self.levels) != self.autoencoder.latent_width):
            raise InputError(f"levels are {self.levels}; give {self.autoencoder.latent_width} of them, one a channel "
                             "of the latent, each at least 3")
        if self.latent_scale < 0 or (self.latent_scale and self.kind != "kl"):
            raise InputError(f"latent_scale is {self.latent_scale}; it is for kind 'kl', and at least 0")
        if self.coarse == "picture" and self.kind != "kl":
            raise InputError(f"coarse 'picture' is for kind 'kl'; {self.kind!r} codes what coarser scales left over")
        self._set_vocabulary()

    def _set_vocabulary(self) -> None:
        width = self.latent_width
        if self.tokens == "index" and self.kind in ("bsq", "lfq") and width > MOST_INDEX_BITS:
            raise InputError(f"{width} bits don't fit an index; set tokens to 'bits'")
        follows = {"bsq": 2**width, "lfq": 2**width, "fsq": math.prod(self.levels), "kl": 0}.get(self.kind)
        if follows is not None:
            default = type(self).__dataclass_fields__["vocabulary"].default
            if self.vocabulary not in (default, follows):
                raise InputError(f"vocabulary is {self.vocabulary}, but {self.kind!r} has {follows} codes here; leave "
                                 "it out, or change " + ("levels" if self.levels else "autoencoder.latent_width"))
            object.__setattr__(self, "vocabulary", follows)
        if self.vocabulary < 2 and not self.continuous:
            raise InputError(f"vocabulary is {self.vocabulary}; it must be at least 2")

    @property
    def latent_width(self) -> int:
        """Channels of a cell of the grids."""
        return self.autoencoder.latent_width * self.patch**2

    @property
    def factor(self) -> int:
        """Pixels a side of a cell of the grids."""
        return self.autoencoder.factor * self.patch

    @property
    def plan(self) -> Plan:
        return Plan.scales(self.grids)

    @property
    def continuous(self) -> bool:
        """Whether tokens are vectors and not codes."""
        return self.kind == "kl"

    @property
    def cached_grids(self) -> tuple[tuple[int, int], ...]:
        """The grids that a token cache has tokens of: all, or the last of vectors, from which the others follow."""
        return self.grids if not self.continuous or self.coarse == "picture" else self.grids[-1:]

    @property
    def bits(self) -> float | None:
        """Bits of a coded picture: tokens times log2 of the vocabulary; None where tokens are vectors."""
        return None if self.continuous else self.plan.length * math.log2(self.vocabulary)
