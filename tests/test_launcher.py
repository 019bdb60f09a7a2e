"""Real runs: what they compute, how they fail, and that nothing of them stays."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from conftest import HANGS, SMALL, SMALL_SGD, RankFailed, in_ranks, processes_of, train, wait_until

from pipetutor import Run, RunFailed, launch
from pipetutor.core import records
from pipetutor.core.records import STEPS, read_lines
from pipetutor.processes.environment import free_port


def script(runs: Path, body: str) -> subprocess.Popen:
    """Start a Python process that stands for a kernel.

    A shell starts background jobs with SIGINT ignored, and their children inherit it; a kernel does not ignore it.
    """
    head = f"from pipetutor import launch\nSMALL = {SMALL!r}\nRUNS = {str(runs)!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(body)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_a_step(runs: Path, kernel: subprocess.Popen) -> None:
    def done():
        return any(list(read_lines(directory / STEPS)) for directory in runs.glob("*-p*"))

    wait_until(lambda: done() or kernel.poll() is not None)
    assert done(), "the kernel has ended"


def ranks_of(runs: Path) -> dict[int, psutil.Process]:
    found = {}
    for process in processes_of(runs.parent):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "pipetutor.train" in process.cmdline() and "RANK" in process.environ():
                found[int(process.environ()["RANK"])] = process
    return found


HEARTBEATS = ["heartbeat_rank0.json", "heartbeat_rank1.json"]
LONG = "launch(stages=2, steps=10_000, model='mobilenet_v3_small', config=SMALL, runs_dir=RUNS)"


def test_a_run_is_recorded_and_the_printed_command_does_the_same_work_alone(runs, capsys):
    place = runs.parent / "a path with spaces"
    place.mkdir()
    how = dict(model="mobilenet_v3_small", partition="uniform", dropout=0.0, config=SMALL)
    run = launch(steps=2, **how, runs_dir=place)
    again = Run.load(run.directory)
    assert again == run and run.samples_per_second > 0 and len(run.seconds) == 2
    assert run.details["result"]["loss"] == run.losses[-1] and run.details["config"]["train_batch_size"] == 4
    assert run.details["versions"]["deepspeed"] == "0.19.8" and run.details["device"] == "cpu"
    assert (run.layers[0], run.layers[-1]) == ("Conv2dNormActivation", "Linear")
    assert sorted(path.name for path in run.directory.glob("*.json")) == ["config.json", *HEARTBEATS, "run.json"]
    assert sorted(path.name for path in run.directory.glob("logs/*")) == ["rank0.log", "rank1.log"]
    assert "'a path with spaces" in run.command
    with pytest.raises(ValueError, match="holds no run"):
        Run.load(runs)
    assert run.command in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")}
    said = subprocess.run(run.command, shell=True, check=True, timeout=HANGS, capture_output=True, text=True).stdout
    assert f"step:   2 /   2 loss: {run.losses[-1]:.6f}" in said, "it is seen where it was typed"
    again = Run.load(run.directory.with_name(f"{run.directory.name}-again"))
    assert again.losses == run.losses and again.status == "finished"
    assert {path: path.stat().st_mtime_ns for path in run.directory.rglob("*")} == before


def test_a_free_port_is_none_that_another_connection_gets():
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(free_port() < least for _ in range(20))


def test_twelve_that_ask_at_once_get_ports_of_their_own():
    """Though all of them draw the same numbers."""
    code = """
        import random, sys
        drawn = random.Random(1)
        random.SystemRandom = lambda: drawn
        from pipetutor.processes.environment import free_port
        print(free_port(), flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    all_at_once = [subprocess.Popen(command, **pipes) for _ in range(12)]
    try:
        ports = [int(process.stdout.readline()) for process in all_at_once]
    finally:
        for process in all_at_once:
            process.communicate(timeout=HANGS)
    assert len(set(ports)) == 12, ports


def test_a_kept_port_can_be_listened_at():
    port = free_port()
    with socket.create_server(("", port)), pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("", port))


