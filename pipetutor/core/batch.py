"""The batch arithmetic: how a train batch is cut into micro-batches, and what that says of the bubble. No torch."""

from dataclasses import dataclass
from typing import Any

from pipetutor.schedule.formulas import FORMULAS, idle_share
from pipetutor.system.kinds import check, counted

__all__ = ["Batch", "batch_arithmetic", "explain"]


@dataclass(frozen=True)
class Batch:
    """The batch arithmetic: train = micro x accumulation x replicas.

    Attributes:
        train: images a step, over all replicas (DeepSpeed's ``train_batch_size``).
        micro: images a micro-batch (``train_micro_batch_size_per_gpu``).
        accumulation: micro-batches a step and replica (``gradient_accumulation_steps``); a pipeline's M.
        replicas: data-parallel copies.
    """

    train: int
    micro: int
    accumulation: int
    replicas: int

    def __str__(self) -> str:
        return (
            f"train batch {self.train} = micro-batch {self.micro} x {counted(self.accumulation, 'micro-batch')} "
            f"x {counted(self.replicas, 'replica')}"
        )


def batch_arithmetic(config: dict[str, Any], replicas: int) -> Batch:
    """Solve train = micro x accumulation x replicas for what the config leaves out, as DeepSpeed does.

    Raises:
        ValueError: a value is not a positive whole number, or the product does not hold; the message gives
            the nearest triple that does.

    >>> print(batch_arithmetic({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8}, 2))
    train batch 256 = micro-batch 8 x 16 micro-batches x 2 replicas
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        if name in config:
            check(name, config[name], "count")
    train, micro, accumulation = given = [config.get(name) for name in names]
    if train is None and micro is None:
        raise ValueError("the config needs train_batch_size or train_micro_batch_size_per_gpu: 256 and 8, say")
    if micro is None:
        assert train is not None
        micro = max(1, train // ((accumulation or 1) * replicas))
    if accumulation is None:
        accumulation = 1 if train is None else max(1, round(train / (micro * replicas)))
    nearest = Batch(micro * accumulation * replicas, micro, accumulation, replicas)
    if train not in (None, nearest.train):
        cut = counted(given[2], "micro-batch") if given[2] else "a whole number of micro-batches"
        raise ValueError(
            f"train batch {train} is not micro-batch {micro} x {cut} x {counted(replicas, 'replica')}; the nearest "
            f"that works: {nearest}"
        )
    return nearest


def explain(config: dict[str, Any], stages: int, replicas: int = 1, schedule: str = "1f1b", chunks: int = 1) -> str:
    """Explain the batch arithmetic with a run's own numbers, as ``launch`` and the command line print it.

    Args:
        config: a whole DeepSpeed config, from ``read_config``.
        stages: pipeline stages P; 0 for the data-parallel baseline.
        replicas: data-parallel copies.
        schedule: a name of ``pipetutor.schedule.orders.SCHEDULES``; of others there is no formula.
        chunks: stages of the model on each rank.

    Raises:
        ValueError: see ``batch_arithmetic`` and ``pipetutor.schedule.formulas.idle_share``.

    >>> print(explain(read_config(None), stages=2, replicas=2))
    train batch 256 = micro-batch 8 x 16 micro-batches x 2 replicas
    gradient accumulation 16 = 256 / (8 x 2): it is the pipeline's M
    P = 2, M = 16: stages of equal work idle (P-1)/(M+P-1) = 1/17 = 5.9 % of each step
    """
    batch = batch_arithmetic(config, replicas)
    whose = "it is the pipeline's M" if stages else "gradients of so many micro-batches are added up, then one step"
    m = batch.accumulation
    lines = [str(batch), f"gradient accumulation {m} = {batch.train} / ({batch.micro} x {replicas}): {whose}"]
    if stages and schedule in FORMULAS:
        idle, slots = idle_share(schedule, stages, m, chunks)
        lines.append(
            f"P = {stages}, M = {m}: stages of equal work idle {FORMULAS[schedule]} = {idle}/{slots} = "
            f"{100 * idle / slots:.1f} % of each step"
        )
    return "\n".join(lines)
