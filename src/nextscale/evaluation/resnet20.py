"""ResNet-20 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): a judge of class-conditional samples.

Published weights with these tensor names load strictly; its 64 pooled features serve Fréchet distances, which are then
named after it and never called FID.
"""
from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale import hub
from nextscale.tokenizers.features import Judgement

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Of [0, 1] pictures, by channel.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))).

    The shortcut has no parameters (the paper's option A): every other pixel, and zero channels on both sides.
    """

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.stride, self.added = stride, width - width_in
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = F.pad(x[..., ::self.stride, ::self.stride], (0, 0, 0, 0, half, self.added - half))
        return F.relu(x + h)


class CifarResNet20(nn.Module):
    """Pictures (B, 3, 32, 32) in [-1, 1] to logits of ten classes and the pooled features (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stage(16, 16, 1), _stage(16, 32, 2), _stage(32, 64, 2)
        self.linear = nn.Linear(64, len(CIFAR10_CLASSES))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor) -> Judgement:
        x = ((picture + 1) / 2 - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        features_BD = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return Judgement([self.linear(features_BD)], features_BD)


def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(width_in, width, stride), BasicBlock(width, width, 1), BasicBlock(width, width, 1))


def load_resnet20(path: Path) -> CifarResNet20:
    """A ResNet-20 from its weights file. Raises WeightsError where the file is missing, damaged or of another one."""
    network = CifarResNet20()
    names = ((r"(?:module\.)?(.*)", r"\1"),)  # files saved from data-parallel training carry the prefix
    hub.load_published(network, hub.read_tensors(path), names, str(path), optional=(r".*num_batches_tracked",))
    return network.eval()
