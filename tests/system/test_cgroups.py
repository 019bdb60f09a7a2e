"""The share of a machine that a container leaves counts, not the machine."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import contest
from pipetutor.processes import environment
from pipetutor.processes.environment import cpu_environment, rank_environment
from pipetutor.system import cgroups, machine
from pipetutor.system.gpus import Gpus

GIGABYTE = 2**30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} {place} rw - cgroup cgroup rw,{controllers}"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A machine of 64 cores whose groups a test writes: mounts, the groups of this process, and their files."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    host = psutil.virtual_memory()._replace(total=256 * GIGABYTE, available=200 * GIGABYTE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)

    def write(mounts, groups, files):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *mounts]))
        (tmp_path / "proc/self/cgroup").write_text("\n".join(groups))
        for name, text in files.items():
            path = tmp_path / "sys/fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


def test_nothing_limits_a_machine_without_groups(fake):
    fake([], [], {})
    assert machine.cpu_cores() == 64
    assert machine.memory() == (256 * GIGABYTE, 200 * GIGABYTE)
    assert cgroups.oom_kills() is None, "nothing counts them"


def test_the_least_limit_of_nested_groups_counts(fake):
    files = {
        "cgroup/cpu.stat": "usage_usec 1",
        "cgroup/cpu.max": "900000 100000",
        "cgroup/jobs/cpu.max": "200000 100000",
        "cgroup/jobs/17/cpu.max": "max 100000",
        "cgroup/jobs/memory.max": 8 * GIGABYTE,
        "cgroup/jobs/memory.current": 7 * GIGABYTE,
        "cgroup/jobs/memory.stat": f"anon 1\ninactive_file {2 * GIGABYTE}\nactive_file 5",
        "cgroup/jobs/17/memory.max": "max",
        "cgroup/jobs/17/memory.current": GIGABYTE,
        "cgroup/jobs/17/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0",
        "cgroup/jobs/memory.events": "oom_kill 5",
    }
    fake([V2], ["0::/jobs/17"], files)
    assert machine.cpu_cores() == 2
    assert machine.memory() == (8 * GIGABYTE, 3 * GIGABYTE)
    assert cgroups.oom_kills() == 2


def test_inside_a_container_its_own_group_is_the_top(fake):
    fake([V2], ["0::/"], {"cgroup/cpu.max": "150000 100000", "cgroup/memory.max": 1, "cgroup/memory.current": 0})
    assert machine.cpu_cores() == 2, "a core and a half keep two busy"
    assert machine.memory() == (1, 1)


@pytest.mark.parametrize(
    ("top", "group"),
    [("/", "/docker/ab"), ("/docker/ab", "/docker/ab"), ("/docker/ab", "/docker/ab/docker/ab"), ("/", "/../else")],
)
def test_version_1_counts_however_the_container_sees_it(fake, top, group):
    place = "cgroup/cpu,cpuacct/docker/ab" if (top, group) == ("/", "/docker/ab") else "cgroup/cpu,cpuacct"
    files = {
        f"{place}/cpu.cfs_quota_us": 50_000,
        f"{place}/cpu.cfs_period_us": 100_000,
        f"{place.replace('cpu,cpuacct', 'memory')}/memory.limit_in_bytes": 4 * GIGABYTE,
        f"{place.replace('cpu,cpuacct', 'memory')}/memory.usage_in_bytes": 3 * GIGABYTE,
        f"{place.replace('cpu,cpuacct', 'memory')}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIGABYTE}",
        f"{place.replace('cpu,cpuacct', 'memory')}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1",
        "cgroup/cpu,cpuacct/cpu.shares": 1024,
    }
    mounts = [
        V1.format(top=top, place="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
        V1.format(top=top, place="/sys/fs/cgroup/memory", controllers="memory"),
        V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
    ]
    fake(mounts, [f"5:cpuacct,cpu:{group}", f"4:memory:{group}", "0::/"], files)
    assert machine.cpu_cores() == 1
    assert machine.memory() == (4 * GIGABYTE, 2 * GIGABYTE)
    assert cgroups.oom_kills() == 1


def test_no_limit_of_version_1_is_none(fake):
    mounts = [V1.format(top="/", place=f"/sys/fs/cgroup/{name}", controllers=name) for name in ("cpu", "memory")]
    files = {
        "cgroup/cpu/cpu.cfs_quota_us": -1,
        "cgroup/cpu/cpu.cfs_period_us": 100_000,
        "cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "cgroup/memory/memory.usage_in_bytes": 250 * GIGABYTE,
    }
    fake(mounts, ["3:cpu:/", "4:memory:/"], files)
    assert machine.cpu_cores() == 64
    assert machine.memory() == (256 * GIGABYTE, 200 * GIGABYTE)


@pytest.mark.parametrize(("cores", "threads"), [(2, "1"), (6, "3")])
def test_ranks_share_the_cores_of_the_container_however_they_are_started(fake, monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(environment, "gpus", lambda *about: Gpus(0, ""))
    fake([V2], ["0::/"], {"cgroup/cpu.max": f"{cores}00000 100000"})
    launched = rank_environment(0, 2, 29500)  # of DeepSpeed's launcher, too
    environment.prepare_rank(launched, ["--backend", "gloo"])
    rivals = contest.environment(contest.RIVALS["pipeline"], 0, 29500)
    assert {env["OMP_NUM_THREADS"] for env in (launched, cpu_environment(2), rivals)} == {threads}


def test_the_machine_is_described_as_the_container_that_it_is(fake):
    files = {"cgroup/cpu.max": "100000 100000", "cgroup/memory.max": 3 * GIGABYTE, "cgroup/memory.current": 0}
    fake([V2], ["0::/"], files)
    found = {what: (found, advice) for what, found, advice in machine.check()}
    assert found["CPU cores"][0] == "1" and "share one core" in found["CPU cores"][1]
    assert found["memory"][0] == "3 GiB" and "container" in found["memory"][1]


HERE = "import os, subprocess, sys\nfrom pipetutor.system import cgroups, machine\nbefore = cgroups.oom_kills()\n"
GREEDY = [sys.executable, "-c", "bytearray(400 * 2**20)"]


@pytest.fixture
def group():
    """Start a script in a group of one core and 200 MB, as Linux makes it here, and return what it prints."""
    made = []

    def path(controller):
        for text in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, own = text.split(":", 2)
            place = Path("/sys/fs/cgroup", controllers) if controllers else Path("/sys/fs/cgroup")
            if controller in controllers.split(",") or not controllers:
                return place / own.lstrip("/") / f"pipetutor-{os.getpid()}"
        return Path("/sys/fs/cgroup", f"pipetutor-{os.getpid()}")

    def limit(controller, old, new):
        place = path(controller)
        try:
            if place not in made:
                place.mkdir()
                made.append(place)
            for name, value in (old if (place / next(iter(old))).exists() else new).items():
                (place / name).write_text(value)
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return place / "cgroup.procs"

    def run(script):
        cpu = {"cpu.cfs_quota_us": "100000"}, {"cpu.max": "100000 100000"}
        memory = {"memory.limit_in_bytes": str(200 * 2**20)}, {"memory.max": str(200 * 2**20)}
        join = [limit("cpu", *cpu), limit("memory", *memory)]
        enter = f"import os\nfor path in {[str(path) for path in join]}: open(path, 'w').write(str(os.getpid()))\n"
        said = subprocess.run([sys.executable, "-c", enter + script], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        return said.stdout.split()

    yield run
    for place in made:
        place.rmdir()


def test_a_real_group_is_read(group):
    script = f"""{HERE}
status = subprocess.run({GREEDY}).returncode
print(machine.cpu_cores(), machine.memory().total, machine.memory().free, status, cgroups.oom_kills() - before)
"""
    cores, total, free, status, killed = map(int, group(script))
    assert cores == 1 and total == 200 * 2**20 and 50 * 2**20 < free < total
    assert (status, killed) == (-9, 1), "the kernel killed a process for want of memory, and says so"
