"""Why a rank waits: for every gap of a timeline what it waited for, and the chain of work that sets a step's length.

Both questions have one answer, a walk backwards through time. It begins where a rank could go on, and asks what ended
there; where that is itself a wait, the walk goes over to the rank that was waited for:

    rank 0   F0  F1  .........  B0        P = 2, GPipe: rank 0 waits for the gradient of micro-batch 0.
    rank 1   ..  F0  F1  [ B0 ]           In that time rank 1 ran F1 and B0: they are the cause,
                     <-- walk             and together they are as long as the gap.

A walk leaves no time out. So the work that it meets during a gap is as long as the gap, and from a step's end back to
its beginning, as long as the step: that is the critical path. numpy alone; simulated and measured timelines alike.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipetutor.schedule.orders import PARTNERS
from pipetutor.schedule.rules import LETTERS
from pipetutor.schedule.timeline import CATEGORIES, KINDS, Timeline

__all__ = ["Gap", "Piece", "causes", "critical_path", "path_words"]

MADE_BY = {"RecvActivation": ("ForwardPass",), "RecvGrad": ("BackwardInput", "BackwardPass")}  # a message
SHOWN = 4  # pieces of a chain that a sentence names
SMALL = 0.05  # shares of a gap for which it has no words


class Piece(NamedTuple):
    """What one rank did for a while.

    Attributes:
        rank: which; of a message, one that stood still for it.
        begin: in seconds.
        end: in seconds.
        name: of the instruction; ``""`` between two of them, ``"waiting"`` where nobody is known to have been waited
            for.
        stage: of the instruction; -1 for none.
        micro_batch: of the instruction; -1 for none.
    """

    rank: int
    begin: float
    end: float
    name: str
    stage: int = -1
    micro_batch: int = -1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin

    @property
    def category(self) -> str:
        """One of ``timeline.COLUMNS``."""
        return CATEGORIES.get(self.name, self.name or "other")

    def __str__(self) -> str:
        if self.name in PARTNERS:
            there = self.stage + PARTNERS[self.name][1]
            sender, receiver = (there, self.stage) if self.name in MADE_BY else (self.stage, there)
            return f"{_message(self.name, self.micro_batch)} on its way from stage {sender} to {receiver}"
        if not self.name:
            return f"rank {self.rank} between two instructions"
        if self.micro_batch < 0:
            return f"{self.name} of rank {self.rank}"
        name = LETTERS[self.name] if self.category == "compute" else f"{self.name} "
        return f"{name}{self.micro_batch} of stage {self.stage}"


class Gap(NamedTuple):
    """Time in which a rank did no work of its own.

    Attributes:
        rank: which.
        begin: in seconds.
        end: in seconds.
        kind: ``waiting`` for another rank, ``transfer`` of a message, or ``other``: no instruction at all.
        reason: what it waited for, in words that follow "rank 0 waits for".
        waits_for: the instruction that it waited for, if that is known.
        chain: what was done meanwhile that it waited for, in the order of time; as long as the gap.
    """

    rank: int
    begin: float
    end: float
    kind: str
    reason: str
    waits_for: Piece | None
    chain: tuple[Piece, ...]

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    def words(self, unit: str = "ms") -> str:
        """Say how long the rank waits, for what, and what was done meanwhile.

        Args:
            unit: ``ms``, or what a simulated second stands for, such as ``slots``.
        """
        long = amount(self.seconds, unit)
        if self.kind != "waiting":
            return f"rank {self.rank} spends {long} on {self.reason}"
        names = list(dict.fromkeys(str(piece) for piece in self.chain if piece.seconds > SMALL * self.seconds))
        if len(names) > SHOWN + 1:
            names[SHOWN // 2 : -SHOWN // 2] = [f"{len(names) - SHOWN} more"]
        meanwhile = f"; meanwhile: {', '.join(names)}" if names else ""
        return f"rank {self.rank} waits {long} for {self.reason}{meanwhile}"

    def __str__(self) -> str:
        return self.words()


def causes(timeline: Timeline) -> list[Gap]:
    """Explain every gap of a timeline.

    Args:
        timeline: simulated or measured.

    Returns:
        The gaps, rank by rank, in the order of time. Those of a kind are together as long as the ``waiting``,
        ``transfer`` and ``other`` of ``Timeline.accounting``.

    >>> from pipetutor.schedule.orders import build
    >>> from pipetutor.schedule.simulate import Costs, simulate
    >>> gaps = causes(simulate(build("1f1b", 3, 1), Costs.equal(3, backward=1)))
    >>> print(gaps[0].words("slots"))  # doctest: +NORMALIZE_WHITESPACE
    rank 0 waits 4 slots for the gradient of micro-batch 0 from stage 1; meanwhile: F0 of stage 1, F0 of stage 2,
    B0 of stage 2, B0 of stage 1
    """
    walk = _Walk(timeline)
    return [gap for rank in range(timeline.ranks) for gap in walk.gaps(rank)]


def critical_path(timeline: Timeline) -> list[Piece]:
    """Return the chain that sets a step's length: each piece begins when the one before has ended.

    Whatever makes a piece of it longer makes the step longer; what is not on it had time to spare.

    Args:
        timeline: simulated or measured.

    Returns:
        Pieces of any ranks, in the order of time, together as long as the step.

    >>> from pipetutor.schedule.orders import build
    >>> from pipetutor.schedule.simulate import Costs, simulate
    >>> print(*critical_path(simulate(build("gpipe", 2, 1), Costs.equal(2))), sep=", then ")
    F0 of stage 0, then F0 of stage 1, then B0 of stage 1, then B0 of stage 0
    """
    walk = _Walk(timeline)
    last = max(range(timeline.ranks), key=lambda rank: timeline.of(rank)["end"].max(initial=-np.inf))
    return walk.back(last, timeline.end, timeline.begin)


def path_words(path: Sequence[Piece], unit: str = "ms") -> str:
    """Say in a sentence what a critical path consists of, the longest first.

    Args:
        path: from ``critical_path``.
        unit: ``ms``, or what a simulated second stands for.
    """
    parts: dict[str, float] = {}
    for piece in path:
        what = {"compute": f"computing on stage {piece.stage}", "other": "between instructions"}
        name = what.get(piece.category, piece.category)
        parts[name] = parts.get(name, 0.0) + piece.seconds
    total = sum(parts.values())
    shown = [
        f"{amount(seconds, unit)} {name}"
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
        if seconds > total / 1000
    ]
    return f"the critical path, {amount(total, unit)} long, is {', '.join(shown)}"


def amount(seconds: float, unit: str = "ms") -> str:
    """Write a time in three digits, or a large one in whole.

    >>> amount(0.0123), amount(1, "slots")
    ('12.3 ms', '1 slot')
    """
    value = seconds * (1e3 if unit == "ms" else 1.0)
    number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} {unit.removesuffix('s') if number == '1' and unit != 'ms' else unit}"


class _Walk:
    """A timeline, and for each of its moments what was waited for."""

    def __init__(self, timeline: Timeline):
        self._timeline = timeline
        self._spans = [timeline.of(rank) for rank in range(timeline.ranks)]
        # Less than this is no time: what should be equal has been added up in another order.
        self._least = 1e-9 * timeline.seconds + 8 * np.spacing(max(abs(timeline.begin), abs(timeline.end)))
        self._names = [[KINDS[kind] for kind in spans["kind"]] for spans in self._spans]
        self._place: dict[tuple[str, int, int, int], tuple[int, int]] = {}  # of a span: its rank, its number there
        self._rank_of: dict[tuple[int, int], int] = {}  # of a stage and a replica
        for rank, spans in enumerate(self._spans):
            for index, (name, span) in enumerate(zip(self._names[rank], spans.tolist(), strict=True)):
                _, stage, replica, _, micro_batch, *_ = span
                self._place[name, stage, replica, micro_batch] = rank, index
                if micro_batch >= 0:
                    self._rank_of[stage, replica] = rank
        self._background = not any(name.startswith("Send") for names in self._names for name in names)
        self._flights = self._find_flights()

    def gaps(self, rank: int) -> list[Gap]:
        """Return the gaps of one rank."""
        found, clock, before = [], self._timeline.begin, "the step's beginning"
        for index, span in enumerate(self._spans[rank]):
            begin, end = float(span["begin"]), float(span["end"])
            piece = self._piece(rank, index)
            if begin - clock > self._least:
                found.append(self._other(rank, clock, begin, before, str(piece)))
            ready = min(begin + float(span["waiting"]), end)
            if ready - begin > self._least:
                found.append(self._waiting(rank, index, begin, ready))
            if piece.category == "transfer" and end - ready > self._least:
                reason = str(piece) if piece.name in PARTNERS else f"its part in {piece.name}"
                found.append(Gap(rank, ready, end, "transfer", reason, None, (piece._replace(begin=ready),)))
            clock, before = end, str(piece)
        if self._timeline.end - clock > self._least:
            found.append(self._other(rank, clock, self._timeline.end, before, "the step's end"))
        return found

    def _other(self, rank: int, begin: float, end: float, before: str, after: str) -> Gap:
        reason = f"what no instruction covers, between {before} and {after}"
        return Gap(rank, begin, end, "other", reason, None, (Piece(rank, begin, end, ""),))

    def _waiting(self, rank: int, index: int, begin: float, ready: float) -> Gap:
        awaited, reason = self._awaited(rank, index)
        if awaited is None:
            return Gap(rank, begin, ready, "waiting", reason, None, (Piece(rank, begin, ready, "waiting"),))
        where, what = awaited
        chain = self.back(where, ready, begin)
        return Gap(
            rank, begin, ready, "waiting", reason, None if what is None else self._piece(where, what), (*chain,)
        )

    def back(self, rank: int, time: float, stop: float) -> list[Piece]:
        """Walk from a moment of a rank back to an earlier one; return what was met, in the order of time."""
        met: list[Piece] = []
        asked: set[int] = set()  # ranks that were found waiting at this moment: measured clocks may close a circle

        def pass_by(begin: float, piece: Piece) -> None:
            nonlocal time
            met.append(piece._replace(begin=max(begin, stop), end=time))
            time = max(begin, stop)
            asked.clear()

        while time - stop > self._least:
            spans = self._spans[rank]
            index = int(np.searchsorted(spans["begin"], time - self._least)) - 1
            if index < 0 or time - spans["end"][index] > self._least:
                pass_by(float(spans["end"][index]) if index >= 0 else stop, Piece(rank, stop, time, ""))
                continue
            span, piece = spans[index], self._piece(rank, index)
            ready = float(span["begin"] + span["waiting"])
            if time - ready > self._least:
                left, rank = self._flights.get((rank, index), (ready, rank))
                pass_by(left, piece)
                continue
            awaited, _ = self._awaited(rank, index)
            asked.add(rank)
            if awaited is None or awaited[0] in asked:
                pass_by(float(span["begin"]), piece._replace(name="waiting"))
            else:
                rank = awaited[0]
        if met:
            met[-1] = met[-1]._replace(begin=stop)
        return met[::-1]

    def _piece(self, rank: int, index: int) -> Piece:
        span = self._spans[rank][index]
        stage, micro_batch = int(span["stage"]), int(span["micro_batch"])
        return Piece(rank, float(span["begin"]), float(span["end"]), self._names[rank][index], stage, micro_batch)

    def _awaited(self, rank: int, index: int) -> tuple[tuple[int, int | None] | None, str]:
        """Return the rank and the instruction that a span waits for, as far as they are known, and why in words."""
        span, name = self._spans[rank][index], self._names[rank][index]
        stage, replica, micro_batch = (int(span[column]) for column in ("stage", "replica", "micro_batch"))
        if name not in PARTNERS:
            where = self._last_to_come(rank, index)
            found = None if where is None else (where, None)
            who = "another rank" if where is None else f"rank {where}"
            return found, f"{who} to {'end the step' if name == 'AggregateLoss' else f'come to {name}'}"
        partner, direction = PARTNERS[name]
        there = stage + direction
        message = _message(name, micro_batch)
        reason = f"{message} from stage {there}" if name in MADE_BY else f"stage {there} to take {message}"
        for wanted in (*MADE_BY.get(name, ()), partner):
            if (place := self._place.get((wanted, there, replica, micro_batch))) is not None:
                return place, reason
        where = self._rank_of.get((there, replica))
        return (None if where is None else (where, None)), reason

    def _last_to_come(self, rank: int, index: int) -> int | None:
        """Return the rank for which a collective waited: it came to its own part, or to its end, just then."""
        span = self._spans[rank][index]
        ready = float(span["begin"] + span["waiting"])
        came = []
        for other, spans in enumerate(self._spans):
            same = spans["kind"] == span["kind"]
            moments = [*spans["begin"][same], *spans["end"][~same][-1:]]
            came += [(abs(float(moment) - ready), other) for moment in moments if other != rank]
        return min(came)[1] if came else None

    def _find_flights(self) -> dict[tuple[int, int], tuple[float, int]]:
        """Say of each message in the background when its way began, and at which rank the walk goes on from there.

        It began when the message was made; or, where it had to wait for the wire, when the one before it arrived:

            rank 0    F0  F1                 a message is made each slot, and the wire needs three
            the wire      [-- 0 --][-- 1 --]
            rank 1                 F0       F1
        """
        found: dict[tuple[int, int], tuple[float, int]] = {}
        wires: dict[tuple[int, int], list[tuple[float, float, tuple[int, int], tuple[str, int]]]] = {}
        for rank, names in enumerate(self._names):
            for index, name in enumerate(names):
                span = self._spans[rank][index]
                if name not in MADE_BY or not (self._background or span["waiting"] > 0):
                    continue
                awaited, _ = self._awaited(rank, index)
                if awaited is None or awaited[1] is None or self._names[awaited[0]][awaited[1]] not in MADE_BY[name]:
                    continue
                made = float(self._spans[awaited[0]]["end"][awaited[1]])
                if self._background or abs(made - float(span["begin"] + span["waiting"])) <= self._least:
                    message = made, float(span["end"]), (rank, index), (name, int(span["stage"]))
                    wires.setdefault((awaited[0], rank), []).append(message)
        for (sender, rank), messages in wires.items():
            messages.sort()
            quickest: dict[tuple[str, int], float] = {}
            for made, there, _, kind in messages:
                quickest[kind] = min(quickest.get(kind, np.inf), there - made)
            for number, (made, there, place, kind) in enumerate(messages):
                before = messages[number - 1][1] if number else -np.inf
                queued = (
                    made + self._least < before < there - self._least and there - made > quickest[kind] + self._least
                )
                found[place] = (before, rank) if queued else (made, sender)
        return found


def _message(name: str, micro_batch: int) -> str:
    what = "activation" if name.endswith("Activation") else "gradient"
    return f"the {what} of micro-batch {micro_batch}"
