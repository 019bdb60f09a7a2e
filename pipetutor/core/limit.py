"""As much memory as a smaller machine would have, so that what does not fit is seen to fail.

Linux counts what a process may write to and shares with no other (``VmData``). What has been loaded by then is not
charged; nor are the process groups of an engine, whose threads reserve far more than they use.

    build the layers     at most the limit
    make the engine      no limit
    train                at most the limit, less what the layers take
"""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipetutor.core.observer import Observer

__all__ = ["MemoryLimit", "limited"]


@contextmanager
def limited(gigabytes: float | None) -> Iterator[None]:
    """Let this process allocate so many gigabytes (10^9 bytes) more, for a while; None: as many as it likes."""
    if gigabytes is None:
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    _limit(1e9 * gigabytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def _limit(more: float) -> None:
    status = Path("/proc/self/status").read_text()
    (written,) = re.findall(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = 1024 * int(written) + max(0, int(more))
    lower = [limit for limit in (before, most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *lower]), most))


class MemoryLimit(Observer):
    """Limits what a rank may allocate from when its engine is made.

    Args:
        gigabytes: of 10^9 bytes, those that the layers have taken by then included.
    """

    def __init__(self, gigabytes: float):
        self._bytes = 1e9 * gigabytes

    def built(self, engine: Any) -> None:
        """Begin to limit."""
        _limit(self._bytes - sum(tensor.nbytes for tensor in engine.state().values()))
