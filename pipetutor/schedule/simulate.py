"""What a schedule costs: play its streams with given seconds and bytes, and get the timeline of the step.

The simulator and the checker of ``rules`` know the rules from one place, ``Form``: the checker plays them
in unit time and explains what is wrong, the simulator plays them with costs, all ranks at once. numpy alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from pipetutor.schedule.orders import PARTNERS, STEP, Instruction
from pipetutor.schedule.rules import LETTERS, PASSES, TRANSFERS, Form, check
from pipetutor.schedule.timeline import CODE, KINDS, SPAN, Timeline

__all__ = ["Costs", "simulate"]

NONE = -1


@dataclass(frozen=True)
class Costs:
    """What each stage of the model costs.

    Attributes:
        forward: seconds of a forward pass, one number for each stage.
        backward_input: seconds of the input half of a backward pass, for each stage.
        backward_weight: seconds of the weight half, for each stage; a ``BackwardPass`` costs both.
        activation_bytes: what a stage keeps of a micro-batch until its last backward pass; () for nothing.
        message_bytes: between stage s and s + 1, in either direction, one less than stages; () for nothing.
        latency: seconds of a message of 0 bytes.
        bandwidth: bytes a second.
        burst: bytes of a message that the wire lets through at once, after a pause.
        buffer: bytes of a message that a ``Send`` leaves to the system, and ends.
        load: seconds to load a micro-batch, for each stage; () for nothing. It is part of the forward pass where a
            stream does not name it.
        optimizer: seconds of an ``OptimizerStep``, for each stage; () for nothing.
        all_reduce: seconds of a ``ReduceGrads``, for each stage; () for nothing.
        tied_reduce: seconds of a ``ReduceTiedGrads``, for each stage; () for nothing.

    Raises:
        ValueError: lengths that do not fit, or a number that is no cost.

    >>> Costs.equal(4).backward_input
    (1.0, 1.0, 1.0, 1.0)
    """

    forward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    activation_bytes: Sequence[float] = ()
    message_bytes: Sequence[float] = ()
    latency: float = 0.0
    bandwidth: float = math.inf
    burst: float = 0.0
    buffer: float = 0.0
    load: Sequence[float] = ()
    optimizer: Sequence[float] = ()
    all_reduce: Sequence[float] = ()
    tied_reduce: Sequence[float] = ()

    def __post_init__(self) -> None:
        stages = len(self.forward)
        if not stages:
            raise ValueError("costs of 0 stages: give them for at least 1")
        once = ("optimizer", "all_reduce", "tied_reduce")
        for name in ("backward_input", "backward_weight", "activation_bytes", "load", *once):
            given = len(getattr(self, name))
            if given != stages and (given or name.startswith("backward")):
                raise ValueError(f"{name} has {given} numbers, forward has {stages}: give one for each stage")
        if len(self.message_bytes) not in (0, stages - 1):
            raise ValueError(
                f"message_bytes has {len(self.message_bytes)} numbers, but {stages} stages have {stages - 1} "
                "boundaries: give one for each"
            )
        for name, value in vars(self).items():
            numbers = value if isinstance(value, Sequence) else [] if name == "bandwidth" else [value]
            if not all(0 <= number < math.inf for number in numbers):
                raise ValueError(f"{name} is {value}: use numbers from 0 up")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {self.bandwidth} bytes a second: use more than 0")

    @classmethod
    def equal(cls, stages: int, forward: float = 1.0, backward: float = 2.0) -> "Costs":
        """Return the costs of theory: stages alike, both halves of a backward pass alike, transfers free.

        A micro-batch takes 1 byte, so that a timeline's memory counts live micro-batches.
        """
        half = (backward / 2,) * stages
        return cls((forward,) * stages, half, half, activation_bytes=(1.0,) * stages)

    def wire(self, boundary: int) -> float:
        """Return the seconds for which a message between stage ``boundary`` and the next occupies the wire."""
        return self._beyond(self.burst, boundary)

    def _beyond(self, free: float, boundary: int) -> float:
        """Return the seconds that the bytes of a message beyond the first few take."""
        return max(self.message_bytes[boundary] - free, 0.0) / self.bandwidth if self.message_bytes else 0.0

    def message(self, boundary: int) -> float:
        """Return the seconds from sending to arrival between stage ``boundary`` and the next, on a free wire."""
        return self.latency + self.wire(boundary)

    def seconds(self, holders: Sequence[int], full: bool) -> np.ndarray:
        """Return the cost of each instruction: a row for each of ``KINDS``, a column for each stage.

        What concerns the whole step is the rank's business: in the column of rank r stands the sum over the stages
        that it holds.

        Args:
            holders: the rank of each stage.
            full: loads are instructions.
        """
        table = np.zeros((len(KINDS), len(self.forward)))
        table[CODE["ForwardPass"]] = self.forward
        table[CODE["BackwardInput"]] = self.backward_input
        table[CODE["BackwardWeight"]] = self.backward_weight
        table[CODE["BackwardPass"]] = np.add(self.backward_input, self.backward_weight)
        if self.load:
            table[CODE["LoadMicroBatch" if full else "ForwardPass"]] += self.load
        once = {
            "ReduceTiedGrads": self.tied_reduce,
            "ReduceGrads": self.all_reduce,
            "OptimizerStep": self.optimizer,
        }
        for name, costs in once.items():
            for stage, cost in enumerate(costs):
                table[CODE[name], holders[stage]] += cost
        for boundary in range(len(self.forward) - 1):
            sent = self.latency + self._beyond(max(self.burst, self.buffer), boundary)
            for name, stage in (("SendActivation", boundary), ("SendGrad", boundary + 1)):
                table[CODE[name], stage] = sent
            for name, stage in (("RecvGrad", boundary), ("RecvActivation", boundary + 1)):
                table[CODE[name], stage] = self.message(boundary)
        return table


class _Program(NamedTuple):
    """All streams, one after the other, in columns."""

    names: list[str]  # KINDS, and after them what is no instruction at all
    start: np.ndarray  # of each rank's stream; one more for the end
    rank: np.ndarray
    code: np.ndarray  # place in names
    stage: np.ndarray
    micro_batch: np.ndarray

    @classmethod
    def of(cls, streams: Iterable[Iterable[Instruction]]) -> "_Program":
        number = dict(CODE)
        row = np.dtype((np.int32, 3))
        tables = [np.zeros(0, row)]
        for stream in streams:  # one instruction at a time: kept, millions of them would keep Python's collector busy
            rows = ((number.setdefault(n, len(number)), s, NONE if m is None else m) for n, s, m in stream)
            tables.append(np.fromiter(rows, row))
        lengths = [len(table) for table in tables[1:]]
        rank = np.repeat(np.arange(len(lengths)), lengths)
        return cls(list(number), np.cumsum([0, *lengths]), rank, *np.concatenate(tables).T)

    def refuse(self) -> NoReturn:
        """Let the checker say what is wrong."""
        flat = [
            Instruction(self.names[code], int(stage), None if micro_batch == NONE else int(micro_batch))
            for code, stage, micro_batch in zip(self.code, self.stage, self.micro_batch, strict=True)
        ]
        check([flat[low:high] for low, high in zip(self.start, self.start[1:], strict=False)])
        raise AssertionError("the simulator cannot play what the checker lets pass")

    def form(self) -> Form:
        """Return what the schedule is made of."""
        passes = self.micro_batch != NONE
        whole = ~passes & np.isin(self.code, [CODE[name] for name in STEP]) & (self.stage == self.rank)
        if not (passes | whole).all() or not passes.any() or self.stage.min() < 0:
            self.refuse()
        stages, micro_batches = (int(column[passes].max()) + 1 for column in (self.stage, self.micro_batch))
        if stages > np.count_nonzero(passes):
            self.refuse()
        holders = np.full(stages, NONE)
        holders[self.stage[passes]] = self.rank[passes]
        if (holders[self.stage[passes]] != self.rank[passes]).any() or len({*holders}) != len(self.start) - 1:
            self.refuse()
        full = np.isin(self.code, [CODE[name] for name in TRANSFERS]).any()
        return Form(tuple(holders.tolist()), micro_batches, bool(full))

    def links(self, form: Form, costs: Costs) -> "_Links":
        """Find what each instruction needs, whom it meets, and what it sends."""
        count = len(self.code)
        passes = self.micro_batch != NONE
        where = {name: np.full((form.stages, form.micro_batches), NONE) for name in LETTERS}
        for name, table in where.items():
            chosen = np.flatnonzero(passes & (self.code == CODE[name]))
            table[self.stage[chosen], self.micro_batch[chosen]] = chosen
        placed = {name: table != NONE for name, table in where.items()}
        if sum(map(np.count_nonzero, placed.values())) != np.count_nonzero(passes):
            self.refuse()
        halves = placed["BackwardInput"]
        whole = placed["ForwardPass"] & (halves == placed["BackwardWeight"]) & (halves != placed["BackwardPass"])
        if not whole.all():
            self.refuse()
        links = _Links(
            need=np.full(count, NONE),
            remote=np.zeros(count, bool),
            partner=np.arange(count),
            way=np.full(count, NONE),
            wire=np.zeros(count),
        )
        for stage, holder in enumerate(form.holders):
            around = form.around(stage)
            for name, table in where.items():
                given = table[stage] != NONE
                if name not in PASSES and not (given.all() if name in around else not given.any()):
                    self.refuse()
                row = table[stage][given]
                for others, at in form.needs(name, stage):
                    theirs = np.max([where[other][at] for other in others], axis=0)[given]
                    links.need[row] = np.maximum(links.need[row], theirs) if at == stage else theirs
                    if form.holders[at] != holder:
                        links.remote[row] = True
                        links.way[theirs] = holder
                        links.wire[theirs] = costs.wire(min(at, stage))
                if name in PARTNERS and given.any():
                    other, step = PARTNERS[name]
                    links.partner[row] = where[other][stage + step][given]
        return links


class _Links(NamedTuple):
    """What ties the instructions of a program together, a number for each of them."""

    need: np.ndarray  # what must have ended before, or NONE
    remote: np.ndarray  # whether that comes as a message, from another rank
    partner: np.ndarray  # the other end of a Send or Recv; any other instruction is its own
    way: np.ndarray  # the rank that its message goes to; NONE, the last place, where it makes none
    wire: np.ndarray  # seconds for which that message occupies the wire


def simulate(streams: Iterable[Iterable[Instruction]], costs: Costs) -> Timeline:
    """Play a schedule.

    In a full stream a send and its receive meet: both end a message's time after the later of the two began,
    and the earlier one waits. Of a message that the system holds for it, the send ends earlier. In a compute stream
    transfers happen in the background: a rank has a wire to each other rank, and a message leaves as soon as it is
    made and the wire is free. A rank that has nothing else to do meanwhile spends the time in
    a span ``RecvActivation`` or ``RecvGrad``: it waits until the message is made, and counts as transfer what comes
    then. A rank that ends early waits in ``AggregateLoss``.

    Args:
        streams: one for each rank. ``check`` a schedule of your own before: here it must only be playable.
        costs: for each stage of the model.

    Returns:
        The step, from 0 seconds; its memory is the bytes of the rank's live activations.

    Raises:
        ScheduleError: the streams cannot be played, for the reason that ``check`` gives.
        ValueError: costs for another number of stages.

    >>> from pipetutor.schedule.orders import build
    >>> simulate(build("gpipe", 4, 9), Costs.equal(4)).bubble
    0.25
    """
    program = _Program.of(streams)
    form = program.form()
    if len(costs.forward) != form.stages:
        raise ValueError(f"costs for {len(costs.forward)} stages, but the schedule has {form.stages}: give as many")
    need, remote, partner, way, wire = program.links(form, costs)
    cost = costs.seconds(form.holders, form.full)[program.code, program.stage]
    begin, start = np.zeros(len(cost)), np.zeros(len(cost))
    # NaN: not yet. The last place, NONE, is what needs nothing: it ended before everything.
    end = np.full(len(cost) + 1, np.nan)
    end[NONE] = -np.inf
    arrive = end.copy()  # when its message is there
    clock = np.zeros(form.ranks)
    free = np.zeros((form.ranks, form.ranks + 1))  # from when on a rank's wires are free; the last is no wire
    at, stop = program.start[:-1].copy(), program.start[1:]
    # A round runs the next instruction of every rank that has what it needs and whose partner has arrived:
    #
    #     round   0  1  2  3  4  5 ...
    #     rank 0  F0 F1       B0 F2      P = 2, 1F1B: a round is a column of rules.picture, whatever
    #     rank 1     F0 B0 F1 B1         the costs, so numpy serves all ranks at once.
    ranks = np.flatnonzero(at < stop)
    while ranks.size:
        now = at[ranks]
        peer = program.rank[partner[now]]
        ready = ~np.isnan(end[need[now]]) & (at[peer] == partner[now])
        if not ready.all():
            ranks, now, peer = ranks[ready], now[ready], peer[ready]
            if not ranks.size:
                program.refuse()
        begin[now] = clock[ranks]
        there = np.where(remote[now], arrive[need[now]], end[need[now]])
        start[now] = np.maximum(np.maximum(clock[ranks], clock[peer]), there)
        end[now] = clock[ranks] = start[now] + cost[now]
        free[ranks, way[now]] = left = np.maximum(free[ranks, way[now]], clock[ranks]) + wire[now]
        arrive[now] = left + costs.latency
        at[ranks] += 1
        ranks = np.flatnonzero(at < stop)
    made = np.clip(end[need], begin, start)
    return _timeline(program, form, costs, begin, made, start, end[:-1], clock)


def _timeline(
    program: _Program,
    form: Form,
    costs: Costs,
    begin: np.ndarray,
    made: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    clock: np.ndarray,
) -> Timeline:
    """Write the spans: the instructions, the waits before them, and the wait for the last rank."""
    forward = program.code == CODE["ForwardPass"]
    release = np.isin(program.code, [CODE["BackwardWeight"], CODE["BackwardPass"]])
    kept = np.array(costs.activation_bytes or (0.0,) * form.stages)[program.stage] * (forward * 1 - release * 1)
    live = np.concatenate(
        [np.cumsum(kept[low:high]) for low, high in zip(program.start, program.start[1:], strict=False)]
    )
    seconds = float(clock.max())
    early = clock < seconds
    waited = (start > begin) & (not form.full)
    earlier = np.concatenate([[0], np.cumsum(early)[:-1]])  # AggregateLoss spans of the ranks before
    place = np.arange(len(start)) + np.cumsum(waited) + earlier[program.rank]
    spans = np.zeros(len(start) + waited.sum() + early.sum(), SPAN)

    def write(where: np.ndarray, **columns: np.ndarray | int) -> None:
        for column, values in columns.items():
            spans[column][where] = values

    from_here = begin if form.full else start
    write(place, rank=program.rank, stage=program.stage, kind=program.code, micro_batch=program.micro_batch)
    write(place, begin=from_here, end=end, waiting=start - from_here, memory=live)
    code = np.where(forward, CODE["RecvActivation"], CODE["RecvGrad"])[waited]
    where = place[waited] - 1
    write(where, rank=program.rank[waited], stage=program.stage[waited], kind=code)
    write(where, micro_batch=program.micro_batch[waited], begin=begin[waited], end=start[waited])
    write(where, waiting=(made - begin)[waited], memory=(live - kept)[waited])
    where = place[program.start[1:] - 1][early] + 1
    rank = np.flatnonzero(early)
    write(where, rank=rank, stage=rank, kind=CODE["AggregateLoss"], micro_batch=NONE, begin=clock[early])
    write(where, end=np.full(len(rank), seconds), waiting=seconds - clock[early])
    return Timeline(spans, 0.0, seconds)
