"""Configurations: frozen dataclasses read from TOML, YAML or JSON mappings, with errors that name the key."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from nextscale.errors import InputError, nearest

T = TypeVar("T")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A TOML (``.toml``) or YAML (``.yaml``, ``.yml``) file as nested dictionaries.

    Raises:
        InputError: no such file, another suffix, not valid.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path of the configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})") from None
    if path.suffix == ".toml":
        return _read_toml(text, path)
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(text, path)
    raise InputError(f"{path}: a configuration ends in .toml, .yaml or .yml")


def _read_toml(text: str, path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def _read_yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, a configuration holds keys and values")
    return found


def build(config_type: type[T], mapping: Mapping[str, Any], where: str = "configuration") -> T:
    """A (nested) config dataclass from a mapping, every value checked against its field's type.

    Args:
        config_type: a dataclass whose fields are int, float, bool, str, Literal, Path, tuple, list, dict, dataclass
            or one of these ``| None``.
        mapping: keys and values; absent keys take the field's default.
        where: what errors call it, usually the file.

    Raises:
        InputError: unknown key (names the nearest), wrong type, missing key, or a value the class itself refuses.
    """
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            close = nearest(str(key), list(fields))
            hint = f"did you mean {close!r}?" if close else f"known keys: {', '.join(fields)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
        values[key] = _convert(value, hints[key], f"{where}: {key}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            raise InputError(f"{where}: key {name!r} is missing")
    try:
        return config_type(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert_to_one(value, [kind for kind in arguments if kind is not type(None)], where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}; use one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return _convert_sequence(value, origin, arguments, where)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, where)
    elif hint is float:
        return _to_float(value, where)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    wanted = "a table of keys" if dataclasses.is_dataclass(hint) else name
    raise InputError(f"{where} is {value!r}; it must be {wanted}")


def _convert_to_one(value: Any, kinds: list[Any], where: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return _convert(value, kind, where)
        except InputError:
            continue
    return _convert(value, kinds[-1], where)


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise InputError(f"{where} has {len(value)} entries; it must have {len(arguments)}")
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [_convert(item, kind, f"{where}[{i}]") for i, (item, kind) in enumerate(zip(value, kinds, strict=True))]
    return origin(items)


def _to_float(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    raise InputError(f"{where} is {value!r}; it must be a number")
