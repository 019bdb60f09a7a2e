"""Watching what runs under the supervisor: a progress bar, and an end that leaves no process behind.

``launch`` watches training this way, ``costs`` measuring and ``certify`` proving. No torch.
"""

import argparse
import contextlib
import io
import json
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from pipetutor import records

SUPERVISOR_SECONDS = 10


class RunFailed(RuntimeError):
    """A run ended before its last step; the message names the rank, its exit code and its last words.

    Attributes:
        directory: of the run, with its logs, heartbeats and checkpoints; None where there is none to look at.
    """

    def __init__(self, message: str, directory: Path | None = None):
        super().__init__(message)
        self.directory = directory


def watch(
    command: list[str],
    directory: Path,
    ranks: int,
    deadline: float,
    lines: Path,
    total: int,
    unit: str,
    describe: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Run a command under the supervisor, with a bar that moves on with each line it adds to a file.

    Args:
        command: what to start.
        directory: its run directory.
        ranks: ranks to expect.
        deadline: seconds without progress after which it is ended.
        lines: the file of JSON lines.
        total: lines to expect.
        unit: what a line stands for.
        describe: says in a few words what a line holds.

    Returns:
        The supervisor's report; see ``pipetutor.supervise.supervise``.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended with all its processes; it says so in one line, without
            the place where the interrupt came.
        RunFailed: the supervisor is gone or does not end.
    """
    __tracebackhide__ = True  # by IPython
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "pipetutor.supervise", str(directory), str(ranks), str(deadline), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # an interrupt of the kernel's group must not reach it
    )
    assert supervisor.stdin and supervisor.stdout
    output, interrupted = b"", False
    try:
        with _bar(total, unit) as bar, selectors.DefaultSelector() as selector:
            selector.register(supervisor.stdout, selectors.EVENT_READ)
            ended = False
            while not ended:
                ended = bool(selector.select(timeout=0.2))
                for line in records.read_lines(lines, start=bar.n):
                    bar.set_postfix_str(describe(line), False)
                    bar.update()
            bar.refresh()
        output = supervisor.stdout.read()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # End of file tells the supervisor to kill the run; a second interrupt must not cut this short.
        with _interrupts_held():
            supervisor.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(SUPERVISOR_SECONDS)
            supervisor.stdout.close()
    if interrupted and supervisor.returncode == 0:
        raise KeyboardInterrupt(f"{directory.name} is interrupted, and all its processes have ended")
    if not output:
        raise RunFailed(f"the supervisor of {directory} was killed; its ranks may still run")
    return json.loads(output)


class Parser(argparse.ArgumentParser):
    """Raises ValueError, in one line, where argparse would print its usage and exit; a flag has its whole name."""

    def __init__(self, **about: Any):
        super().__init__(allow_abbrev=False, **about)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise ValueError(f"{' '.join(message.split())} (--help lists every flag)")


@contextlib.contextmanager
def ending_with_a_status() -> Iterator[None]:
    """End a command with status 2 for bad input and 1 for a failed run, with one line, and 130 when interrupted."""
    try:
        yield
    except (ValueError, RunFailed) as error:
        print(f"pipetutor: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def _interrupts_held() -> Any:
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone receives interrupts
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _bar(total: int, unit: str) -> tqdm:
    """Return a progress bar for where this runs: a notebook, a terminal, or a file."""
    style = {
        "total": total,
        "unit": unit,
        "bar_format": "{n_fmt}/{total_fmt} {unit} |{bar:30}| {elapsed}{postfix}",
    }
    if "ipykernel" in sys.modules:
        return _CellBar(**style, file=io.StringIO(), ascii=False)
    interactive = sys.stderr.isatty()
    return tqdm(**style, mininterval=0.1 if interactive else 5, miniters=1 if interactive else max(1, total // 20))


class _CellBar(tqdm):
    """A bar that is one output of its cell, changed in place: live in JupyterLab, and as it ended in a file."""

    _handle: Any = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        content = {"text/plain": str(self)}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
