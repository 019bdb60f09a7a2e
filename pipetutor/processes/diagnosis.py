"""Why a run failed: which rank came first, what every rank was doing, and what the culprit said last.

What a rank wrote itself goes before how it was ended: a launcher ends the ranks that are left, also one that has just
said why it gives up.
"""

import re
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipetutor.core import records
from pipetutor.processes import heartbeat, network
from pipetutor.processes.heartbeat import Beat

__all__ = ["diagnose"]

SMALLER = "use a smaller micro-batch, more stages, or recompute=True (--recompute)"
_NO_MEMORY = re.compile(r"MemoryError|out of memory|can(no|')t allocate|unable to allocate|bad_alloc", re.IGNORECASE)
_NO_SHARED_MEMORY = re.compile(r"shared memory ?\(shm\)|/dev/shm")
_LOST = re.compile(
    r"connection (was likely )?(reset|closed)|broken pipe|time(d )?out|remote process exit", re.IGNORECASE
)


def diagnose(directory: Path, report: dict[str, Any]) -> str:
    """Explain a failed run.

    Args:
        directory: the run directory.
        report: what the supervisor saw; see ``pipetutor.processes.supervise.supervise``.

    Returns:
        One line that names the culprit, one that explains it where that takes more words, then what every rank was
        doing, then the culprit's last words: its Python stack where the run stalled, else the end of its log.
    """
    if report["cancelled"]:
        return "the supervisor was asked to end, and has ended the run"
    if report["stalled"] is not None:
        return _stalled(directory, [Beat(**beat) for beat in report["stalled"]], report)
    beats = {beat.rank: beat for beat in heartbeat.read(directory)}
    raised = {failure["rank"]: failure for failure in records.read_failures(directory)}
    first = _failed_first(report["ended"], raised, beats)
    head, why = "the run did not end well", ""
    rank, code = first or (0, None)  # where none has failed, the first rank may have said why
    log = _log(directory, rank, report["ended"])
    text = log.read_text(errors="replace") if log.exists() else ""
    last = [line for line in text.splitlines() if line.strip()][-15:]
    if first:
        error = raised[rank]["error"] if rank in raised else ""
        if error:  # a rank that raised may still be about to end: it has no code yet
            how = f"{error} ({'then ended by ' + _name(code) if code and code < 0 else f'exit code {code or 1}'})"
        elif code and code < 0:
            how = f"killed by {_name(code)} (exit code {code})"
        elif code is None:
            how = "it is gone without a word, and the others have lost it"
        else:
            how = f"see its last lines (exit code {code})"
        dead = _dead_host(report["ended"], rank)
        who = f"rank {rank}" if dead is None else f"{network.name(dead)}, with rank {rank},"
        head = f"{who} failed first: {how}" + (f", at {beats[rank]}" if rank in beats else "")
        why = (
            f"all that ran on {network.name(dead)} is gone at once, as of a host that lost its power"
            if dead is not None
            else _explain(
                rank, error or "\n".join(last), code if not error else None, directory, report.get("oom_kills")
            )
        )
    lines = [head, *filter(None, [why, records.lost_in(directory)]), *_doing(list(beats.values()))]
    said = (
        [f"its last lines, from {log}:", *(f"    {line}" for line in last)]
        if last
        else [f"it wrote nothing to {log}"]
    )
    return "\n".join([*lines, *said])


def _log(directory: Path, rank: int, ended: Sequence[dict[str, Any]]) -> Path:
    """Return the log of a rank, or of what should have started it."""
    log = records.log_path(directory, rank)
    started = next((directory / "logs" / end["log"] for end in ended if end["rank"] == rank and "log" in end), log)
    return log if log.exists() else started


def _dead_host(ended: Sequence[dict[str, Any]], rank: int) -> int | None:
    """Return the host of a rank, if it was a run's own and has been killed as a whole."""
    hosts = {end["rank"]: end["host"] for end in ended if end.get("killed")}
    return hosts.get(rank)


def _failed_first(
    ended: Sequence[dict[str, Any]], raised: dict[int, dict[str, Any]], beats: dict[int, Beat]
) -> tuple[int, int | None] | None:
    """Return the rank that failed first and its exit code, or None where no rank has failed.

    Args:
        ended: the ranks that have ended, as the supervisor reports them.
        raised: what ranks raised; one may not have ended yet, and has no exit code.
        beats: what all of them were doing.
    """
    codes: dict[int, int | None] = dict.fromkeys(raised) | {end["rank"]: end["code"] for end in ended}
    # A rank that raised failed when it said so; one that was killed, when it ended.
    times = {each["rank"]: each["time"] for each in (*ended, *raised.values())}
    failed = [rank for rank, code in codes.items() if code or rank in raised]
    if not failed:
        return None
    first = min(failed, key=lambda rank: (_is_consequence(raised.get(rank), codes[rank]), times[rank], rank))
    silent = [rank for rank, beat in beats.items() if rank not in codes and beat.phase != "finished"]
    if silent and _is_consequence(raised.get(first), codes[first]) == 2:  # the others miss one that has said nothing
        return min(silent), None
    return first, codes[first]


