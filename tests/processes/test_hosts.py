"""Hosts on one machine: what runs on them, what goes between them, and that nothing of them is left."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import TINY, processes_of, wait_until

from pipetutor import RunFailed, launch
from pipetutor.core import records
from pipetutor.data.sums import LENGTH
from pipetutor.processes import network
from pipetutor.processes.children import Process
from pipetutor.processes.watch import watch
from pipetutor.system.links import parse_links
from pipetutor.system.namespaces import LEAST_BURST, check_hosts

DEADLINE = 5
# A grandchild of what runs on a host, as a rank is: the launcher does not end with its parent
NEST = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {!r}])\n"
)
SLEEP = "print('begun', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def own_hosts():
    """A machine that allows hosts of its own."""
    try:
        check_hosts(parse_links(2, "1mbit").values())
    except ValueError as refused:
        pytest.skip(str(refused))


def run(runs: Path, *codes: str, link: str | None = None, during=None, deadline: float = 300):
    """Run a program on each host, and do something once all of them have spoken; return the directory and report."""
    directory = records.create(runs, "watched")
    logs = directory / "logs"
    logs.mkdir()
    processes = [
        Process([sys.executable, "-c", code, str(directory)], dict(os.environ), f"host{host}.log", [host], host)
        for host, code in enumerate(codes)
    ]

    def meanwhile():
        wait_until(lambda: all((logs / p.log).exists() and (logs / p.log).read_text() for p in processes))
        during(directory)

    thread = threading.Thread(target=meanwhile)
    if during:
        thread.start()
    try:
        links, lines = parse_links(len(codes), link), directory / "lines.jsonl"
        return directory, watch(processes, directory, deadline, lines, 1, "lines", str, links)
    finally:
        if during:
            thread.join()


def said(directory: Path, host: int) -> str:
    return (directory / "logs" / f"host{host}.log").read_text().strip()


def test_a_host_has_a_name_an_address_and_a_network_of_its_own(runs):
    look = "import os, socket, psutil; print(socket.gethostname(), os.stat('/proc/self/ns/net').st_ino, os.getuid(), "
    look += "psutil.net_if_addrs()['eth0'][0].address)"
    directory, report = run(runs, look, look, look)
    names, networks, users, addresses = zip(*(said(directory, host).split() for host in range(3)), strict=True)
    assert names == ("host0", "host1", "host2") and report["code"] == 0
    assert addresses == tuple(map(network.address, range(3)))
    assert len({*networks, str(os.stat("/proc/self/ns/net").st_ino)}) == 4
    assert set(users) == {str(os.getuid())}, "files are written as who it is"


SEND = """
import socket, sys, time
size, host = {size}, {host}
if host == 0:
    with socket.create_server(("", 5000)) as server:
        for _ in range({others}):
            with server.accept()[0] as connection:
                got, begin = 0, None
                while part := connection.recv(1 << 20):
                    begin, got = begin or time.monotonic(), got + len(part)
                print(connection.getpeername()[0], got, time.monotonic() - begin, flush=True)
else:
    time.sleep(0)
    while True:
        try:
            connection = socket.create_connection(({address!r}, 5000), timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    with connection:
        connection.sendall(bytes(size))
"""


def test_a_link_lets_through_what_its_rate_allows_and_links_differ(runs):
    size, burst = 2_000_000, 128 * 1024
    codes = [SEND.format(size=size, host=host, others=2, address=network.address(0)) for host in range(3)]
    directory, report = run(runs, *codes, link="0-1 10mbit, 0-2 40mbit")
    assert report["code"] == 0
    taken = {}
    for line in said(directory, 0).splitlines():
        address, got, seconds = line.split()
        taken[address] = float(seconds)
        assert int(got) == size
    for host, rate in ((1, 10e6), (2, 40e6)):
        # What has come before the clock starts, a first part of 1 MiB at most, and a full bucket, went for nothing.
        assert taken[network.address(host)] > 8 * (size - burst - (1 << 20)) / rate


def test_two_runs_with_hosts_at_a_time_do_not_meet(tmp_path, runs):
    """Both listen at the same port of the same address, and wait until the other one does."""
    serve = f"""
import pathlib, socket, sys, time
with socket.create_server(({network.address(0)!r}, 29500)) as server:
    pathlib.Path(sys.argv[1], "there").touch()
    print("begun", flush=True)
    while len(list(pathlib.Path({str(tmp_path)!r}).glob("*/*/there"))) < 2:
        time.sleep(0.05)
"""
    found = {}
    threads = [
        threading.Thread(target=lambda place=place: found.update({place: run(tmp_path / place, serve, "pass")[1]}))
        for place in ("one", "other")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report["code"] for report in found.values()] == [0, 0]


def child_of_test(directory: Path, *words: str) -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if all(word in " ".join(process.cmdline()) for word in words)
    ]
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([".supervise import main"], "its supervisor is gone"),
        (["processes.host import main", "host1"], ""),
        (["begun", "--host=0"], ""),
    ],
    ids=["supervisor", "host", "launcher"],
)
def test_whatever_is_killed_nothing_is_left(runs, words, message):
    nest = [NEST.format(str(runs)) + SLEEP + f"  # --host={host}" for host in range(2)]
    before = set(os.listdir("/sys/class/net"))

    def kill(directory):
        wait_until(lambda: sum("time.sleep(600)'," in " ".join(p.cmdline()) for p in processes_of(runs.parent)) >= 2)
        child_of_test(directory, *words).kill()

    try:
        _, report = run(runs, *nest, during=kill)
        assert not message and report["code"] not in (0, None)
    except RunFailed as failed:
        assert message and message in str(failed)
    wait_until(lambda: not processes_of(runs.parent))
    assert set(os.listdir("/sys/class/net")) == before


def test_a_kernel_that_is_killed_leaves_no_host(runs):
    body = f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from pathlib import Path
        from test_hosts import NEST, SLEEP, run
        run(Path({str(runs)!r}), *[NEST.format({str(runs)!r}) + SLEEP] * 2)
    """
    kernel = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stderr=subprocess.DEVNULL)
    wait_until(lambda: [log.read_text() for log in runs.glob("*/logs/*")] == ["begun\n"] * 2)
    os.kill(kernel.pid, signal.SIGKILL)
    kernel.wait()
    wait_until(lambda: not processes_of(runs.parent))
    assert json.loads(next(runs.glob("*/run.json")).read_text())["status"] == "interrupted"


