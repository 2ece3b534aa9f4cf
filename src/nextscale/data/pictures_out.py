"""Pictures out: sheets, single files, coarse-to-fine animations and ADM sample files, each with its settings inside.

Everything is written under a temporary name and renamed when it is whole, so a full disk or an interruption leaves
nothing half-written. Pictures come as uint8 (N, H, W, 3), settings as anything that JSON can say.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nextscale.data.sheets import board
from nextscale.errors import DataError, InputError, WeightsError

OutKind = Literal["sheet", "folder", "animation", "npz"]

#: Under this name settings lie in PNG text, and in the .npz beside ``arr_0``.
SETTINGS_KEY = "nextscale"
STEP_MILLISECONDS, LAST_MILLISECONDS = 350, 2000
_EXIF_DESCRIPTION = 0x010E
_KINDS: dict[str, OutKind] = {".png": "sheet", ".gif": "animation", ".webp": "animation", ".npz": "npz"}


def out_kind(path: Path) -> OutKind:
    """What a path asks for: ``.png`` a sheet, ``.gif`` or ``.webp`` an animation, ``.npz`` an ADM sample file, a
    folder (or a name without suffix) single pictures.

    Raises:
        InputError: another suffix.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or not suffix:
        return "folder"
    if suffix not in _KINDS:
        raise InputError(f"{path}: cannot write {suffix}; end in .png, .gif, .webp or .npz, or name a folder")
    return _KINDS[suffix]


def check_writable(path: Path, folder: bool = False) -> None:
    """Try, before any long work, whether a file (or a folder) can be made at ``path``.

    Raises:
        DataError: a file stands where a folder must be, or the reverse, or the place cannot be written to.
    """
    place = path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise DataError(f"{path} cannot be written: {place} is a file, not a folder; choose another place")
    if path.exists() and path.is_dir() != folder:
        kinds = "a file, not a folder" if folder else "a folder, not a file"
        raise DataError(f"{path} is {kinds}; choose another place")
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else place) as probe:
            probe.write(b"nextscale")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another place") from None


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that gets its name at the end, or goes away when anything fails.

    Raises:
        DataError: it cannot be written, with the space that is left.
    """
    # A process number alone isn't enough: threads share it, and so may two machines of a shared disk.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        _forget(temporary)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a rename after it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` whose files go into ``path`` together at the end, or not at all.

    Files of other names that are in ``path`` already stay.

    Raises:
        DataError: it cannot be written, with the space that is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            for file in sorted(temporary.iterdir()):
                os.replace(file, path / file.name)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    except (DataError, WeightsError) as error:
        # The user knows nothing of temporary names.
        raise type(error)(str(error).replace(str(temporary), str(path))) from None
    finally:
        _forget(temporary)


def _unwritable(path: Path, error: OSError) -> DataError:
    place = path.parent
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e6
    return DataError(f"{path} cannot be written ({error.strerror or error}); {free:,.0f} MB are free there")


def _forget(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):  # there may not even be a folder; what went wrong before this is what counts
            temporary.unlink(missing_ok=True)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as one line of ASCII JSON."""
    return json.dumps(settings, default=str)


def write_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> Path:
    """One PNG with its settings in the text chunk ``nextscale``. Raises DataError where it cannot be written."""
    text = PngInfo()
    text.add_text(SETTINGS_KEY, settings_text(settings))
    with writing(path) as temporary:
        image.save(temporary, pnginfo=text)
    return path


class Folder:
    """Single PNGs, numbered in the order in which they come and named by titles, and ``sheet.png``.

    A thread of its own encodes them, so that the next pictures can be drawn meanwhile.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        self._thread = ThreadPoolExecutor(1, "pictures")
        self._waiting: list[Future[Path]] = []

    def add(self, pixels_NHWC: np.ndarray, titles: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> None:
        """More pictures, uint8 (N, H, W, 3), with a title and settings each; what a file name had better not hold
        becomes a hyphen. Pictures must not be changed after."""
        for pixels, title, about in zip(pixels_NHWC, titles, settings, strict=True):
            number = len(self.names)
            name = f"{number:05d}-{_plain(title)}.png" if title else f"{number:05d}.png"
            self.names.append(name)
            self._waiting.append(self._thread.submit(self._write, pixels, name, about))

    def _write(self, pixels: np.ndarray, name: str, about: Mapping[str, Any]) -> Path:
        return write_png(Image.fromarray(pixels), self.path / name, about)

    def sheet(self, pixels_NHWC: np.ndarray, columns: int, settings: Mapping[str, Any]) -> None:
        """All pictures on one sheet."""
        write_png(board(pixels_NHWC, columns), self.path / "sheet.png", settings)

    def close(self, wait: bool = True) -> None:
        """Raises DataError where a picture could not be written; without ``wait`` those that haven't begun are left."""
        self._thread.shutdown(cancel_futures=not wait)
        if wait:
            for written in self._waiting:
                written.result()


