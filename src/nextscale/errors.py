"""The errors a user can meet: one clear line each, saying what, where and what to do.

The command line turns every `NextscaleError` into that line and exit code 2; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "DeviceError",
    "InputError",
    "MissingExtraError",
    "NextscaleError",
    "WeightsError",
    "did_you_mean",
    "nearest",
]


class NextscaleError(Exception):
    """Base of every error that the user can put right."""


class InputError(NextscaleError, ValueError):
    """An argument, picture, mask, configuration or name that cannot be used."""


class DataError(NextscaleError):
    """A data set, folder or file that cannot be read, or cannot be written."""


class WeightsError(NextscaleError):
    """A checkpoint that is damaged, unsafe to load, or does not fit the model."""


class DeviceError(NextscaleError):
    """A device or number format that was asked for and is not there."""


class MissingExtraError(NextscaleError, ImportError):
    """A package that belongs to an extra that is not installed.

    Args:
        package: the distribution or module that is missing, as the user would search for it.
        extra: the extra of nextscale that brings it.
        purpose: what it is needed for, as the end of "... is needed to ..." (optional).
    """

    def __init__(self, package: str, extra: str, purpose: str | None = None) -> None:
        self.package = package
        self.extra = extra
        self.purpose = purpose
        what = f"{package} is needed to {purpose}" if purpose else f"{package} is not installed"
        super().__init__(f"{what}: run `pip install 'nextscale[{extra}]'`", name=package)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str | None]]:
        # Errors travel between data-loading processes, and the default would call us with the message alone.
        return type(self), (self.package, self.extra, self.purpose)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None.

    Case, `-`, `_` and spaces do not count.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "").replace(" ", "")

    by_plain: dict[str, str] = {}
    for candidate in known:
        by_plain.setdefault(plain(candidate), candidate)
    matches = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=0.5)
    return by_plain[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error line about an unknown name: "; did you mean 'x'?", `otherwise` if nothing is near."""
    found = nearest(name, known)
    return otherwise if found is None else f"; did you mean '{found}'?"
