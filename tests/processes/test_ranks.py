"""A learner's own function in real ranks: what it returns and prints, where it fails, and that nothing stays."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import HANGS, processes_of, wait_until
from jupyter_client.manager import start_new_kernel

from pipetutor.processes.ranks import LONGEST, SAID, Call, _printed, _Said, on_ranks, outcomes
from pipetutor.processes.watch import RunFailed


@pytest.fixture(autouse=True)
def folder(runs, monkeypatch):
    """Where the jobs of a test are, by whose path its processes are known."""
    monkeypatch.setenv("TMPDIR", str(runs.parent))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield runs.parent
    monkeypatch.setattr("tempfile.tempdir", None)


def exchange(rank, ranks, start):
    """Send a number around; speak before and after it, and at the end without ending the line."""
    import torch
    import torch.distributed as dist

    print("sends\nreceives")
    x = torch.tensor([float(start + rank)])
    sending = dist.isend(x, (rank + 1) % ranks)
    y = torch.empty(1)
    dist.recv(y, (rank - 1) % ranks)
    sending.wait()
    print("done", end="")
    return rank, ranks, y, torch.get_num_threads(), dist.get_backend()


def test_ranks_exchange_and_what_they_print_is_shown(capsys, folder):
    found = on_ranks(exchange, 3, 10)
    assert [(r, n, y.item(), *more) for r, n, y, *more in found] == [
        (0, 3, 12.0, 1, "gloo"),
        (1, 3, 10.0, 1, "gloo"),
        (2, 3, 11.0, 1, "gloo"),
    ]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rank")]  # the bar beside them
    assert sorted(said) == [f"rank {r}: {word}" for r in range(3) for word in ("done", "receives", "sends")]
    for rank in range(3):
        assert [line for line in said if f"rank {rank}" in line][-1].endswith("done")
    assert not processes_of(folder) and not any(folder.iterdir()), "nothing is kept"


def hold(rank, ranks):
    import torch
    import torch.distributed as dist

    x = torch.zeros(1)
    print("waits")
    if rank < 2:
        dist.recv(x, 1 - rank)


def test_a_deadlock_is_ended_and_says_where_each_rank_stands(capsys):
    with pytest.raises(RunFailed) as failed:
        on_ranks(hold, 3, deadline=2)
    line = hold.__code__.co_firstlineno + 7
    assert str(failed.value).splitlines() == [
        "not every rank has returned within 2 s, and all were ended. When that was over,",
        *(
            f"    rank {r} stands at: dist.recv(x, 1 - rank)   (line {line} of test_ranks.py, in hold)"
            for r in (0, 1)
        ),
        "    rank 2 has returned: has all that it sent been waited for?",
        "If they were only slow, give a longer deadline.",
    ]
    assert failed.value.directory is None and "rank 2: waits" in capsys.readouterr().out


def wait_in_vain(rank, ranks):
    import torch
    import torch.distributed as dist

    if rank == 1:
        dist.recv(torch.zeros(1), 0)


def test_a_rank_that_waits_for_one_that_has_returned_is_told_so_and_not_of_a_lost_connection():
    with pytest.raises(RunFailed) as failed:
        on_ranks(wait_in_vain, 2, deadline=2)
    returned = "    rank 0 has returned: has all that it sent been waited for?\n"
    assert f"{returned}    rank 1 stands at: dist.recv(torch.zeros(1), 0)" in str(failed.value)


REST = """
def rest(rank, ranks):
    import os, signal, time
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600 * rank)
"""


def test_a_rank_without_a_line_to_stand_at_is_told_in_words(folder):
    """Nobody receives, so that a rank that has returned owes nothing."""
    names = {}
    exec(compile(REST, "<frozen rest>", "exec"), names)
    (found,) = outcomes([Call(names["rest"], 3)], 2, "call", folder / "one")
    assert found.reason.splitlines()[1:4] == [
        "    rank 0 has returned",
        "    rank 1 does not say where it stands: its process may have been stopped",
        "    rank 2 still runs, but in none of your lines",
    ]


def multiply(x):
    return x @ x


def fail(rank, ranks):
    import torch
    import torch.distributed as dist

    if rank == 1:
        multiply(torch.zeros(2, 3))
    dist.barrier()


def test_what_a_rank_raises_is_told_by_its_own_lines():
    """The other one waits for it, and would have to be told that it is gone."""
    with pytest.raises(RunFailed) as failed:
        on_ranks(fail, 2)
    first, *lines = str(failed.value).splitlines()
    assert first.startswith("rank 1 raised RuntimeError: ") and "2x3 and 2x3" in first
    assert [line.partition("   (")[0] for line in lines] == [
        "    at: return x @ x",
        "    called at: multiply(torch.zeros(2, 3))",
    ]


def die(rank, ranks):
    import os

    os._exit(3)


def give(rank, ranks):
    return (number for number in range(3))


def test_a_rank_that_is_gone_and_one_whose_answer_cannot_be_sent_are_told():
    words = (
        r"rank \d: it ended without an answer, with status 3. Its process is gone\n    It was ended by the function"
    )
    with pytest.raises(RunFailed, match=words):
        on_ranks(die, 2)
    with pytest.raises(RunFailed, match=r"raised TypeError: what give returned cannot be sent to the notebook: "):
        on_ranks(give, 2)


def misfit(rank, ranks, shape, dtype):
    import torch
    import torch.distributed as dist

    if rank == 0:
        dist.send(torch.ones(4, 8), 1)
        dist.recv(torch.empty(1), 1)  # and finds that rank 1 is gone
    else:
        dist.recv(torch.empty(shape, dtype=getattr(torch, dtype)), 0)


@pytest.mark.parametrize("shape, dtype", [((3, 8), "float32"), ((4, 8), "float16")])
def test_a_message_that_does_not_fit_where_it_is_received_is_told_in_words(shape, dtype):
    """gloo ends the process then."""
    with pytest.raises(RunFailed) as failed:
        on_ranks(misfit, 2, shape, dtype)
    lines = str(failed.value).splitlines()
    assert lines[0] == "rank 1: it ended without an answer, by signal 6 (Aborted). Its process is gone"
    assert lines[1].startswith(
        "    it stood at: dist.recv(torch.empty(shape, dtype=getattr(torch, dtype)), 0)   (line"
    )
    assert any(line.startswith("    it said: ") and "doesn't match expected size" in line for line in lines), lines
    assert lines[-1] == "Did it receive into a tensor of another shape or dtype than what was sent?"


def chatter(rank, ranks, lines):
    print("x" * 50_000)
    for number in range(lines):
        print("line", number)
    if rank:
        while True:
            print(end="y" * 10_000)


def test_of_endless_printing_the_first_and_the_last_lines_are_kept(capsys, folder):
    """Also on the disk, while it goes on."""
    with pytest.raises(RunFailed, match="rank 1 stands at: "):
        on_ranks(chatter, 2, 12_345, deadline=3)
    said = capsys.readouterr().out.splitlines()
    for rank in range(2):
        mine = [line.removeprefix(f"rank {rank}: ") for line in said if line.startswith(f"rank {rank}: ")]
        assert mine == [
            "x" * LONGEST + " ...",
            *(f"line {number}" for number in range(99)),
            "... 12146 lines left out",
            *(f"line {number}" for number in range(12_245, 12_345)),
        ]
    (found,) = outcomes([Call(chatter, 1, (12_345,))], 60, "call", folder / "one")
    assert found.returned == [None]
    kept = sum(len(path.read_text().splitlines()) for path in (folder / "one" / "0").glob(f"{SAID}*"))
    assert 200 <= kept <= 300


@pytest.mark.parametrize("lines", [99, 100, 150, 199, 200, 299, 300])
def test_no_line_is_lost_without_a_word(lines, tmp_path):
    said = _Said(4, tmp_path)
    for number in range(lines):
        print(number, file=said)
    shown = _printed(tmp_path).splitlines()
    wanted = [f"rank 4: {number}" for number in range(lines)]
    if lines > 200:
        wanted[100:-100] = [f"rank 4: ... {lines - 200} lines left out"]
    assert shown == wanted


def test_the_lesson_shows_how_to_do_without(tmp_path):
    """Its program runs as it stands, but for the port, which somebody else may have."""
    notebook = json.loads((Path(__file__).parents[2] / "notebooks" / "01_engine.ipynb").read_text())
    text = next("".join(cell["source"]) for cell in notebook["cells"] if cell["id"] == "engine-without")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "message.py").write_text(program.replace("29500", str(port)))
    said = subprocess.run([sys.executable, "message.py"], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert said.returncode == 0, said.stderr
    assert sorted(said.stdout.splitlines()) == [f"rank {rank} has tensor([1., 1., 1.])" for rank in (0, 1)]


def test_no_call_is_made_after_one_that_fails(folder):
    calls = [Call(exchange, 2, (5,)), Call(exchange, 3, (6,)), Call(die, 1), Call(exchange, 2, (7,))]
    found = outcomes(calls, 60, "call", folder / "several")
    assert [(len(one.returned), bool(one.reason)) for one in found] == [(2, False), (3, False), (0, True)]


@pytest.mark.parametrize("way", ["send", "isend", "recv", "irecv"])
def test_a_rank_that_is_not_there_is_refused(way):
    with pytest.raises(RunFailed) as failed:
        on_ranks(stray, 1, way)
    first, line = str(failed.value).splitlines()
    assert first == f"rank 0 raised ValueError: {way} names rank 1, and the ranks are 0 to 0"
    assert line.startswith("    at: getattr(dist, way)(torch.zeros(1), rank + 1)")


def stray(rank, ranks, way):
    import torch
    import torch.distributed as dist

    getattr(dist, way)(torch.zeros(1), rank + 1)


LOCK = __import__("threading").Lock()


@pytest.mark.parametrize(
    "asked, words",
    [
        ((3, 2), "function is 3, but must be a function, such as def step(rank, ranks): ..."),
        ((die, 0), "ranks is 0, but must be a whole number of at least 1 and at most 16"),
        ((die, "2"), "ranks is '2', but must be a whole number"),
        (
            (exchange, 2),
            "every rank calls exchange(rank, ranks, ...) with its number, their count, which does not fit "
            "exchange(rank, ranks, start): missing a required argument: 'start'",
        ),
        ((die, 2, 7), "with its number, their count and 1 more argument, which does not fit die(rank, ranks): too"),
        ((exchange, 2, LOCK), "cannot be sent to other processes: cannot pickle '_thread.lock' object"),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_starts(asked, words, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ValueError, match=re.escape(words)):
        on_ranks(*asked)


def test_a_deadline_is_a_number():
    with pytest.raises(ValueError, match="deadline is 0, but must be a number above 0"):
        on_ranks(die, 1, deadline=0)


HELPER = "def twice(x):\n    return 2 * x if x < 5 else wrong\n"
CELLS = """import torch.distributed as dist
from helper import twice
from pipetutor.processes.ranks import on_ranks
factor = 10