@contextmanager
def folder_of(path: Path) -> Iterator[Folder]:
    """A ``Folder`` whose files go to ``path`` together at the end, or not at all.

    Raises:
        DataError: the folder cannot be written.
    """
    with writing_folder(path) as temporary:
        folder = Folder(temporary)
        try:
            yield folder
        except BaseException:
            folder.close(wait=False)
            raise
        folder.close()


def write_folder(
    pixels_NHWC: np.ndarray,
    path: Path,
    titles: Sequence[str],
    settings: Sequence[Mapping[str, Any]],
    sheet_settings: Mapping[str, Any],
    columns: int,
) -> list[Path]:
    """Single PNGs, numbered and named by ``titles``, and ``sheet.png`` with all of them.

    Args:
        pixels_NHWC: uint8 (N, H, W, 3).
        path: the folder.
        titles: one a picture; what a file name had better not hold becomes a hyphen.
        settings: one a picture.
        sheet_settings: of the sheet.
        columns: of the sheet.

    Raises:
        DataError: the folder cannot be written.
    """
    with folder_of(path) as folder:
        folder.add(pixels_NHWC, titles, settings)
        folder.sheet(pixels_NHWC, columns, sheet_settings)
    return [path / name for name in folder.names]


def _plain(title: str) -> str:
    """Class names come from a model's files: nothing of them may lead out of the folder."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", title).strip("-")[:80] or "picture"


def write_animation(
    frames: Sequence[np.ndarray],
    path: Path,
    columns: int,
    settings: Mapping[str, Any],
) -> Path:
    """An endless GIF or WebP of sheets, one a step, the last one held.

    Args:
        frames: uint8 (N, H, W, 3) each, coarse to fine.
        path: ends in ``.gif`` or ``.webp``.
        columns: of every sheet.
        settings: go into the GIF's comment or the WebP's Exif description.

    Raises:
        DataError: it cannot be written.
    """
    sheets = [board(frame, columns) for frame in frames]
    times = [STEP_MILLISECONDS] * (len(sheets) - 1) + [LAST_MILLISECONDS]
    options: dict[str, Any] = {"save_all": True, "append_images": sheets[1:], "duration": times, "loop": 0}
    if path.suffix.lower() == ".gif":
        options["comment"] = settings_text(settings)
    else:
        exif = Image.Exif()
        exif[_EXIF_DESCRIPTION] = settings_text(settings)
        options |= {"exif": exif, "quality": 90}
    with writing(path) as temporary:
        sheets[0].save(temporary, **options)
    return path


def write_npz(pixels_NHWC: np.ndarray, path: Path, settings: Mapping[str, Any]) -> Path:
    """The sample file that ADM's FID evaluator reads: ``arr_0``, uint8 (N, H, W, 3). Raises DataError."""
    # Through a handle: given a name, numpy would append a suffix of its own.
    with writing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=pixels_NHWC, nextscale=np.array(settings_text(settings)))
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a picture, animation or sample file that this library wrote.

    Raises:
        InputError: no such file, not readable, or none inside.
    """
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                text = str(arrays[SETTINGS_KEY]) if SETTINGS_KEY in arrays else None
        else:
            with Image.open(path, formats=("PNG", "GIF", "WEBP")) as image:
                text = image.info.get(SETTINGS_KEY) or image.info.get("comment")
                text = text or image.getexif().get(_EXIF_DESCRIPTION)
        found = json.loads(text) if text else None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except Exception as error:
        # Pillow, numpy and json have dozens of error types for damaged files, which all mean the same here.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}); give a file that nextscale wrote") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} has no settings inside; nextscale writes them into .png, .gif, .webp and .npz files")
    return found
