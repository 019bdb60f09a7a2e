"""What machines and users bring along, and complain of elsewhere: Pipetutor works as it does without it."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import HANGS

from pipetutor import certify, machine
from pipetutor.costs import environment

NOBODY_ANSWERS = """
    set -e
    echo nameserver 127.0.0.1 > resolv.conf
    echo options timeout:1 attempts:1 >> resolv.conf
    echo 127.0.0.1 localhost > hosts
    mount --bind resolv.conf /etc/resolv.conf
    mount --bind hosts /etc/hosts
    hostname host-that-no-server-knows
    ip link set lo up
"""
LISTEN = """
import socket, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 53))
    server.setblocking(False)
    subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
    try:
        print("asked for", server.recv(512)[13:].split(b"\\0")[0].decode())
    except BlockingIOError:
        print("not asked")
"""
JOIN = """
import pipetutor, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
A_RANK = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "own, said",
    [
        (A_RANK, "not asked"),
        ({"GLOO_SOCKET_IFNAME": environment(1).get("GLOO_SOCKET_IFNAME", "")}, "not asked"),
        (A_RANK | {"WORLD_SIZE": "2"}, "asked for host-that-no-server-knows"),  # the other is on another host
    ],
    ids=["a rank", "a rank that measures", "a rank of several hosts"],
)
def test_ranks_on_one_host_need_no_name_server(tmp_path, own, said):
    namespaces = ["unshare", "-Urmun", "sh", "-c"]
    if not shutil.which("ip") or subprocess.run([*namespaces, NOBODY_ANSWERS], cwd=tmp_path).returncode:
        pytest.skip("namespaces of one's own, or ip, are not to be had here")

    shell = NOBODY_ANSWERS + 'exec "$@"'
    asking = [*namespaces, shell, "sh", sys.executable, "-c", LISTEN, JOIN]
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"} | own
    done = subprocess.run(asking, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.stdout.strip() == said, done.stderr


def test_a_certificate_needs_no_name_server_either(tmp_path, monkeypatch):
    """Its ranks are forked by a job, whose environment they have."""
    jobs = []
    monkeypatch.setattr(certify, "run_job", lambda *job: jobs.append(job) or [])
    certify.certify(["alexnet"], [1], runs_dir=tmp_path)
    assert jobs[0][3]["GLOO_SOCKET_IFNAME"] == machine.LOOPBACK and jobs[0][3]["OMP_NUM_THREADS"] == "1"