class Answer:
    def __init__(self, value): self.value = value

def step(rank, ranks, x):
    return Answer(factor * twice(x) + rank)
"""


@pytest.fixture
def cell(folder):
    """Runs a cell in a real kernel, and returns all that it shows."""
    (folder / "helper.py").write_text(HELPER)
    (folder / "random.py").write_text("raise ImportError('the learner calls a file so')")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def show(source):
        found = []
        client.execute_interactive(textwrap.dedent(source), timeout=HANGS, output_hook=found.append)
        texts = [m["content"].get("text", "") + "\n".join(m["content"].get("traceback", [])) for m in found]
        return re.sub(r"\x1b\[[\d;]*m", "", "".join(texts))

    yield show
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    wait_until(lambda: not processes_of(folder))


def test_from_a_cell(cell):
    assert cell(CELLS) == ""
    shown = cell(
        "answers = on_ranks(step, 2, 3)\nprint([one.value for one in answers], isinstance(answers[0], Answer))"
    )
    assert shown.endswith("[60, 61] True\n")
    shown = cell("on_ranks(step, 2, 5)")
    assert (
        "----> 1 on_ranks(step, 2, 5)" in shown
        and "RunFailed: rank" in shown
        and ".py" not in shown.partition("RunF")[0]
    )
    assert "raised NameError: name 'wrong' is not defined" in shown
    assert "at: return 2 * x if x < 5 else wrong   (line 2 of helper.py, in twice)" in shown
    assert "called at: return Answer(factor * twice(x) + rank)   (line 10 of the cell, in step)" in shown
    assert cell("print(dist.is_initialized())") == "False\n", "the kernel itself joins nothing"


STUCK = """
import sys
from pipetutor.processes.ranks import on_ranks

def step(rank, ranks):
    import time
    open(f"begun{rank}", "w").close()
    time.sleep(600)

try:
    on_ranks(step, 2)
except KeyboardInterrupt as interrupt:
    print(interrupt)
    sys.exit(7)
"""


@pytest.mark.parametrize("end, code", [(signal.SIGINT, 7), (signal.SIGKILL, -9)])
def test_nothing_outlives_an_interrupt_or_the_kernel(end, code, folder):
    (folder / "stuck.py").write_text(STUCK)
    kernel = subprocess.Popen(
        [sys.executable, "stuck.py"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    wait_until(lambda: (folder / "begun0").exists() and (folder / "begun1").exists())
    assert len(processes_of(folder)) >= 4, "kernel, supervisor, job and ranks"
    os.kill(kernel.pid, end)
    said, _ = kernel.communicate(timeout=HANGS)
    assert kernel.returncode == code
    assert said == ("step is interrupted, and all its processes have ended\n" if code == 7 else "")
    wait_until(lambda: not processes_of(folder))
