"""Ranks on hosts that DeepSpeed's runner reaches by pdsh and ssh, from a command on the first of them."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_SGD, Run

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
