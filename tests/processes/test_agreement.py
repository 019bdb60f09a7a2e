"""Ranks that agree before they meet: on one plan, or on why there is none; ranks on hosts of their own are played."""

import contextlib
import functools
import json
import os
import shlex
import socket
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import HANGS, SMALL_SGD, RankFailed, train

from pipetutor.processes import agreement

SMALL = ["-s", 1, "--model", "tiny"]


def hosts_of_their_own():
    """Give each rank a host, of which it is the only one."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": os.environ["RANK"], "CROSS_SIZE": "2"}
    socket.gethostname = lambda: "localhost"


def said(refusal: pytest.ExceptionInfo, directory: Path, rank: int) -> list[str]:
    assert "Traceback" not in str(refusal.value)
    text = (directory / f"rank{rank}.txt").read_text()
    return [line.removeprefix("pipetutor: ") for line in text.splitlines() if line.startswith("pipetutor: ")]


def second_has_no_checkpoint():
    hosts_of_their_own()
    if os.environ["RANK"] == "1":
        sys.argv += ["--resume", "nowhere"]


def both_have_no_checkpoint():
    hosts_of_their_own()
    sys.argv += ["--resume", "nowhere"]


def second_has_other_steps():
    hosts_of_their_own()
    if os.environ["RANK"] == "1":
        sys.argv += ["-s", "2"]


def second_has_no_such_network():
    hosts_of_their_own()
    if os.environ["RANK"] == "1":
        os.environ["GLOO_SOCKET_IFNAME"] = "eth77"


def second_has_no_room_for_data():
    hosts_of_their_own()
    if os.environ["RANK"] == "1":
        sys.argv += ["--data-dir", "/proc/nowhere"]


def second_has_other_weights():
    from pipetutor.train import joining, trainers

    hosts_of_their_own()
    Path(name := f"weights{os.environ['RANK']}").write_text(name)
    sys.argv += ["--weights", name]
    trainers.load_weights = joining.check_weights = lambda *_: None


def second_would_take_gpus():
    from pipetutor.system.gpus import Gpus
    from pipetutor.train import joining

    hosts_of_their_own()
    sys.argv.remove("--backend")
    sys.argv.remove("gloo")
    joining.gpus = lambda ranks: Gpus(int(os.environ["RANK"]))


@pytest.mark.parametrize(
    "patch, first, second",
    [
        (
            second_has_no_checkpoint,
            ["rank 1 on localhost: nowhere holds no checkpoint"],
            ["nowhere holds no checkpoint"],
        ),
        (both_have_no_checkpoint, ["nowhere holds no checkpoint"], ["nowhere holds no checkpoint"]),
        (
            second_has_no_such_network,
            ["rank 1 on localhost: GLOO_SOCKET_IFNAME is eth77"],
            ["GLOO_SOCKET_IFNAME is eth77"],
        ),
        (
            second_has_no_room_for_data,
            ["rank 1 on localhost: cannot write the synthetic"],
            ["cannot write the synthetic"],
        ),
        (
            second_has_other_steps,
            *[["rank 1 on localhost: steps is 2 here and 1 at the first rank: all hosts need"]] * 2,
        ),
        (
            second_has_other_weights,
            *[["rank 1 on localhost: sha256 of the weights is not what it is at the first"]] * 2,
        ),
        (
            second_would_take_gpus,
            *[["rank 1 on localhost: its host would compute with nccl, and the first rank's with gloo"]] * 2,
        ),
    ],
)
def test_what_one_host_refuses_ends_all_and_is_told_on_each(patch, first, second, runs):
    with pytest.raises(RankFailed, match=r"exit codes \[2, 2\]") as refusal:
        train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=patch)
    for rank, wanted in enumerate((first, second)):
        lines = said(refusal, runs, rank)
        assert len(lines) == len(wanted) and all(map(str.startswith, lines, wanted)), lines


def where_another_listens():
    os.environ["MASTER_PORT"] = Path("port").read_text()
    agreement.PATIENCE_SECONDS = 1.0


@pytest.mark.parametrize("listener", ["socket", "run"])
def test_a_taken_port_is_told_in_a_line(listener, runs):
    """Of a program that says nothing, and of another run, whose ranks have met in torch's store."""
    runs.mkdir()
    with contextlib.ExitStack() as stack:
        if listener == "socket":
            port = stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
        else:
            code = (
                "import sys; from torch.distributed import TCPStore; store = TCPStore('127.0.0.1', 0, is_master=True)"
            )
            command = [sys.executable, "-c", f"{code}; print(store.port, flush=True); sys.stdin.read()"]
            other = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            port = int(other.stdout.readline())
            stack.callback(other.stdin.close)
        (runs / "port").write_text(str(port))
        with pytest.raises(RankFailed, match=r"exit codes \[2, 0\]") as refusal:
            train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=where_another_listens)
    line = f"port {port} is taken, maybe by another run: take another one (--master_port {port + 1}; "
    line += f"for srun, MASTER_PORT={port + 1} in the environment)"
    assert said(refusal, runs, 0) == [line] and not said(refusal, runs, 1)


