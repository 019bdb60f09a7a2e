"""A function of a learner's own, run by real processes that can send to each other: what a cell calls to try an idea.

    on_ranks(step, 2, model)    kernel --pipe--> supervisor --> job --fork--> rank 0: step(0, 2, model)
                                                                    --fork--> rank 1: step(1, 2, model)

The job loads torch once, so that a rank starts in milliseconds. The function reaches it by value, with what it uses
of the notebook; modules beside the notebook are imported there. What goes wrong is told in the learner's own lines:
an exception, and where each rank stands when nothing moves any more. The lines are looked up in the kernel, which
alone has the text of its cells.
"""

import functools
import inspect
import io
import linecache
import os
import pickle
import re
import sys
import sysconfig
import tempfile
import traceback
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, NamedTuple

import cloudpickle

from pipetutor.core import records
from pipetutor.processes import heartbeat
from pipetutor.processes.entry import briefly
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.forks import forked, meet
from pipetutor.processes.job import do_job, run_job
from pipetutor.processes.watch import RunFailed
from pipetutor.system.kinds import check, counted, shown, whole

__all__ = ["DEADLINE", "Call", "Outcome", "on_ranks", "outcomes"]

DEADLINE = 60.0  # seconds: for what hangs, not for what is slow
MOST_RANKS = 16
CALLS, ANSWERS, SAID, STORE = "calls.pickle", "answers.pickle", "said.txt", "store"
# Below these is no code of a learner's.
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_OTHERS = ("<frozen ", *(f"{path}{os.sep}" for path in (*_LIBRARIES, str(Path(__file__).parents[1]))))
_PLACE = re.compile(r'File "(.+?)", line (\d+),? in (\S+)')  # of a traceback, and of what faulthandler writes


class Call(NamedTuple):
    """A function, and the ranks that call it, each with its number, their count, and arguments."""

    function: Callable[..., Any]
    ranks: int
    arguments: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def check(self) -> None:
        """Raise ValueError unless it can be made."""
        if not callable(self.function):
            raise ValueError(
                f"function is {shown(self.function)}, but must be a function, such as def step(rank, ranks): ..."
            )
        check("ranks", self.ranks, whole(1, MOST_RANKS))
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # one that is written in C may not tell
            return
        try:
            signature.bind(0, self.ranks, *self.arguments)
        except TypeError as error:
            more = f" and {counted(len(self.arguments), 'more argument')}" if self.arguments else ""
            raise ValueError(
                f"every rank calls {self.name}(rank, ranks, ...) with its number, their count{more}, which does not "
                f"fit {self.name}{signature}: {error}"
            ) from None


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        returned: what the ranks returned; nothing where one of them has not.
        reason: why not, in words and in lines of the learner's; empty where all have.
    """

    returned: list[Any]
    reason: str = ""


@briefly
def on_ranks(function: Callable[..., Any], ranks: int, *args: Any, deadline: float = DEADLINE) -> list[Any]:
    """Call a function in as many processes, which are joined by ``torch.distributed`` (gloo, on the CPU).

    Each is one of the ranks, with one thread, and calls ``function(rank, ranks, *args)`` with copies of the
    arguments. What they print is shown when they have ended, each line with its rank. Nothing is left running,
    whatever happens.

    Args:
        function: of the notebook, or of a module.
        ranks: how many, 1 to 16.
        args: further arguments, the same for all.
        deadline: seconds within which one of them must have returned, and after it the next.

    Returns:
        What they return, in the order of ranks.

    Raises:
        ValueError: this cannot be called, or cannot be sent to another process; nothing was started.
        RunFailed: a rank raised or died, or none returned in time; the message has the lines where they were.

    >>> on_ranks(lambda rank, ranks: rank * 10, 2)  # doctest: +SKIP
    [0, 10]
    """
    call = Call(function, ranks, args)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, call.name)
        try:
            (outcome,) = outcomes([call], deadline, call.name, directory)
        finally:
            said = directory / "0" / SAID
            print(said.read_text() if said.exists() else "", end="")
    if outcome.reason:
        raise RunFailed(outcome.reason)
    return outcome.returned


def outcomes(calls: Sequence[Call], deadline: float, unit: str, directory: Path) -> list[Outcome]:
    """Make calls one after the other, in one start of a process, until one of them fails.

    Args:
        calls: what to call.
        deadline: as in ``on_ranks``.
        unit: what a call is, for the bar.
        directory: where all is kept; it is made.

    Returns:
        What came of those that were made, at most the last of which has failed.

    Raises:
        ValueError: one of them cannot be made; nothing was started.
        RunFailed: the job itself failed.
    """
    check("deadline", deadline, "above 0")
    for call in calls:
        call.check()
    try:
        packed = _packed(list(calls))
    except Exception as error:  # whatever an object's own way to be pickled raises
        raise ValueError(
            f"the function, its arguments or what it uses of the notebook cannot be sent to other processes: {error}."
            " Make it inside the function"
        ) from None
    directory.mkdir()
    (directory / CALLS).write_bytes(packed)
    # One thread: both sides of a comparison add up in the same order, and forks are safe.
    env = cpu_environment(1) | {"OMP_NUM_THREADS": "1"}
    asked = {"deadline": deadline, "path": [str(Path(path).resolve()) for path in sys.path]}
    rows = run_job("pipetutor.processes.ranks", directory, asked, env, len(calls), unit, lambda row: row["brief"])
    return [_outcome(directory / str(place), row, deadline) for place, row in enumerate(rows)]


def _code(code: CodeType) -> tuple[Callable[..., CodeType], tuple[Any, ...]]:
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return _code_of, (make, arguments, code.co_filename)


def _code_of(make: Callable[..., CodeType], arguments: tuple[Any, ...], file: str) -> CodeType:
    return make(*arguments).replace(co_filename=file)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's, which leaves out in which file or cell code is written, and a learner is told of lines there."""

    dispatch_table: ClassVar[Any] = ChainMap({CodeType: _code}, cloudpickle.Pickler.dispatch_table)


