"""A function of a learner's own, run by real processes that can send to each other: what a cell calls to try an idea.

    on_ranks(step, 2, model)    kernel --pipe--> supervisor --> job --fork--> rank 0: step(0, 2, model)
                                                                    --fork--> rank 1: step(1, 2, model)

The job loads torch once, so that a rank starts in milliseconds. The function reaches it by value, with what it uses
of the notebook; modules beside the notebook are imported there. What goes wrong is told in the learner's own lines:
an exception, and where each rank stands when nothing moves any more. The lines are looked up in the kernel, which
alone has the text of its cells.
"""

import faulthandler
import functools
import inspect
import io
import linecache
import os
import pickle
import re
import signal
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
from pipetutor.processes.forks import Gone, forked, meet
from pipetutor.processes.job import do_job, run_job
from pipetutor.processes.watch import RunFailed
from pipetutor.system.kinds import check, counted, shown, whole

__all__ = ["DEADLINE", "Call", "Outcome", "on_ranks", "outcomes"]

DEADLINE = 60.0  # seconds: for what hangs, not for what is slow
MOST_RANKS = 16
CALLS, ANSWERS, STORE = "calls.pickle", "answers.pickle", "store"
SAID, KEPT, LONGEST = "said", 100, 2000  # of each rank its first and its last lines; characters of a line
LAST_WORDS = 3  # lines of what a library says when it ends the process
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
            print(_printed(directory / "0"), end="")
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
    if row["gone"] is not None:
        return Outcome([], "\n".join([f"{row['failed']}. Its process is gone", *_last_words(folder, *row["gone"])]))
    failures = records.read_failures(folder)
    if not row["silent"] and not failures:  # before it was called
        return Outcome([], row["failed"])
    if not row["silent"]:
        places = _own_places(failures[0]["traceback"])
        way = [f"    at: {place}" for place in places[-1:]] + [f"    called at: {place}" for place in places[-2::-1]]
        error = " ".join(failures[0]["error"].split())
        return Outcome([], "\n".join([f"rank {failures[0]['rank']} raised {error}", *way]))
    stands, receives = list[str](), False
    for rank in range(row["ranks"]):
        stack = _read(folder / f"stack_rank{rank}.txt")
        places = _own_places(stack)
        receives |= " in recv\n" in stack
        if rank not in row["silent"]:
            stands.append(f"    rank {rank} has returned")
        elif places:
            stands.append(f"    rank {rank} stands at: {places[0]}")
        elif stack:
            stands.append(f"    rank {rank} still runs, but in none of your lines")
        else:
            stands.append(f"    rank {rank} does not say where it stands: its process may have been stopped")
    who = "no rank has" if len(row["silent"]) == row["ranks"] else "not every rank has"
    head = f"{who} returned within {deadline:g} s, and all were ended. When that was over,"
    if receives:
        asks = ": has all that it sent been waited for?"
        stands = [f"{one}{asks}" if one.endswith("has returned") else one for one in stands]
    return Outcome([], "\n".join([head, *stands, "If they were only slow, give a longer deadline."]))


def _last_words(folder: Path, rank: int, code: int) -> list[str]:
    """Return what a rank that is gone has left behind: where it stood, and what a library said of it."""
    if code >= 0:
        return ["    It was ended by the function itself, or by what that called"]
    lines = _read(folder / f"log_rank{rank}.txt").splitlines()
    said = [line.strip()[:LONGEST] for line in lines if line.strip() and not line.startswith("frame #")]
    words = [f"    it stood at: {place}" for place in _own_places(_read(folder / f"death_rank{rank}.txt"))[:1]]
    words += [f"    it said: {line}" for line in said[-LAST_WORDS:]]
    if code == -signal.SIGABRT and any("gloo" in line for line in said):
        words.append("Did it receive into a tensor of another shape or dtype than what was sent?")
    return words


def _printed(folder: Path) -> str:
    """Return what the ranks of a call printed, as far as it was kept."""
    text = _read(folder / SAID)
    for rank in range(MOST_RANKS):
        if parts := sorted(folder.glob(f"{SAID}_rank{rank}_*")):
            behind = [line for part in parts for line in _read(part).split("\n")[:-1]]
            before = KEPT * int(parts[0].name.rpartition("_")[2])
            if (left := before + len(behind) - KEPT) > 0:
                text += f"rank {rank}: ... {counted(left, 'line')} left out\n"
            text += "\n".join([*behind[-KEPT:], ""])
    return text


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


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
    """Writes each line that a rank prints to a file, whole, with the rank ahead of it.

    The first lines go to a file that all ranks share, so that one sees who spoke when. Of those behind them, a rank
    keeps the last ones, in two parts: whoever prints without end fills neither the disk nor the notebook.
    """

    def __init__(self, rank: int, folder: Path):
        self._rank, self._folder, self._begun, self._count = rank, folder, "", 0
        self._file = self._open(SAID)

    def _open(self, name: str) -> int:
        return os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, text: str) -> int:
        """Write the lines that are complete with this, and keep the rest."""
        *lines, begun = (self._begun + text).split("\n")
        self._begun = begun[: LONGEST + 1]
        for line in lines:
            part, place = divmod(self._count, KEPT)
            if part and not place:
                os.close(self._file)
                self._file = self._open(f"{SAID}_rank{self._rank}_{part - 1:09}")
                (self._folder / f"{SAID}_rank{self._rank}_{part - 3:09}").unlink(missing_ok=True)
            self._count += 1
            short = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
            os.write(self._file, f"rank {self._rank}: {short}\n".encode())
        return len(text)

    def end(self) -> None:
        """Write what is left of a line."""
        if self._begun:
            self.write("\n")


def _rank(call: Call, rank: int, folder: Path) -> bytes:
    """Be one rank of a call, and return what it returns, for the kernel to unpack."""
    told = heartbeat.Heartbeat(folder, rank)  # so that its stack can be asked for, as long as this is kept
    with open(folder / f"log_rank{rank}.txt", "w") as log:
        os.dup2(log.fileno(), 2)  # what a library says that ends the process
    faulthandler.enable(os.open(folder / f"death_rank{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o644))
    meet(rank, call.ranks, folder / STORE)
    said = _Said(rank, folder)
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
        folder, silent, failed, gone = directory / str(place), list[int](), "", None
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
            gone = (error.rank, error.code) if isinstance(error, Gone) else None
        brief = "failed" if failed else counted(call.ranks, "rank")
        yield {"ranks": call.ranks, "failed": failed, "silent": silent, "gone": gone, "brief": brief}
        if failed:
            return


if __name__ == "__main__":
    do_job(_answer)
