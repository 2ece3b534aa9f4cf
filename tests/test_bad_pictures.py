"""Pictures from outside: every one opens as upright RGB on white, or is one clear error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nextscale.data.images import check_header, open_image, resize_crop, to_pil, to_tensor
from nextscale.errors import InputError, NextscaleError


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def speckles(size: int = 24) -> Image.Image:
    shades = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    shades[0, 0], shades[0, 1] = 0, 255
    return Image.fromarray(shades)


SEEDS = {kind: encode(speckles(), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}


@pytest.mark.parametrize("kind", list(SEEDS))
def test_every_format_opens(kind: str) -> None:
    image = open_image(SEEDS[kind])
    assert image.mode == "RGB" and image.size == (24, 24)
    if kind not in ("JPEG", "WEBP", "GIF"):
        assert np.array_equal(np.asarray(image), np.asarray(speckles()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_on_white(mode: str) -> None:
    if mode == "RGBA":
        source = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    elif mode == "LA":
        source = Image.new("LA", (4, 4), (0, 0))
    elif mode == "P":
        source = Image.new("P", (4, 4), 0)
        source.info["transparency"] = 0
    elif mode == "I;16":
        source = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    elif mode == "CMYK":
        source = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    else:
        source = Image.new(mode, (4, 4), 255 if mode == "L" else 1)
    opened = open_image(encode(source, "TIFF" if mode == "CMYK" else "PNG"))
    assert opened.mode == "RGB" and opened.getcolors() == [(16, (255, 255, 255))]


def test_half_transparent_black_is_grey() -> None:
    opened = open_image(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert opened.getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bit_greys_keep_their_shades() -> None:
    shades = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    opened = open_image(encode(Image.fromarray(shades)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_camera_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encode(image, "JPEG", exif=exif)).size == (4, 8)


def bomb(width: int, height: int) -> bytes:
    """A few hundred bytes that say they are an enormous PNG."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8000, 8000), (12000, 12000), (60000, 60000)])
def test_enormous_pictures_are_refused_before_decoding(size: tuple[int, int]) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InputError, match="pixels"):
        open_image(bomb(*size))
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_bound_can_be_set() -> None:
    assert open_image(SEEDS["PNG"], max_pixels=24 * 24).size == (24, 24)
    with pytest.raises(InputError, match="24x24 pixels, the bound is 575"):
        open_image(SEEDS["PNG"], max_pixels=24 * 24 - 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.png", None, "no such file"),
        ("empty.png", b"", "not a picture"),
        ("text.png", b"hello", "not a picture"),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        ("cut.png", SEEDS["PNG"][:300], "broken"),
        ("cut.jpg", SEEDS["JPEG"][:-200], "broken"),
    ],
    ids=["absent", "empty", "text", "postscript", "cut png", "cut jpeg"],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_image(tmp_path)


@given(
    kind=st.sampled_from(sorted(SEEDS)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=12),
    keep=st.floats(0, 1),
)
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_open_or_raise_our_error(kind: str, flips: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(SEEDS[kind])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    cut = bytes(data[: int(len(data) * keep)]) if keep < 0.5 else bytes(data)
    try:
        image = open_image(cut, max_pixels=1_000_000)
    except NextscaleError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB" and image.width * image.height <= 1_000_000
    try:
        check_header(cut, max_pixels=1_000_000)
    except NextscaleError:
        pass


@given(st.binary(max_size=200))
@settings(max_examples=100)
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        open_image(data)


@given(width=st.integers(1, 60), height=st.integers(1, 60), size=st.integers(1, 40))
@settings(max_examples=60)
def test_fitted_pictures_have_the_size_asked_for(width: int, height: int, size: int) -> None:
    image = Image.new("RGB", (width, height), (10, 20, 30))
    assert resize_crop(image, size).size == (size, size)
    assert resize_crop(image, size).getcolors() == [(size * size, (10, 20, 30))]
    assert resize_crop(image, (size, size + 3), "pad").size == (size + 3, size)


def test_padding_is_white_and_cuts_nothing_off() -> None:
    padded = resize_crop(Image.new("RGB", (8, 4)), 8, "pad")
    assert [padded.getpixel((4, y))[0] for y in range(8)] == [255, 255, 0, 0, 0, 0, 255, 255]


def test_pictures_survive_the_way_to_tensors_and_back() -> None:
    image = speckles()
    tensor = to_tensor(image)
    assert tensor.shape == (3, 24, 24) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))
    assert to_pil(torch.full((3, 2, 2), 7.0)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(InputError, match=r"\(1, 2, 2\)"):
        to_pil(torch.zeros(1, 2, 2))
