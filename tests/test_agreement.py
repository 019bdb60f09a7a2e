"""Ranks that agree before they meet: on one plan, or on why there is none; ranks on hosts of their own are played."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_SGD, RankFailed, train

from pipetutor import agreement

SMALL = ["-s", 1, "--model", "mobilenet_v3_small"]


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
    from pipetutor import train as module

    hosts_of_their_own()
    Path(name := f"weights{os.environ['RANK']}").write_text(name)
    sys.argv += ["--weights", name]
    module.load_weights = lambda *_: None


def second_would_take_gpus():
    from pipetutor import train as module
    from pipetutor.machine import Gpus

    hosts_of_their_own()
    sys.argv.remove("--backend")
    sys.argv.remove("gloo")
    module.gpus = lambda ranks: Gpus(int(os.environ["RANK"]))


def a_machine_of_its_own():
    """As a rank in another machine's network would be: with a name there that means every machine itself."""
    hosts_of_their_own()
    stat = os.stat
    os.stat = lambda path, **how: (
        os.stat_result([int(os.environ["RANK"])] * 10) if "/ns/net" in str(path) else stat(path, **how)
    )


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
        (
            a_machine_of_its_own,
            *[["rank 0 on localhost, rank 1 on localhost: the other hosts would look for it at 127.0.0.1"]] * 2,
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
    line = f"port {port} is taken, maybe by another run: take another one (deepspeed --master_port {port + 1})"
    assert said(refusal, runs, 0) == [line] and not said(refusal, runs, 1)
