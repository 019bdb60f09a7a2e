"""The share of a machine that control groups leave: what a container, a batch job or a service may take of it.

A process is in one group, which lies in others, and the least of all their limits holds. Version 2 of Linux' control
groups keeps them in one hierarchy, version 1 in one for each controller; some machines have both. See cgroups(7).
Whatever cannot be read limits nothing.

    /proc/self/cgroup       in which group of each hierarchy this process is:  0::/jobs/17
    /proc/self/mountinfo    where a hierarchy, or the part of it that a container sees, is mounted
"""

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["oom_kills"]

ROOT = Path("/")  # a test puts a machine of its own in its place


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _groups(controller: str) -> Iterator[Path]:
    """Yield the directory of this process's group in each hierarchy that has a controller, then those around it."""
    for mounted in _read(ROOT / "proc/self/mountinfo").splitlines():
        before, _, behind = mounted.partition(" - ")
        kind, _, options = behind.split(" ", 2)
        if kind != "cgroup2" and not (kind == "cgroup" and controller in options.split(",")):
            continue
        top, place = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word) for word in before.split()[3:5])
        for line in _read(ROOT / "proc/self/cgroup").splitlines():
            _, controllers, group = line.split(":", 2)
            if controller in controllers.split(",") if kind == "cgroup" else controllers == "":
                # In a container without a namespace for groups, the group is named as the host names it.
                inside = Path(group).relative_to(top) if Path(group).is_relative_to(top) else Path()
                mount = ROOT / place.lstrip("/")
                for directory in [inside, *inside.parents] if ".." not in inside.parts else [Path()]:
                    yield mount / directory


def quota() -> float:
    """Return how many cores' time this process may take; infinite where nothing limits it."""
    least = float("inf")
    for group in _groups("cpu"):
        old = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        if found := re.fullmatch(r"(\d+) (\d+)", _read(group / "cpu.max") or old):
            least = min(least, int(found[1]) / int(found[2]))
    return least


def memory() -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of each group that has one; what the kernel gives back at once is no use."""
    found = []
    for group in _groups("memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            files = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            found.append((int(limit), max(0, int(used) - int(files[-1] if files else 0))))
    return found


def oom_kills() -> int | None:
    """Return how many processes of this group the kernel has killed for want of memory, or of the machine.

    None where it does not tell.
    """
    own = [_read(group / name) for group in _groups("memory") for name in ("memory.events", "memory.oom_control")]
    for text in [*own, _read(ROOT / "proc/vmstat")]:
        if found := re.search(r"^oom_kill (\d+)$", text, re.MULTILINE):
            return int(found[1])
    return None
