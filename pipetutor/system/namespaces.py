"""Networks of one's own on this machine, without root: what Linux has for that, and what stands in the way.

A process in a user namespace of its own may make network namespaces, interfaces in them, and limits to those
(user_namespaces(7), network_namespaces(7), tc-tbf(8)). Root needs no user namespace of its own. Standard library
only.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pipetutor.system.links import Link

__all__ = ["alone", "check_hosts", "limits", "tool"]

# Files are written as who it is; what it may do to networks, its children may.
OWN_USER = ("--user", "--map-current-user", "--keep-caps")
TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}
PATH = "/usr/sbin:/sbin"  # where ip and tc are, which a user's PATH may not have
SETTINGS = {
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "user/max_user_namespaces": ("0", "15000"),
    "user/max_net_namespaces": ("0", "15000"),
}
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
LEAST_BURST = 128 * 1024  # bytes that may go through at once: two of the largest packets between two namespaces
BURST_SECONDS = 0.002
QUEUE_SECONDS = 0.1  # that a packet may wait for its turn before it is dropped


def alone() -> list[str]:
    """Return the words before a command that has it run in a network of its own, and with the right to change it."""
    return [tool("unshare"), *(() if _may_change_networks() else OWN_USER), "--net"]


def _may_change_networks() -> bool:
    """Say whether this process has the rights of root that namespaces need, as root in a container may not."""
    rights = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return all(int(rights.split()[1], 16) >> right & 1 for right in (CAP_NET_ADMIN, CAP_SYS_ADMIN))


def tool(name: str) -> str:
    """Return the path of a program, also of one that only root's PATH has."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}") or name


def limits(link: Link, interface: str, verb: str = "add") -> list[list[str]]:
    """Return the commands that limit what goes out of an interface to what a link lets through.

    Args:
        link: its rate is kept by a token bucket, its delay by netem, which not every kernel has.
        interface: by its name.
        verb: ``add``, or ``replace`` for one that may be limited already.
    """
    commands, start = [], [tool("tc"), "qdisc", verb, "dev", interface]
    place = ["root", "handle", "1:"]
    if link.delay:
        commands.append([*start, *place, "netem", "delay", f"{link.delay * 1e6:.0f}us", "limit", "100000"])
        place = ["parent", "1:", "handle", "2:"]
    if link.rate < float("inf"):
        burst = max(LEAST_BURST, int(link.rate / 8 * BURST_SECONDS))
        queue = max(QUEUE_SECONDS, 8 * 2 * LEAST_BURST / link.rate)
        shape = ["tbf", "rate", f"{link.rate:.0f}bit", "burst", str(burst), "latency", f"{queue * 1e3:.0f}ms"]
        commands.append([*start, *place, *shape])
    return commands


def check_hosts(links: Iterable[Link]) -> None:
    """Raise ValueError where this machine cannot have hosts of its own with such links, and say what helps."""
    missing = [name for name in TOOLS if not shutil.which(tool(name))]
    if missing:
        packages = " ".join(sorted({TOOLS[name] for name in missing}))
        raise ValueError(
            f"hosts on one machine need {' and '.join(missing)}, which this one lacks: install {packages} "
            f"(apt-get install {packages}), or leave hosts out"
        )
    pair = [tool("ip"), "link", "add", "end0", "type", "veth", "peer", "name", "end1"]
    for commands in [[pair], *([pair, *limits(link, "end0")] for link in set(links))]:
        script = " && ".join(map(shlex.join, commands))
        tried = subprocess.run([*alone(), "sh", "-c", script], capture_output=True, text=True)
        if tried.returncode == 0:
            continue
        said = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
        if "netem" in script:
            raise ValueError(f"this kernel delays no packets ({said}): give the link without a delay")
        raise ValueError(f"this machine does not allow hosts of its own ({said}): {_advice()}, or leave hosts out")


def _advice() -> str:
    """Say what would allow user and network namespaces here."""
    for name, (forbids, allows) in SETTINGS.items():
        place = Path("/proc/sys", name)
        if place.exists() and place.read_text().strip() == forbids:
            return f"sudo sysctl -w {name.replace('/', '.')}={allows} allows them"
    return (
        "a container allows them when it is started with --privileged, or with --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined"
    )