def _packed(content: Any) -> bytes:
    packed = io.BytesIO()
    _Pickler(packed).dump(content)
    return packed.getvalue()


def _outcome(folder: Path, row: dict[str, Any], deadline: float) -> Outcome:
    """Read what the ranks of a call have left behind."""
    if not row["failed"]:
        return Outcome([pickle.loads(answer) for answer in pickle.loads((folder / ANSWERS).read_bytes())])
    failures = records.read_failures(folder)
    if not row["silent"] and failures:
        places = _own_places(failures[0]["traceback"])
        way = [f"    at: {place}" for place in places[-1:]] + [f"    called at: {place}" for place in places[-2::-1]]
        error = " ".join(failures[0]["error"].split())
        return Outcome([], "\n".join([f"rank {failures[0]['rank']} raised {error}", *way]))
    if not row["silent"]:
        return Outcome([], f"{row['failed']}. Its process is gone: killed, or ended by the function itself")
    stands = []
    for rank in range(row["ranks"]):
        stack = folder / f"stack_rank{rank}.txt"
        places = _own_places(stack.read_text() if stack.exists() else "")
        if rank not in row["silent"]:
            stands.append(f"    rank {rank} has returned")
        else:
            stands.append(f"    rank {rank} stands at: {places[0] if places else 'no line of yours, or is stopped'}")
    who = "no rank has" if len(row["silent"]) == row["ranks"] else "not every rank has"
    head = f"{who} returned within {deadline:g} s, and all were ended. When that was over,"
    return Outcome([], "\n".join([head, *stands, "If they were only slow, give a longer deadline."]))


def _own_places(trace: str) -> list[str]:
    """Return the learner's own lines in a traceback or a stack, in its order, as they are written in the notebook."""
    places = []
    for file, line, function in _PLACE.findall(trace):
        if file.startswith(_OTHERS):
            continue
        text = linecache.getline(file, int(line)).strip()
        where = Path(file).name if Path(file).exists() else "the cell"
        places.append(f"{text or '?'}   (line {line} of {where}, in {function})")
    return places


# --- in the job, and in its forks ----------------------------------------------------------------------------------


class _Said(io.TextIOBase):
    """Writes each line that a rank prints to a file that all share, whole, with the rank ahead of it."""

    def __init__(self, rank: int, path: Path):
        self._rank, self._begun = rank, ""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, text: str) -> int:
        """Write the lines that are complete with this, and keep the rest."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            os.write(self._file, f"rank {self._rank}: {line}\n".encode())
        return len(text)

    def end(self) -> None:
        """Write what is left of a line."""
        if self._begun:
            self.write("\n")


def _rank(call: Call, rank: int, folder: Path) -> bytes:
    """Be one rank of a call, and return what it returns, for the kernel to unpack."""
    told = heartbeat.Heartbeat(folder, rank)  # so that its stack can be asked for, as long as this is kept
    meet(rank, call.ranks, folder / STORE)
    said = _Said(rank, folder / SAID)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            found = call.function(rank, call.ranks, *call.arguments)
        try:
            return cloudpickle.dumps(found)
        except Exception as error:
            raise TypeError(f"what {call.name} returned cannot be sent to the notebook: {error}") from None
    except BaseException as error:
        records.write_failure(folder, rank, error, traceback.format_exc())
        raise
    finally:
        said.end()
        del told


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function of ``torch.distributed`` refuse a rank that is not there: gloo crashes, or waits for ever."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        peer, last = given.get("dst", given.get("src")), int(os.environ["WORLD_SIZE"]) - 1
        if isinstance(peer, int) and not 0 <= peer <= last:
            raise ValueError(f"{function.__name__} names rank {peer}, and the ranks are 0 to {last}")
        return function(*args, **kwargs)

    return call


def _answer(directory: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make the calls, and leave for each what its ranks answer or what is known of why not."""
    import torch.distributed as dist  # once, here, and not once in every fork

    for name in ("send", "isend", "recv", "irecv"):
        setattr(dist, name, _checked(getattr(dist, name)))
    # Behind our own, which a file random.py of the learner's must not hide.
    sys.path += [path for path in asked["path"] if path not in sys.path]
    for place, call in enumerate(pickle.loads((directory / CALLS).read_bytes())):
        folder, silent, failed = directory / str(place), list[int](), ""
        folder.mkdir()

        def ask(pids: Mapping[int, int], folder: Path = folder, silent: list[int] = silent) -> None:
            silent += pids
            heartbeat.ask_for_stacks(folder, pids)

        try:
            works = [partial(_rank, call, rank, folder) for rank in range(call.ranks)]
            answers = forked(works, folder / "log", asked["deadline"], stay=True, silent=ask)
            (folder / ANSWERS).write_bytes(pickle.dumps(answers))
        except RuntimeError as error:
            failed = str(error)
        brief = "failed" if failed else counted(call.ranks, "rank")
        yield {"ranks": call.ranks, "failed": failed, "silent": silent, "brief": brief}
        if failed:
            return


if __name__ == "__main__":
    do_job(_answer)
