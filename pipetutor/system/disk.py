"""What file systems refuse, and what to do about it: full or not, not ours to write, or unable to."""

import errno
import os
from pathlib import Path

__all__ = ["cannot", "full", "sync"]

_UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def full(error: Exception) -> bool:
    """Say whether an error means that there is no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot(what: str, error: OSError, instead: str = "") -> str:
    """Return one line: what cannot be done, why, and what to do about it. To make room helps where there is none.

    Args:
        what: such as ``write runs to /runs``.
        error: what the file system said.
        instead: what helps in any case; empty where nothing does.

    >>> cannot("write runs to /runs", OSError(errno.EACCES, "Permission denied"), "give another runs_dir")
    'cannot write runs to /runs: Permission denied; give another runs_dir'
    """
    ways = ", or ".join(filter(None, ["free the disk" if full(error) else "", instead]))
    return "; ".join(filter(None, [f"cannot {what}: {error.strerror or error}", ways]))


def sync(path: Path) -> None:
    """Have a file or a directory on disk before what follows, where its file system is able to do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network, FUSE and shared-folder file systems sync no directory
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(descriptor)
