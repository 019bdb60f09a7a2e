"""Whatever ends the supervisor, the kernel or a process: nothing goes on, and the reason is told. No torch here."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest
from conftest import HANGS, processes_of, wait_until

from pipetutor.core import records
from pipetutor.processes.children import Process
from pipetutor.processes.diagnosis import diagnose
from pipetutor.processes.watch import RunFailed, watch

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def run(runs: Path, *codes: str, during=None, lines: int = 1, deadline: float = 300):
    """Watch a process for each of these programs, and do something once the first of them has spoken."""
    directory = records.create(runs, "watched")
    (directory / "logs").mkdir()
    processes = [
        Process([sys.executable, "-c", code, str(directory)], dict(os.environ), f"rank{rank}.log")
        for rank, code in enumerate(codes)
    ]

    def meanwhile():
        said = wait_until(lambda: spoken.exists() and spoken.read_text())
        during(directory, said)

    spoken = directory / "logs" / "rank0.log"
    thread = threading.Thread(target=meanwhile)
    if during:
        thread.start()
    try:
        return directory, watch(
            processes, directory, deadline, directory / "lines.jsonl", lines, "lines", lambda line: ""
        )
    finally:
        if during:
            thread.join()
        wait_until(lambda: not processes_of(runs.parent))


def supervisor(directory: Path) -> psutil.Process:
    """Return this process's child that supervises; one that it is just starting has the same words for a moment."""
    words = {child: " ".join(child.cmdline()) for child in psutil.Process().children()}
    (found,) = [child for child, said in words.items() if ".supervise" in said and str(directory) in said]
    return found


def test_a_supervisor_that_is_killed_takes_its_ranks_with_it(runs):
    with pytest.raises(RunFailed, match=r"its supervisor is gone \(killed by SIGKILL\), and its ranks with it$"):
        run(runs, SLEEP, SLEEP, during=lambda directory, _: supervisor(directory).kill())
    assert records.read(next(runs.iterdir()))["status"] == "failed"


def test_a_supervisor_that_is_asked_to_end_ends_the_run(runs):
    directory, report = run(runs, SLEEP, during=lambda directory, _: supervisor(directory).terminate())
    assert report["cancelled"] and report["code"] is None and records.read(directory)["status"] == "interrupted"
    assert diagnose(directory, report) == "the supervisor was asked to end, and has ended the run"


def damage(directory: Path, _: str) -> None:
    (directory / "run.json").write_text("{")
    supervisor(directory).terminate()


def test_an_error_inside_the_supervisor_ends_the_ranks_and_is_told(runs):
    with pytest.raises(RunFailed, match=r"watched failed: .*JSONDecodeError: Expecting property name"):
        run(runs, SLEEP, SLEEP, during=damage)


def test_a_process_that_a_signal_has_stopped_is_told_from_one_that_waits(runs):
    """Both have begun a step, and no stack comes from either that would tell."""
    training = (
        "import os, signal, sys; from pathlib import Path; from pipetutor.processes.heartbeat import Heartbeat\n"
        "Heartbeat(Path(sys.argv[1]), {rank}).enter('training', 1)\n"
        "os.kill(os.getpid(), signal.{number}); signal.pause()"
    )
    codes = [training.format(rank=rank, number=number) for rank, number in enumerate(("SIGCONT", "SIGSTOP"))]
    _, report = run(runs, *codes, deadline=3)
    assert report["stopped"] == [1] and [beat["step"] for beat in report["stalled"]] == [1, 1]


def test_what_cannot_be_started_is_told(runs):
    directory = records.create(runs, "watched")
    (directory / "logs").mkdir()
    good = Process([sys.executable, "-c", SLEEP], dict(os.environ), "rank0.log")
    bad = Process([str(runs / "no such program")], dict(os.environ), "rank1.log")
    with pytest.raises(RunFailed, match=r"watched failed: FileNotFoundError: .*no such program"):
        watch([good, bad], directory, 300, directory / "lines.jsonl", 1, "lines", str)
    wait_until(lambda: not processes_of(runs.parent))


def test_a_run_is_well_only_if_every_rank_was_seen_to_end_well(runs):
    finished = "import sys; from pathlib import Path; from pipetutor.core import records\n"
    finished += "records.update(Path(sys.argv[1]), status='finished')"
    _, well = run(runs, finished, "pass")
    assert well["code"] == 0 and sorted(end["code"] for end in well["ended"]) == [0, 0]
    directory, ill = run(runs, SLEEP, finished, during=lambda directory, pid: os.kill(int(pid), signal.SIGKILL))
    assert ill["code"] == -9 and records.read(directory)["status"] == "failed"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_child_that_the_kernel_forks_meanwhile_keeps_no_rank_alive(runs, end):
    """It holds all that was open, the pipe to the supervisor among it."""
    body = f"""
        import os, sys, threading, time
        from pathlib import Path
        from pipetutor.core import records
        from pipetutor.processes.children import Process
        from pipetutor.processes.watch import watch
        directory = records.create(Path({str(runs)!r}), "watched")
        (directory / "logs").mkdir()
        def fork():
            while not (directory / "logs" / "rank0.log").exists():
                time.sleep(0.05)
            if (child := os.fork()) == 0:
                time.sleep(600)
            print(child, flush=True)
        threading.Thread(target=fork).start()
        process = Process([sys.executable, "-c", {SLEEP!r}], dict(os.environ), "rank0.log")
        watch([process], directory, 300, directory / "lines.jsonl", 1, "lines", str)
    """
    kernel = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child = psutil.Process(int(kernel.stdout.readline()))
    try:
        os.kill(kernel.pid, end)
        assert kernel.wait(HANGS) != 0
        wait_until(lambda: not [p for p in processes_of(runs.parent) if p != child])
        assert child.is_running()
    finally:
        child.kill()
        child.wait(HANGS)
        kernel.stdout.close()
    record = json.loads(next(runs.glob("*/run.json")).read_text())
    assert record["status"] == "interrupted"


def test_the_bar_saves_few_lines_where_nobody_watches(runs, monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # of a test before, maybe: this is no kernel
    write = "import sys; [print('{}', file=open(sys.argv[1] + '/lines.jsonl', 'a')) for _ in range(60)]"
    _, report = run(runs, write, lines=60)
    errors = capfd.readouterr().err
    assert report["code"] == 0 and "60/60 lines" in errors
    assert len(re.findall("[\r\n]", errors)) < 30
