"""Golden sets lie in the repository as archives, NAME.tar.xz, of a JSON and a safetensors file each; ``run.py`` and the
tests unpack them beside themselves, where git does not look.

    python tests/parity/archives.py tests/parity/flexvar_tiny.json

packs a set anew, after its files were changed.
"""
from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent


def unpack(folder: Path = FOLDER) -> None:
    """Files of all archives of a folder and those below it that aren't there yet, or are older."""
    for archive in sorted(folder.rglob("*.tar.xz")):
        name = archive.name.removesuffix(".tar.xz")
        files = [archive.with_name(f"{name}{suffix}") for suffix in (".json", ".safetensors")]
        if all(file.is_file() and file.stat().st_mtime >= archive.stat().st_mtime for file in files):
            continue
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary, tarfile.open(archive) as packed:
            for file in files:  # these alone, whatever else the archive may hold
                found = packed.extractfile(file.name)
                assert found is not None, f"{archive} lacks {file.name}"
                written = Path(temporary) / file.name
                written.write_bytes(found.read())
                os.replace(written, file)  # several test processes may do this at once


def pack(json_file: Path) -> Path:
    """Write the archive of a set; the same files give the same bytes."""
    archive = json_file.with_suffix(".tar.xz")
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for file in (json_file, json_file.with_suffix(".safetensors")):
            about = tarfile.TarInfo(file.name)
            about.size, about.mode = file.stat().st_size, 0o644
            packed.addfile(about, io.BytesIO(file.read_bytes()))
    for file in (json_file, json_file.with_suffix(".safetensors")):
        file.touch()  # what is there is what was packed
    return archive


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(pack(Path(argument)))
