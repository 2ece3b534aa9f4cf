"""Names to code: the table of systems and the names of models, each a "module:name" string imported on use.

Nothing here imports a system. Other packages add their own through the entry point groups `nextscale.systems`
(slug = "module:name"), `nextscale.models` (model name = "module:function") and `nextscale.hooks`
(hook name = "module:class").
"""

from __future__ import annotations

import importlib
import importlib.resources
import sys
import warnings
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from nextscale.errors import DataError, InputError, did_you_mean, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "COLUMNS",
    "FAMILIES",
    "STATUSES",
    "SystemEntry",
    "hooks",
    "import_target",
    "models",
    "resolve",
    "system_entry",
    "systems",
    "systems_path",
    "weights_of",
]

STATUSES = ("planned", "built", "shown")

FAMILIES = (
    "Scale-wise core",
    "Scale-wise, conditioned on text, pictures and more",
    "Control",
    "Speed and memory",
    "Guidance, diversity, search, post-training",
    "Token order",
    "Masked and continuous",
    "Unified multimodal and personalization",
    "Video and world models",
    "3D and view synthesis",
    "Backbones and representation",
    "Tokenizers and analysis",
    "Surveys (taxonomies and lists to draw on)",
    "Added by other packages",
)

# Model name -> "module:function". The function takes the name and returns the configuration, or the system where the
# model ships or comes from another package.
_PUBLISHED = dict.fromkeys(("var-d16", "var-d20", "var-d24", "var-d30", "var-d36-s"),
                           "nextscale.systems.var:preset_config")
_PUBLISHED |= dict.fromkeys(("flexvar-d16", "flexvar-d20", "flexvar-d24"), "nextscale.systems.flexvar:preset_config")
_PUBLISHED |= dict.fromkeys(("hmar-d16", "hmar-d20", "hmar-d24", "hmar-d30"), "nextscale.systems.hmar:preset_config")
_PUBLISHED |= dict.fromkeys(("m-var-d12", "m-var-d16", "m-var-d20", "m-var-d24", "m-var-d30", "m-var-d32"),
                            "nextscale.systems.m_var:preset_config")
_PUBLISHED |= dict.fromkeys(("flowar-small", "flowar-large", "flowar-huge"), "nextscale.systems.flowar:preset_config")
_PUBLISHED |= dict.fromkeys(("xar-base", "xar-large", "xar-huge"), "nextscale.systems.xar:preset_config")
_PUBLISHED |= dict.fromkeys(("mar-base", "mar-large", "mar-huge"), "nextscale.systems.mar:preset_config")
_PUBLISHED |= dict.fromkeys(("himar-base", "himar-large", "himar-huge"), "nextscale.systems.himar:preset_config")
_PUBLISHED["car-d16"] = "nextscale.systems.car:preset_config"
_PUBLISHED |= dict.fromkeys(("code-n6", "code-n7", "code-n8", "code-n9"),
                            "nextscale.systems.code_decoding:preset_config")
_PUBLISHED |= dict.fromkeys([f"infinity-{size}{budget}" for size in ("2b", "8b")
                             for budget in ("", "-0.06M", "-0.25M", "-0.60M")],
                            "nextscale.systems.infinity:preset_config")
_PUBLISHED |= dict.fromkeys(("star-256-d16", "star-256-d30", "star-512-d30", "star-1024-d30", "star-1024-d30-base"),
                            "nextscale.systems.star:preset_config")
# Controls that came without weights, or only for another size, on a base that has published ones.
_ON_PUBLISHED = dict.fromkeys(("car-d20", "car-d24", "car-d30"), "nextscale.systems.car:preset_config")
_ON_PUBLISHED |= dict.fromkeys(("scalar-d16", "scalar-d20", "scalar-d24"), "nextscale.systems.scalar:preset_config")
# Sizes of papers that came without weights.
_UNRELEASED = dict.fromkeys(("nfig-310m", "nfig-600m"), "nextscale.systems.nfig:preset_config")
_UNRELEASED |= dict.fromkeys(("infinity-125m", "infinity-361m", "infinity-940m", "infinity-2.2b", "infinity-4.7b",
                              "infinity-8.7b", "infinity-20b"), "nextscale.systems.infinity:preset_config")
_UNRELEASED |= {f"{slug}-d12": f"nextscale.systems.{slug}:preset_config" for slug in ("car", "scalar")}
_SMALL = dict.fromkeys(("var-d6-64px", "var-d2-16px"), "nextscale.systems.var:preset_config")
_SMALL |= {f"{slug}-64px": f"nextscale.systems.{slug}:preset_config" for slug in ("flowar", "xar", "mar", "himar")}
DEFAULT_MODEL = "emoji-text-64"
"""What is loaded where no model is named: it comes with the package."""
_SHIPPED = {DEFAULT_MODEL: "nextscale.systems.folders:shipped"}


