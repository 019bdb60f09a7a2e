"""Before they meet to train, the ranks of a job agree on the first rank's plan, or hear from each other why not.

Ranks may stand on several hosts, whose files, devices and networks differ, and whose refusals nobody else would see:

    every other rank --its word: what it would run, or why it cannot--> rank 0
    every other rank <--one answer: the plan, or all refusals---------- rank 0

The first rank listens where torch's ranks will meet, at MASTER_ADDR:MASTER_PORT, and has torch's store serve there
before it answers, so all this costs a round trip.

Where they are on several machines, they also learn here by which network interface they reach each other, and gloo
takes that one. By itself it would listen at the address of its host's name, which Debian makes 127.0.1.1 everywhere.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from pipetutor.core.batch import Batch
from pipetutor.core.description import Data
from pipetutor.core.partition import Layer
from pipetutor.core.plan import Plan
from pipetutor.options import Options

__all__ = ["Refused", "agree"]

PATIENCE_SECONDS = 60.0  # for the other ranks to come once one has refused: they may still be loading torch
TAKEN = b"+"  # what the first rank says at once to a rank of its job, and nothing else at its port does
QUIET_SECONDS = 15.0  # of waiting for other hosts, before a rank says so


class Refused(ValueError):
    """The job cannot begin; the message has a line for each reason that this rank has not given itself."""


@dataclass(frozen=True)
class Word:
    """What a rank has to say before a job begins.

    Attributes:
        rank: which rank.
        host: the name of its host.
        machine: what tells machines apart, and containers with networks of their own.
        launcher: the number of its host, and the process that started it there: one for each host of a job.
        refusal: why it cannot run; empty where it can.
        backend: ``nccl`` or ``gloo``, as its host would choose.
        common: what must be the same on every rank that has it.
    """

    rank: int
    host: str
    machine: str
    launcher: list[int]
    refusal: str
    backend: str
    common: dict[str, Any]


def agree(plan: Plan | None, refusal: str, common: dict[str, Any], timeout: timedelta) -> tuple[Plan, Any]:
    """Exchange words with the other ranks of this job.

    Args:
        plan: what this rank would run; None where it refuses.
        refusal: why it cannot run; empty where it can.
        common: what must be the same on every rank that has it.
        timeout: how long to wait for the other ranks.

    Returns:
        The first rank's plan, and what must be kept until the ranks have met: torch's store, on the first rank.

    Raises:
        Refused: a rank refuses, or what it would run does not fit the first rank's plan, or it does not come.
    """
    word = Word(
        rank=int(os.environ["RANK"]),
        host=socket.gethostname(),
        machine=f"{Path('/proc/sys/kernel/random/boot_id').read_text()} {os.stat('/proc/self/ns/net').st_ino}",
        launcher=[int(os.environ.get("CROSS_RANK", "0")), os.getppid()],
        refusal=refusal,
        backend=plan.backend if plan else "",
        common=json.loads(json.dumps(common, default=str, allow_nan=False)),  # as they will arrive
    )
    store = None
    if os.environ["WORLD_SIZE"] == "1":
        answer = _answer([word], plan, []) | {"interface": ""}
    elif word.rank == 0:
        answer, store = _hear(word, plan, timeout)
    else:
        answer = _ask(word, timeout)
    if answer["refusals"]:
        others: dict[str, list[str]] = {}
        for who, reason in answer["refusals"]:
            if reason != refusal:
                others.setdefault(reason, []).append(who)
        raise Refused("\n".join(f"{', '.join(who)}: {reason}" for reason, who in others.items()))
    if interface := answer["interface"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    first = answer["plan"]
    assert plan
    about = {
        "batch": Batch(**first["batch"]),
        "data": Data(**first["data"]),
        "layers": tuple(Layer(*layer) for layer in first["layers"]),
        "options": Options(**first["options"]).on_this_host(plan.options),
    }
    return Plan(**first | about), store


def _several_hosts() -> bool:
    return int(os.environ["LOCAL_SIZE"]) < int(os.environ["WORLD_SIZE"])


def _interface(connection: socket.socket) -> str:
    """Return the network interface of this host over which a connection goes; empty where it cannot be known."""
    own = connection.getsockname()[0].removeprefix("::ffff:")  # how IPv4 looks to a socket for both
    found = psutil.net_if_addrs().items()
    return next((name for name, places in found if own in (place.address.partition("%")[0] for place in places)), "")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _meeting_place() -> tuple[str, int, str]:
    """Return MASTER_ADDR, MASTER_PORT, and advice where the first is an address that every host has for itself."""
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not 0 < port < 2**16:  # as every rank has said of itself
        raise Refused
    try:
        address = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise Refused(
            f"the first rank should be at {name}, and this host does not know where that is ({error.strerror}): give "
            "--master_addr (for srun, MASTER_ADDR in the environment) an address, or a name that every host knows"
        ) from None
    own = (
        f"; {address} is each host itself: give --master_addr (for srun, MASTER_ADDR in the environment) the address "
        "by which others reach the first host"
    )
    return name, port, own if _is_loopback(address) else ""


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=dual)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken, maybe by another run" if taken else f"cannot be had ({error.strerror})"
        other = port + 1 if 1024 <= port < 65535 else 29501
        raise Refused(
            f"port {port} {reason}: take another one (--master_port {other}; for srun, MASTER_PORT={other} in the "
            "environment)"
        ) from None


def _hear(mine: Word, plan: Plan | None, timeout: timedelta) -> tuple[dict[str, Any], Any]:
    """Take the word of every other rank, and answer them all; see ``agree``."""
    from torch.distributed import TCPStore

    name, port, advice = _meeting_place()
    ranks, quiet = int(os.environ["WORLD_SIZE"]), QUIET_SECONDS if _several_hosts() else float("inf")
    words, waiting, interface = [mine], [], ""
    began = time.monotonic()
    end = began + (PATIENCE_SECONDS if mine.refusal else timeout.total_seconds())
    with _listen(port) as listener, contextlib.ExitStack() as connections:
        listener.settimeout(0.5)
        while (absent := sorted({*range(ranks)} - {word.rank for word in words})) and time.monotonic() < end:
            try:
                connection = connections.enter_context(listener.accept()[0])
            except TimeoutError:
                if time.monotonic() - began > quiet:
                    quiet = float("inf")
                    _say(f"{mine.host} waits for rank {_listed(absent)}: start the command on their host{advice}")
                continue
            word = _read_word(connection)
            if word and _belongs(word, words, absent):
                connection.sendall(TAKEN)
                words.append(word)
                waiting.append(connection)
                if word.machine != mine.machine:
                    interface = _interface(connection)
                if word.refusal:
                    end = min(end, time.monotonic() + PATIENCE_SECONDS)
            else:
                connection.close()
        answer = _answer(words, plan, absent) | {"machine": mine.machine, "interface": interface}
        listener.close()
        store = None
        if not answer["refusals"]:
            store = TCPStore(name, port, is_master=True, multi_tenant=True, wait_for_workers=False, timeout=timeout)
        for connection in waiting:
            with contextlib.suppress(OSError):  # a rank that is gone has said why
                connection.sendall(json.dumps(answer, default=str, allow_nan=False).encode())
    return answer, store


def _read(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def _read_word(connection: socket.socket) -> Word | None:
    """Return what a rank says; None if it is no rank that speaks."""
    connection.settimeout(5)
    try:
        return Word(**json.loads(_read(connection)))
    except (OSError, ValueError, TypeError):
        return None


def _belongs(word: Word, words: Sequence[Word], absent: Sequence[int]) -> bool:
    """Say whether a word is of this job: another run on this host may have been given the same port."""
    on_host = [other for other in words if (other.machine, other.launcher[0]) == (word.machine, word.launcher[0])]
    return word.rank in absent and all(other.launcher == word.launcher for other in on_host)


def _answer(words: Sequence[Word], plan: Plan | None, absent: Sequence[int]) -> dict[str, Any]:
    refusals = [(word, word.refusal) for word in words if word.refusal]
    if not refusals and not absent:
        refusals = [(word, reason) for word in words if (reason := _misfit(word, words))]
    told = [(f"rank {word.rank} on {word.host}", reason) for word, reason in refusals]
    if absent and not told:
        told = [(f"rank {_listed(absent)}", "did not come in time")]
    return {"refusals": told, "plan": asdict(plan) if plan and not told else None}


def _misfit(word: Word, words: Sequence[Word]) -> str:
    """Say why a rank does not fit the first rank's plan; empty where it does."""
    first = words[0]
    if word.backend != first.backend:
        return (
            f"its host would compute with {word.backend}, and the first rank's with {first.backend}: give every host "
            "the same --backend; gloo, on the CPU, is for all"
        )
    for name, value in word.common.items():
        if (wanted := first.common.get(name)) != value:
            given = f"{name} is {value} here and {wanted} at the first rank"
            brief = given if len(given) < 120 else f"{name} is not what it is at the first rank"
            return f"{brief}: all hosts need the same command, files and versions"
    return ""


