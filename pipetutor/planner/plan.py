"""Plan: the best layouts of a model on a cluster, ranked, and why each loses to the one before it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from pipetutor.costs.table import LayerCosts
from pipetutor.planner.cluster import Cluster
from pipetutor.planner.decoder import Decoder
from pipetutor.planner.layout import SCHEDULES, Choice, Layout
from pipetutor.planner.measured import Measured
from pipetutor.planner.search import Misfit, Problem, search
from pipetutor.planner.transformers import Transformer
from pipetutor.processes.entry import briefly
from pipetutor.system.kinds import check, counted, list_of, named

__all__ = ["LEGEND", "PLAYED", "Plans", "plan", "problem_of"]

PLAYED = ("1f1b", "interleaved_1f1b", "zero_bubble")
LEGEND = (
    "P stages, D replicas, M micro-batches of b examples, T devices that share a layer, v chunks; TFLOP/s, sent and "
    "memory are of a device.\n"
    "bubble: a pipeline of equal stages fills and drains; waiting: all other idling, for uneven stages or late "
    "messages"
)


@dataclass(frozen=True)
class Plans:
    """Choices, the fastest first; printed, a table.

    Attributes:
        title: what was planned, in a line.
        choices: that fit.
        misfits: what does not fit, the nearest first.
        limit: bytes that a rank may need.
        layouts: how many there were.
        played: how many the simulator played; closed forms put the others aside.
    """

    title: str
    choices: tuple[Choice, ...]
    misfits: tuple[Misfit, ...]
    limit: float
    layouts: int
    played: int

    @property
    def best(self) -> Choice:
        """The fastest."""
        return self.choices[0]

    def reason(self, place: int) -> str:
        """Say why a choice, counted from 0, loses to the one before it: by what part of its step most of all."""
        if not place:
            return ""
        before, after = self.choices[place - 1], self.choices[place]
        more = {part: seconds - before.parts[part] for part, seconds in after.parts.items()}
        part = max(more, key=lambda name: more[name])
        lost = after.seconds - before.seconds
        if lost <= 1e-9 * before.seconds:
            return "as fast, with more memory"
        return f"+{_seconds(lost)}: {part} +{_seconds(more[part])}"

    def __str__(self) -> str:
        """Return the table, and below it what does not fit."""
        head = ["", "P", "D", "T", "b", "M", "schedule", "recompute", "ZeRO", "s/step", "idle", "examples/s"]
        head += ["TFLOP/s", "sent GB", "memory GB", "loses to the one above by"]
        rows = [head]
        for place, choice in enumerate(self.choices):
            layout = choice.layout
            order = layout.schedule + (f" v={layout.chunks}" if layout.chunks > 1 else "")
            rows.append(
                [
                    *(str(place + 1), str(layout.stages), str(layout.replicas), str(layout.tensor)),
                    *(str(layout.micro_batch), str(layout.micro_batches), order),
                    *("yes" if layout.recompute else "", str(layout.zero_stage or ""), f"{choice.seconds:.4g}"),
                    *(f"{choice.idle:.1%}", f"{choice.examples_per_second:.4g}"),
                    "" if choice.flops is None else f"{choice.flops / 1e12:.1f}",
                    *(f"{choice.sent / 1e9:.3g}", f"{choice.memory / 1e9:.3g}", self.reason(place)),
                ]
            )
        kept = [place for place, name in enumerate(head) if any(row[place] for row in rows[1:]) and name != "T"]
        if any(choice.layout.tensor > 1 for choice in self.choices):
            kept = sorted({*kept, head.index("T")})
        rows = [[row[place] for place in kept] for row in rows]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left = {place for place, name in enumerate(rows[0]) if name == "schedule" or " by" in name}
        lines = [self.title]
        for row in rows:
            cells = [
                cell.ljust(w) if at in left else cell.rjust(w)
                for at, (cell, w) in enumerate(zip(row, wide, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines.append(LEGEND)
        lines += [
            f"does not fit: {misfit.layout}: needs {misfit.memory / 1e9:.3g} GB of {self.limit / 1e9:.3g}"
            for misfit in self.misfits
        ]
        return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def problem_of(
    model: str | Transformer | LayerCosts,
    cluster: str | Cluster,
    global_batch: int,
    *,
    tensor: int = 1,
    schedules: Sequence[str] = PLAYED,
) -> Problem:
    """Return what ``plan`` searches, so that one layout can be judged; see there for the arguments.

    >>> layout = Layout(stages=2, replicas=1, tensor=1, micro_batch=1, micro_batches=8)
    >>> problem_of("gpt2-xl", "dgx-a100:hosts=1,devices=2", 8).memory(layout) < 80e9
    True
    """
    if not isinstance(model, Transformer | LayerCosts):
        model = Transformer.parse(model)
    if not isinstance(cluster, Cluster):
        cluster = Cluster.parse(cluster)
    check("global_batch", global_batch, "count")
    check("tensor", tensor, "count")
    check("schedules", schedules, list_of(named(SCHEDULES)))
    if isinstance(model, LayerCosts):
        if tensor > 1 or "1f1b" not in schedules:
            raise ValueError(
                "measured costs are planned for DeepSpeed's engine, which plays 1f1b and shares no layer between "
                "devices: leave schedules and tensor out"
            )
        if model.ranks != cluster.ranks:
            raise ValueError(
                f"{model.model} was measured with ranks={model.ranks}, and the cluster has "
                f"{counted(cluster.ranks, 'device')}: what ranks take from each other is known for as many alone; "
                f"measure with ranks={cluster.ranks}, or give a cluster of {counted(model.ranks, 'device')}"
            )
        return Measured(model, cluster, global_batch)
    if cluster.devices % tensor:
        fitting = [number for number in range(1, cluster.devices + 1) if cluster.devices % number == 0]
        raise ValueError(
            f"tensor is {tensor}: a layer is shared by devices of one host, and its {cluster.devices} cannot be "
            f"divided into groups of {tensor}: use {', '.join(map(str, fitting))}"
        )
    if model.heads % tensor:
        raise ValueError(
            f"tensor is {tensor}, but {model.name} has {model.heads} heads to share out: no multiple of it"
        )
    return Decoder(model, cluster, global_batch, tensor, tuple(schedules))


@briefly
def plan(
    model: str | Transformer | LayerCosts,
    cluster: str | Cluster,
    global_batch: int,
    *,
    tensor: int = 1,
    schedules: Sequence[str] = PLAYED,
    top: int = 6,
    each: Sequence[str] = ("stages",),
) -> Plans:
    """Plan a model's training on a cluster: stages, replicas, micro-batches, bounds, schedule, recomputing, ZeRO.

    Args:
        model: a known one (gpt3-175b, gpt2-xl:sequence=512), a line such as layers=24,width=1024,heads=16,
            sequence=1024,vocabulary=50257, or measured costs.
        cluster: a known one (dgx-a100, dgx-a100:hosts=48), or a line such as hosts=2,devices=8,memory=80GB,
            flops=312T,inside=300GB/s,between=25GB/s+5us; measured costs need the first three alone.
        global_batch: examples of a step, all replicas together.
        tensor: devices of a host that share each layer.
        schedules: which may be played; measured costs are those of DeepSpeed's engine, which plays 1f1b alone.
        top: how many choices are ranked.
        each: the best for each value of these is ranked: stages, schedule, micro_batch, recompute, zero_stage, ...

    Returns:
        The choices, the fastest first. For measured costs ``options`` of each is what ``launch`` takes.

    Raises:
        ValueError: something asked for makes no sense, or nothing fits; the message says what would.

    >>> plan("gpt3-175b", "dgx-a100:hosts=48", 1536, tensor=8).best.layout.stages  # doctest: +SKIP
    8
    """
    problem = problem_of(model, cluster, global_batch, tensor=tensor, schedules=schedules)
    check("top", top, "count")
    check("each", each, list_of(named(one.name for one in fields(Layout))))
    found = search(problem, top, each)
    ranks = problem.cluster.ranks
    if not found.layouts:
        measured = (
            f"; measured costs are of micro-batches of {model.micro_batch}" if isinstance(model, LayerCosts) else ""
        )
        raise ValueError(
            f"no layout of {problem.name} has {counted(ranks, 'device')} and a global batch of {global_batch}: "
            "stages x replicas x tensor are the devices, replicas x micro-batch divide the batch, and each stage has "
            f"a layer with weights{measured}: use another batch or another number of devices"
        )
    if not found.choices:
        nearest = found.misfits[0]
        raise ValueError(
            f"{problem.name} does not fit: the nearest is {nearest.layout}, which needs {nearest.memory / 1e9:.3g} "
            f"GB on a device of {problem.cluster.memory / 1e9:.3g}: use more devices, or more for each layer (tensor)"
        )
    title = (
        f"{problem.name} on {counted(ranks, 'device')}, global batch {global_batch}: {found.layouts:,} layouts, "
        f"{found.played} of them played"
    )
    return Plans(
        title, tuple(found.choices), tuple(found.misfits), problem.cluster.memory, found.layouts, found.played
    )
