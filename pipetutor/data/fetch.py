"""What is fetched and when: a data directory is complete and verified before any rank reads it.

A data set is a folder of batch files with known md5 sums. It is made in a hidden folder beside its place,
under a lock, verified, and moved there in one step: no process ever sees half of it, and however many ask
at once, one fetches. What is already there is never changed. torch is imported only for a download.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from pipetutor.system import disk
from pipetutor.system.named import Named

__all__ = ["DATA_DIR", "SHARED_DIR", "VARIABLE", "DataError", "locked", "prepare"]

SHARED_DIR = "/tmp/cifar10-data"  # the reference example's
VARIABLE = "PIPETUTOR_DATA_DIR"  # of the environment, that puts another in its place
OTHER = f"give another data directory (data_dir, --data-dir or {VARIABLE})"
CONNECT_SECONDS = 15
STALL_SECONDS = 20


@dataclass(frozen=True)
class Files:
    """A data set's files on disk.

    Attributes:
        folder: its name inside the data directory.
        md5: md5 sum of each file in it.
        archive: name of the archive that holds the folder; empty where the data set is drawn.
        archive_md5: md5 sum of the archive.
    """

    folder: str
    md5: dict[str, str]
    archive: str = ""
    archive_md5: str = ""


FILES = {
    # The sums are torchvision's (torchvision.datasets.CIFAR10); a test compares them.
    "cifar10": Files(
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
    "synthetic": Files(
        "synthetic-batches-py",
        {
            "data_batch_1": "097266a4c168c61c7893d2c90dd1d96f",
            "test_batch": "fc690923aea5fda9e312f0fc53d52097",
            "batches.meta": "7471dd1ee6a9585554739390e22eea79",
        },
    ),
    "sums": Files(
        "sums-text", {"train.txt": "970608e62f0dc46470f13f91456a032c", "test.txt": "ee4d72927f5640fc3cac1594ca586a9c"}
    ),
}


class DataError(ValueError):
    """The data is not there, or not what it should be; the message says what to do."""


def own_dir(shared: str = SHARED_DIR) -> str:
    """Return the data directory of who gives none: the shared one, unless another user has it for themselves.

    What somebody else has made serves, too, once it holds every data set. Else the user has one beside it:
    ``/tmp/cifar10-data-1001``.
    """
    folders = [os.path.join(shared, files.folder) for files in FILES.values()]
    there = [folder for folder in folders if os.path.lexists(folder)]
    readable = all(os.access(path, os.R_OK | os.X_OK) for path in [shared, *there])
    usable = readable and (os.access(shared, os.W_OK) or there == folders)
    return shared if usable or not os.path.lexists(shared) else f"{shared}-{os.getuid()}"


DATA_DIR = os.environ.get(VARIABLE) or own_dir()


def _verify(path: Path, md5: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise DataError(disk.cannot(f"read {path}", error, OTHER)) from None
    if found != md5:
        raise DataError(
            f"{path} is damaged or altered: its md5 is {found}, not {md5}. It was left as it is and is not used; "
            "move it away, and the next run fetches it again"
        )


def ready(dataset: str, data_dir: str | Path) -> bool:
    """Say whether a data set is complete, having verified every file of it.

    Raises:
        DataError: the folder is there, but a file in it is missing or altered.
    """
    files = FILES[dataset]
    folder = Path(data_dir) / files.folder
    try:
        if not folder.exists():
            return False
        if missing := [name for name in files.md5 if not (folder / name).exists()]:
            raise DataError(
                f"{folder / missing[0]} is missing; move {folder} away, and the next run fetches it again"
            )
    except PermissionError as error:
        raise DataError(disk.cannot(f"read {folder}", error, OTHER)) from None
    for name, md5 in files.md5.items():
        _verify(folder / name, md5)
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this name, having waited for whoever holds it; it ends with its process at the latest."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(dataset: str, data_dir: str | Path) -> None:
    """Have a data set complete in ``data_dir``: verify it, or draw it, unpack it or download it.

    Any number of processes may call this at once; one does the work and the others wait for it.

    Args:
        dataset: ``cifar10``, ``synthetic`` or ``sums``; of a function of one's own nothing is to be prepared.
        data_dir: made when missing. ``cifar-10-python.tar.gz`` put there by hand is used.

    Raises:
        DataError: a file is altered, there is no network, or the directory cannot be written.

    >>> prepare("synthetic", "/tmp/cifar10-data")  # doctest: +SKIP
    """
    if Named.parse(dataset).is_own:
        return
    files, data_dir = FILES[dataset], Path(data_dir)
    try:
        if ready(dataset, data_dir):
            return
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / f".{files.folder}.lock"):
            if ready(dataset, data_dir):  # another process made it while this one waited
                return
            work = Path(tempfile.mkdtemp(prefix=f".{files.folder}.", dir=data_dir))
            try:
                _make(dataset, data_dir, work)
                for name, md5 in files.md5.items():
                    _verify(work / files.folder / name, md5)
                os.rename(work / files.folder, data_dir / files.folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except DataError:
        raise
    except OSError as error:
        raise DataError(disk.cannot(f"write the {dataset} data to {data_dir}", error, OTHER)) from None


def _make(dataset: str, data_dir: Path, work: Path) -> None:
    files = FILES[dataset]
    if not files.archive:
        from pipetutor.data import sums, synthetic

        (work / files.folder).mkdir()
        {"sums": sums, "synthetic": synthetic}[dataset].write(work / files.folder)
        return
    given = data_dir / files.archive
    if given.exists():
        _verify(given, files.archive_md5)
        shutil.unpack_archive(given, work)
    else:
        _download(data_dir, work)


def _download(data_dir: Path, work: Path) -> None:
    """Let torchvision fetch and unpack CIFAR-10, and keep the archive."""
    from pipetutor.system.uncompiled import torchvision

    url = torchvision.datasets.CIFAR10.url

    archive = FILES["cifar10"].archive
    timeout = socket.getdefaulttimeout()
    try:
        _connect(url)
        socket.setdefaulttimeout(STALL_SECONDS)  # urllib waits for ever otherwise
        torchvision.datasets.CIFAR10(str(work), download=True)
    except Exception as error:  # urllib raises several kinds, by what is wrong with the network or a proxy
        if disk.full(error):
            raise
        raise DataError(
            f"CIFAR-10 is not in {data_dir}, and fetching {url}{_proxy(url)} failed ({error}). Two ways on: take the "
            f"embedded data with --dataset synthetic, or put {archive} into {data_dir}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    os.replace(work / archive, data_dir / archive)


def _proxy(url: str) -> str:
    """Say through which proxy urllib asks for ``url``; a password in its address is nobody's business."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    found = getproxies().get(scheme)
    return f" through {scheme}_proxy={found.split('@')[-1]}" if found and not proxy_bypass(host) else ""


def _connect(url: str) -> None:
    """Raise an error within CONNECT_SECONDS unless ``url`` answers, through a proxy where one is set.

    A name that does not resolve can block for a minute, and no timeout reaches it; hence the thread.
    """
    outcome: list[Exception | None] = []

    def attempt() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {CONNECT_SECONDS} s")
    if outcome[0]:
        raise outcome[0]
