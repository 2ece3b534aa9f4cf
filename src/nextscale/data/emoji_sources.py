"""The packages the emoji set is made from: fetching them with npm and reading them, without unpacking to disk.

Archives are read in memory and only the members that are asked for by name are kept, so no path in an archive can
reach outside, and nothing half-extracted can be left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextscale.errors import DataError

STYLES: tuple[str, ...] = ("noto", "twemoji", "fluent-flat", "fluent-color", "fluent-3d")

#: Unicode's skin tone modifiers; a pair of them (two people) is written "light+dark".
SKIN_TONES: dict[str, str] = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}

#: A picture file of these sets is under 100 kB; anything far larger is not what we asked for.
_LARGEST_MEMBER = 16 * 2**20


@dataclass(frozen=True)
class Package:
    """One npm package.

    Args:
        name: its name in the registry.
        version: the exact version the set is made from.
        wanted: pattern of the members that are read, without the leading `package/`.
    """

    name: str
    version: str
    wanted: str

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES: dict[str, Package] = {
    "noto": Package("emoji-datasource-google", "16.0.0", r"(emoji\.json|img/google/64/.*\.png)"),
    "twemoji": Package("emoji-datasource-twitter", "16.0.0", r"img/twitter/64/.*\.png"),
    "fluent": Package("fluentui-emoji", "1.3.0", r"icons/(flat|modern)/.*\.svg"),
    "fluent-3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", r"assets/.*\.webp"),
    "names": Package("unicode-emoji-json", "0.9.0", r"data-by-emoji\.json"),
    "keywords": Package("emojilib", "4.0.3", r"dist/emoji-en-US\.json"),
}


#: The 3D package fills its gaps with Noto's flags of countries and regions: neither 3D nor under its licence.
_NOT_3D = {"country-flag", "subdivision-flag"}

#: Drawings that show something else than their name: Noto's picture for Sark is the flag of Saudi Arabia.
_WRONG_DRAWINGS = {("noto", "1F1E8-1F1F6")}


@dataclass(frozen=True)
class Drawing:
    """One picture file of one style: `data` is a PNG, WebP or SVG; `skin_tone` is "" for the plain drawing."""

    style: str
    skin_tone: str
    data: bytes


@dataclass
class Concept:
    """What a picture is of: a Unicode emoji sequence without skin tone, and all drawings of it.

    Args:
        codepoints: the sequence, upper-case hexadecimal joined by hyphens; the concept's id.
        name: Unicode CLDR short name ("woman firefighter").
        keywords: English search words.
        category, subcategory: Unicode's.
        drawings: of every style that has the concept.
    """

    codepoints: str
    name: str
    keywords: list[str]
    category: str
    subcategory: str
    drawings: list[Drawing] = field(default_factory=list)


def fetch_package(package: Package, folder: Path) -> Path:
    """Path of the package's archive in `folder`, fetched with `npm pack` when it is not there yet.

    Raises:
        DataError: npm is missing, or it could not fetch the package.
    """
    target = folder / package.archive
    if target.is_file():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"emoji set: npm is needed to fetch {package.name} and is not on the PATH; "
            f"install Node.js, or put {package.archive} into {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        specification = f"{package.name}@{package.version}"
        try:
            result = subprocess.run(
                [npm, "pack", "--loglevel=error", "--pack-destination", scratch, specification],
                capture_output=True,
                text=True,
                timeout=1800,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"emoji set: npm could not fetch {specification}: {error}") from error
        fetched = Path(scratch) / package.archive
        if result.returncode != 0 or not fetched.is_file():
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            reason = lines[0].strip() if lines else f"exit code {result.returncode}"
            raise DataError(f"emoji set: npm could not fetch {specification}: {reason}; check the network and rerun")
        os.replace(fetched, target)
    return target


def read_package(archive: Path, wanted: str) -> dict[str, bytes]:
    """The archive's files whose path inside the package matches `wanted`, as path -> bytes.

    Raises:
        DataError: the archive is damaged, or holds nothing that matches.
    """
    pattern = re.compile(r"package/" + wanted)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                if not member.isfile() or not pattern.fullmatch(member.name):
                    continue
                if member.size > _LARGEST_MEMBER:
                    raise DataError(f"{archive}: {member.name} is larger than any file of this set; not read")
                stream = opened.extractfile(member)
                if stream is not None:
                    files[member.name.removeprefix("package/")] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: not a readable package archive ({error}); delete it and rerun") from error
    if not files:
        raise DataError(f"{archive}: holds none of the expected files; delete it and rerun")
    return files


def text_of(codepoints: str) -> str:
    """The characters of a hexadecimal sequence, without variation selectors (packages disagree on those)."""
    return "".join(chr(int(part, 16)) for part in codepoints.split("-") if part.upper() != "FE0F")


#: Fluent's file names where they differ from the Unicode name of today.
_FLUENT_NAMES: dict[str, str] = {
    "black bird": "blackbird",
    "enraged face": "pouting-face",
    "face with crossed-out eyes": "knocked-out-face",
    "keycap #": "keycap-hashtag",
    "keycap *": "keycap-asterisk",
    "phoenix": "phoenix-bird",
    "red triangle pointed up": "red-triangle",
    "smiling face with open hands": "hugging-face",
    "stuffed flatbread": "stuffedbread",
    "deaf man": "man-deaf",
    "deaf woman": "woman-deaf",
    "deaf person": "person-deaf",
    "mermaid": "woman-merpeople",
    "merman": "man-merpeople",
    "merperson": "person-merpeople",
    "man blond hair": "man-blonde-hair",
    "woman blond hair": "woman-blonde-hair",
    "person blond hair": "person-blonde-hair",
    "men with bunny ears": "man-with-bunny-ears",
    "women with bunny ears": "woman-with-bunny-ears",
    "people with bunny ears": "person-with-bunny-ears",
    "men wrestling": "man-wrestling",
    "women wrestling": "woman-wrestling",
    "people wrestling": "person-wrestling",
} | {being: f"person-{being}" for being in "elf fairy genie mage superhero supervillain vampire zombie".split()}


def fluent_stem(name: str) -> str:
    """File name, without ending and skin tone, that Fluent gives a Unicode name: "man red hair" -> "man-red-hair"."""
    if name in _FLUENT_NAMES:
        return _FLUENT_NAMES[name]
    plain = "".join(c for c in unicodedata.normalize("NFKD", name.lower()) if not unicodedata.combining(c))
    plain = re.sub(r"[’'“”!.]", "", plain).replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _by_text(table: bytes) -> dict[str, Any]:
    return {emoji.replace("\ufe0f", ""): entry for emoji, entry in json.loads(table).items()}


def read_concepts(folder: Path, skin_tones: bool, step: Callable[[str], None] = lambda what: None) -> list[Concept]:
    """Every emoji concept with its drawings, in Unicode's order; packages are fetched into `folder` if need be.

    Args:
        folder: where the archives are kept.
        skin_tones: also the drawings with skin tones.
        step: called with a line of text before each package.

    Raises:
        DataError: a package cannot be fetched or read.
    """
    files: dict[str, dict[str, bytes]] = {}
    for role, package in PACKAGES.items():
        step(f"{package.name} {package.version}")
        files[role] = read_package(fetch_package(package, folder), package.wanted)
    table: list[dict[str, Any]] = json.loads(files["noto"]["emoji.json"])
    names = _by_text(files["names"]["data-by-emoji.json"])
    keywords = _by_text(files["keywords"]["dist/emoji-en-US.json"])
    # Names of regions' flags are no plain code points; they are left out below in any case.
    three_d = {text_of(Path(path).stem): data for path, data in files["fluent-3d"].items() if "_" not in path}

    def drawings_of(entry: dict[str, Any], name: str, subcategory: str, tone: str) -> list[Drawing]:
        found: dict[str, bytes | None] = {
            "noto": files["noto"].get(f"img/google/64/{entry['image']}") if entry["has_img_google"] else None,
            "twemoji": files["twemoji"].get(f"img/twitter/64/{entry['image']}") if entry["has_img_twitter"] else None,
            "fluent-3d": three_d.get(text_of(entry["unified"])) if subcategory not in _NOT_3D else None,
        }
        stem = fluent_stem(name)
        for style, directory in (("fluent-flat", "flat"), ("fluent-color", "modern")):
            endings = [f"-{tone}"] if tone else ["", "-default", f"-{directory}"]
            paths = [f"icons/{directory}/{stem}{ending}.svg" for ending in endings]
            found[style] = next((files["fluent"][path] for path in paths if path in files["fluent"]), None)
        return [
            Drawing(style, tone, data)
            for style in STYLES
            if (data := found[style]) is not None and (style, entry["unified"]) not in _WRONG_DRAWINGS
        ]

    concepts = []
    for entry in sorted(table, key=lambda entry: int(entry["sort_order"])):
        text = text_of(entry["unified"])
        if entry["category"] == "Component" or text not in names:
            continue
        name = names[text]["name"]
        words = [" ".join(word.replace("_", " ").split()) for word in keywords.get(text, [])]
        concept = Concept(entry["unified"], name, words, entry["category"], entry["subcategory"])
        concept.drawings += drawings_of(entry, name, entry["subcategory"], "")
        if skin_tones:
            for key, variant in entry.get("skin_variations", {}).items():
                tone = "+".join(SKIN_TONES[part] for part in key.split("-"))
                concept.drawings += drawings_of(variant, name, entry["subcategory"], tone)
        if concept.drawings:
            concepts.append(concept)
    return concepts