# Hook name -> "module:class": what `nextscale.hook` and `--hook` take.
_HOOKS: dict[str, str] = {
    "diversevar": "nextscale.sampling.diversevar:DiverseVAR",
    "fastvar": "nextscale.acceleration.fastvar:FastVAR",
    "hack": "nextscale.acceleration.hack:HACK",
    "litevar": "nextscale.acceleration.litevar:LiteVAR",
    "pyramidkv": "nextscale.acceleration.cache_baselines:PyramidKV",
    "scalekv": "nextscale.acceleration.scalekv:ScaleKV",
    "sliding-window": "nextscale.acceleration.cache_baselines:SlidingWindow",
    "snapkv": "nextscale.acceleration.cache_baselines:SnapKV",
    "softcfg": "nextscale.sampling.softcfg:SoftCFG",
    "var_limits": "nextscale.acceleration.var_limits:LowRankAttention",
}

# Method -> "module:class" of its calibration, a dataclass of settings with ``run(system, labels, count, **options)``
# that returns what the method's hook reads: what `nextscale calibrate` takes.
CALIBRATIONS: dict[str, str] = {
    "hack": "nextscale.acceleration.hack:Calibration",
    "litevar": "nextscale.acceleration.litevar:Calibration",
    "scalekv": "nextscale.acceleration.scalekv:Calibration",
}


@dataclass(frozen=True)
class SystemEntry:
    """One row of `systems.toml`.

    Args:
        slug: the name here, unique.
        name: the published name; title: the paper's title; paper: its arXiv number ("" where there is none).
        family: one of `FAMILIES`.
        status: one of `STATUSES`: planned (not here yet), built (runs and is tested), shown (its published
            result was reproduced with a trained model).
        where: "module:name" of the code; command: what runs it; check: what proves it; "" while planned.
        authors: of the paper, as BibTeX takes them; licence: of the published code, not of ours; "" while planned.
    """

    slug: str
    name: str
    title: str
    paper: str
    family: str
    status: str
    where: str
    command: str
    check: str
    authors: str = ""
    licence: str = ""

    def citation(self) -> str:
        """A BibTeX entry of the paper, its year that of the arXiv number; "" where there is no number."""
        if not self.paper:
            return ""
        values = {
            "title": "{" + self.title.replace("^", r"\^{}") + "}",
            "author": self.authors,
            "year": f"20{self.paper[:2]}",
            "eprint": self.paper,
            "archivePrefix": "arXiv",
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in values.items() if value)
        return f"@misc{{{self.slug},\n{lines}}}"


COLUMNS = tuple(field.name for field in fields(SystemEntry) if field.name != "slug")
_OPTIONAL = {field.name for field in fields(SystemEntry) if field.default is not MISSING}


def systems_path() -> Path:
    """Where `systems.toml` lies: inside an installed package, or at the root of a checkout.

    Raises:
        DataError: it is in neither place.
    """
    installed = Path(str(importlib.resources.files("nextscale").joinpath("systems.toml")))
    checkout = Path(__file__).resolve().parents[2] / "systems.toml"
    for path in (installed, checkout):
        if path.is_file():
            return path
    raise DataError(f"no systems.toml at {installed} or {checkout}: install nextscale again")


@cache
def _table() -> dict[str, SystemEntry]:
    path = systems_path()
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is not valid TOML ({error}): install nextscale again") from None
    return {slug: _entry(path, slug, row) for slug, row in rows.items()}


def _entry(path: Path, slug: str, row: object) -> SystemEntry:
    columns = set(COLUMNS)
    if not isinstance(row, dict):
        raise DataError(f"{path}: '{slug}' must be a table [{slug}]")
    missing, extra = sorted(columns - _OPTIONAL - set(row)), sorted(set(row) - columns)
    if missing or extra:
        problem = f"lacks {', '.join(missing)}" if missing else f"does not know {', '.join(extra)}"
        raise DataError(f"{path}: [{slug}] {problem}")
    if not all(isinstance(value, str) for value in row.values()):
        raise DataError(f"{path}: every value of [{slug}] must be a string")
    return SystemEntry(slug=slug, **row)


