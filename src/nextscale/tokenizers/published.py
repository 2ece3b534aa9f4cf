"""Published tokenizers beside VAR's: their sizes, their tensor names, and how to load them.

LlamaGen's VQ (arXiv 2406.06525) comes in ``FoundationVision/LlamaGen/vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt`` and
``peizesun/llamagen_t2i/vq_ds16_t2i.pt``; many token-order systems use the first. Infinity's bitwise tokenizers
(arXiv 2412.04431) come in ``FoundationVision/Infinity/infinity_vae_d16.pth`` and its siblings. KL-16, the continuous
autoencoder of MAR (arXiv 2406.11838) and all who build on it, comes as ``kl16.ckpt``. TAEF2, a tiny autoencoder for the
latents of FLUX.2, comes in two files, ``taef2_encoder.pth`` and ``taef2_decoder.pth`` (github.com/madebyollin/taesd).
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nextscale import hub
from nextscale.errors import InputError, did_you_mean
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer

# For pictures of 256 pixels a side; every published tokenizer here is convolutional and takes other sizes with
# another schedule.
_INFINITY_GRIDS = tuple((side, side) for side in (1, 2, 4, 6, 8, 12, 16))


def llamagen_config(factor: int = 16, side: int = 256, width: int = 128, feature_width: int = 256,
                    vocabulary: int = 16384) -> TokenizerConfig:
    """LlamaGen's VQ-16 (71,883,403 parameters) or VQ-8 (70,109,835), for pictures of ``side`` pixels."""
    if factor not in (8, 16):
        raise InputError(f"LlamaGen's tokenizers have factor 8 or 16, not {factor}")
    multipliers = (1, 1, 2, 2, 4) if factor == 16 else (1, 2, 2, 4)
    sizes = AutoencoderConfig(width, multipliers, latent_width=8, feature_width=feature_width, latent_kernel=1)
    return TokenizerConfig(sizes, ((side // factor, side // factor),), vocabulary, kind="l2-vq")


def infinity_config(bits: int = 32, patchify: bool = False, width: int = 128,
                    grids: tuple[tuple[int, int], ...] = _INFINITY_GRIDS,
                    multipliers: tuple[int, ...] = ()) -> TokenizerConfig:
    """Infinity's bitwise tokenizer of ``bits`` bits a cell; ``patchify``: the one of factor 8, four of whose cells make
    one of the grids; multipliers: of the levels' widths, empty for the published ones."""
    multipliers = multipliers or ((1, 2, 4, 4) if patchify else (1, 2, 4, 4, 4))
    sizes = AutoencoderConfig(width, multipliers, latent_width=bits, attention="none", latent_kernel=0)
    return TokenizerConfig(sizes, grids, kind="bsq", tokens="bits", patch=2 if patchify else 1)


def kl_config(width: int = 128, latent_width: int = 16, multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
              grids: tuple[tuple[int, int], ...] = ((16, 16),), latent_scale: float = 0.2325) -> TokenizerConfig:
    """KL-16 of MAR, FlowAR, xAR and Hi-MAR (66,456,019 parameters): latent diffusion's autoencoder of factor
    16 with attention at the coarsest level of the encoder and in both middles."""
    sizes = AutoencoderConfig(width, multipliers, latent_width=latent_width, attention="encoder", latent_kernel=1)
    return TokenizerConfig(sizes, grids, kind="kl", latent_scale=latent_scale)


def taesd_config(latent_width: int = 32, pooled: bool = True, side: int = 256, width: int = 64,
                 latent_scale: float = 1.18) -> TokenizerConfig:
    """TAEF2 (2.7 million parameters), or with 4 or 16 channels and without pooled blocks one of its siblings, for
    pictures of ``side`` pixels. Its latents vary by 0.84 (experiments/tiny_autoencoder.py)."""
    sizes = AutoencoderConfig(width, (1, 1, 1, 1), 3, 3, latent_width, groups=4,
                              attention="level" if pooled else "none", latent_kernel=0, network="taesd")
    grids = [(side // sizes.factor,) * 2]
    while grids[0][0] % 2 == 0:
        grids.insert(0, (grids[0][0] // 2,) * 2)
    return TokenizerConfig(sizes, tuple(grids), kind="kl", latent_scale=latent_scale)


PUBLISHED: dict[str, TokenizerConfig] = {
    "llamagen-vq-16": llamagen_config(16),
    "llamagen-vq-8": llamagen_config(8),
    **{f"infinity-d{bits}": infinity_config(bits) for bits in (16, 24, 32, 64)},
    "kl-16": kl_config(),
    "taef2": taesd_config(),
    "infinity-d14-f8": infinity_config(14, True),
}
"""Name to configuration."""

_PARTS = (("norm1", "norm_in"), ("conv1", "conv_in"), ("norm2", "norm_out"), ("conv2", "conv_out"),
          ("nin_shortcut", "shortcut"))
_ENDS = (("conv_in", "input"), ("norm_out", "norm"), ("conv_out", "output"))


def llamagen_names(levels: int) -> hub.NameMap:
    """LlamaGen's tensor names; its decoder counts levels from the coarsest, ours from the finest."""
    names: list[tuple[str, str | None]] = []
    for level in range(levels):
        for side, number in (("encoder", level), ("decoder", levels - 1 - level)):
            old, new = rf"{side}\.conv_blocks\.{level}", f"{side}.levels.{number}"
            names += [(rf"{old}\.res\.(\d+)\.{theirs}\.(weight|bias)", rf"{new}.blocks.\1.{part}.\2")
                      for theirs, part in _PARTS]
            names += [(rf"{old}\.attn\.(\d+)\.(norm|qkv)\.(weight|bias)", rf"{new}.attentions.\1.\2.\3"),
                      (rf"{old}\.attn\.(\d+)\.proj_out\.(weight|bias)", rf"{new}.attentions.\1.projection.\2"),
                      (rf"{old}\.(?:down|up)sample\.conv\.(weight|bias)", rf"{new}.change.conv.\1")]
    for index, block in ((0, "block_in"), (2, "block_out")):
        names += [(rf"(encoder|decoder)\.mid\.{index}\.{theirs}\.(weight|bias)", rf"\1.middle.{block}.{part}.\2")
                  for theirs, part in _PARTS]
    names += [(r"(encoder|decoder)\.mid\.1\.(norm|qkv)\.(weight|bias)", r"\1.middle.attention.\2.\3"),
              (r"(encoder|decoder)\.mid\.1\.proj_out\.(weight|bias)", r"\1.middle.attention.projection.\2")]
    names += [(rf"(encoder|decoder)\.{theirs}\.(weight|bias)", rf"\1.{ours}.\2") for theirs, ours in _ENDS]
    return [*names, (r"quant_conv\.(weight|bias)", r"to_latent.\1"),
            (r"post_quant_conv\.(weight|bias)", r"from_latent.\1"),
            (r"quantize\.embedding\.weight", "quantiser.codebook.weight"),
            (r"quantize\.codebook_used", None)]  # a record of the published training


# Infinity wraps every convolution and norm once more, in some files.
_END = r"(?:\.conv|\.norm)?\.(weight|bias)"
INFINITY_NAMES: hub.NameMap = (
    *((rf"(encoder|decoder)\.(?:down|up)\.(\d+)\.block\.(\d+)\.{theirs}{_END}", rf"\1.levels.\2.blocks.\3.{ours}.\4")
      for theirs, ours in _PARTS),
    (rf"(encoder|decoder)\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv{_END}", r"\1.levels.\2.change.conv.\3"),
    *((rf"(encoder|decoder)\.mid\.block_{index}\.{theirs}{_END}", rf"\1.middle.{block}.{ours}.\2")
      for index, block in ((1, "block_in"), (2, "block_out")) for theirs, ours in _PARTS),
    *((rf"(encoder|decoder)\.{theirs}{_END}", rf"\1.{ours}.\2") for theirs, ours in _ENDS),
    (r"quantize[r]?\.lfq\.mask", None),  # powers of two
)


def join_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's separate ``q``, ``k`` and ``v`` convolutions as one ``qkv``."""
    joined = dict(tensors)
    for name in tensors:
        match = re.fullmatch(r"(.*)\.q\.(weight|bias)", name)
        parts = [f"{match[1]}.{part}.{match[2]}" for part in "qkv"] if match else []
        if match and all(part in tensors for part in parts):
            joined[f"{match[1]}.qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


_LEVELS = (("encoder", "down"), ("decoder", "up"))
VQGAN_NAMES: hub.NameMap = (
    *((rf"{side}\.{level}\.(\d+)\.block\.(\d+)\.{theirs}\.(weight|bias)", rf"{side}.levels.\1.blocks.\2.{ours}.\3")
      for side, level in _LEVELS for theirs, ours in _PARTS),
    *((rf"{side}\.{level}\.(\d+)\.attn\.(\d+)\.(norm|qkv)\.(weight|bias)", rf"{side}.levels.\1.attentions.\2.\3.\4")
      for side, level in _LEVELS),
    *((rf"{side}\.{level}\.(\d+)\.attn\.(\d+)\.proj_out\.(weight|bias)",
       rf"{side}.levels.\1.attentions.\2.projection.\3") for side, level in _LEVELS),
    *((rf"{side}\.{level}\.(\d+)\.(?:down|up)sample\.conv\.(weight|bias)", rf"{side}.levels.\1.change.conv.\2")
      for side, level in _LEVELS),
    *((rf"(encoder|decoder)\.mid\.block_{index}\.{theirs}\.(weight|bias)", rf"\1.middle.{block}.{ours}.\2")
      for index, block in ((1, "block_in"), (2, "block_out")) for theirs, ours in _PARTS),
    (r"(encoder|decoder)\.mid\.attn_1\.(norm|qkv)\.(weight|bias)", r"\1.middle.attention.\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.(weight|bias)", r"\1.middle.attention.projection.\2"),
    *((rf"(encoder|decoder)\.{theirs}\.(weight|bias)", rf"\1.{ours}.\2") for theirs, ours in _ENDS),
    (r"quant_conv\.(weight|bias)", r"to_latent.\1"),
    (r"post_quant_conv\.(weight|bias)", r"from_latent.\1"),
)
"""Names of the autoencoder that VQGAN (arXiv 2012.09841), latent diffusion and VAR share, with joined q, k and v."""

KL_NAMES: hub.NameMap = (*VQGAN_NAMES, (r"loss\..*", None))  # what the published training had beside it
"""Tensor names of ``kl16.ckpt``, whose separate q, k and v are joined first (``join_attention``)."""


TAESD_NAMES: hub.NameMap = ((r"(encoder|decoder)\.(\d+)\.(.*)", r"\1.layers.\2.\3"),)


def read_pair(encoder: str | Path) -> dict[str, Tensor]:
    """The tensors of an encoder's file and of the decoder's beside it, whose name differs by that word alone, with
    ``encoder.`` and ``decoder.`` before their names. Raises InputError where the name doesn't say encoder."""
    folder, slash, name = str(encoder).rpartition("/")
    if "encoder" not in name:
        raise InputError(f"{encoder}: the weights are in two files; name the encoder's, as in taef2_encoder.pth")
    found: dict[str, Tensor] = {}
    for part in ("encoder", "decoder"):
        tensors = hub.read_tensors(folder + slash + name.replace("encoder", part))
        found |= {f"{part}.{key}": tensor for key, tensor in tensors.items()}
    return found


def load_published(tokenizer: Tokenizer, weights: Mapping[str, Tensor] | str | Path) -> Tokenizer:
    """Fill a tokenizer of one of these families (told apart by its kind) with published weights: a state dict, a local
    file, or ``FoundationVision/LlamaGen/vq_ds16_c2i.pt`` on the hub.

    Raises WeightsError naming the tensors that don't fit, InputError for another kind.
    """
    where = "state dict" if isinstance(weights, Mapping) else str(weights)
    kind = tokenizer.config.kind
    if tokenizer.config.autoencoder.network == "taesd":
        tensors = weights if isinstance(weights, Mapping) else read_pair(weights)
        hub.load_published(tokenizer, tensors, TAESD_NAMES, where)
        return tokenizer.eval()
    if kind not in ("l2-vq", "bsq", "kl"):
        raise InputError(f"there are no published weights of kind {kind!r} here; VAR's go through its system")
    tensors = weights if isinstance(weights, Mapping) else hub.read_tensors(weights)
    records = (r"quantiser\.(usage_KV|ones_KC|seen_K)",)
    if kind == "l2-vq":
        levels = len(tokenizer.config.autoencoder.multipliers)
        hub.load_published(tokenizer, join_attention(tensors), llamagen_names(levels), where, records)
    elif kind == "kl":
        hub.load_published(tokenizer, join_attention(tensors), KL_NAMES, where)
    else:
        hub.load_published(tokenizer, tensors, INFINITY_NAMES, where, records)
    return tokenizer.eval()


def published_tokenizer(name: str, weights: Mapping[str, Tensor] | str | Path) -> Tokenizer:
    """A published tokenizer by its name in ``PUBLISHED``, filled from its file. Raises InputError for other names."""
    if name not in PUBLISHED:
        raise InputError(f"unknown tokenizer {name!r}{did_you_mean(name, PUBLISHED)}")
    return load_published(Tokenizer(PUBLISHED[name]), weights)
