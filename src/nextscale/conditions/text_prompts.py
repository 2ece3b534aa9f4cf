"""What every text encoder does with prompts before it reads them."""
from __future__ import annotations

import logging
from collections.abc import Sequence

from nextscale.errors import InputError


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list; half a surrogate pair, which no encoding can write, becomes a question mark.

    Raises InputError for a bare string, no prompts at all, or something else among them.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts must be a list of texts, not one text; write [{prompts[:40]!r}]")
    if not len(prompts):
        raise InputError("text: no prompts; give at least one, the empty text where nothing is asked for")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {i} is {type(prompt).__name__}; a prompt is a text")
    return [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]


class CutNotice:
    """One line of the log at the first prompt that an encoder doesn't read to its end.

    unit: what the encoder counts, such as "tokens".
    """

    def __init__(self, encoder: str, limit: int, unit: str = "tokens"):
        self.encoder, self.limit, self.unit = encoder, limit, unit
        self.given = False

    def __call__(self, prompt: str) -> None:
        if not self.given:
            self.given = True
            start = " ".join(prompt[:80].split())[:40]
            logging.getLogger("nextscale").warning(
                f"text: the prompt '{start}...' has more than {self.limit} {self.unit}, which is all that "
                f"{self.encoder} reads; the rest is left out (said once, longer prompts after it are cut too)")
