"""The number that a text gives as its answer, read exactly."""

from __future__ import annotations

import re
from fractions import Fraction


def final_number(text: str) -> Fraction | None:
    r"""The number that a text ends with, or ``None`` if it has none.

    The last of those marked by ``####`` or ``\boxed{}``; without either, the last number in the
    text. Where ``\boxed{}`` holds something else (``\boxed{\sqrt{2}}``, ``\boxed{3x}``) the answer
    is not a number; where something else follows ``####`` on its line, that is a heading.

    Read are signs, thousands separated by commas (``1,234``), decimals (``.5``), fractions
    (``1/2``, ``1 1/2``, ``\frac{1}{2}``). Currency, per cent signs and units are left out: ``$5``,
    ``5%`` and ``5 apples`` are 5.
    """
    text = _tidy(text)
    marked = _marked_numbers(text)
    if marked:
        return marked[-1]
    matches = list(_NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def stated_number(text: str) -> Fraction | None:
    r"""The number that a text marks by ``####`` or ``\boxed{}``, or that it is as a whole.

    As :func:`final_number`, but never a guess: for answers that come with the data.
    """
    text = _tidy(text)
    marked = _marked_numbers(text)
    return marked[-1] if marked else _whole_number(text)


_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])(?P<sign>[-+]))?"  # after a digit or a bracket it means subtraction
    r"(?:(?P<whole>[0-9]+)[ \t]+(?=[0-9]+/[0-9]))?"
    rf"(?P<top>{_DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    rf"(?:/(?P<bottom>{_DIGITS}))?"
)
_UNIT = re.compile(r"\s*%?(?:\s[^0-9\\^*+=]*)?")
_HEADED = re.compile(r"####[ \t]*(.*)")
_CURRENCY = "$€£¥₹"
_TIDIED = (
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!]"), ""),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=[0-9])(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{([-0-9.,]+)\}\s*\{([0-9,]+)\}"), r"\1/\2"),
    # Between two digits a currency sign keeps them apart.
    (re.compile(rf"(?<![0-9])[{_CURRENCY}]|[{_CURRENCY}](?![0-9])"), ""),
    (re.compile("−"), "-"),
)


def _tidy(text: str) -> str:
    """A text with what only decorates its numbers taken away."""
    for pattern, replacement in _TIDIED:
        text = pattern.sub(replacement, text)
    return text


def _marked_numbers(text: str) -> list[Fraction | None]:
    """Numbers after ``####``, and what the last ``\\boxed{}`` holds, as they come."""
    found = [(match.start(), _whole_number(match[1])) for match in _HEADED.finditer(text)]
    found = [(start, number) for start, number in found if number is not None]
    start = text.rfind("\\boxed{")
    if start >= 0:
        found.append((start, _whole_number(_braced(text, start + len("\\boxed")))))
    return [number for _, number in sorted(found, key=lambda entry: entry[0])]


def _braced(text: str, start: int) -> str:
    """What stands between the brace at ``start`` and the one that closes it; nothing if none."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start + 1 : index]
    return ""


def _whole_number(text: str) -> Fraction | None:
    """The number that a text is, perhaps with ``x =`` before it and a unit behind."""
    stated = text.rpartition("=")[2].lstrip(" \t\n*").rstrip(" \t\n*.")
    match = _NUMBER.match(stated)
    if match is None or _UNIT.fullmatch(stated, match.end()) is None:
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    whole, top, bottom = (
        (match[group] or default).replace(",", "")
        for group, default in (("whole", "0"), ("top", "0"), ("bottom", "1"))
    )
    try:
        value = Fraction(whole) + Fraction(top) / Fraction(bottom)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or x/0
        return None
    return -value if match["sign"] == "-" else value
