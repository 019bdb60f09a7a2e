"""A job: work in a process of its own, under the supervisor, which hands on each row that it finds.

run_job("pipetutor.certify.proof", directory, cases, ...)    who wants it: a cell, or a command
do_job(prove_all)                                            the module that it names, when it is run
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipetutor.core import records
from pipetutor.processes.children import Process
from pipetutor.processes.network import name
from pipetutor.processes.watch import RunFailed, watch
from pipetutor.system import machine
from pipetutor.system.links import Link, hosts_of

__all__ = ["ROWS", "do_job", "run_job"]

ROWS = "rows.jsonl"


def run_job(
    module: str,
    directory: Path,
    asked: Any,
    environment: dict[str, str],
    total: int,
    unit: str,
    describe: Callable[[dict[str, Any]], str],
    links: Mapping[tuple[int, int], Link] | None = None,
) -> Iterator[dict[str, Any]]:
    """Run ``python -m module directory JSON`` under the supervisor, and return its rows.

    Args:
        module: what to run; it calls ``do_job``.
        directory: its new run directory.
        asked: what it is to do, as JSON.
        environment: what is laid over this process's own.
        total: rows to expect.
        unit: what a row stands for.
        describe: says in a few words what a row holds.
        links: between hosts, on each of which it runs once; without any, it runs once on this machine.

    Raises:
        RunFailed: it ended with another status than 0; the message has its last lines.
    """
    (directory / "logs").mkdir()
    command = [*machine.PYTHON, "-m", module, str(directory), records.to_json(asked)]
    env, rows = os.environ | environment, directory / ROWS
    processes = [Process(command, env, f"{name(host)}.log", host=host) for host in range(hosts_of(links or ()))]
    processes = processes or [Process(command, env, "job.log")]
    report = watch(processes, directory, math.inf, rows, total, unit, describe, links)
    if report["code"] != 0:
        first = next((end["log"] for end in report["ended"] if end["code"]), None)
        log = (directory / "logs" / first).read_text(errors="replace") if first else ""
        raise RunFailed(f"{module} ended with status {report['code']}:\n{log[-2000:]}", directory)
    return records.read_lines(rows)


def do_job(work: Callable[[Path, Any], Iterable[dict[str, Any]] | None]) -> None:
    """Be what ``run_job`` runs.

    Args:
        work: takes the run directory and what is asked, and yields rows, unless it appends them to ``ROWS`` itself.
    """
    directory = Path(sys.argv[1])
    for row in work(directory, json.loads(sys.argv[2])) or ():
        records.append(directory / ROWS, row)
    records.update(directory, status="finished")
