"""Feature extractors: networks in whose features sets of pictures are compared. Every figure names its own.

An extractor takes pictures (B, 3, S, S') in [-1, 1]. ``open_extractor`` knows, by text:

    emoji-judge            the classifier that ships
    FOLDER                 a classifier that this library trained
    resnet20:FILE          CIFAR-10's ResNet-20 from a weights file
    dinov2, clip[:PLACE]   through transformers; PLACE is a folder or a hub name
    inception              the published Inception, through torch-fidelity
    package.module:name    a function of yours without arguments that gives an :class:`Extractor`
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.errors import InputError, MissingExtraError, WeightsError, did_you_mean
from nextscale.tokenizers.features import Judgement, load_classifier

DINOV2, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14"
_KNOWN = ("emoji-judge", "resnet20", "dinov2", "clip", "inception")


class Found(NamedTuple):
    """Of B pictures: features (B, D), and for a classifier the logits (B, classes) of every kind of label."""

    features_BD: Tensor
    logits: list[Tensor]


def fingerprint(module: nn.Module) -> str:
    """Of a module's weights: what results on disk are bound to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Extractor:
    """A named network and how it is asked.

    name: goes into every figure; network: the module; read: from the module's output to features and logits, by
    default a tensor or a classifier's judgement; size: side that pictures are resized to (bicubic, antialiased), None
    for their own; mean, std: per channel, of [0, 1] pictures, None for pictures in [-1, 1] as they are; class_names:
    one list a kind of label, for judging what samples were asked for; published: the Inception of published FIDs.
    """

    name: str
    network: nn.Module
    read: Callable[[Any], Found] = field(default=lambda out: _plain(out))
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    class_names: Sequence[Sequence[str]] = ()
    published: bool = False

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights, and of what is done to pictures before them."""
        how = repr((self.size, self.mean, self.std)).encode()
        return hashlib.sha256(fingerprint(self.network).encode() + how).hexdigest()[:16]

    def to(self, device: torch.device) -> Extractor:
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Found:
        """Features and logits, float32 on the CPU. Raises InputError for pictures that the network refuses."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise InputError(f"{self.name}: expected pictures (B, 3, S, S'), got {tuple(pictures.shape)}")
        self.network.eval()
        x = pictures.to(self.device).float()
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        if self.mean is not None and self.std is not None:
            shape = (1, 3, 1, 1)
            x = ((x + 1) / 2 - x.new_tensor(self.mean).view(shape)) / x.new_tensor(self.std).view(shape)
        found = self.read(self.network(x))
        if found.features_BD.ndim != 2 or len(found.features_BD) != len(pictures):
            raise InputError(f"{self.name} gave features {tuple(found.features_BD.shape)} for {len(pictures)} pictures;"
                             " an extractor gives (B, D)")
        return Found(found.features_BD.float().cpu(), [logits.float().cpu() for logits in found.logits])


def _plain(out: Any) -> Found:
    if isinstance(out, Judgement):
        return Found(out.features_BD, out.logits)
    if isinstance(out, Tensor):
        return Found(out, [])
    raise InputError(f"a feature network gave {type(out).__name__}; give a `read` that turns it into features")


def open_extractor(spec: str) -> Extractor:
    """An extractor by text, see this file's head.

    Raises:
        InputError: unknown name.
        WeightsError: weights missing, damaged or of another network.
        MissingExtraError: its package is not installed.
    """
    name, _, place = spec.partition(":")
    if name == "resnet20":
        return _resnet20(place)
    if name in ("dinov2", "clip"):
        return _dinov2(place or DINOV2) if name == "dinov2" else _clip(place or CLIP)
    if spec == "inception":
        return published_inception()
    if Path(spec).is_dir() or spec == "emoji-judge":
        classifier = load_classifier(spec)
        return Extractor(Path(spec).name, classifier, class_names=classifier.config.class_names)
    if place:
        return _of_user(spec)
    hint = did_you_mean(spec, _KNOWN, f"; use {', '.join(_KNOWN)}, a classifier's folder, or package.module:name")
    raise InputError(f"unknown features {spec!r}{hint}")


def _resnet20(place: str) -> Extractor:
    from nextscale.evaluation.resnet20 import CIFAR10_CLASSES, load_resnet20

    if not place:
        raise InputError("features resnet20 need their weights; write resnet20:path/to/resnet20.safetensors")
    return Extractor("resnet20-cifar10", load_resnet20(Path(place)), size=32, class_names=(CIFAR10_CLASSES,))


def _of_user(spec: str) -> Extractor:
    from nextscale.registry import import_target

    make = import_target(spec)
    found = make() if callable(make) else make
    if not isinstance(found, Extractor):
        raise InputError(f"features {spec!r} gave {type(found).__name__}, not an Extractor of "
                         "nextscale.evaluation.features")
    return found


def _dinov2(place: str) -> Extractor:
    """The class token after the last norm (FD-DINOv2, Stein et al., arXiv 2306.04675), at 224 pixels."""
    network = pretrained("Dinov2Model", place)
    return Extractor(f"dinov2 ({short_name(place)})", network, lambda out: Found(out.last_hidden_state[:, 0], []), 224,
                     (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _clip(place: str) -> Extractor:
    """The projected image embedding, not normalised, at the size that the network was trained with."""
    network = pretrained("CLIPVisionModelWithProjection", place)
    return Extractor(f"clip ({short_name(place)})", network, lambda out: Found(out.image_embeds, []),
                     int(network.config.image_size),  # type: ignore[union-attr, arg-type]
                     (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def short_name(place: str) -> str:
    """Of a folder its name alone: where it lies is nobody's business."""
    return Path(place).name if Path(place).is_dir() else place


def pretrained(kind: str, place: str) -> nn.Module:
    """A network of transformers, by its class's name, from a folder or by its hub name.

    Raises MissingExtraError without transformers, WeightsError where it can't be loaded whole.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "text", f"take features of {place}") from None
    try:
        network, found = getattr(transformers, kind).from_pretrained(place, use_safetensors=True,
                                                                     output_loading_info=True)
    except Exception as error:  # the hub and the loader have dozens of error types
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{place} can't be loaded as {kind} ({reason}); give a folder or a hub name") from None
    if found["missing_keys"]:
        raise WeightsError(f"{place} doesn't hold a {kind}: {len(found['missing_keys'])} tensors are missing, such as "
                           f"{sorted(found['missing_keys'])[0]}")
    ready: nn.Module = network.eval()
    return ready


def published_inception() -> Extractor:
    """The Inception v3 of published FIDs (TensorFlow's weights of 2015, ported by torch-fidelity), features 2048.

    It takes 8-bit pictures and resizes them itself, as the original graph does. The package needs torchvision, and its
    weights are fetched on first use, so this is tested here for its shapes alone. Raises MissingExtraError.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise MissingExtraError("torch-fidelity", "eval-published", "measure the published FID") from None
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    return Extractor("inception", _EightBit(network), lambda out: Found(out[0], [out[1]]), published=True)


class _EightBit(nn.Module):
    """A network that wants uint8 pictures in [0, 255]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> Any:
        return self.network(((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def distance_name(extractor_name: str, published: bool, generated: int) -> str:
    """What a Fréchet distance may be called: FID for the published Inception and protocol (50,000 samples), else by its
    extractor and its number of samples."""
    if published and generated == 50_000:
        return "FID (50,000 samples)"
    return f"Fréchet distance ({extractor_name}, {generated:,} samples)"
