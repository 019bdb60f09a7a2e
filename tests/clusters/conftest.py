"""Two hosts on this machine, with sshd and Slurm of Debian's packages.

A host is a process with namespaces of its own: its network, which a cable joins to the other's; its name; its mounts,
so that /etc/ssh, /etc/slurm and /run are those of the test; and its process numbers, so that whatever runs there ends
with it. Nothing of the real machine is written to but the test's own directory, which all hosts share.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import HANGS, wait_until

from pipetutor.processes.starters import is_rank

BEGIN = """
    set -e
    mount -t tmpfs none /run
    mount --bind {own}/hosts /etc/hosts
    mount --bind {own}/ssh /etc/ssh
    mount --bind {shared}/slurm /etc/slurm
    mkdir -m 755 /run/sshd /run/munge
    hostname {name}
    ip link set lo up
    echo ready
    read _
    ip address add {address}/24 dev eth0
    ip link set eth0 up
    echo joined
    exec sleep infinity
"""
SSH = """
    Host *
        IdentityFile {shared}/key
        StrictHostKeyChecking no
        UserKnownHostsFile /dev/null
        LogLevel ERROR
"""
SSHD = """
    HostKey /etc/ssh/host_key
    AuthorizedKeysFile {shared}/key.pub
    PermitRootLogin prohibit-password
    StrictModes no
    UsePAM no
    PidFile none
"""
SLURM = """
    ClusterName=test
    SlurmctldHost={names[0]}
    SlurmUser=root
    StateSaveLocation={shared}/state
    SlurmdSpoolDir={shared}/spool-%n
    SlurmctldLogFile={shared}/slurmctld.log
    SlurmdLogFile={shared}/slurmd-%n.log
    SlurmctldPidFile=/run/slurmctld.pid
    SlurmdPidFile=/run/slurmd.pid
    ProctrackType=proctrack/linuxproc
    SelectType=select/cons_tres
    SlurmdParameters=config_overrides
    NodeName={list} CPUs=4 State=UNKNOWN
    PartitionName=all Nodes=ALL Default=YES
"""


@dataclass(frozen=True)
class Host:
    """One of the hosts.

    Attributes:
        name: its name, which every host knows.
        address: that of its end of the cable.
        pid: the number of its first process.
    """

    name: str
    address: str
    pid: int

    def command(self, *words: object) -> list[str]:
        """Return a command that runs these words there, in the working directory of the caller."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid"]
        return [*enter, "env", f"--chdir={Path.cwd()}", *map(str, words)]

    def run(self, *words: object, **how: object) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(self.command(*words), capture_output=True, text=True, timeout=HANGS, **how)

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks that run there, as the real machine sees them."""
        space, found = os.stat(f"/proc/{self.pid}/ns/pid").st_ino, []
        for process in psutil.process_iter():
            try:
                here = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == space
                if here and process.name() != "srun" and is_rank(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                continue
        return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[list[Host]]:
    """Two hosts, ``first`` and ``second``; their daemons are started by ``sshd`` and ``slurm``."""
    shared, names = tmp_path_factory.mktemp("cluster"), ["first", "second"]
    places = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
    known = "\n".join(f"{address} {name}" for name, address in places.items())
    fields = {"shared": shared, "names": names, "list": ",".join(names)}
    _write(shared / "slurm" / "slurm.conf", SLURM.format(**fields))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", shared / "key"], check=True)
    with contextlib.ExitStack() as stack:
        beginnings, found = [], []
        for name, address in places.items():
            own = shared / name
            _write(own / "hosts", f"127.0.0.1 localhost\n{known}")
            _write(own / "ssh" / "ssh_config", SSH.format(**fields))
            _write(own / "ssh" / "sshd_config", SSHD.format(**fields))
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own / "ssh" / "host_key"], check=True
            )
            code = BEGIN.format(own=own, name=name, address=address, **fields)
            spaces = ["unshare", "-nmup", "--fork", "--kill-child", "--mount-proc", "sh", "-c", code]
            host = subprocess.Popen(spaces, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(host.wait)
            stack.callback(host.kill)  # and with it, its first process and all others there
            assert host.stdout.readline() == "ready\n"
            (first,) = psutil.Process(host.pid).children()
            beginnings.append(host)
            found.append(Host(name, address, first.pid))
        cable = f"ip link add eth0 netns {found[0].pid} type veth peer name eth0 netns {found[1].pid}"
        subprocess.run(cable.split(), check=True)
        for host in beginnings:
            host.stdin.write("go\n")
            host.stdin.flush()
            assert host.stdout.readline() == "joined\n"
        yield found


def _serve(hosts: list[Host], *words: object) -> None:
    for host in hosts:
        done = host.run(*words)
        assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def sshd(hosts) -> list[Host]:
    """The hosts, each of which lets root log in from the other without a password."""
    _serve(hosts, "/usr/sbin/sshd")
    return hosts


@pytest.fixture(scope="module")
def slurm(hosts) -> list[Host]:
    """The hosts, as nodes of a Slurm cluster that is idle."""
    key = "umask 077; head -c 64 /dev/zero > /run/munge/key"
    munged = "munged --force --key-file /run/munge/key --log-file /run/munge/log --seed-file /run/munge/seed"
    _serve(hosts, "sh", "-c", f"{key}; exec {munged}")
    _serve(hosts[:1], "slurmctld", "-i")
    _serve(hosts, "slurmd")
    wait_until(lambda: hosts[0].run("sinfo", "-h", "-o", "%D %T").stdout == "2 idle\n", 60)
    return hosts
