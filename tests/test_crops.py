"""Crops keep what they say, and large JPEGs decoded at reduced size come out the same to the eye."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from nextscale.data import Loader, ShuffledOrder, open_dataset
from nextscale.data.crops import CROPS, DRAWS, RANDOM_CROPS, least_size, window
from nextscale.data.images import open_fitted, open_image, picture_size, resize_crop
from nextscale.errors import InputError


def drawing(width: int, height: int) -> Image.Image:
    """A smooth picture with edges, such as photographs are."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = np.stack([np.sin(x / (9 + 4 * c) + c) * np.cos(y / (7 + 5 * c)) for c in range(3)], -1)
    image = Image.fromarray(np.uint8(127 + 90 * waves))
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(200, 40, 30))
    return image


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(out, "JPEG", quality=92, exif=exif)
    return out.getvalue()


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.square(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def published_adm_crop(array: Image.Image, size: int) -> np.ndarray:
    """Centre crop as the guided-diffusion repository describes it, for square sizes."""
    while min(array.size) >= 2 * size:
        array = array.resize((array.size[0] // 2, array.size[1] // 2), resample=Image.Resampling.BOX)
    scale = size / min(array.size)
    array = array.resize(tuple(round(side * scale) for side in array.size), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(array)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (200, 150), (90, 333), (517, 261), (63, 80)])
@pytest.mark.parametrize("size", [16, 64])
def test_adm_crop_is_the_published_one_to_the_last_pixel(shape: tuple[int, int], size: int) -> None:
    image = drawing(*shape)
    assert np.array_equal(np.asarray(resize_crop(image, size, "adm")), published_adm_crop(image, size))
    data = jpeg(image)
    assert np.array_equal(np.asarray(open_fitted(data, size, "adm")), published_adm_crop(open_image(data), size))


def test_center_crop_is_pillows() -> None:
    for shape in ((40, 30), (17, 80), (64, 64)):
        expected = ImageOps.fit(drawing(*shape), (24, 20), method=Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(resize_crop(drawing(*shape), (20, 24))), np.asarray(expected))


@given(
    width=st.integers(1, 300), height=st.integers(1, 300), size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.sampled_from(CROPS), seed=st.integers(0, 2**32), area=st.floats(0.05, 1),
)  # fmt: skip
@settings(max_examples=120)
def test_every_crop_has_the_size_asked_for_and_windows_lie_inside(
    width: int, height: int, size: tuple[int, int], crop: str, seed: int, area: float
) -> None:
    draws = np.random.default_rng(seed).random(DRAWS).tolist()
    image = resize_crop(Image.new("RGB", (width, height), (9, 9, 9)), size, crop, draws, area)
    assert image.size == (size[1], size[0])
    if crop in ("center", *RANDOM_CROPS):
        left, top, right, bottom = window(width, height, size, crop, draws, area)
        assert -1e-6 <= left < right <= width + 1e-6 and -1e-6 <= top < bottom <= height + 1e-6
        ratio = (right - left) / (bottom - top) / (size[1] / size[0])
        assert 3 / 4 - 1e-6 <= ratio <= 4 / 3 + 1e-6
        if crop == "random":
            assert ratio == pytest.approx(1)


def test_random_crops_zoom_as_they_say() -> None:
    generator = np.random.default_rng(0)
    boxes = {crop: [window(300, 200, (64, 64), crop, generator.random(DRAWS).tolist(), 0.3) for _ in range(300)]
             for crop in RANDOM_CROPS}  # fmt: skip
    areas = {crop: np.array([(r - a) * (d - b) for a, b, r, d in found]) for crop, found in boxes.items()}
    assert np.allclose(areas["random"], (200 / 1.125) ** 2)
    lefts = np.array([box[0] for box in boxes["random"]])
    assert lefts.min() < 10 and lefts.max() > 300 - 200 / 1.125 - 10
    shares = areas["random-resized"] / 60_000
    assert shares.min() < 0.35 and shares.min() >= 0.3 - 1e-9 and shares.max() <= 1 and shares.std() > 0.1


@pytest.mark.parametrize("crop", ["center", "pad", "random", "random-resized"])
@pytest.mark.parametrize("orientation", [None, 6])
def test_reduced_decoding_is_used_and_hardly_seen(crop: str, orientation: int | None) -> None:
    data = jpeg(drawing(640, 480), orientation)
    draws = np.random.default_rng(3).random(DRAWS).tolist()
    size = (24, 60)
    whole = resize_crop(open_image(data), size, crop, draws)
    sizes: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        kept = JpegImageFile.draft
        patch.setattr(JpegImageFile, "draft", lambda self, *a: (kept(self, *a), sizes.append(self.size))[0])
        reduced = open_fitted(data, size, crop, draws)
    full = picture_size(data)
    assert full == open_image(data).size == ((480, 640) if orientation else (640, 480))
    decoded = sizes[0][::-1] if orientation else sizes[0]
    need = least_size(*full, size, crop, draws)
    assert decoded[0] >= need[0] and decoded[1] >= need[1] and decoded != full
    assert decoded[0] < 2 * need[0] or decoded[1] < 2 * need[1] or decoded[0] * 8 == full[0]
    assert 36 < psnr(whole, reduced) < 90


def test_what_is_decoded_has_twice_the_crops_resolution() -> None:
    assert least_size(640, 480, (48, 48)) == (128, 96)
    assert least_size(640, 480, (48, 48), "pad") == (96, 72)
    assert least_size(640, 480, (48, 48), "random") == (144, 108)
    assert least_size(640, 480, (48, 48), "adm") == (640, 480)
    assert least_size(60, 40, (48, 48)) == (60, 40)


def test_small_jpegs_are_decoded_whole() -> None:
    data = jpeg(drawing(100, 80))
    assert psnr(resize_crop(open_image(data), 48), open_fitted(data, 48)) > 100


def test_unknown_crops_and_shares_are_refused(tmp_path: Path) -> None:
    image = drawing(8, 8)
    with pytest.raises(InputError, match="unknown crop 'middle'; use 'center'"):
        resize_crop(image, 4, "middle")  # type: ignore[arg-type]
    for area in (0.0, 1.5):
        with pytest.raises(InputError, match="crop_area"):
            resize_crop(image, 4, "random-resized", crop_area=area)
    image.save(tmp_path / "a.png")
    with pytest.raises(InputError, match="crop_area"):
        open_dataset(tmp_path, 4, split="all", crop="random-resized", crop_area=0.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(6):
        drawing(60 + 3 * i, 50).save(tmp_path / f"{i}.jpg")
    return tmp_path


@pytest.mark.parametrize("crop", RANDOM_CROPS)
def test_random_crops_hang_on_seed_epoch_and_picture_only(crop: str, photos: Path) -> None:
    dataset = open_dataset(photos, 16, split="all", crop=crop)

    def seen(batch_size: int, seed: int, workers: int = 1) -> dict[tuple[int, int], bytes]:
        loader = Loader(dataset, ShuffledOrder(6, 1), batch_size, seed=seed, workers=workers)
        found = {}
        for _, batch in zip(range(18 // batch_size), loader.batches(0), strict=False):
            for picture, epoch, number in zip(batch["picture"], batch["epoch"], batch["id"], strict=True):
                found[int(epoch), int(number)] = picture.numpy().tobytes()
        return found

    first = seen(3, 0)
    assert first == seen(9, 0, workers=3) and len(first) == 18
    assert all(first[0, i] != first[1, i] for i in range(6))
    assert all(seen(3, 1)[key] != first[key] for key in first)
    assert dataset[2].picture.equal(dataset[2].picture)
