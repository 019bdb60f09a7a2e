"""What if a stage were faster: a timeline's own order, played anew with other costs.

The order of the instructions stays what it was; the simulator plays it twice, with the costs as they are and with one
stage's passes made shorter. So a prediction is compared with a prediction, and what the simulator does not know of a
measured step, such as Python between two instructions, falls out.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipetutor.schedule.causes import amount
from pipetutor.schedule.orders import PARTNERS, STEP, Instruction
from pipetutor.schedule.rules import LETTERS, ScheduleError, check
from pipetutor.schedule.simulate import Costs, simulate
from pipetutor.schedule.timeline import CODE, KINDS, Timeline

__all__ = ["Faster", "costs_of", "faster", "streams_in"]


class Faster(NamedTuple):
    """What a faster stage would do to the step.

    Attributes:
        stage: which one is faster.
        share: by how much of its time.
        before: seconds of the simulated step, with the costs as they are.
        after: seconds of the simulated step with the faster stage.
    """

    stage: int
    share: float
    before: float
    after: float

    @property
    def saved(self) -> float:
        """By which share the step is shorter."""
        return 1 - self.after / self.before

    def words(self, unit: str = "ms") -> str:
        """Say it, with times in ``ms`` or in what a simulated second stands for."""
        change = f"{amount(self.before, unit)} to {amount(self.after, unit)}"
        return f"stage {self.stage} {self.share:.0%} faster: the step is {self.saved:.1%} shorter, from {change}"

    def __str__(self) -> str:
        return self.words()


def faster(timeline: Timeline, share: float = 0.1, costs: Costs | None = None) -> list[Faster]:
    r"""Ask for each stage by how much the step would be shorter, were the stage's passes shorter.

    Args:
        timeline: simulated or measured; with replicas, its first pipeline is played.
        share: by how much of their time the passes are shorter, from 0 to 1.
        costs: what the timeline was simulated with; without, they are taken from its spans.

    Returns:
        One answer for each stage. A stage that saves nothing has time to spare.

    Raises:
        ValueError: a share that is none.
        ScheduleError: what the timeline did is no whole step.

    >>> from pipetutor.schedule.orders import build
    >>> uneven = Costs((1, 2, 1), (1, 2, 1), (1, 2, 1))
    >>> print(*(each.words("units") for each in faster(simulate(build("1f1b", 3, 8), uneven))), sep="\n")
    stage 0 10% faster: the step is 0.6% shorter, from 52 units to 51.7 units
    stage 1 10% faster: the step is 8.8% shorter, from 52 units to 47.4 units
    stage 2 10% faster: the step is 0.6% shorter, from 52 units to 51.7 units
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: give the part of a stage's time that is saved, such as 0.1 for 10 %")
    costs, streams = costs or costs_of(timeline), streams_in(timeline)
    before = simulate(streams, costs).seconds

    def after(stage: int) -> float:
        def shorter(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(v * (1 - share) if at == stage else v for at, v in enumerate(values))

        passes = [shorter(each) for each in (costs.forward, costs.backward_input, costs.backward_weight)]
        of_it = replace(costs, forward=passes[0], backward_input=passes[1], backward_weight=passes[2])
        return simulate(streams, of_it).seconds

    return [Faster(stage, share, before, after(stage)) for stage in range(len(costs.forward))]


def streams_in(timeline: Timeline) -> list[list[Instruction]]:
    """Return what each rank did in which order, as streams that can be checked and simulated.

    Where sends and receives meet, as DeepSpeed's do, they are full streams; else compute streams. What the rules do
    not know, such as the exchange of the loss, is left out. With replicas it is what the first pipeline did.

    >>> from pipetutor.schedule.orders import build
    >>> streams = build("1f1b", 4, 8)
    >>> streams_in(simulate(streams, Costs.equal(4))) == streams
    True
    """
    spans = timeline.spans[timeline.spans["replica"] == timeline.spans["replica"].min()]
    if _meet(spans):
        full = _streams(spans, {*LETTERS})
        try:
            check(full)
            return full
        except ScheduleError:
            pass  # they met by chance
    return _streams(spans, {*LETTERS} - {"LoadMicroBatch", *PARTNERS})


def _streams(spans: np.ndarray, kept: Set[str]) -> list[list[Instruction]]:
    streams = []
    for number, rank in enumerate(np.unique(spans["rank"])):
        own = spans[spans["rank"] == rank]
        names = [KINDS[kind] for kind in own["kind"]]
        passes = [
            Instruction(name, int(span["stage"]), int(span["micro_batch"]))
            for name, span in zip(names, own, strict=True)
            if name in kept
        ]
        ends = [name for name in STEP if name in names or name == STEP[-1]]
        streams.append([*passes, *(Instruction(name, number, None) for name in ends)])
    return streams


def _meet(spans: np.ndarray) -> bool:
    """Tell whether every Send was still there when its Recv ended.

    Torch's pipelines wait for what they have sent as well, but in the background and later.
    """
    ends = {
        (KINDS[span["kind"]], int(span["stage"]), int(span["micro_batch"])): span
        for span in spans[np.isin(spans["kind"], [CODE[name] for name in PARTNERS])]
    }
    met = []
    for (name, stage, micro_batch), span in ends.items():
        partner, direction = PARTNERS[name]
        other = ends.get((partner, stage + direction, micro_batch))
        if name.startswith("Send"):
            met.append(other is not None and other["end"] >= span["begin"])
    return all(met)


def costs_of(timeline: Timeline) -> Costs:
    """Take the costs of each stage from a timeline: medians of passes, and of the messages that were waited for."""
    spans = timeline.spans
    busy = spans["end"] - spans["begin"] - spans["waiting"]
    passes = spans["micro_batch"] >= 0
    stages = int(spans["stage"][passes].max()) + 1

    def median(name: str, chosen: np.ndarray) -> float:
        seconds = busy[chosen & (spans["kind"] == CODE[name])]
        return float(np.median(seconds)) if len(seconds) else 0.0

    def each(name: str) -> tuple[float, ...]:
        return tuple(median(name, spans["stage"] == stage) for stage in range(stages))

    def once(name: str) -> tuple[float, ...]:
        """Put what a rank does for the whole step to the first of its stages."""
        costs = [0.0] * stages
        for rank in np.unique(spans["rank"]):
            own = spans["rank"] == rank
            costs[int(spans["stage"][own & passes].min())] = median(name, own)
        return tuple(costs)

    def message(boundary: int) -> float:
        waited = spans["waiting"] > 0  # the others had come, in part or as a whole, before their rank came to them
        ways = [("RecvActivation", boundary + 1), ("RecvGrad", boundary)]
        found = [median(name, waited & (spans["stage"] == stage)) for name, stage in ways]
        return max(found)

    whole, halves = each("BackwardPass"), each("BackwardInput")
    return Costs(
        forward=each("ForwardPass"),
        backward_input=tuple(half or both for half, both in zip(halves, whole, strict=True)),
        backward_weight=each("BackwardWeight"),
        # As many bytes as seconds, over a wire that takes one a second.
        message_bytes=tuple(message(boundary) for boundary in range(stages - 1)),
        bandwidth=1.0,
        load=each("LoadMicroBatch"),
        optimizer=once("OptimizerStep"),
        all_reduce=once("ReduceGrads"),
        tied_reduce=once("ReduceTiedGrads"),
    )
