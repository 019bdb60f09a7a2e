"""The hosts of a cluster, in the file that DeepSpeed and MPI read: a line each, with the ranks that it takes.

    # two machines with four GPUs each
    first slots=4
    second slots=4

Standard library only.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pipetutor.system import disk

__all__ = ["check_logins", "read_hostfile"]

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
NEEDED = "give each host a line such as: first slots=2"


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return the hosts of a file with the number of ranks of each, in their order.

    Raises:
        ValueError: there is no such file, or it has something else in it; the message has the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error if isinstance(error, OSError) else OSError(0, "it is no text")
        raise ValueError(disk.cannot(f"read hostfile {path}", reason, NEEDED)) from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = re.fullmatch(r"\s*([^\s-]\S*)\s+slots=([1-9]\d{0,5})\s*(?:#.*)?", line)
        if not entry or entry[1] in found:
            what = f"{entry[1]} a second time" if entry else repr(line.strip()[:80])
            raise ValueError(f"hostfile {path} has in line {number} {what}: {NEEDED}")
        found[entry[1]] = int(entry[2])
    if not found:
        raise ValueError(f"hostfile {path} has no hosts: {NEEDED}")
    return found


def check_logins(hosts: Iterable[str]) -> None:
    """Raise ValueError unless ssh logs in to all of these hosts without a password, as pdsh will have to."""
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))  # where users give pdsh a port, say
    asked = {
        host: subprocess.Popen(
            [*SSH, *more, host, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    said = {host: login.communicate()[1].strip().splitlines() for host, login in asked.items()}
    refused = [host for host, login in asked.items() if login.returncode]
    if refused:
        last = said[refused[0]][-1] if said[refused[0]] else f"status {asked[refused[0]].returncode}"
        raise ValueError(
            f"ssh does not log in to {', '.join(refused)} ({last}): each host of the hostfile must let you in "
            f"without a password; try ssh {refused[0]} true"
        )
