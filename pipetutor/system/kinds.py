"""What a value may be: the kinds of a run's options and of a config's keys, and one line for what is none of them.

A kind is a name of ``KINDS``; one with a ``?`` may be None, too, and a key with a ``!`` must be there. A list holds
the values that there are, and a dict the kinds of an object's keys. So a table of kinds is data, which JSON can hold.
Standard library only.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Kind", "check", "check_keys", "closest", "counted", "list_of", "named", "shown", "whole"]

LARGEST = 10**15  # numbers are below it: what is made of them stays a number in 32 bits
# A path or a name with one of these would break a line, a command or a file's name.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words, as a test, and by an example."""

    words: str
    fits: Callable[[Any], bool]
    example: str = ""

    def __str__(self) -> str:
        return f"{self.words}: {self.example}, say" if self.example else self.words


def _is_number(value: Any, least: float = 0) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value < LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not _CONTROL.search(value)


def whole(least: int, most: int = LARGEST - 1, example: int = 2) -> Kind:
    """Return the kind of whole numbers from ``least`` to ``most``."""
    return Kind(
        f"a whole number of at least {least}" + ("" if most == LARGEST - 1 else f" and at most {most}"),
        lambda value: not isinstance(value, bool) and isinstance(value, int) and least <= value <= most,
        str(example),
    )


def named(names: Iterable[str]) -> Kind:
    """Return the kind of these names."""
    known = list(names)
    return Kind(f"one of {', '.join(known)}", lambda value: isinstance(value, str) and value in known, repr(known[0]))


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists that hold values of a kind, and at least one."""
    return Kind(
        f"a list, each item {kind.words}",
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(kind.fits, value)),
        f"[{kind.example}]",
    )


def _two_shares(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(KINDS["share"].fits, value))


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) or KINDS["path"].fits(value)


KINDS = {
    "switch": Kind("True or False", lambda value: isinstance(value, bool)),
    "whole": whole(0),
    "count": whole(1),
    "counts": list_of(whole(1)),
    "seed": whole(0, 2**32 - 1, 1138),
    "number": Kind("a number of at least 0", _is_number, "0.001"),
    "above 0": Kind("a number above 0", lambda value: _is_number(value) and value > 0, "1"),
    "norm": Kind("a number of at least 0", _is_number, "1.0"),
    "signed": Kind("a number", lambda value: _is_number(value, -LARGEST), "0.1"),
    "share": Kind("a number from 0 and below 1", lambda value: _is_number(value) and value < 1, "0"),
    "shares": Kind("two numbers from 0 and below 1", _two_shares, "[0.9, 0.999]"),
    "text": Kind("a string in one line", _is_text),
    "texts": list_of(Kind("a string in one line", _is_text, "'torch.nn.Linear'")),
    "path": Kind("a path", lambda value: isinstance(value, str | Path) and _is_text(str(value)), "'some/where'"),
    "object": Kind("an object", lambda value: isinstance(value, dict)),
    "config": Kind("a dict or a path", _is_config, '{"train_batch_size": 64}'),
    "unused": Kind("left out: runs here do without it", lambda _: False),
    "an option": Kind("left out: stages and partition are options of a run (-p, --partition)", lambda _: False),
}


def shown(value: Any) -> str:
    """Return a value in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a number with more digits than Python writes, or of an object that cannot be shown
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "rank"), counted(2, "micro-batch")
    ('1 rank', '2 micro-batches')
    """
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def closest(value: Any, known: list[str], cutoff: float) -> str:
    """Return the known name that is most like a value; empty where none is."""
    return next(iter(difflib.get_close_matches(str(shown(value)).strip("'"), known, n=1, cutoff=cutoff)), "")


def _one_of(name: str, value: Any, known: list[Any], where: str = "") -> None:
    """Raise ValueError unless ``value`` is one of these values; the message has the one that is most like it."""
    if any(type(value) is type(one) and value == one for one in known):
        return
    names = [str(one) for one in known if one is not None]
    few = len(names) < 16
    listed = f"there is {', '.join(names)}" if few else f"{len(names)} are known, from {names[0]} to {names[-1]}"
    close = closest(value, names, 0.4) or names[0]
    close = repr(close) if isinstance(known[-1], str) else close
    raise ValueError(f"{where}unknown {name} {shown(value)}: try {close} ({listed})")


def check(name: str, value: Any, kind: Any, where: str = "", example: str = "") -> None:
    """Raise ValueError, in one line, unless a value is of a kind.

    Args:
        name: of the option or key.
        value: what was given for it.
        kind: see this module.
        where: what the message begins with, such as ``my.json: ``.
        example: of an object.

    >>> check("steps", 0, "count")
    Traceback (most recent call last):
    ValueError: steps is 0, but must be a whole number of at least 1: 2, say
    """
    if isinstance(kind, list | tuple):
        return _one_of(name, value, list(kind), where)
    keys = kind if isinstance(kind, Mapping) else None
    if isinstance(kind, str):
        kind = kind.removesuffix("!")
        if kind.endswith("?") and value is None:
            return None
        kind = KINDS[kind.removesuffix("?")]
    if keys is not None:
        kind = KINDS["object"]
    if not kind.fits(value):
        if isinstance(value, int | float) and value >= LARGEST:
            kind = Kind(f"{kind.words}, and below {LARGEST:.0e}", kind.fits, kind.example)
        hint = f", as in {example}" if example else ""
        raise ValueError(f"{where}{name} is {shown(value)}, but must be {kind}{hint}")
    return check_keys(name, value, keys, where) if keys is not None else None


def check_keys(name: str, found: dict[Any, Any], keys: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError, in one line, unless an object has keys and values of these kinds alone."""
    for key, value in found.items():
        if key not in keys:
            close = closest(key, list(keys), 0.5)
            hint = f"did you mean {close!r}?" if close else f"there is {', '.join(keys)}"
            raise ValueError(f"{where}{name} has no key {shown(key)}; {hint}")
        check(f"{name} {key}", value, keys[key], where)
    for key, kind in keys.items():
        if str(kind).endswith("!") and key not in found:
            raise ValueError(f"{where}{name} needs {key}: {KINDS[kind.removesuffix('!')]}")
