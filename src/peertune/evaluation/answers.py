"""Whether a generated answer is the expected one: by its final number, or word by word."""

from __future__ import annotations

import re

# Not within a word such as "x2"; but in scripts without spaces a number stands right behind a letter.
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d.])[-+\N{MINUS SIGN}]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?![\d])"
)

_ENDINGS = ".!?,;: 。！？，；：、।؟"  # noqa: RUF001
"""Punctuation that ends a text."""


def exact_match(generated: str, expected: str) -> bool:
    """Whether an answer is right.

    Where the expected one ends in "#### N", as those of GSM8K do, or is one number and nothing else, numbers are
    compared: the generated one is what follows "####", else the last in the text. Else the texts are compared, or what
    stands on the line after "####", without case, punctuation at the end and differences of white space.
    """
    _, mark, tail = expected.rpartition("####")
    is_alone = not _NUMBER.sub("", tail).strip(" \n\t.。%$€£¥")
    is_line = bool(mark and tail.strip()) and "\n" not in tail.strip()
    if len(_NUMBER.findall(tail)) == 1 and (is_alone or is_line):
        return answered_number(generated) == last_number(tail)
    _, is_marked, after = generated.partition("####")
    said = after.strip().partition("\n")[0] if is_marked else generated
    return normalise(generated) == normalise(expected) or (is_line and normalise(said) == normalise(tail))


def answered_number(text: str) -> float | None:
    """The number after the first "####", else the last one; None where there is none."""
    # a model that does not stop goes on with a question of its own
    _, mark, after = text.partition("####")
    first = _NUMBER.search(after) if mark else None
    return _value(first[0]) if first else last_number(text)


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def normalise(text: str) -> str:
    """A text without case, punctuation at its end and differences of white space."""
    return " ".join(text.lower().split()).rstrip(_ENDINGS)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", "").replace("\N{MINUS SIGN}", "-"))
