"""Watching what runs under the supervisor: a progress bar, and an end that leaves no process behind.

``launch`` watches training this way, ``costs`` measuring and ``certify`` proving. No torch.
"""

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from pipetutor.core import records
from pipetutor.processes import heartbeat
from pipetutor.processes.children import Process
from pipetutor.system import machine, namespaces
from pipetutor.system.links import Link

__all__ = ["RunFailed", "watch"]

SUPERVISOR = "from pipetutor.processes.supervise import main; main()"
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
    processes: Sequence[Process],
    directory: Path,
    deadline: float,
    lines: Path,
    total: int,
    unit: str,
    describe: Callable[[dict[str, Any]], str],
    links: Mapping[tuple[int, int], Link] | None = None,
) -> dict[str, Any]:
    """Run processes under the supervisor, with a bar that moves on with each line they add to a file.

    Args:
        processes: what to start.
        directory: their run directory, with ``logs`` in it.
        deadline: seconds without progress after which they are ended.
        lines: the file of JSON lines.
        total: lines to expect.
        unit: what a line stands for.
        describe: says in a few words what a line holds.
        links: between the hosts that the processes run on; without any, that is this machine.

    Returns:
        The supervisor's report; see ``pipetutor.processes.supervise.supervise``.

    Raises:
        KeyboardInterrupt: it was interrupted, and has ended with all its processes; it says so in one line, without
            the place where the interrupt came.
        RunFailed: a process could not be started, or the supervisor is gone or does not end.
    """
    asked = {
        "processes": [asdict(process) for process in processes],
        "deadline": deadline,
        "links": [(*pair, str(link)) for pair, link in (links or {}).items()],
    }
    supervisor = subprocess.Popen(
        [*(namespaces.alone() if links else ()), *machine.PYTHON, "-c", SUPERVISOR, str(directory), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # an interrupt of the kernel's group must not reach it
    )
    assert supervisor.stdin and supervisor.stdout and supervisor.stderr
    output, interrupted = b"", False
    try:
        _tell(supervisor.stdin, records.to_json(asked))
        with _bar(total, unit) as bar, selectors.DefaultSelector() as selector:
            selector.register(supervisor.stdout, selectors.EVENT_READ)
            ended, seen = False, 0
            while not ended:
                if selector.select(timeout=0.2):
                    words = os.read(supervisor.stdout.fileno(), 65536)
                    output, ended = output + words, not words
                for line in records.read_lines(lines, start=seen):
                    bar.set_postfix_str(describe(line), False)
                    bar.update()
                    seen += 1
            bar.refresh()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # A second interrupt must not cut this short.
        with _interrupts_held():
            _tell(supervisor.stdin, "end")  # a child of the kernel's may hold the pipe open, too
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(SUPERVISOR_SECONDS)
            said = supervisor.stderr.read() if supervisor.returncode is not None else b""
            supervisor.stdout.close()
            supervisor.stderr.close()
    if interrupted and supervisor.returncode == 0:
        raise KeyboardInterrupt(f"{directory.name} is interrupted, and all its processes have ended")
    # Before the report stands what a site's sitecustomize, say, prints in every Python.
    report: dict[str, Any] = next((json.loads(line) for line in output.splitlines() if line.startswith(b"{")), {})
    if not report or "error" in report:
        error = report.get("error") or f"its supervisor is gone{_ended(supervisor.returncode, said)}"
        with contextlib.suppress(OSError, ValueError):  # the record itself may be what is wrong
            records.close(directory, "failed")
            if any(process.elsewhere for process in processes):
                heartbeat.ask_to_end(directory)
        raise RunFailed(f"{directory.name} failed: {error}", directory)
    return report


def _tell(pipe: IO[bytes], line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, and its report says why
        pipe.write(f"{line}\n".encode())
        pipe.flush()


def _ended(status: int | None, said: bytes) -> str:
    """Say how a supervisor ended that has not reported."""
    if status is None:
        return f": it did not end within {SUPERVISOR_SECONDS} s"
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return f" ({how}), and its ranks with it {said.decode(errors='replace')[-1000:].strip()}".rstrip()


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
        # TQDM_DISABLE does not count: a cell that says nothing for long is taken for one that hangs.
        return _CellBar(**style, file=io.StringIO(), ascii=False, disable=False)
    stream = sys.stderr or io.StringIO()  # a program without a console has none
    pace = {"miniters": 1} if stream.isatty() else {"mininterval": 5, "miniters": max(1, total // 20)}
    return tqdm(**style, **pace, file=stream)


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
