"""What machines and users bring along, and complain of elsewhere: Pipetutor works as it does without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from conftest import HANGS, SMALL
from test_supervise import run

from pipetutor import launch
from pipetutor.certify import certificate
from pipetutor.core import records
from pipetutor.figures import plots, plots_timeline
from pipetutor.lessons import hazards
from pipetutor.processes import environment, supervise
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.supervise import Progress

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
        ({"GLOO_SOCKET_IFNAME": cpu_environment(1).get("GLOO_SOCKET_IFNAME", "")}, "not asked"),
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
    monkeypatch.setattr(certificate, "run_job", lambda *job: jobs.append(job) or [])
    certificate.certify(["alexnet"], [1], runs_dir=tmp_path)
    assert jobs[0][3]["GLOO_SOCKET_IFNAME"] == environment.LOOPBACK and jobs[0][3]["OMP_NUM_THREADS"] == "1"


def test_files_of_a_learner_that_are_called_as_modules_are_none_of_ours(runs):
    """A kernel has loaded Python's modules before it looks into its directory; its ranks would look there first."""
    for name in ("config", "queue", "random", "statistics", "torch", "types"):
        Path(f"{name}.py").write_text("raise ImportError('this is the module of a learner')")
    assert len(launch(1, steps=1, model="mobilenet_v3_small", config=SMALL, runs_dir=runs).losses) == 1
    assert hazards.play("A")[0].did == "looks: nothing there"
    assert [rank["images"] for rank in hazards.barrier(ranks=1, runs_dir=runs)] == [2000]


def test_a_site_whose_python_greets_is_no_matter(runs, monkeypatch):
    """What stands in a sitecustomize.py is run by every Python: by the supervisor's, too, whose words are read."""
    (runs.parent / "sitecustomize.py").write_text("print('welcome to our cluster', flush=True)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.parent), os.environ.get("PYTHONPATH", "")]))
    _, report = run(runs, "pass")
    assert report["code"] == 0 and len(report["ended"]) == 1
    assert [move.did for move in hazards.play("AA")] == ["looks: nothing there", "makes the folder"]


def test_a_program_without_a_console_has_no_bar(runs, monkeypatch):
    """Python has no sys.stderr then."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run(runs, "import sys; open(sys.argv[1] + '/lines.jsonl', 'w').write('{}\\n')")[1]["code"] == 0


def python(code: str, *flags: str, cwd: Path | None = None, **own: str) -> subprocess.CompletedProcess[str]:
    """Run a program with this environment and what is added to it."""
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, env=os.environ | own, capture_output=True, text=True, timeout=HANGS)


def test_a_cell_has_its_bar_where_bars_are_switched_off(tmp_path):
    """A cell that says nothing for long is taken for one that hangs."""
    code = """
import sys, types
sys.modules["ipykernel"] = types.ModuleType("ipykernel")
from pipetutor.processes import watch
watch._CellBar.display = lambda *_: print("shown")
watch._bar(3, "steps")
"""
    assert python(code, TQDM_DISABLE="1").stdout == "shown\n"


@pytest.mark.parametrize("flags, own", [(["-O"], {}), ([], {"PYTHONOPTIMIZE": "2"})])
def test_without_asserts_nothing_begins(flags, own):
    """The checks of the exercises are asserts."""
    done = python("import pipetutor", *flags, **own)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: Python was started with -O or PYTHONOPTIMIZE, and")


BOUND = "import os\n{}\nimport torch\ntorch.ones(9).sum()\nprint(len(os.sched_getaffinity(0)))"


@pytest.mark.parametrize(
    "name, value", [("OMP_PROC_BIND", "true"), ("GOMP_CPU_AFFINITY", "0"), ("OMP_PLACES", "cores")]
)
def test_threads_are_not_bound_to_cores(name, value):
    """The first thread of every rank would be bound to the same core, and a kernel's children with it."""
    cores = len(os.sched_getaffinity(0))
    if int(python(BOUND.format(""), OMP_PROC_BIND="true").stdout) == cores:
        pytest.skip("there is one core, or no binding to it")
    assert int(python(BOUND.format("import pipetutor"), **{name: value}).stdout) == cores


def test_a_kernel_that_loads_torch_first_is_not_bound_either():
    execute = f"""
from nbclient import execute
from nbformat.v4 import new_code_cell, new_notebook
notebook = new_notebook(cells=[new_code_cell({BOUND.format("")!r})])
print(execute(notebook, kernel_name="python3").cells[0].outputs[0].text)
"""
    assert int(python(execute, OMP_PROC_BIND="true").stdout) == len(os.sched_getaffinity(0))


def test_a_deleted_working_directory_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for place in (Path("runs"), tmp_path / "runs"):
        with pytest.raises(ValueError, match="the working directory was deleted: change to one that is there"):
            records.create(place, "p2r1")


def test_the_time_of_a_suspended_machine_is_no_stall(tmp_path, monkeypatch):
    """Containers that are paused and virtual machines that are put to sleep have a clock that goes on."""
    now = [0.0]
    monkeypatch.setattr(supervise.time, "monotonic", lambda: now[0])
    progress = Progress(tmp_path, ranks=1, deadline=300)

    def stalls(seconds: float) -> bool:
        now[0] += seconds
        return progress.stalled() is not None

    assert not stalls(1) and not stalls(3600) and not any(stalls(1) for _ in range(100))
    assert any(stalls(1) for _ in range(100))  # a stall is one, nevertheless


OTHERS = {
    "text.usetex": True,
    "font.family": ["a font that nobody has"],
    "axes.facecolor": "black",
    "axes.grid": True,
    "figure.dpi": 300,
    "lines.linewidth": 9,
    "savefig.bbox": "tight",
}


def test_figures_do_not_depend_on_a_users_settings(monkeypatch):
    orders = [[[3, 1, 4], [0, 2, 5]]]
    ours = plots.passes(orders, micro_batch=2)._repr_png_()
    with matplotlib.rc_context(OTHERS):
        assert plots.passes(orders, micro_batch=2)._repr_png_() == ours
        assert matplotlib.rcParams["axes.facecolor"] == "black"  # the user's own figures keep them


@pytest.mark.parametrize("module", [plots, plots_timeline])
def test_all_figures_are_drawn_in_our_style(module):
    drawn = [each for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
    plain = [
        each.__name__ for each in drawn if not each.__name__.startswith("_") and not hasattr(each, "__wrapped__")
    ]
    assert drawn and not plain
