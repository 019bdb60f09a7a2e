"""A command line out of a function: its arguments are the flags, and its documentation is their help."""

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from pipetutor.system.kinds import closest

__all__ = ["Parser", "call"]

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Raises ValueError, in one line, where argparse would print its usage and exit; a flag has its whole name."""

    def __init__(self, **about: Any):
        super().__init__(allow_abbrev=False, **about)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read a command line; an unknown flag is refused with the one that is most like it."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            named = (word[2:].partition("=")[0] for word in unknown if word.startswith("--"))
            close = next((closest(name, known, 0.6) for name in named), "")
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean --{close}?" if close else "")
            )
        return found

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise ValueError(f"{' '.join(message.split())} (--help lists every flag)")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers and commas: 1,2, say") from None


# How a word of the command line becomes a value of a type.
_READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float | None: float,
    str: str,
    str | None: str,
    str | Path: str,
    Sequence[int]: _numbers,
    Sequence[str]: lambda text: re.split(r",(?!\w+=)", text),  # gpt:layers=2,width=64 is one
}


def call(function: Callable[..., T], program: str) -> T:
    """Call a function with what the command line says; an argument without a default is no flag, but a place.

    Args:
        function: its arguments have types, and lines below ``Args:`` in its documentation.
        program: what the command is called.

    Raises:
        ValueError: the command line does not fit, or what the function itself refuses.
    """
    about = (inspect.getdoc(function) or "").replace("``", "")
    parser = Parser(prog=program, description=about.partition("\n")[0])
    types = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        found = re.search(rf"^    {name}: (.+(?:\n {{5,}}.+)*)", about, re.MULTILINE)
        words = " ".join(found[1].split()).removesuffix(".").replace("%", "%%") if found else ""
        default, flag = parameter.default, f"--{name.replace('_', '-')}"
        if default is parameter.empty:
            parser.add_argument(name, help=words)
        elif types[name] is bool:
            parser.add_argument(flag, action="store_true", help=words)
        else:
            if default is not None:
                words += f" (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"
            parser.add_argument(flag, type=_READERS[types[name]], default=default, help=words)
    return function(**vars(parser.parse_args()))