def systems() -> dict[str, SystemEntry]:
    """All systems by slug: the rows of `systems.toml` in their order, then those of other packages.

    Raises:
        DataError: `systems.toml` is missing or damaged.
    """
    table = dict(_table())
    for point in _added("nextscale.systems", table):
        table[point.name] = SystemEntry(
            slug=point.name,
            name=point.name,
            title=f"from the package {point.dist.name}" if point.dist else "",
            paper="",
            family=FAMILIES[-1],
            status="built",
            where=point.value,
            command="",
            check="",
        )
    return table


def models() -> dict[str, str]:
    """Names that `nextscale.load` takes, presets and models that ship, each with its "module:function"."""
    table = {**_PUBLISHED, **_ON_PUBLISHED, **_UNRELEASED, **_SMALL, **_SHIPPED}
    for point in _added("nextscale.models", table):
        table[point.name] = point.value
    return table


def hooks() -> dict[str, str]:
    """Names of the hooks that `nextscale.hook` makes, each with its "module:class"."""
    table = dict(_HOOKS)
    for point in _added("nextscale.hooks", table):
        table[point.name] = point.value
    return table


def weights_of(name: str) -> Literal["published", "base", "none", "shipped", "unknown"]:
    """Where a model's weights come from: published files that the user gives, files of its base alone (its control has
    to be trained), none (a size for training and tests: published without weights, or a small one of this project), the
    package itself, or whatever another package does."""
    return ("published" if name in _PUBLISHED else "base" if name in _ON_PUBLISHED else
            "none" if name in {**_SMALL, **_UNRELEASED} else "shipped" if name in _SHIPPED else "unknown")


@cache
def _installed(path: tuple[str, ...]) -> Any:
    """The entry points of all packages on a path, to select from (by types that hang on Python's version): reading
    them takes 20 ms, and a start asks a dozen times."""
    return entry_points()


def _added(group: str, ours: Iterable[str]) -> list[EntryPoint]:
    taken = set(ours)
    added: list[EntryPoint] = []
    for point in _installed(tuple(sys.path)).select(group=group):
        if point.name in taken:
            # An installed package must neither replace a name silently nor stop every command.
            owner = point.dist.name if point.dist else point.value
            warnings.warn(f"{owner} adds '{point.name}' to {group}, which is taken: ignored", stacklevel=3)
            continue
        taken.add(point.name)
        added.append(point)
    return added


def _called(name: str) -> list[SystemEntry]:
    table = systems()
    if name in table:
        return [table[name]]
    return [entry for entry in table.values() if entry.name.lower() == name.lower()]


def system_entry(name: str) -> SystemEntry:
    """The row of one system, by its slug or by its published name where only one system bears that.

    Raises:
        InputError: unknown (the nearest is suggested), or a published name that several systems share.
    """
    found = _called(name)
    if len(found) == 1:
        return found[0]
    if found:
        slugs = ", ".join(entry.slug for entry in found)
        raise InputError(f"several systems are called '{name}': use one of the slugs {slugs}")
    # The slug is what the user should type, also when the published name is the one that is near.
    table = systems()
    slugs_by_name = {entry.name: entry.slug for entry in table.values()} | {slug: slug for slug in table}
    near = nearest(name, slugs_by_name)
    hint = f"; did you mean '{slugs_by_name[near]}'?" if near else "; `nextscale systems` lists them"
    raise InputError(f"unknown system '{name}'{hint}")


def resolve(name: str) -> object:
    """The object a name stands for, imported now.

    Args:
        name: a model (`var-d16`: the function that builds it, to be called with the name), a system's slug or
            published name (its class), or "module:name".

    Raises:
        InputError: unknown (the nearest name is suggested), planned but not built, or not importable.
    """
    if ":" in name:
        return import_target(name)
    known = models()
    if name in known:
        return import_target(known[name])
    if not _called(name):
        lists = "; `nextscale models` and `nextscale systems` list them"
        hint = did_you_mean(name, [*known, *systems()], lists)
        raise InputError(f"unknown model or system '{name}'{hint}")
    entry = system_entry(name)
    if not entry.where:
        raise InputError(f"{entry.name} ({entry.slug}) is planned, not built yet")
    return import_target(entry.where)


def import_target(target: str) -> object:
    """Import "module:name" (the name may have dots) and return it.

    Raises:
        InputError: not of that form, no such module, or no such name in it.
    """
    module_name, separator, qualified = target.partition(":")
    if not (separator and module_name and qualified):
        raise InputError(f"'{target}' is not of the form module:name")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports is another problem and keeps its own message.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise InputError(f"no module '{module_name}' for '{target}'") from None
    for part in qualified.split("."):
        if not hasattr(found, part):
            raise InputError(f"module '{module_name}' has no '{qualified}'{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found
