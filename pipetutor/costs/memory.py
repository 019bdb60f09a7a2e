"""What each rank keeps in memory, predicted and measured.

                 predicted                       measured, in a run's trace
    parameters   4 bytes each                    the tensors that building the stage added
    gradients    4 bytes each, at each place     what the end of a step gives back
    optimizer    Adam: 8 bytes each              what the end of the first step adds beside that
    activations  of all live micro-batches       the rest, at its highest between two instructions
    peak         the most that a step adds       the same, within instructions too

With ZeRO-1 each of R replicas steps a share of the weights (Rajbhandari et al., arXiv:1910.02054), and keeps of the
optimizer's state 1/R. DeepSpeed 0.19.8 steps a copy of that share in fp32, also where the weights are fp32, so 4/R
bytes of parameters come on top.

On a CPU, memory is the process's resident set without mapped files, but for the parameters: while a stage is built,
its process also gets threads, Python modules and machine code that oneDNN writes for the processor, a few MB that
differ between machines, and so the tensors are counted by themselves. glibc keeps much of what a program frees; with
``MALLOC_MMAP_THRESHOLD_=65536`` in its environment it hands all large blocks back, and the resident set tells
what is in use. That makes a step slower. On CUDA it is what torch's allocator has handed out. numpy alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipetutor.core.config import REDUCE_BUCKET
from pipetutor.core.partition import parameters_of
from pipetutor.costs.table import LayerCosts
from pipetutor.options import ENGINES
from pipetutor.schedule.orders import Instruction
from pipetutor.schedule.simulate import simulate
from pipetutor.schedule.timeline import CODE
from pipetutor.system.kinds import check
from pipetutor.tracing.trace import Trace

__all__ = ["PARTS", "measure", "predict"]

PARTS = ("parameters", "gradients", "optimizer", "activations", "peak")
FP32 = 4
END = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")  # of a step, behind its last backward pass
Memory = dict[str, float]  # bytes, for each of PARTS


def predict(
    costs: LayerCosts,
    bounds: Sequence[int],
    streams: Iterable[Iterable[Instruction]],
    *,
    engine: str = "deepspeed",
    recompute: bool = False,
    optimizer_states: int = 2,
    replicas: int = 1,
    zero_stage: int = 0,
) -> list[Memory]:
    """Say what each rank will keep, from what is known of the layers.

    A live micro-batch keeps what autograd saves, or its stage's input alone with ``recompute``. DeepSpeed keeps
    one more copy of that input.

    Args:
        costs: of the model; only its bytes matter.
        bounds: of all stages of the model.
        streams: the schedule, one stream for each rank.
        engine: ``deepspeed`` or ``torch``.
        recompute: whether stages recompute their activations.
        optimizer_states: numbers that the optimizer keeps for each parameter: 2 for Adam, 0 for plain SGD.
        replicas: copies R of the pipeline; the ranks that hold the same stage keep the same.
        zero_stage: with 1, they share the optimizer's state.

    Returns:
        The bytes of ``PARTS`` for each rank of one replica.

    Raises:
        ValueError: the bounds, the streams and the model do not fit each other, or there is no such engine.

    >>> predict(costs, [0, 16, 22], build("gpipe", 2, 8))[0]["activations"]  # doctest: +SKIP
    """
    check("engine", engine, ENGINES)
    check("replicas", replicas, "count")
    check("zero_stage", zero_stage, [0, 1])
    stage_costs = costs.for_bounds(bounds)
    copies = np.array([costs.input_bytes, *stage_costs.message_bytes])
    saved = np.array(stage_costs.activation_bytes) - copies
    kept = (copies if recompute else saved) + copies * (engine == "deepspeed")
    timeline = simulate(streams, replace(stage_costs, activation_bytes=tuple(kept)))
    share = 1 / replicas if zero_stage else 1.0
    rows = []
    for rank in range(timeline.ranks):
        spans = timeline.of(rank)
        stages = np.unique(spans["stage"][spans["kind"] == CODE["ForwardPass"]])
        layers = [layer for s in stages for layer in costs.layers[bounds[s] : bounds[s + 1]]]
        parameters = FP32 * parameters_of(layers)
        # Without ZeRO each place of tied weights adds up its gradients apart, also on one rank: core.model.TiedSums.
        gradients = parameters if zero_stage else FP32 * sum(layer.parameters for layer in layers)
        there, begun = _gradients(spans)
        after, before = spans["memory"], np.concatenate([[0.0], spans["memory"][:-1]])
        passing = max(layer.output_bytes for layer in layers) + recompute * max(saved[s] for s in stages)
        # In a first backward pass gradients come while activations go. Later ones hold a layer's new gradient
        # beside the sum that it is added to, unless it is added in place.
        by_autograd = zero_stage or CODE["BackwardWeight"] in spans["kind"]
        added = gradients + FP32 * max(layer.parameters * (by_autograd or layer.kind != "Linear") for layer in layers)
        during = np.where(begun, before + passing + added * (begun > 1), 0)
        during = np.maximum(during, after + gradients * there)
        # A mean over replicas is taken of a copy: of all gradients, or with ZeRO of as many as its buffer holds.
        averaged = parameters * (replicas > 1)
        copied = min(averaged, FP32 * REDUCE_BUCKET) if zero_stage else averaged
        values = (
            parameters * (1 + share * zero_stage),
            gradients,
            optimizer_states * parameters * share,
            spans["memory"].max(),
            max(during.max(), parameters + copied),
        )
        rows.append(dict(zip(PARTS, map(float, values), strict=True)))
    return rows


def measure(trace: Trace) -> list[Memory]:
    """Say what each rank kept in a traced run of at least two steps, from its memory after each instruction.

    Args:
        trace: of the run.

    Returns:
        The bytes of ``PARTS`` for each rank.

    Raises:
        ValueError: the trace has fewer than two steps, or glibc kept what the ranks freed.
    """
    if not all(head["returns_blocks"] for head in trace.heads):
        raise ValueError(
            "the ranks ran without MALLOC_MMAP_THRESHOLD_, so glibc kept what they freed, and memory in use cannot "
            "be told: set os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536' ahead of launch"
        )
    if len(trace.steps) < 2:
        raise ValueError(f"{len(trace.steps)} traced step: what the optimizer keeps shows from the second on; run 2")
    first, step = trace.steps[0], trace.steps[-1]
    rows = []
    for rank, head in enumerate(trace.heads):
        spans = step.timeline.of(rank)
        there, _ = _gradients(spans)
        end = _end_of_passes(spans)
        gradients = -_added_at_end(spans)
        values = (
            head["with_model"] - head["without_model"],
            gradients,
            _added_at_end(first.timeline.of(rank)) + gradients,
            (spans["memory"] - step.memory[rank] - gradients * there)[:end].max(),
            step.peaks[rank] - step.memory[rank],
        )
        rows.append(dict(zip(PARTS, map(float, values), strict=True)))
    return rows


def _end_of_passes(spans: np.ndarray) -> int:
    """Return the place of the first span behind the last backward pass: of an exchange, or of the optimizer."""
    return int(np.flatnonzero(np.isin(spans["kind"], [CODE[name] for name in END]))[0])


def _added_at_end(spans: np.ndarray) -> float:
    """Return what the end of a step adds to memory: the optimizer's state in the first, less the gradients in all.

    It is taken as a whole: ZeRO gives gradients back within ReduceGrads, and gloo's copy of them may outlive that.
    """
    (place,) = np.flatnonzero(spans["kind"] == CODE["OptimizerStep"])
    return float(spans["memory"][place] - spans["memory"][_end_of_passes(spans) - 1])


def _gradients(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Say after which spans there are gradients, and which backward pass each is, counted from 1; 0 for others."""
    backward = np.isin(spans["kind"], [CODE[name] for name in ("BackwardPass", "BackwardWeight")])
    begun = np.cumsum(backward)
    stepped = np.cumsum(spans["kind"] == CODE["OptimizerStep"])
    return (begun > 0) & (stepped == 0), begun * backward
