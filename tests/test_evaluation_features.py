"""Feature extractors: each takes pictures in [-1, 1] the way its weights expect, and says what it lacks."""
from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import emoji
from torch import Tensor, nn

from nextscale import hub
from nextscale.errors import InputError, MissingExtraError, WeightsError
from nextscale.evaluation.features import Extractor, Found, open_extractor
from nextscale.evaluation.resnet20 import CIFAR10_CLASSES, CifarResNet20


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_resnet20_has_the_published_size_and_loads_strictly(tmp_path: Path) -> None:
    network = CifarResNet20().eval()
    # He et al., table 6: 0.27 million parameters for 20 layers.
    assert sum(p.numel() for p in network.parameters()) == 269_722
    tensors = {name: t for name, t in network.state_dict().items() if "num_batches" not in name}
    path = hub.save_tensors(tensors, tmp_path / "resnet20.safetensors")
    extractor = open_extractor(f"resnet20:{path}")
    found = extractor(emoji(4, 64))
    assert extractor.name == "resnet20-cifar10" and extractor.class_names == (CIFAR10_CLASSES,)
    assert found.features_BD.shape == (4, 64) and found.logits[0].shape == (4, 10)
    assert torch.allclose(found.logits[0], network.linear(found.features_BD), atol=1e-5)
    hub.save_tensors({**tensors, "conv1.weight": torch.zeros(8, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match=r"wrong shape: conv1\.weight"):
        open_extractor(f"resnet20:{path}")
    with pytest.raises(InputError, match="need their weights"):
        open_extractor("resnet20")


def test_resnet20_shortcut_takes_every_other_pixel_and_adds_zero_channels() -> None:
    block = CifarResNet20().layer2[0].eval()
    for parameter in (block.bn2.weight, block.bn2.bias):
        nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[..., ::2, ::2]) and not out[:, :8].any()


def test_pictures_are_resized_and_normalised_as_asked() -> None:
    seen: list[Tensor] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3))

    extractor = Extractor("look", Look(), size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    found = extractor(torch.full((2, 3, 32, 32), 0.5))
    assert seen[0].shape == (2, 3, 8, 8) and torch.allclose(seen[0], torch.ones(2, 3, 8, 8))
    assert found.features_BD.shape == (2, 3) and found.logits == []
    with pytest.raises(InputError, match="gave features"):
        Extractor("flat", nn.Identity())(torch.zeros(2, 3, 4, 4))
    with pytest.raises(InputError, match="expected pictures"):
        extractor(torch.zeros(3, 8, 8))


def test_fingerprint_changes_with_weights_and_with_what_is_done_before() -> None:
    network = nn.Conv2d(3, 4, 3)
    before = Extractor("a", network).fingerprint
    assert Extractor("a", network).fingerprint == before != Extractor("a", network, size=8).fingerprint
    with torch.no_grad():
        network.weight.add_(1e-3)
    assert Extractor("a", network).fingerprint != before


def test_dinov2_and_clip_load_from_a_folder(tmp_path: Path) -> None:
    """Tiny random networks of the published kinds: the class token, and the projected embedding."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=28, patch_size=14)).eval()
    dino.save_pretrained(tmp_path / "dino")
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        **small, intermediate_size=32, projection_dim=10, image_size=32, patch_size=16)).eval()
    clip.save_pretrained(tmp_path / "clip")
    pictures = emoji(3, 64)
    seen = open_extractor(f"dinov2:{tmp_path / 'dino'}")(pictures)
    assert seen.features_BD.shape == (3, 24)
    extractor = open_extractor(f"clip:{tmp_path / 'clip'}")
    assert (extractor.name, extractor.size) == ("clip (clip)", 32)
    assert extractor(pictures).features_BD.shape == (3, 10)
    resized = nn.functional.interpolate(pictures, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = dino(((resized + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    assert torch.allclose(seen.features_BD, wanted, atol=1e-4)
    with pytest.raises(WeightsError, match="can't be loaded as Dinov2Model"):
        open_extractor(f"dinov2:{tmp_path / 'nothing'}")
    with pytest.raises(WeightsError, match=r"tensors are missing|can't be loaded"):
        open_extractor(f"dinov2:{tmp_path / 'clip'}")


def test_published_inception_is_fed_bytes_and_gives_2048_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone: its weights can't be had on every machine, so a network of the same interface stands in."""
    seen: list[Tensor] = []

    class Stand(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(x)
            return torch.zeros(len(x), 2048), torch.zeros(len(x), 1008)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extractor = open_extractor("inception")
    found = extractor(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8))
    assert extractor.published and found.features_BD.shape == (3, 2048) and found.logits[0].shape == (3, 1008)
    assert seen[0].dtype == torch.uint8 and seen[0][:, 0, 0, 0].tolist() == [0, 128, 255]


def test_missing_packages_and_unknown_names_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="eval-published"):
        open_extractor("inception")
    with pytest.raises(MissingExtraError, match=r"nextscale\[text\]"):
        open_extractor("dinov2")
    with pytest.raises(InputError, match="did you mean 'emoji-judge'"):
        open_extractor("emoji-jugde")
    with pytest.raises(InputError, match="not an Extractor"):
        open_extractor("json:loads.__name__")


def own_extractor() -> Extractor:
    return Extractor("own", nn.Flatten(), lambda out: Found(out, []))


def test_a_function_of_ones_own_gives_an_extractor() -> None:
    assert open_extractor(f"{__name__}:own_extractor")(torch.zeros(2, 3, 4, 4)).features_BD.shape == (2, 48)
