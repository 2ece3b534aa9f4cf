"""What the emoji set's columns say of a drawing, in a few plain sentences such as people type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nextscale.data.captions import texts_of

COLUMNS = ("name", "keywords", "subcategory", "style", "skin_tone")
"""The columns that captions are made of; a parquet file with all of them has such captions."""

#: style -> the word that canonical captions call it by, and another.
STYLE_WORDS: dict[str, tuple[str, str]] = {
    "noto": ("noto", "shaded"),
    "twemoji": ("twemoji", "cartoon"),
    "fluent-flat": ("flat", "fluent flat"),
    "fluent-color": ("gradient", "fluent color"),
    "fluent-3d": ("3d", "rendered 3d"),
}

#: Unicode's subcategories whose last word doesn't say in plain words what is drawn; the others are called by it.
_GROUPS: dict[str, str] = {
    **{name: "face" for name in (
        "face-affection", "face-concerned", "face-costume", "face-glasses", "face-hand", "face-hat", "face-negative",
        "face-neutral-skeptical", "face-sleepy", "face-smiling", "face-tongue", "face-unwell", "cat-face",
        "monkey-face")},
    **{name: "hand" for name in (
        "hand-fingers-closed", "hand-fingers-open", "hand-fingers-partial", "hand-prop", "hand-single-finger",
        "hands")},
    **{name: "person" for name in (
        "person-activity", "person-fantasy", "person-gesture", "person-resting", "person-role")},
    **{name: "flag" for name in ("country-flag", "subdivision-flag")},
    **{name: "symbol" for name in (
        "alphanum", "gender", "geometric", "math", "other-symbol", "person-symbol", "punctuation")},
    **{name: "place" for name in ("place-geographic", "place-map", "place-other", "place-religious")},
    "animal-amphibian": "animal", "animal-marine": "sea animal", "animal-mammal": "animal", "av-symbol": "button",
    "award-medal": "award", "body-parts": "body part", "book-paper": "paper", "food-asian": "Asian food",
    "food-prepared": "food", "food-sweet": "sweet food", "musical-instrument": "musical instrument",
    "other-object": "object", "person-sport": "sport", "plant-other": "plant", "religion": "religious symbol",
    "sky & weather": "sky and weather", "sound": "sound symbol", "transport-air": "aircraft",
    "transport-ground": "ground transport", "transport-sign": "sign", "transport-water": "boat",
    "warning": "warning sign", "zodiac": "zodiac sign",
}  # fmt: skip

#: Search words that are rude, that are not about the picture, or that say next to nothing about it.
_LEFT_OUT = frozenset((
    "butt", "cock", "crap", "creepy", "dito", "molester", "phallic", "sexual", "sexy", "shit", "shitface", "stalk",
    "terrorism", "twitter", "ugly",
    "activity", "and", "bad", "banner", "blue-square", "communication", "country", "early", "entertainment", "female",
    "for", "good", "human", "late", "like", "male", "men", "nation", "nature", "person", "photo", "schedule", "the",
    "women",
))  # fmt: skip
_PLURALS = re.compile(r"(?<![su])s$|people$|women$|men$|children$")
_STYLED = re.compile(f"(.+), ({'|'.join(word for word, _ in STYLE_WORDS.values())}) style")
_HEAD = re.compile(r" (?:with|of|in|on|and|behind|holding|getting|for|from|over|without) |,| \(")


def emoji_captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Ways to say what a row of the set shows, five to nine of them; the first is ``<name>, <style> style``.

    ``red apple, flat style``, ``red apple``, ``a flat drawing of a red apple``, ``fruit, red apple, flat style``, the
    style in other words, and the search words beside the name and in its place. A skin tone follows the name.
    """
    name, style = str(row["name"]), str(row["style"])
    word, other = STYLE_WORDS.get(style, (style, style))
    group = group_of(str(row["subcategory"]))
    spoken = re.sub("^(flag|family) ", r"\1 of ", name)
    tone = f", {row['skin_tone'].replace('+', ' and ')} skin tone" if row["skin_tone"] else ""
    keys = keywords_of(name, row["keywords"])
    found = [
        f"{name}{tone}, {word} style",
        f"{name}{tone}",
        f"a {word} drawing of {with_article(spoken)}{tone}",
        f"{spoken}{tone}, {other} style",
        f"{word} {spoken} emoji{tone}",
        *([] if group in name.split() else [f"{group}, {name}{tone}, {word} style"]),
        *([f"{name}, {keys[0]}{tone}, {word} style"] if keys else []),
        *([f"{keys[0]}, {keys[1]}{tone}, {word} style"] if len(keys) > 1 else []),
        *([f"{group}, {keys[2]}, {keys[3]}{tone}, {word} style"] if len(keys) > 3 else []),
    ]
    return texts_of(found)


def split_style(phrase: str) -> tuple[str, str]:
    """A phrase without the style that it ends with, and that style's word, "" where it names none: ``("red apple",
    "flat")`` of ``red apple, flat style``."""
    found = _STYLED.fullmatch(phrase)
    return (found[1], found[2]) if found else (phrase, "")


def with_style(phrase: str, word: str) -> str:
    """The other way round."""
    return f"{phrase}, {word} style" if word else phrase


def group_of(subcategory: str) -> str:
    """What a subcategory is called in plain words."""
    return _GROUPS.get(subcategory, subcategory.rpartition("-")[2])


def keywords_of(name: str, keywords: Any) -> list[str]:
    """Those of the search words that are words (no smileys, codes or halves of quotations) and say something, in a
    decent way, that the name doesn't."""
    words = dict.fromkeys(str(word) for word in keywords or ())
    fit = [word for word in words if len(word) > 2 and re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", word)]
    return [word for word in fit if word not in _LEFT_OUT and _bare(word) != _bare(name)]


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def with_article(name: str) -> str:
    """``a red apple``, ``an owl``, ``the flag of Norway``; plurals and proper names stay as they are."""
    head = _HEAD.split(name)[0]
    if name.startswith("flag of "):
        return f"the {name}"
    if _PLURALS.search(head) or head.istitle() or name[len(head) :].startswith(" and "):
        return name
    vowel = head[0].lower() in "aeiou" and not head.startswith(("uni", "eu", "one"))
    return f"{'an' if vowel else 'a'} {name}"
