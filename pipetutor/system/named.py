"""What a model or a data set is called: a name of ours, or a function of one's own, with arguments behind it.

    alexnet    gpt    gpt:layers=8,width=256    mymodels:mlp    mymodels:mlp:hidden=64

A function is imported from the working directory first, as from a file beside a notebook. No torch of its own.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipetutor.system.kinds import closest, shown

__all__ = ["FORM", "Named"]

FORM = "module:function or module:function:key=value"


@dataclass(frozen=True)
class Named:
    """A name, taken apart.

    Attributes:
        text: as it was given.
        module: where the function is; empty for a name of ours.
        name: of the function, or the name of ours.
        arguments: by their names.
    """

    text: str
    module: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Named":
        """Take a name apart.

        Raises:
            ValueError: it is not of the form.

        >>> Named.parse("gpt:layers=8").arguments
        {'layers': 8}
        """
        *parts, last = text.split(":")
        arguments = {}
        if "=" in last:
            for pair in last.split(","):
                key, equals, value = (part.strip() for part in pair.partition("="))
                if not equals or not key.isidentifier() or not value:
                    raise ValueError(f"{shown(text)}: {shown(pair)} is no key=value, as in gpt:layers=8,width=256")
                if key in arguments:
                    raise ValueError(f"{shown(text)}: {key} is given twice")
                arguments[key] = _value(value)
        else:
            parts.append(last)
        if len(parts) not in (1, 2) or not all(re.fullmatch(r"[^\W\d][\w.-]*", part) for part in parts):
            raise ValueError(f"{shown(text)} is neither a name nor a function")
        return cls(text, parts[0] if len(parts) == 2 else "", parts[-1], arguments)

    @property
    def is_own(self) -> bool:
        """Whether it is a function of one's own."""
        return bool(self.module)

    def function(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ValueError: there is no such module or function in it, the module cannot be imported, or the function
                does not take the arguments; the message says which, and where it was looked for.
        """
        if self.module == "__main__":
            raise ValueError(
                f"{self.text}: other processes do not have the functions of a cell: write it into a file"
            )
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and (self.module == error.name or self.module.startswith(f"{error.name}.")):
                raise ValueError(self._missing()) from None
            raise ValueError(f"{self.text}: {_told(error)}") from None
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.text}: {_told(error)}") from None
        finally:
            sys.path.remove(here)
        beside, taken = self._file(), getattr(module, "__file__", None) or "a part of Python"
        if beside.exists() and Path(taken).resolve() != beside.resolve():
            raise ValueError(
                f"{self.text}: {self.module} is {taken}, which Python takes before {beside}: rename yours"
            )
        found = getattr(module, self.name, None)
        if not callable(found):
            there = [name for name, one in vars(module).items() if _is_of(one, module) and name[0] != "_"]
            close = closest(self.name, there, 0.5)
            hint = f"did you mean {close}?" if close else f"it has {', '.join(there[:8]) or 'none'}"
            what = (
                f"no function {self.name}" if found is None else f"{self.name}, but that is a {type(found).__name__}"
            )
            raise ValueError(f"{self.text}: {self.module} has {what}; {hint}")
        return found

    def call(self, *given: Any) -> Any:
        """Call the function with these values and its own arguments.

        Raises:
            ValueError: see ``function``; it does not take these; or it fails.
        """
        function = self.function()
        try:
            inspect.signature(function).bind(*given, **self.arguments)
        except TypeError as error:
            raise ValueError(f"{self.text}: {self.name}{inspect.signature(function)}: {error}") from None
        try:
            return function(*given, **self.arguments)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.text}: {_told(error)}") from None

    def source_digest(self) -> str:
        """Return a sum of the module's file, so that hosts and caches tell one version from another.

        Raises:
            ValueError: there is no such file.
        """
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            spec = importlib.util.find_spec(self.module)  # which runs nothing of it
        except ModuleNotFoundError:
            spec = None
        finally:
            sys.path.remove(here)
        if spec is None or not spec.origin:
            raise ValueError(self._missing())
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()

    def _file(self) -> Path:
        """Return where the module lies if it is one's own."""
        return Path(os.getcwd(), *self.module.split(".")).with_suffix(".py")

    def _missing(self) -> str:
        if self.module.endswith(".py"):
            return f"{self.text}: a module is named without .py: {self.module.removesuffix('.py')}:{self.name}"
        return (
            f"{self.text}: there is no module {self.module}: neither {self._file()} nor an installed one; give {FORM}"
        )


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_of(one: Any, module: Any) -> bool:
    return inspect.isfunction(one) and one.__module__ == module.__name__


def _told(error: BaseException) -> str:
    """Say in a line what went wrong, and where, in a file that is neither of this package nor an installed one."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    places = [place for place in traceback.extract_tb(error.__traceback__) if not place.filename.startswith("<")]
    others = (str(Path(__file__).parents[1]), *sysconfig.get_paths().values())
    theirs = [place for place in places if not place.filename.startswith(others)]
    place = (theirs or places)[-1]
    where = f"{place.filename}, line {place.lineno}"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"
