"""Who did what and when in one step: the one form of a simulated and of a measured timeline.

A timeline is a table of spans. The simulator fills it from costs, a trace from clocks; the accounting, the
figures and the tests read it and cannot tell the two apart. numpy alone: a notebook loads no torch for it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["CATEGORIES", "CODE", "COLUMNS", "KINDS", "SPAN", "Timeline", "peak_live"]

# DeepSpeed's instructions, the two halves of a backward pass that zero-bubble schedules tell apart, and the
# exchange of the loss that ends a step.
CATEGORIES = {
    "LoadMicroBatch": "load",
    "ForwardPass": "compute",
    "BackwardPass": "compute",
    "BackwardInput": "compute",
    "BackwardWeight": "compute",
    "SendActivation": "transfer",
    "RecvActivation": "transfer",
    "SendGrad": "transfer",
    "RecvGrad": "transfer",
    "ReduceTiedGrads": "reduce",
    "ReduceGrads": "reduce",
    "OptimizerStep": "optimizer",
    "AggregateLoss": "transfer",
}
KINDS = tuple(CATEGORIES)
CODE = {kind: code for code, kind in enumerate(KINDS)}
COLUMNS = ("compute", "load", "transfer", "waiting", "reduce", "optimizer", "other")

SPAN = np.dtype(
    [
        ("rank", "i4"),
        ("stage", "i4"),  # of the model; of a rank where it concerns the whole step
        ("replica", "i4"),
        ("kind", "i1"),  # its place in KINDS
        ("micro_batch", "i4"),  # -1 for what concerns the whole step
        ("begin", "f8"),  # seconds, on a clock that all ranks share
        ("end", "f8"),
        ("waiting", "f8"),  # seconds of the span spent waiting for another rank, at its beginning
        ("memory", "f8"),  # bytes at the span's end
    ]
)


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline.

    Attributes:
        spans: an array of ``SPAN``, sorted by rank and begin; spans of one rank do not overlap.
        begin: when the first rank began, in seconds.
        end: when the last rank ended.
    """

    spans: np.ndarray
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the step."""
        return self.end - self.begin

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return int(self.spans["rank"].max()) + 1

    def of(self, rank: int) -> np.ndarray:
        """Return the spans of one rank, in order."""
        return self.spans[self.spans["rank"] == rank]

    def durations(self, kind: str) -> np.ndarray:
        """Return the seconds of each instruction of a kind, such as ``ForwardPass``, without its waiting."""
        spans = self.spans[self.spans["kind"] == CODE[kind]]
        return spans["end"] - spans["begin"] - spans["waiting"]

    def accounting(self) -> list[dict[str, float]]:
        """Say where each rank's time went.

        Returns:
            For each rank the seconds of ``COLUMNS``. They add up to the length of the step: what no span covers
            is ``other``, such as the engine's own Python between two instructions.
        """
        rows = []
        for spans in np.split(self.spans, np.searchsorted(self.spans["rank"], range(1, self.ranks))):
            row = dict.fromkeys(COLUMNS, 0.0)
            busy = spans["end"] - spans["begin"] - spans["waiting"]
            for code, kind in enumerate(KINDS):
                row[CATEGORIES[kind]] += float(busy[spans["kind"] == code].sum())
            row["waiting"] = float(spans["waiting"].sum())
            row["other"] = self.seconds - sum(row.values())
            rows.append(row)
        return rows

    @property
    def bubble(self) -> float:
        """Share of the step that the ranks spend waiting, on average."""
        return sum(row["waiting"] for row in self.accounting()) / (self.ranks * self.seconds)


class Peak(NamedTuple):
    """The most that one rank has at a time: live micro-batches, of any of its stages, and bytes of memory."""

    micro_batches: int
    bytes: float


def peak_live(timeline: Timeline) -> list[Peak]:
    """Return each rank's peak of live micro-batches, and of the timeline's memory.

    A micro-batch is live on a stage from the beginning of its forward pass to the end of its ``BackwardPass``,
    or of its ``BackwardWeight`` where backward passes are split. The memory of a simulated timeline is that of live
    activations; a measured one has all that the rank keeps.

    Args:
        timeline: the step.

    Returns:
        One ``Peak`` for each rank.

    >>> from pipetutor.schedule.orders import build
    >>> from pipetutor.schedule.simulate import Costs, simulate
    >>> [peak.micro_batches for peak in peak_live(simulate(build("1f1b", 4, 8), Costs.equal(4)))]
    [4, 3, 2, 1]
    """
    peaks = []
    for rank in range(timeline.ranks):
        spans = timeline.of(rank)
        change = 1 * (spans["kind"] == CODE["ForwardPass"])
        change -= np.isin(spans["kind"], [CODE["BackwardPass"], CODE["BackwardWeight"]])
        peaks.append(Peak(int(np.cumsum(change).max()), float(spans["memory"].max())))
    return peaks