def _is_consequence(failure: dict[str, Any] | None, code: int | None) -> int:
    """Say how surely a rank only followed another one: 0 it did not, 1 it was asked to end, 2 it missed another one.

    It may say so before the end of that other one is noticed.
    """
    if failure is None:
        return int(code == -signal.SIGTERM)
    return 2 if _LOST.search(failure["error"]) else 0


def _name(code: int) -> str:
    """Return the name of the signal that an exit code below 0 stands for."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _explain(rank: int, said: str, code: int | None, directory: Path, oom_kills: int | None) -> str:
    """Say what a rank's end means, and what to do, where it may have run out of memory; nothing about others.

    Args:
        rank: who failed first.
        said: what it raised, or the end of its log.
        code: its exit code, unless it raised.
        directory: the run directory.
        oom_kills: processes that the system has ended meanwhile for want of memory; None where it does not tell.
    """
    if code == -signal.SIGBUS or _NO_SHARED_MEMORY.search(said):
        return (
            f"rank {rank} probably found /dev/shm full, the memory that processes share: give it more (--shm-size=1g "
            "for a container), or remove what ended programs have left there"
        )
    if _NO_MEMORY.search(said):
        return f"rank {rank} ran out of memory: {SMALLER}"
    if code != -signal.SIGKILL or _dies_by_request(rank, directory):
        return ""
    if oom_kills == 0:
        return f"the system did not run out of memory: somebody sent rank {rank} a SIGKILL"
    if oom_kills:
        return f"out of memory: the system's out-of-memory killer ended rank {rank}; {SMALLER}"
    return (
        f"nothing of this run killed rank {rank}: probably the system's out-of-memory killer did (dmesg would tell); "
        f"{SMALLER}"
    )


def _dies_by_request(rank: int, directory: Path) -> bool:
    """Say whether the run was asked for a fault that kills this rank."""
    words = shlex.split(records.read(directory).get("command", ""))
    return any(word.startswith("die:") and f"rank={rank}" in re.split("[:,]", word) for word in words)


def _stalled(directory: Path, beats: list[Beat], report: dict[str, Any]) -> str:
    head = f"no step was completed in {report['deadline']:g} s: "
    if absent := set(range(report["ranks"])) - {beat.rank for beat in beats}:
        return "\n".join([f"{head}rank {min(absent)} did not start", *_doing(beats)])
    if report.get("cut"):
        return _cut_off(beats, report["cut"], head)
    if report["stopped"]:
        who = f"rank {report['stopped'][0]} is stopped, by a SIGSTOP or a debugger; SIGCONT lets a process go on"
        return "\n".join([f"{head}{who}", *_doing(beats)])
    culprits = heartbeat.culprits(beats)
    members = [(beat, found) for found in culprits for beat in found]
    first, among = min(members, key=lambda member: (member[0].step, member[0].since))
    if len(among) > 1:
        who = f"ranks {_list([beat.rank for beat in among])} wait for each other in a circle: rank {first.rank} is"
        if len(between := {beat.host for beat in among}) > 1:
            hosts = " and ".join(sorted(between))
            who = f"either the link between {hosts} takes longer than that for a message, or {who}"
    elif len(culprits) < len(beats):
        who = f"rank {first.rank} holds the others up,"
    else:
        who = f"rank {first.rank} came least far,"
    stack = directory / f"stack_rank{first.rank}.txt"
    text = stack.read_text() if stack.exists() else ""
    shown = f"the Python stack of rank {first.rank}, from {stack}:" if text else "it gave no stack: stopped, or gone"
    lines = [f"{head}{who} at {first}", *_doing(beats), shown]
    lines += [f"    {line}" for line in text.splitlines()[:20]]
    return "\n".join([*lines, "if the machine is only slow, give it longer: launch(..., deadline=SECONDS)"])


def _cut_off(beats: list[Beat], cut: list[list[str]], head: str) -> str:
    """Say which hosts do not reach each other, and which ranks wait for what cannot come."""
    apart = {frozenset(pair) for pair in cut}
    hosts = {beat.rank: beat.host for beat in beats}
    waiting = [
        f"rank {beat.rank} on {beat.host} waits in {beat.instruction} for rank {peer} on {hosts[peer]}"
        for beat in beats
        for peer in beat.peers
        if frozenset((beat.host, hosts.get(peer, beat.host))) in apart
    ]
    every = set.intersection(*map(set, apart))
    pairs = "; ".join(f"{one} and {other} do not reach each other" for one, other in sorted(map(sorted, apart)))
    known = set(hosts.values())
    who = f"{every.pop()} is cut off: " if len(every) == 1 and len(known) > 2 else "the link is cut: "
    return "\n".join([f"{head}{who}{pairs}", *waiting, *_doing(beats)])


def _list(ranks: list[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _doing(beats: list[Beat]) -> list[str]:
    now = time.time()
    several = len({beat.host for beat in beats}) > 1
    return [
        f"    rank {beat.rank}{f' on {beat.host}' if several else ''}: {beat}, for {now - beat.since:.0f} s"
        for beat in beats
    ]
