"""A card, of a cluster or of a model, as a line of text: ``name``, ``name:key=value,...`` or ``key=value,...``.

hosts=2,devices=8,memory=80GB,flops=312T,inside=300GB/s,between=25GB/s+5us
dgx-a100:hosts=48
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pipetutor.system.kinds import check, closest, shown

__all__ = ["quantity", "read", "whole_number"]

PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
SECONDS = {"us": 1e6, "ms": 1e3, "s": 1.0}  # so many are one
NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"


def quantity(text: str, unit: str) -> float:
    """Read a number with its unit.

    Args:
        text: such as ``80GB``, ``16GiB``, ``312T``, ``25GB/s``, ``100mbit``, ``5us``, ``0.5``.
        unit: ``B``, ``FLOP/s``, ``B/s``, ``s``, or none.

    Returns:
        It in bytes, FLOP/s, bytes a second, or seconds.

    Raises:
        ValueError: it is no such quantity, without the name of what it is.

    >>> quantity("100mbit", "B/s"), quantity("16GiB", "B"), quantity("312T", "FLOP/s")
    (12500000.0, 17179869184.0, 312000000000000.0)
    """
    forms = {
        "": rf"{NUMBER}",
        "s": rf"{NUMBER} ?(us|ms|s)",
        "B": rf"{NUMBER} ?([kmgt]?)(i?)b",
        "FLOP/s": rf"{NUMBER} ?([kmgtp]?)(?:flops|flop/s)?",
        "B/s": rf"{NUMBER} ?([kmgt]?)(?:b/s|(bit)(?:/s)?)",
    }
    examples = {"": "0.5", "s": "5us", "B": "80GB", "FLOP/s": "312T", "B/s": "25GB/s or 100mbit"}
    found = re.fullmatch(forms[unit], text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{shown(text)} is no such quantity: {examples[unit]}, say")
    number, *rest = found.groups()
    value = float(number)
    if unit == "s":
        return value / SECONDS[rest[0].lower()]
    if unit == "":
        return value
    prefix = rest[0].lower()
    if unit == "B" and rest[1]:
        return value * 1024 ** list(PREFIXES).index(prefix)
    return value * PREFIXES[prefix] / (8 if unit == "B/s" and rest[1] else 1)


def whole_number(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        ValueError: it is none, without the name of what it is.
    """
    if not re.fullmatch(r"0*[1-9]\d{0,14}", text.strip()):
        raise ValueError(f"{shown(text)} must be a whole number of at least 1")
    return int(text)


def read(
    text: str,
    what: str,
    known: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, Callable[[str], Any]],
    example: str,
) -> tuple[str, dict[str, Any]]:
    """Read a card.

    Args:
        text: the line.
        what: it is a card of.
        known: values of cards that have a name.
        keys: what reads the value of each key.
        example: of a whole line.

    Returns:
        The card's name, empty where it has none, and its values; those given lie over those known.

    Raises:
        ValueError: no such name or key, or no such value of it.

    >>> read("small:width=6", "box", {"small": {"width": 2, "depth": 3}}, {"width": int, "depth": int}, "width=1")
    ('small', {'width': 6, 'depth': 3})
    """
    check(what, text, "text")
    head, colon, rest = text.partition(":")
    if not colon and "=" in head:
        head, rest = "", text
    if head or colon:
        check(what, head, list(known))
    values = dict(known[head]) if head else {}
    given = set()
    for pair in rest.split(",") if rest else []:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise ValueError(f"{what} {shown(text)}: {shown(pair)} is no key=value, as in {example}")
        if key not in keys:
            close = closest(key, list(keys), 0.5)
            hint = f"did you mean {close}?" if close else f"there is {', '.join(keys)}"
            raise ValueError(f"{what} {shown(text)} has no key {shown(key)}; {hint}")
        if key in given:
            raise ValueError(f"{what} {shown(text)}: {key} is given twice")
        given.add(key)
        try:
            values[key] = keys[key](value)
        except ValueError as error:
            raise ValueError(f"{what} {shown(text)}: {key}: {error}") from None
    return head, values
