"""Tensor lists of published autoencoders, written out from their descriptions."""
from __future__ import annotations

import re

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out: int, inner: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, inner, side, side), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def residual(name: str, inner: int, out: int) -> Shapes:
    shapes = {**norm(f"{name}.norm1", inner), **conv(f"{name}.conv1", out, inner),
              **norm(f"{name}.norm2", out), **conv(f"{name}.conv2", out, out)}
    return {**shapes, **(conv(f"{name}.nin_shortcut", out, inner, 1) if inner != out else {})}


def attention(name: str, width: int, joined: bool) -> Shapes:
    parts = conv(f"{name}.qkv", 3 * width, width, 1) if joined else {
        key: shape for part in "qkv" for key, shape in conv(f"{name}.{part}", width, width, 1).items()}
    return {**norm(f"{name}.norm", width), **parts, **conv(f"{name}.proj_out", width, width, 1)}


def vqgan(width: int, encoded: int, decoded: int, joined: bool = True, in_decoder: bool = True) -> Shapes:
    """Encoder and decoder of factor 16, as VQGAN and VAR name them. encoded, decoded: channels that the encoder gives
    and the decoder takes; joined: q, k and v in one; in_decoder: attention at the decoder's coarsest level, too."""
    widths = [width * by for by in (1, 1, 2, 2, 4)]
    shapes = {**conv("encoder.conv_in", width, 3), **conv("decoder.conv_in", widths[-1], decoded)}
    inner = width
    for level, out in enumerate(widths):
        for i in range(2):
            shapes |= residual(f"encoder.down.{level}.block.{i}", inner, out)
            inner = out
            if level == 4:
                shapes |= attention(f"encoder.down.4.attn.{i}", out, joined)
        if level < 4:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", out, out)
    for level in (4, 3, 2, 1, 0):
        for i in range(3):
            shapes |= residual(f"decoder.up.{level}.block.{i}", inner, widths[level])
            inner = widths[level]
            if level == 4 and in_decoder:
                shapes |= attention(f"decoder.up.4.attn.{i}", inner, joined)
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", inner, inner)
    for side in ("encoder", "decoder"):
        shapes |= {**residual(f"{side}.mid.block_1", widths[-1], widths[-1]),
                   **attention(f"{side}.mid.attn_1", widths[-1], joined),
                   **residual(f"{side}.mid.block_2", widths[-1], widths[-1])}
    return {**shapes, **norm("encoder.norm_out", widths[-1]), **conv("encoder.conv_out", encoded, widths[-1]),
            **norm("decoder.norm_out", width), **conv("decoder.conv_out", 3, width)}


def vq_16(latent: int, vocabulary: int) -> Shapes:
    """LlamaGen's VQ-16 and FlexVAE; their decoders count levels from the coarsest."""
    shapes: Shapes = {}
    for name, shape in vqgan(128, 256, 256, joined=False).items():
        name = re.sub(r"up\.(\d)", lambda match: f"conv_blocks.{4 - int(match[1])}", name)
        name = re.sub(r"(conv_blocks\.\d)\.block", r"\1.res", name.replace("down.", "conv_blocks."))
        for number, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f"mid.{part}", f"mid.{number}")
        shapes[name] = shape
    return {**shapes, **conv("quant_conv", latent, 256, 1), **conv("post_quant_conv", 256, latent, 1),
            "quantize.embedding.weight": (vocabulary, latent), "quantize.codebook_used": (65536,)}


def kl_16() -> Shapes:
    return {**vqgan(128, 32, 16, joined=False, in_decoder=False), **conv("quant_conv", 32, 32, 1),
            **conv("post_quant_conv", 16, 16, 1)}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
