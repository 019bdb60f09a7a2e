"""Shared by the tests: small runs, and proof that they leave no process behind."""

import fcntl
import json
import multiprocessing
import os
import sys
import tempfile
import textwrap
import threading
import time
import zlib
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipetutor import Run
from pipetutor.core.config import read_config
from pipetutor.processes.environment import free_port

HANGS = 600.0  # seconds: generous, for a slow machine with other work; only what hangs takes longer
SMALL = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
SMALL_SGD = SMALL | {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
TINY = {"model": "gpt:layers=1,width=16,heads=1", "dataset": "sums", "config": SMALL_SGD}
FAST_SGD, TWICE_AS_FAST = (SMALL | {"optimizer": {"type": "SGD", "params": {"lr": rate}}} for rate in (0.05, 0.1))


def equal_but_for_rounding(found: list[float], wanted: list[float], mistaken: list[float]) -> None:
    """Assert that losses differ by at most a thousandth of what a mistake does to them: those are ``mistaken``.

    For plain SGD and few steps: Adam makes rounding as large as its steps.
    """
    mistake = max(abs(a - b) for a, b in zip(wanted, mistaken, strict=True))
    assert mistake > 1e-3, "no mistake to compare with"
    assert found == pytest.approx(wanted, abs=mistake / 1000, rel=0)


# Ranks that are forked from a server which has loaded DeepSpeed start in milliseconds. One thread each: both
# sides of a comparison add up in the same order.
for _name, _value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "THP_MEM_ALLOC_ENABLE": "1"}.items():
    os.environ.setdefault(_name, _value)
os.environ["JUPYTER_PATH"] = str(Path(__file__).parents[1] / "tools" / "jupyter")  # whose kernel is this Python
_ALONE = Path(tempfile.gettempdir(), f"pipetutor-{os.getuid()}-{zlib.crc32(os.fsencode(Path(__file__).parent)):x}")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["pipetutor.train", "pipetutor.core.torch_engine", "pipetutor.certify.proof", "tiny"])


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.option.numprocesses:  # here tests run, and not in workers alone
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where tiny is
            forkserver.ensure_running()  # before the first test, so that it stands in no test's directory


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Run a test that is marked ``alone`` while no other worker runs one: a door, and a room behind it."""
    with open(f"{_ALONE}.door", "a") as door, open(f"{_ALONE}.room", "a") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # kept until the room is free: nobody enters before one who waits
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        return (yield)


def processes_of(directory: Path) -> list[psutil.Process]:
    """Every process whose command line or working directory names this test's own directory."""
    found = []
    for process in psutil.process_iter():
        try:
            named = str(directory) in " ".join(process.cmdline()) or process.cwd().startswith(str(directory))
            if named and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A directory for runs; afterwards, none of its processes may be alive."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "runs"
    left = processes_of(tmp_path)
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"


def wait_until(condition, seconds=HANGS):
    """Wait for something that other processes do; fail when it does not come."""
    done = threading.Event()
    for _ in range(int(seconds * 10)):
        if result := condition():
            return result
        done.wait(0.1)
    raise AssertionError(f"not within {seconds} s: {condition}")


def in_ranks(tmp_path: Path, monkeypatch, code: str) -> None:
    """Run this code at the start of every process that has a RANK; where it fails, the process ends."""
    indented = textwrap.indent(textwrap.dedent(code), "        ")
    failed = (
        "    except BaseException:\n        import traceback\n        traceback.print_exc()\n        os._exit(1)\n"
    )
    begin = "import os\nif 'RANK' in os.environ:\n    try:\n"
    (tmp_path / "sitecustomize.py").write_text(f"{begin}{indented}\n{failed}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")


class RankFailed(AssertionError):
    """A forked rank ended with a status other than 0; the message is what it printed."""


def _rank(
    rank: int, ranks: int, port: int, arguments: list[str], log: Path, patch: Callable[[], None] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(log.parent)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["pipetutor.train", *arguments]
    import tiny

    tiny.enter()
    if patch:
        patch()
    from pipetutor import train

    train.main()


def _codes(processes: list[Any], seconds: float) -> list[int | None]:
    """Run ranks until all have ended or the time is over; return their exit codes, and leave none."""
    try:
        for process in processes:
            process.start()
        running, end = {process.sentinel for process in processes}, time.monotonic() + seconds
        while running and time.monotonic() < end:
            running -= set(connection.wait(list(running), end - time.monotonic()))
            if any(process.exitcode for process in processes):  # the others see that soon, or hang
                end = min(end, time.monotonic() + 60)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def train(
    directory: Path,
    *arguments: object,
    stages: int = 1,
    replicas: int = 1,
    config: dict | None = None,
    patch: Callable[[], None] | None = None,
    seconds: float = HANGS,
) -> Run:
    """Run ``pipetutor.train`` in forked ranks, as DeepSpeed's launcher would, and return its record.

    ``patch`` is a function of a test's module, called in each rank before it starts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ds.json").write_text(json.dumps(read_config(config or SMALL)))
    ranks, port = max(stages, 1) * replicas, free_port()
    given = ["-p", stages, "--backend", "gloo", "--deepspeed_config", directory / "ds.json", "--run-dir", directory]
    words = [str(word) for word in [*given, *arguments]]
    processes = [
        _FORKS.Process(target=_rank, args=(r, ranks, port, words, directory / f"rank{r}.txt", patch), daemon=True)
        for r in range(ranks)
    ]
    codes = _codes(processes, seconds)
    if any(code != 0 for code in codes):
        said = "\n".join((directory / f"rank{r}.txt").read_text()[-3000:] for r in range(ranks))
        raise RankFailed(f"exit codes {codes}\n{said}")
    return Run.load(directory)


def _child(
    work: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, port: int, directory: Path
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist_backend="gloo")
    torch.save(work(*arguments), directory / f"{rank}.pt")
    os._exit(0)


def run(directory: Path, ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``work``, a function of a test's module, in forked ranks that can talk, and return what each returned.

    All have ended when this returns.
    """
    port = free_port()
    processes = [
        _FORKS.Process(target=_child, args=(work, arguments, rank, ranks, port, directory), daemon=True)
        for rank in range(ranks)
    ]
    codes = _codes(processes, HANGS)
    assert all(code == 0 for code in codes), f"exit codes {codes}; None: still running"
    import torch

    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