def late(rank: int) -> None:
    """Let this rank come when the other one has said that it waits."""
    hosts_of_their_own()
    agreement.QUIET_SECONDS = 0.0
    other = Path(f"rank{1 - rank}.txt")
    while os.environ["RANK"] == str(rank) and not (other.exists() and " waits for " in other.read_text()):
        time.sleep(0.05)


@pytest.mark.parametrize("rank, words", [(0, "the first rank at 127.0.0.1:"), (1, "rank 1: start the command on")])
def test_a_rank_that_waits_for_another_host_says_so(rank, words, runs):
    """And what to look for: the address is one that other hosts have for themselves."""
    run = train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=functools.partial(late, rank))
    assert len(run.losses) == 1
    line = next(line for line in (runs / f"rank{1 - rank}.txt").read_text().splitlines() if " waits for " in line)
    assert line.startswith(f"pipetutor: localhost waits for {words}")
    assert line.endswith(
        "127.0.0.1 is each host itself: give --master_addr (for srun, MASTER_ADDR in the environment) the address by "
        "which others reach the first host"
    )


def second_alone_has_no_checkpoint():
    if os.environ["RANK"] == "1":
        sys.argv += ["--resume", "nowhere"]


def test_on_one_host_the_first_rank_speaks_for_all(runs):
    with pytest.raises(RankFailed, match=r"exit codes \[2, 0\]") as refusal:
        train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=second_alone_has_no_checkpoint)
    (line,) = said(refusal, runs, 0)
    assert line.startswith(f"rank 1 on {socket.gethostname()}: nowhere holds no checkpoint")
    assert not said(refusal, runs, 1)


def second_is_of_another_run():
    from pipetutor.train import job

    agreement.PATIENCE_SECONDS = 1.0
    job.default_pg_timeout = timedelta(seconds=3)
    if os.environ["RANK"] == "1":
        os.getppid = lambda: 0


def test_a_rank_of_another_run_with_the_same_port_is_not_taken(runs):
    with pytest.raises(RankFailed, match=r"exit codes \[2, 0\]") as refusal:
        train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=second_is_of_another_run)
    assert said(refusal, runs, 0) == ["rank 1: did not come in time"]


def without_a_launcher():
    del os.environ["LOCAL_SIZE"]  # as below torchrun, or in a notebook there


def test_a_rank_that_no_launcher_started_says_what_to_start(runs):
    with pytest.raises(RankFailed, match=r"exit codes \[2, 2\]") as refusal:
        train(runs, *SMALL, stages=2, config=SMALL_SGD, patch=without_a_launcher)
    (line,) = said(refusal, runs, 1)
    assert line.startswith("no launcher has started this rank (LOCAL_SIZE is not set): use deepspeed --num_gpus 2 ")


HOST = """
    hostname {name}
    printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n{other}\\n' > hosts{rank}
    mount --bind hosts{rank} /etc/hosts
    ip address add 10.77.0.{number}/24 dev veth{rank}
    ip link set lo up
    ip link set veth{rank} up
    export RANK={rank} CROSS_RANK={rank} WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_SIZE=1 MASTER_ADDR=first MASTER_PORT=29500
    {python} -m pipetutor.train -p 2 {arguments} > rank{rank}.txt 2>&1
    echo $? > status{rank}
"""


def test_two_machines_whose_names_mean_127_0_1_1(runs):
    """As Debian has it in /etc/hosts: two networks, joined by a cable, and two commands."""
    cable = "unshare -Urnmu ip link add veth0 type veth peer name veth1"
    allowed = subprocess.run(["sh", "-c", cable], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"this machine allows no networks of a test's own: {allowed.stderr.strip()}")
    runs.mkdir()
    (runs / "small.json").write_text(json.dumps(SMALL_SGD))
    arguments = "-s 1 --model mobilenet_v3_small --deepspeed_config small.json"
    hosts = [("first", "10.77.0.2 second"), ("second", "10.77.0.1 first")]
    for rank, (name, other) in enumerate(hosts):
        python = shlex.quote(sys.executable)
        fields = dict(rank=rank, number=rank + 1, python=python, arguments=arguments)
        (runs / f"host{rank}.sh").write_text(textwrap.dedent(HOST).format(name=name, other=other, **fields))
    join = """
        mkfifo ready go
        unshare -nmu sh -c 'echo > ready; read _ < go; . ./host1.sh' &
        read _ < ready
        ip link add veth0 type veth peer name veth1 netns $!
        echo > go
        . ./host0.sh
        wait
    """
    path = os.pathsep.join([str(Path(agreement.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    subprocess.run(["unshare", "-Urnmu", "sh", "-c", textwrap.dedent(join)], cwd=runs, env=env, timeout=HANGS)
    texts = [(runs / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert [(runs / f"status{rank}").read_text() for rank in (0, 1)] == ["0\n"] * 2, texts
    assert "step:   1 /   1" in texts[0]