def test_two_launches_at_once_with_port_29500_taken(runs):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        call = "launch(stages=1, steps=1, model='mobilenet_v3_small', config=SMALL, runs_dir=RUNS)"
        both = [script(runs, call) for _ in range(2)]
        assert [process.wait(HANGS) for process in both] == [0, 0]
    assert len(list(runs.iterdir())) == 2


@pytest.fixture
def stand_ins(runs, monkeypatch):
    """Ranks that say what ranks say, for ever, and load no torch: who starts, watches and ends them cannot tell."""
    in_ranks(
        runs.parent,
        monkeypatch,
        """
        import itertools, sys, time
        from pathlib import Path
        from pipetutor.core import records
        from pipetutor.processes.heartbeat import Heartbeat
        from pipetutor.schedule.orders import Instruction
        sys.argv = sys.orig_argv  # as Python sets it behind this
        directory, rank = Path(sys.argv[sys.argv.index("--run-dir") + 1]), int(os.environ["RANK"])
        heart = Heartbeat(directory, rank)
        if rank == 0:
            records.update(directory, status="running")
            steps = records.StepWriter(directory, 4)
        for step in itertools.count(1):
            heart.enter("training", step)
            heart.before(Instruction("ForwardPass", 0, 0))
            time.sleep(0.1)
            if rank == 0:
                steps.write(step, 2.3, 0.1)
        """,
    )


def test_without_a_compiler_it_still_trains(runs, monkeypatch):
    empty = runs.parent / "no compiler here"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(empty))
    assert shutil.which("g++") is None
    run = launch(stages=2, steps=1, model="mobilenet_v3_small", config=SMALL, runs_dir=runs)
    assert len(run.losses) == 1 and not list(empty.iterdir())


def test_a_rank_that_raises_is_named(runs, monkeypatch):
    """Its own words are shown, not its neighbour's complaint that the connection was closed."""
    in_ranks(
        runs.parent,
        monkeypatch,
        """
        import torch.nn as nn
        calls, forward = [], nn.CrossEntropyLoss.forward
        def failing(self, *args):
            calls.append(1)
            if len(calls) > 3:
                raise ArithmeticError("the loss of the test")
            return forward(self, *args)
        nn.CrossEntropyLoss.forward = failing
        """,
    )
    kernel = script(runs, LONG)
    wait_until(lambda: any(runs.glob("*/failure_rank1.json")))
    _, errors = kernel.communicate(timeout=HANGS)
    assert kernel.returncode == 1
    assert "rank 1 failed first: ArithmeticError: the loss of the test (exit code 1)" in errors
    assert "logs/rank1.log" in errors and "RunFailed" in errors
    assert json.loads(next(runs.glob("*/run.json")).read_text())["status"] == "failed"


def test_a_rank_that_is_killed_is_named_and_the_others_end(runs, stand_ins):
    kernel = script(runs, LONG)
    wait_for_a_step(runs, kernel)
    ranks_of(runs)[1].kill()
    _, errors = kernel.communicate(timeout=HANGS)
    assert "rank 1 failed first: killed by SIGKILL (exit code -9), at " in errors, errors
    assert not processes_of(runs.parent)


@pytest.mark.parametrize("end", ["interrupt", "kill"])
def test_nothing_outlives_the_kernel(runs, stand_ins, end):
    kernel = script(runs, LONG)
    wait_for_a_step(runs, kernel)
    assert len(ranks_of(runs)) == 2
    kernel.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    wait_until(lambda: not [p for p in processes_of(runs.parent) if p.pid != kernel.pid])
    _, errors = kernel.communicate(timeout=HANGS)
    assert ("KeyboardInterrupt" in errors) == (end == "interrupt")
    assert json.loads(next(runs.glob("*/run.json")).read_text())["status"] == "interrupted"


def test_children_that_ignore_signals_and_leave_the_session_are_ended_too(runs, monkeypatch):
    in_ranks(
        runs.parent,
        monkeypatch,
        """
        import subprocess, sys
        code = "import signal, time, os; signal.signal(15, signal.SIG_IGN); os.setsid(); time.sleep(600)"
        clean = {name: value for name, value in os.environ.items() if name != "RANK"}
        subprocess.Popen([sys.executable, "-c", code], env=clean)
        """,
    )
    kernel = script(runs, LONG)
    wait_for_a_step(runs, kernel)
    assert any("os.setsid()" in " ".join(p.cmdline()) for p in processes_of(runs.parent))
    kernel.kill()
    kernel.communicate()
    wait_until(lambda: not processes_of(runs.parent))


