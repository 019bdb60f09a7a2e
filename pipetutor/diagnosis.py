"""Why a run failed: which rank came first, what every rank was doing, and what the culprit said last."""

import re
import signal
import time
from pathlib import Path
from typing import Any

from pipetutor import heartbeat, records
from pipetutor.heartbeat import Beat


def diagnose(directory: Path, report: dict[str, Any]) -> str:
    """Explain a failed run.

    Args:
        directory: the run directory.
        report: what the supervisor saw; see ``pipetutor.supervise.supervise``.

    Returns:
        One line that names the culprit, then what every rank was doing, then the culprit's last words: its
        Python stack where the run stalled, else the end of its log.
    """
    if report["cancelled"]:
        return "the supervisor was asked to end, and has ended the run"
    if report["stalled"] is not None:
        return _stalled(directory, [Beat(**beat) for beat in report["stalled"]], report)
    beats = {beat.rank: beat for beat in heartbeat.read(directory)}
    raised = {failure["rank"]: failure for failure in records.read_failures(directory)}
    # A rank that raised failed when it said so; one that was killed, when it ended.
    ends = [(raised.get(end["rank"], end)["time"], end["rank"], end["code"]) for end in report["ended"]]
    ends += [(failure["time"], rank, None) for rank, failure in raised.items() if rank not in {e[1] for e in ends}]
    bad = sorted(
        (_complains(raised.get(rank)), when, rank, code) for when, rank, code in ends if code or rank in raised
    )
    rank, head = 0, "the run did not end well"
    if bad:
        *_, rank, code = bad[0]
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name} (exit code {code})"
        else:
            how = f"{raised.get(rank, {}).get('error', 'see its last lines')} (exit code {code or 1})"
        head = f"rank {rank} failed first: {how}" + (f", at {beats[rank]}" if rank in beats else "")
    log = records.log_path(directory, rank)
    text = log.read_text(errors="replace") if log.exists() else ""
    last = [line for line in text.splitlines() if line.strip()][-15:]
    lines = [head, *filter(None, [records.lost_in(directory)]), *_doing(list(beats.values()))]
    return "\n".join([*lines, f"its last lines, from {log}:", *(f"    {line}" for line in last)])


def _complains(failure: dict[str, Any] | None) -> bool:
    """Say whether a rank raised because another one was gone; it may say so before that one's end is noticed."""
    words = r"connection (was likely )?(reset|closed)|broken pipe|time(d )?out|remote process exit"
    return failure is not None and re.search(words, failure["error"], re.IGNORECASE) is not None


def _stalled(directory: Path, beats: list[Beat], report: dict[str, Any]) -> str:
    head = f"no step was completed in {report['deadline']:g} s: "
    if absent := set(range(report["ranks"])) - {beat.rank for beat in beats}:
        return "\n".join([f"{head}rank {min(absent)} did not start", *_doing(beats)])
    culprits = heartbeat.culprits(beats)
    members = [(beat, found) for found in culprits for beat in found]
    first, among = min(members, key=lambda member: (member[0].step, member[0].since))
    if len(among) > 1:
        who = f"ranks {_list([beat.rank for beat in among])} wait for each other in a circle: rank {first.rank} is"
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


def _list(ranks: list[int]) -> str:
    return f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _doing(beats: list[Beat]) -> list[str]:
    now = time.time()
    return [f"    rank {beat.rank}: {beat}, for {now - beat.since:.0f} s" for beat in beats]
