"""Several ranks in forks of one process that has already loaded torch and DeepSpeed.

A rank that DeepSpeed's launcher starts takes seconds to import them; a fork takes milliseconds. The parent
must not have computed with torch: the threads that it computes with do not survive a fork.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pipetutor.processes.children import end_with

__all__ = ["Gone", "forked", "meet"]


class Gone(RuntimeError):
    """A rank's process ended without an answer.

    Attributes:
        rank: which one.
        code: its exit code; for a signal, the negative of its number.
    """

    def __init__(self, rank: int, code: int):
        how = f"with status {code}" if code >= 0 else f"by signal {-code} ({signal.strsignal(-code)})"
        super().__init__(f"rank {rank}: it ended without an answer, {how}")
        self.rank, self.code = rank, code


def _in_child(work: Callable[[], Any], answer: Connection, log: Path, parent: int, stays: bool) -> None:
    """Run in a forked process: what libraries print goes to a file, an exception to the parent."""
    end_with(parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        answer.send((work(), ""))
    except BaseException as error:
        traceback.print_exc()
        answer.send((None, f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    while stays:  # until it is killed
        signal.pause()
    os._exit(0)  # no engine of a case is worth an orderly end, which can take seconds


def forked(
    works: Sequence[Callable[[], Any]],
    log: Path,
    seconds: float = 120,
    stay: bool = False,
    silent: Callable[[Mapping[int, int]], None] = lambda _: None,
) -> list[Any]:
    """Run functions at once, each in a fork of this process, and leave none of them running.

    Args:
        works: what to run.
        log: where what they print is added.
        seconds: how long to wait for the next answer.
        stay: whether one that has answered stays until all have, so that the others do not find it gone.
        silent: is told the processes, by rank, of those that have not answered in time, before they are killed.

    Returns:
        What they return, in their order.

    Raises:
        Gone: one of them ended without an answer.
        RuntimeError: one of them raised, or none answered in time.
    """
    fork = multiprocessing.get_context("fork")
    children, pipes = [], []
    answers: list[Any] = [None] * len(works)
    try:
        for work in works:
            here, there = fork.Pipe(duplex=False)
            child = fork.Process(target=_in_child, args=(work, there, log, os.getpid(), stay), daemon=True)
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        waiting = dict(zip(pipes, range(len(works)), strict=True))
        while waiting:
            ready = wait(list(waiting), timeout=seconds)
            if not ready:
                silent({index: pid for index in waiting.values() if (pid := children[index].pid)})
                raise RuntimeError(f"no answer within {seconds:.0f} s from rank {min(waiting.values())}")
            failed = ""
            for pipe in ready:
                assert isinstance(pipe, Connection)
                index = waiting.pop(pipe)
                try:
                    answers[index], error = pipe.recv()
                except EOFError:  # the cause of what others raise, who find it gone
                    children[index].join()
                    raise Gone(index, children[index].exitcode or 0) from None
                if error and not failed:
                    failed = f"rank {index}: {error}"
            if failed:
                raise RuntimeError(failed)
        return answers
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.join()
        for pipe in pipes:
            pipe.close()


def meet(rank: int, ranks: int, store: Path) -> None:
    """Join the other forks in a process group on the CPU.

    Args:
        rank: this one.
        ranks: how many there are.
        store: a file that is not there yet, by which they find each other.
    """
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
