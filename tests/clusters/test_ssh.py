"""Ranks on hosts that DeepSpeed's runner reaches by pdsh and ssh, from a command on the first of them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, SMALL_SGD, TINY, Run, processes_of, wait_until

pytestmark = pytest.mark.cluster


def test_deepspeeds_command_starts_ranks_on_all_hosts(sshd, runs):
    Path("small.json").write_text(json.dumps(SMALL_SGD))
    Path("hosts").write_text("first slots=1\nsecond slots=2\n")
    train = [
        "--module",
        "pipetutor.train",
        "-p",
        3,
        "--steps",
        2,
        "--run-dir",
        "runs",
        "--data-dir",
        runs.parent / "data",
    ]
    flags = ["--model", "gpt:layers=1,width=32,heads=1", "--dataset", "sums", "--deepspeed_config", "small.json"]
    done = sshd[0].run("deepspeed", "--hostfile", "hosts", *train, *flags)
    assert not done.returncode, done.stderr
    assert len(Run.load(runs).losses) == 2 and not any(host.ranks() for host in sshd)


def launching(hosts, **options):
    """Return a process that stands for a kernel on the first host, and launches over both of them."""
    Path("hosts").write_text("# two machines\nfirst slots=1\nsecond slots=1\n")
    words = f"launch(stages=2, hostfile='hosts', data_dir='data', **{TINY | options!r})"
    code = f"from pipetutor import launch; run = {words}; print('finished', len(run.losses))"
    return subprocess.Popen(
        hosts[0].command(sys.executable, "-c", code),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_cell_launches_on_all_hosts(sshd, runs):
    out, errors = launching(sshd, steps=3).communicate(timeout=HANGS)
    assert "finished 3" in out, errors
    (directory,) = runs.iterdir()
    run = Run.load(directory)
    assert run.status == "finished" and run.command.split()[1:4] == ["--hostfile", "hosts", "--force_multi"]
    beats = [json.loads(path.read_text()) for path in sorted(directory.glob("heartbeat_rank*.json"))]
    assert [beat["host"] for beat in beats] == ["first", "second"]
    assert not any(host.ranks() for host in sshd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_cell_ends_the_ranks_on_all_hosts(sshd, runs, number):
    kernel = launching(sshd, steps=10**6)
    wait_until(lambda: any(runs.glob("*/steps.jsonl")) or kernel.poll() is not None)
    assert [len(host.ranks()) for host in sshd] == [1, 1], kernel.communicate()
    (python,) = [
        p
        for p in map(int, subprocess.check_output(["pgrep", "-f", "hostfile='hosts'"], text=True).split())
        if Path(f"/proc/{p}/comm").read_text().startswith("python")
    ]
    subprocess.run(["kill", f"-{number.value}", str(python)], check=True)
    kernel.communicate(timeout=HANGS)
    wait_until(lambda: not any(host.ranks() for host in sshd), 60)
    wait_until(lambda: not processes_of(runs.parent), 60)
    (directory,) = runs.iterdir()
    assert Run.load(directory).status == "interrupted"


def test_a_rank_that_dies_elsewhere_is_named(sshd, runs):
    _, errors = launching(sshd, steps=10**6, fault="die:rank=1,step=3").communicate(timeout=HANGS)
    # Its launcher says how it ended, if that comes before the end of the run.
    assert re.search(
        r"rank 1 failed first: (it is gone without a word, and the others have|killed by SIGKILL)", errors
    )
    assert "rank 1 on second: ForwardPass of micro-batch 0 in step 3" in errors
    wait_until(lambda: not any(host.ranks() for host in sshd), 60)


def test_a_hostfile_that_does_not_fit_is_refused(sshd, runs):
    Path("hosts").write_text("first slots=2\nsecond slots=1\n")
    code = f"from pipetutor import launch; launch(stages=2, hostfile='hosts', **{TINY!r})"
    done = sshd[0].run(sys.executable, "-c", code)
    assert "hostfile hosts has 3 slots, and 2 x 1 stages and replicas are 2 ranks" in done.stderr


def test_a_host_that_ssh_does_not_reach_is_named_before_anything_starts(sshd, runs):
    Path("hosts").write_text("first slots=1\nnowhere slots=1\n")
    code = f"from pipetutor import launch; launch(stages=2, hostfile='hosts', **{TINY!r})"
    done = sshd[0].run(sys.executable, "-c", code)
    assert "ValueError: ssh does not log in to nowhere (ssh: Could not resolve hostname nowhere" in done.stderr
    assert "try ssh nowhere true" in done.stderr and not runs.exists()
