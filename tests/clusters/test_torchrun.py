"""Ranks on two hosts, on each of which torchrun is started."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import HANGS, SMALL_SGD, Run

pytestmark = pytest.mark.cluster


def test_torchrun_on_each_host(hosts, runs):
    Path("small.json").write_text(json.dumps(SMALL_SGD))
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29400", "--rdzv-id", "a job"]
    train = ["-m", "pipetutor.train", "-p", 3, "--steps", 2, "--run-dir", "runs", "--data-dir", runs.parent / "data"]
    flags = ["--model", "gpt:layers=1,width=32,heads=1", "--dataset", "sums", "--deepspeed_config", "small.json"]
    commands = [
        host.command("torchrun", "--nnodes", 2, "--nproc-per-node", ranks, *meet, *train, *flags)
        for host, ranks in zip(hosts, (1, 2), strict=True)
    ]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    said = [process.communicate(timeout=HANGS)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert len(Run.load(runs).losses) == 2
