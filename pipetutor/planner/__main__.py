"""``python -m pipetutor plan``: the best layouts of a model on a cluster."""

from collections.abc import Sequence
from pathlib import Path

from pipetutor.costs.table import LayerCosts
from pipetutor.planner.plan import PLAYED, Plans, plan
from pipetutor.processes.entry import command


def planned(
    model: str,
    *,
    cluster: str = "dgx-a100",
    global_batch: int = 1024,
    tensor: int = 1,
    schedules: Sequence[str] = PLAYED,
    top: int = 6,
    each: Sequence[str] = ("stages",),
) -> Plans:
    """Plan a model's training on a cluster: stages, replicas, micro-batches, bounds, schedule, recomputing, ZeRO.

    Args:
        model: gpt3-175b, gpt2-xl:sequence=512, layers=24,width=1024,heads=16,sequence=1024,vocabulary=50257, or a
            directory with costs that python -m pipetutor costs wrote.
        cluster: dgx-a100, dgx-h100:hosts=48, or hosts=2,devices=8,memory=80GB,flops=312T,inside=300GB/s,
            between=25GB/s+5us, both of each device; for measured costs hosts, devices and memory alone.
        global_batch: examples of a step, all replicas together.
        tensor: devices of a host that share each layer.
        schedules: which may be played.
        top: how many choices are ranked.
        each: the best for each value of these is ranked.
    """
    found = LayerCosts.load(model) if Path(model).is_dir() else model
    return plan(found, cluster, global_batch, tensor=tensor, schedules=schedules, top=top, each=each)


if __name__ == "__main__":
    print(command(planned, "python -m pipetutor plan"))