def test_hosts_compute_what_one_host_computes(runs, monkeypatch):
    """The same operations in the same order: DeepSpeed's launcher on each host, a link between them, a trace."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    apart = launch(stages=2, steps=3, hosts=2, link="100mbit", trace=True, runs_dir=runs, **TINY)
    together = launch(stages=2, steps=3, runs_dir=runs, **TINY)
    assert apart.losses == together.losses and apart.status == "finished"
    assert apart.details["options"]["hosts"] == 2 and apart.details["options"]["link"] == "100mbit"
    first, second = apart.command.splitlines()
    assert re.search(r"deepspeed\S* --hostfile runs/\S+/hostfile --no_ssh --master_addr 10\.77\.0\.1 ", first)
    assert "--node_rank 0" in first and second == first.replace("--node_rank 0", "--node_rank 1")
    heads = [json.loads(path.read_text().splitlines()[0]) for path in sorted(apart.directory.glob("trace_rank*"))]
    assert len(heads) == 2
    assert "deepspeed.launcher.launch" not in " ".join(" ".join(p.cmdline()) for p in processes_of(runs.parent))


def failure(runs, fault, **options):
    with pytest.raises(RunFailed) as failed:
        launch(stages=2, steps=1000, hosts=2, fault=fault, runs_dir=runs, **TINY, **options)
    assert not processes_of(runs.parent)
    assert records.read(failed.value.directory)["status"] == "failed"
    return str(failed.value)


def test_a_link_that_is_cut_is_told_with_who_waits_for_whom(runs):
    said = failure(runs, "cut:host=1,step=3", deadline=DEADLINE)
    first, *more = said.splitlines()
    assert first == f"no step was completed in {DEADLINE} s: the link is cut: host0 and host1 do not reach each other"
    assert "rank 0 on host0 waits in RecvGrad for rank 1 on host1" in more
    assert [line for line in more if line.startswith("    rank 1 on host1: ")]


def test_a_host_that_dies_is_told_from_a_rank_that_does(runs):
    host = failure(runs, "die:host=1,step=3").splitlines()
    assert host[0].startswith("host1, with rank 1, failed first: killed by SIGKILL (exit code -9), at ForwardPass")
    assert host[1] == "all that ran on host1 is gone at once, as of a host that lost its power"
    rank = failure(runs, "die:rank=1,step=3").splitlines()
    assert rank[0].startswith(
        "rank 1 failed first: killed by SIGKILL (exit code -9), at ForwardPass of micro-batch 0"
    )


def test_a_link_that_becomes_slow_makes_steps_longer(runs):
    """What the first stage sends in a step goes at the rate, but for what a full bucket lets through at once."""
    micro_batch = 256
    config = TINY["config"] | {"train_batch_size": 2 * micro_batch, "train_micro_batch_size_per_gpu": micro_batch}
    slow = "slow-link:host=0,step=4,rate=1mbit"
    run = launch(stages=2, steps=4, hosts=2, fault=slow, runs_dir=runs, **TINY | {"config": config})
    sent = 2 * micro_batch * LENGTH * 16 * 4  # bytes: fp32, 16 wide
    assert run.seconds[3] > 8 * (sent - LEAST_BURST) / 1e6 > 1


def test_a_refusal_on_another_host_is_told(runs, monkeypatch, tmp_path):
    """The second host has another version of what the first computes with."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('CROSS_RANK') == '1' and 'RANK' in os.environ:\n"
        "    from importlib import metadata\n"
        "    known = metadata.version\n"
        "    metadata.version = lambda name: '0.0.1' if name == 'numpy' else known(name)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    began = time.monotonic()
    with pytest.raises(RunFailed) as failed:
        launch(stages=2, steps=3, hosts=2, runs_dir=runs, **TINY)
    said = str(failed.value)
    assert re.search(r"rank 1 on host1: version of numpy is 0\.0\.1 here and \S+ at the first rank: all hosts", said)
    assert time.monotonic() - began < 120


def test_other_code_on_another_host_is_told(runs, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('CROSS_RANK') == '1' and 'RANK' in os.environ:\n"
        "    from pathlib import Path\n"
        "    read = Path.read_bytes\n"
        "    Path.read_bytes = lambda path: b'#' + read(path) if path.name == 'loop.py' else read(path)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RunFailed, match=r"rank 1 on host1: code of pipetutor is \w+ here and \w+ at the first rank"):
        launch(stages=2, steps=3, hosts=2, runs_dir=runs, **TINY)
