"""Hosts on this machine, joined by links: what ``launch(hosts=2, link="100mbit")`` trains on.

The supervisor itself is in a network of its own, with the right to change it (``pipetutor.system.namespaces.alone``).
Below it each host is a process in a further network, and every two are joined by a pair of virtual Ethernet
interfaces, a cable, whose two ends let through what the link's rate allows:

    host0: 10.77.0.1 eth0 ---- 100 Mbit/s ---- eth0 10.77.0.2 :host1

The same addresses serve every run, for no run sees another one's. With the last process the networks go, and with
them the interfaces: nothing is left that would have to be removed. Standard library only.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from errno import EHOSTUNREACH, ENETDOWN, ENETUNREACH
from pathlib import Path

from pipetutor.core import records
from pipetutor.processes.children import Process
from pipetutor.system import machine
from pipetutor.system.links import Link, hosts_of
from pipetutor.system.namespaces import limits, tool

__all__ = ["ENVIRONMENT", "Network", "address", "name"]

# Each host has its address at every interface. No name server is there, of which torch would warn in every log.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
HOST = "from pipetutor.processes.host import main; main()"
PROBE = (
    "import socket, sys; probe = socket.socket(); probe.settimeout(5); "
    f"sys.exit(probe.connect_ex((sys.argv[1], 9)) in {(ENETDOWN, ENETUNREACH, EHOSTUNREACH)})"
)


def name(host: int) -> str:
    """Return a host's name."""
    return f"host{host}"


def address(host: int) -> str:
    """Return a host's address."""
    return f"10.77.{host // 250}.{host % 250 + 1}"


class Network:
    """Hosts and the links between them; they are there until this process ends, or ``start`` has what they run end.

    Args:
        links: of every two hosts, numbered from 0.

    Raises:
        OSError: the system refuses; see ``pipetutor.system.namespaces.check_hosts``.
    """

    def __init__(self, links: Mapping[tuple[int, int], Link]):
        self._links = links
        count = hosts_of(links)
        self._hosts = [_begin(host, count) for host in range(count)]
        for begun in self._hosts:
            assert begun.stdout
            if begun.stdout.readline() != b"ready\n":
                raise OSError(f"a host did not begin, and ended with status {begun.wait()}")
            self._run(begun, [[tool("ip"), "link", "set", "lo", "up"]])
        ends = [0] * count  # interfaces that each host has so far
        for pair, link in links.items():
            interfaces = [f"eth{ends[host]}" for host in pair]
            mine, theirs = (
                ["name", interface, "netns", str(self._hosts[host].pid)]
                for host, interface in zip(pair, interfaces, strict=True)
            )
            _call([tool("ip"), "link", "add", *mine, "type", "veth", "peer", *theirs])
            for host, peer, interface in zip(pair, reversed(pair), interfaces, strict=True):
                self._run(self._hosts[host], _wired(address(host), address(peer), interface, link))
                ends[host] += 1

    def start(self, process: Process, log: Path) -> "subprocess.Popen[bytes]":
        """Run a process on its host, which ends when it does, and with its status."""
        assert process.host is not None
        host = self._hosts[process.host]
        assert host.stdin
        host.stdin.write(records.to_json(asdict(process) | {"log": str(log)}).encode() + b"\n")
        host.stdin.flush()
        return host

    def cut(self) -> list[tuple[str, str]]:
        """Return the pairs of hosts, by name, of which the first has no way to the second any more.

        Where there is a way, but nobody answers in time, the link is slow: it is not cut.
        """
        there = [number for number, host in enumerate(self._hosts) if host.poll() is None]
        probes = {
            (one, other): subprocess.Popen(
                [*_inside(self._hosts[one]), sys.executable, "-IS", "-c", PROBE, address(other)]
            )
            for pair in self._links
            if set(pair) <= set(there)
            for one, other in (pair, (pair[1], pair[0]))
        }
        return [(name(one), name(other)) for (one, other), probe in probes.items() if probe.wait()]

    @staticmethod
    def _run(host: "subprocess.Popen[bytes]", commands: list[list[str]]) -> None:
        for command in commands:
            _call([*_inside(host), *command])


def _begin(host: int, count: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [tool("unshare"), "--net", "--uts", *machine.PYTHON, "-c", HOST, name(host), str(host), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _inside(host: "subprocess.Popen[bytes]") -> list[str]:
    return [tool("nsenter"), "--target", str(host.pid), "--net"]


def _wired(mine: str, theirs: str, interface: str, link: Link) -> list[list[str]]:
    """Return the commands that make an interface one end of a link."""
    ip = tool("ip")
    return [
        [ip, "address", "add", f"{mine}/32", "dev", interface],
        [ip, "link", "set", interface, "up"],
        [ip, "route", "add", theirs, "dev", interface, "src", mine],
        *limits(link, interface),
    ]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
