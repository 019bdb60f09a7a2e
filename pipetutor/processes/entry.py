"""Where people come in: a function that a cell calls, or a command line. What goes wrong there is said in a line."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from pipetutor.processes.watch import RunFailed
from pipetutor.system.command import call
from pipetutor.system.kinds import closest

__all__ = ["briefly", "command"]

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


def briefly(function: Callable[P, T]) -> Callable[P, T]:
    """Have IPython show a learner's cell and the words alone, where a function refuses, fails or is interrupted."""

    @functools.wraps(function)
    def brief(*args: P.args, **kwargs: P.kwargs) -> T:
        if words := _misfit(function, args, kwargs):
            raise _in_short(TypeError(words))
        try:
            return function(*args, **kwargs)
        except (ValueError, RunFailed, KeyboardInterrupt) as error:
            raise _in_short(error) from None

    return brief


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Say why a function does not take these arguments, and what it takes; empty where it does."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        known = signature.parameters
        free = [name for name, one in known.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
        close = next((closest(name, list(known), 0.5) for name in kwargs if name not in known), "")
        hint = f"; did you mean {close!r}?" if close else ""
        problem = str(error)
        if len(args) > len(free):
            problem = (
                f"got {len(args)} values without a name; only the first {len(free)} need none: {', '.join(free)}"
            )
        return f"{function.__name__}() {problem}{hint}"
    return ""


def _in_short(error: E) -> E:
    """Return an error without the places where it came from; IPython shows none but those of the learner's cell."""

    def render() -> list[str]:
        from IPython import get_ipython

        place = error.__traceback__
        while place and place.tb_next:
            if place.tb_next.tb_frame.f_code.co_filename == __file__:
                place.tb_next = None  # IPython never hides the last place, so it must not be there
            place = place.tb_next
        return get_ipython().InteractiveTB.structured_traceback(type(error), error, error.__traceback__)

    error._render_traceback_ = render  # type: ignore[attr-defined]
    return error.with_traceback(None)


def command(function: Callable[..., T], program: str) -> T:
    """Call a function with what the command line says, and return what it does.

    The program ends with one line, and status 2 for bad input, 1 for a failed run, and 130 when interrupted.
    """
    try:
        return call(function, program)
    except (ValueError, RunFailed) as error:
        print(f"pipetutor: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt as error:
        print(f"pipetutor: {error or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