def test_papermill_stopped_leaves_nothing(runs, stand_ins, tmp_path):
    import nbformat

    cell = f"from pipetutor import launch\nlaunch(steps=10_000, config={SMALL!r}, runs_dir={str(runs)!r})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(notebook, tmp_path / "long.ipynb")
    papermill = subprocess.Popen(
        [sys.executable, "-m", "papermill", "-k", "python3", "--cwd", ".", "long.ipynb", "out.ipynb"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_a_step(runs, papermill)
    papermill.kill()
    papermill.wait()
    # The kernel notices that its parent is gone, and the supervisor that the kernel is.
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("place", ["file", "full"])
def test_runs_that_cannot_be_written_are_a_clear_error(runs, monkeypatch, place):
    if place == "file":
        runs.write_text("not a directory")
    else:
        real = Path.write_text

        def full(path, *args, **kwargs):
            real(path, "half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
    advice = "(free the disk, or )?give another runs_dir"
    with pytest.raises(ValueError, match=rf"cannot write runs to .*; {advice}$") as refusal:
        launch(runs_dir=runs)
    assert ("free the disk" in str(refusal.value)) == (place == "full"), "only where that helps"
    assert place == "file" or not [p for p in runs.glob("*/*")]


def deepspeed(*arguments, cwd, ranks=None, timeout=HANGS):
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    command += ["--num_gpus", str(ranks)] if ranks else []
    command += ["--master_port", str(free_port())]  # its own is for one run at a time
    return subprocess.run(
        [*command, "--module", "pipetutor.train", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def hear_of_children():
    """As torch's DataLoader does once it has workers; and with each step a child of the rank ends."""
    from pipetutor.core import loop

    signal.signal(signal.SIGCHLD, lambda *_: None)
    write = loop.records.StepWriter.write
    loop.records.StepWriter.write = lambda self, *step: (subprocess.run(["true"], check=True), write(self, *step))


def test_only_a_signal_that_asks_a_rank_to_end_ends_it(runs):
    run = train(runs, "-s", 2, "--model", "tiny", patch=hear_of_children)
    assert run.status == "finished" and len(run.losses) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_in_a_terminal_says_so_in_its_record(runs, number):
    (runs.parent / "small.json").write_text(json.dumps(SMALL_SGD))
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["--module", "pipetutor.train", "-s", "10000", "--model", "mobilenet_v3_small", "--run-dir", "ended"]
    terminal = subprocess.Popen(
        [*command, "--deepspeed_config", "small.json"],
        cwd=runs.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list(read_lines(runs.parent / "ended" / STEPS)))
    os.killpg(terminal.pid, number)
    said, _ = terminal.communicate(timeout=HANGS)
    wait_until(lambda: not processes_of(runs.parent))
    record = records.read(runs.parent / "ended")
    assert record["status"] == "interrupted" and record["done"] >= 1
    assert "[rank" not in said, "ranks end in silence"


def test_bad_input_on_the_command_line_is_one_line_and_status_2(runs):
    done = deepspeed("-p", "2", "--save-every", "1", cwd=runs.parent, ranks=2)
    lines = [line for line in done.stderr.splitlines() if "pipetutor:" in line]
    assert done.returncode == 2 and len(lines) == 1 and "--save-every needs a place to write to" in lines[0], (
        done.stderr
    )
    assert "Traceback" not in done.stderr + done.stdout


def test_a_run_directory_that_cannot_be_written_is_a_clear_error(runs):
    (runs.parent / "file").write_text("in the way")
    with pytest.raises(RankFailed) as caught:
        train(runs.parent, "--model", "tiny", "--run-dir", "file/here")
    said = [line for line in str(caught.value).splitlines() if line.startswith("pipetutor:")]
    assert said == ["pipetutor: cannot write --run-dir file/here: Not a directory; give another directory"]


def test_a_run_directory_that_holds_another_run_is_refused_and_left_as_it_is(runs):
    quick = ["-s", 1, "--model", "tiny"]
    run = train(runs / "a", *quick, stages=2)
    assert run.details["done"] == 1, "the last step that it completed"
    before = {path.name: path.read_bytes() for path in run.directory.glob("*.json*")}
    with pytest.raises(RankFailed, match="exit codes ") as caught:
        train(runs / "a", *quick, stages=2)
    (line,) = (line for line in str(caught.value).splitlines() if line.startswith("pipetutor:"))
    assert line == (
        f"pipetutor: --run-dir {runs / 'a'} holds a run already (status finished, 1 step): give another --run-dir"
    )
    assert {path.name: path.read_bytes() for path in run.directory.glob("*.json*")} == before
    train(runs / "b", *quick, "--save-every", 1)
    with pytest.raises(RankFailed, match=r"step-000001\): give another --run-dir, or go on with it: --resume"):
        train(runs / "b", *quick, "--save-every", 1)
    with pytest.raises(RankFailed, match=r"holds a run already \(status finished, 1 step\): give another"):
        train(runs / "a", "-s", 2, "--model", "tiny", "--resume", runs / "b")


def test_a_run_directory_whose_run_came_to_nothing_can_be_given_again(runs):
    quick = ["-s", 1, "--model", "tiny"]
    with pytest.raises(RankFailed, match="ragged micro-batch"):
        train(runs, *quick, "--fault", "ragged:rank=0,step=1")
    assert records.read(runs)["status"] == "failed" and (runs / "failure_rank0.json").exists()
    assert train(runs, *quick).status == "finished" and not (runs / "failure_rank0.json").exists()


@pytest.mark.parametrize("stages", [2, 0])
def test_the_references_command_lines_work(runs, stages):
    """`deepspeed train.py --deepspeed_config=ds_config.json -p 2 --steps=200`, here for one step of a small batch."""
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}},
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
    }
    (runs.parent / "ds_config.json").write_text(json.dumps(config))
    arguments = ["--deepspeed_config=ds_config.json", "-p", str(stages), "--steps=1", "--run-dir", "recorded"]
    done = deepspeed(*arguments, cwd=runs.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = Run.load(runs.parent / "recorded")
    assert run.train_batch == 16 and run.status == "finished" and run.stages == stages
    assert 2.2 < run.losses[0] < 2.4
    assert "--deepspeed_config=ds_config.json" in run.command


def test_two_hosts_without_ssh(runs):
    """README's command for several hosts: this machine under two names, and two launchers that know of each other."""
    (runs.parent / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    (runs.parent / "small.json").write_text(json.dumps(SMALL_SGD))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    train = ["--module", "pipetutor.train", "-p", "2", "-s", "2", "--model", "mobilenet_v3_small"]
    train += ["--deepspeed_config", "small.json", "--run-dir", "shared"]
    hosts = [
        subprocess.Popen([*command, "--node_rank", str(number), *train], cwd=runs.parent, stdout=subprocess.PIPE)
        for number in (0, 1)
    ]
    try:
        said = [host.communicate(timeout=HANGS)[0] for host in hosts]
    finally:
        for host in hosts:
            host.terminate()
    assert [host.returncode for host in hosts] == [0, 0], said
    run = Run.load(runs.parent / "shared")
    assert run.status == "finished" and run.stages == 2 and len(run.losses) == 2
    assert "local_rank" not in run.command


def test_a_kernel_that_is_itself_a_rank_of_something_launches_as_any_other(runs, monkeypatch):
    """As in a job of torchrun or SLURM, whose variables the kernel has inherited."""
    job = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"}
    for name, value in (job | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    run = launch(stages=2, steps=1, model="mobilenet_v3_small", config=SMALL, runs_dir=runs)
    assert len(run.losses) == 1


def test_a_failed_run_raises_in_the_cell_that_launched_it(runs, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "no such accelerator")
    with pytest.raises(RunFailed, match="DS_ACCELERATOR must be one of"):
        launch(steps=1, config=SMALL, runs_dir=runs)
