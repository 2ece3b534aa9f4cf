"""Which class an emoji belongs to, and which emoji are variants of one drawing.

The classes merge Unicode's 97 subcategories (nine hold fewer than four concepts, flags alone hold 270) into 51
of at least 20 concepts each, always inside one category and with the nearest neighbour in meaning. Variants of one
drawing (man, woman and person of one role; hair colours; facing right; families) form a *group*, which the splits
never cut: otherwise a "held-out" woman firefighter would be the trained man firefighter with other hair.
"""

from __future__ import annotations

#: class name -> (category, subcategories merged into it), in Unicode's order of categories.
CLASS_TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "face-smiling": (
        "Smileys & Emotion",
        ("face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses"),
    ),
    "face-neutral": ("Smileys & Emotion", ("face-neutral-skeptical", "face-hand", "face-sleepy")),
    "face-concerned": ("Smileys & Emotion", ("face-concerned",)),
    "face-unwell-angry": ("Smileys & Emotion", ("face-unwell", "face-negative")),
    "face-creature": ("Smileys & Emotion", ("face-costume", "cat-face", "monkey-face")),
    "heart-emotion": ("Smileys & Emotion", ("heart", "emotion")),
    "hand-open": ("People & Body", ("hand-fingers-open", "hand-fingers-partial")),
    "hand-closed-pointing": ("People & Body", ("hand-fingers-closed", "hand-single-finger", "hands")),
    "body-parts": ("People & Body", ("body-parts", "hand-prop")),
    "person": ("People & Body", ("person",)),
    "person-gesture": ("People & Body", ("person-gesture",)),
    "person-role": ("People & Body", ("person-role",)),
    "person-fantasy": ("People & Body", ("person-fantasy",)),
    "person-activity": ("People & Body", ("person-activity", "person-resting")),
    "person-sport": ("People & Body", ("person-sport",)),
    "person-family": ("People & Body", ("family", "person-symbol")),
    "animal-mammal": ("Animals & Nature", ("animal-mammal",)),
    "animal-bird": ("Animals & Nature", ("animal-bird",)),
    "animal-bug-reptile-marine": (
        "Animals & Nature",
        ("animal-bug", "animal-reptile", "animal-amphibian", "animal-marine"),
    ),
    "plant": ("Animals & Nature", ("plant-flower", "plant-other")),
    "food-fruit-vegetable": ("Food & Drink", ("food-fruit", "food-vegetable")),
    "food-prepared": ("Food & Drink", ("food-prepared",)),
    "food-asian-sweet": ("Food & Drink", ("food-asian", "food-sweet")),
    "drink-dishware": ("Food & Drink", ("drink", "dishware")),
    "place-building": ("Travel & Places", ("place-building", "place-religious", "hotel")),
    "place-scenery": ("Travel & Places", ("place-map", "place-geographic", "place-other")),
    "transport-ground": ("Travel & Places", ("transport-ground",)),
    "transport-water-air": ("Travel & Places", ("transport-water", "transport-air")),
    "time": ("Travel & Places", ("time",)),
    "sky-weather": ("Travel & Places", ("sky & weather",)),
    "event-award": ("Activities", ("event", "award-medal")),
    "sport": ("Activities", ("sport",)),
    "game-craft": ("Activities", ("game", "arts & crafts")),
    "clothing": ("Objects", ("clothing",)),
    "music-sound": ("Objects", ("sound", "music", "musical-instrument")),
    "device": ("Objects", ("phone", "computer", "light & video")),
    "book-writing": ("Objects", ("book-paper", "writing")),
    "mail-money": ("Objects", ("mail", "money")),
    "office": ("Objects", ("office",)),
    "tool-lock": ("Objects", ("tool", "lock")),
    "science-medical-other": ("Objects", ("science", "medical", "other-object")),
    "household": ("Objects", ("household",)),
    "sign-transport-warning": ("Symbols", ("transport-sign", "warning")),
    "arrow": ("Symbols", ("arrow",)),
    "religion-zodiac": ("Symbols", ("religion", "zodiac")),
    "media-button": ("Symbols", ("av-symbol",)),
    "keycap-math-punctuation": ("Symbols", ("keycap", "math", "punctuation", "currency")),
    "other-symbol": ("Symbols", ("other-symbol", "gender")),
    "alphanumeric": ("Symbols", ("alphanum",)),
    "geometric": ("Symbols", ("geometric",)),
    "flag": ("Flags", ("flag", "country-flag", "subdivision-flag")),
}

#: Classes of flags: scores are given with and without them (14% of the concepts, one drawing rule, no shading).
FLAG_CLASSES: tuple[str, ...] = ("flag",)

CLASS_OF_SUBCATEGORY: dict[tuple[str, str], str] = {
    (category, subcategory): name
    for name, (category, subcategories) in CLASS_TABLE.items()
    for subcategory in subcategories
}

_ADULTS = {"1F468", "1F469", "1F9D1"}
_CHILDREN = {"1F466", "1F467", "1F9D2"}
_OLDER = {"1F474", "1F475", "1F9D3"}
#: Variation selector, joiner, female and male signs, four kinds of hair.
_DROPPED = {"FE0F", "200D", "2640", "2642", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}

#: Single code points that Unicode encodes apart though they are one drawing in another gender or pose.
_TOLD_APART: dict[str, str] = {
    "1F471": "ADULT",  # person with blond hair: the hair colours of the plain adult
    "1F9D4": "ADULT",  # person with beard
    "1F478": "ROYAL",
    "1F934": "ROYAL",
    "1F385": "SANTA",
    "1F936": "SANTA",
    "ADULT-1F384": "SANTA",
    "1F483": "DANCER",
    "1F57A": "DANCER",
    "1F930": "PREGNANT",
    "1FAC3": "PREGNANT",
    "1FAC4": "PREGNANT",
    "1F931": "FEEDING",
    "ADULT-1F37C": "FEEDING",
    "1F46B": "HOLDING-HANDS",
    "1F46C": "HOLDING-HANDS",
    "1F46D": "HOLDING-HANDS",
    "ADULT-1F91D-ADULT": "HOLDING-HANDS",
    "1F48F": "KISS",
    "ADULT-2764-1F48B-ADULT": "KISS",
    "1F491": "COUPLE",
    "ADULT-2764-ADULT": "COUPLE",
    "1F46A": "FAMILY",
}


def drawing_key(codepoints: str) -> str:
    """Key shared by the variants of one drawing: gender, hair, age, direction and family make no difference.

    Args:
        codepoints: a Unicode emoji sequence, hexadecimal, joined by hyphens ("1F469-200D-1F692").

    Returns:
        A key; two concepts with equal keys belong to one group ("ADULT-1F692" for every firefighter).
    """
    parts = [part for part in codepoints.upper().split("-") if part not in _DROPPED]
    if len(parts) > 1 and parts[-1] == "27A1":  # "facing right" is the mirrored drawing
        parts = parts[:-1]
    roles: list[str] = []
    for part in parts:
        if part in _ADULTS:
            roles.append("ADULT")
        elif part in _CHILDREN:
            roles.append("CHILD")
        elif part in _OLDER:
            roles.append("OLDER")
        else:
            roles.append(part)
    if len(roles) > 1 and set(roles) <= {"ADULT", "CHILD"}:
        return "FAMILY"
    if not roles:
        return codepoints.upper()
    key = "-".join(roles)
    return _TOLD_APART.get(key, key)