def _ask(mine: Word, timeout: timedelta) -> dict[str, Any]:
    """Send a rank's word to the first rank, and return its answer."""
    name, port, advice = _meeting_place()
    patience = PATIENCE_SECONDS if mine.refusal else timeout.total_seconds()
    quiet = QUIET_SECONDS if _several_hosts() and os.environ["LOCAL_RANK"] == "0" else float("inf")
    began, problem = time.monotonic(), ""
    while (waited := time.monotonic() - began) < patience:
        try:
            with socket.create_connection((name, port), timeout=5) as connection:
                if _takes(connection, mine):
                    connection.settimeout(patience)
                    answer = _read_answer(connection)
                    other = answer["machine"] != mine.machine
                    return answer | {"interface": _interface(connection)} if other else answer
            problem = "something else answers there"
            patience = max(waited, min(patience, PATIENCE_SECONDS))
        except OSError as error:
            problem = error.strerror or str(error)
        if waited > quiet:
            quiet = float("inf")
            _say(f"{mine.host} waits for the first rank at {name}:{port} ({problem}){advice}")
        time.sleep(0.05 if waited < 5 else 0.5)
    raise Refused(f"the first rank was not at {name}:{port} within {patience:.0f} s ({problem}){advice}")


def _takes(connection: socket.socket, word: Word) -> bool:
    """Send a word, and say whether a first rank of this job has taken it."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(asdict(word), allow_nan=False).encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(len(TAKEN)) == TAKEN  # a port above 32767 can connect with itself, and reads the word
    return False


def _read_answer(connection: socket.socket) -> dict[str, Any]:
    try:
        return json.loads(_read(connection))
    except (OSError, ValueError):
        raise Refused("the first rank has ended: see what it says") from None


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _say(line: str) -> None:
    print(f"pipetutor: {line}", file=sys.stderr, flush=True)
