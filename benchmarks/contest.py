"""The runs of the bench, one after another: which rivals there are, how each is started, what it took.

    python -m benchmarks.contest DIRECTORY JSON

``benchmarks.bench`` starts it under the supervisor. Repetitions are interleaved, a b c a b c, so that what slows the
machine down for a minute slows down every rival. Each run has processes of its own, which are started as DeepSpeed's
launcher starts them. No torch is loaded here.
"""

import resource
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipetutor import launch
from pipetutor.core import records
from pipetutor.core.config import read_config
from pipetutor.processes.environment import free_port, prepare_rank, rank_environment
from pipetutor.processes.job import do_job
from pipetutor.system import machine
from pipetutor.system.gpus import gpus

STAGES = 2
SEED = 1138
# Not Adam: it divides a gradient by its own size, so that rounding counts. A plain PyTorch process with one thread
# differs from one with two by 1e-4 of a loss within ten steps, and fused from not fused by 4e-4. With SGD it is 1e-6.
OPTIMIZER = {"type": "SGD", "params": {"lr": 0.1}}
MICRO_BATCHES = (1, 2, 4, 8, 16)  # of the runs that show how throughput grows
GROWING_STAGES = (1, 2, 4)  # likewise, with the train batch of the rivals
WEIGHTS = "weights.pt"
# The weights that the other rivals draw. Ours would give each draw a seed of its own, so it is handed them.
DRAW = """
import sys
import torch
from pipetutor.core.layers import build
torch.manual_seed(int(sys.argv[1]))
torch.save(build("alexnet").state_dict(), sys.argv[2])
"""
WARM_UP = 2  # steps: memory is allocated, shapes are agreed on
LATER = 2  # steps that are measured in the repetitions after the first, which runs as many as losses are compared
PATIENCE_SECONDS = 600  # without a step: a slow machine may take as many steps' time as it needs
DEFAULTS = (
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "GLIBC_TUNABLES",
    "LOCAL_RANK",
    "TORCHELASTIC_USE_AGENT_STORE",
)


@dataclass(frozen=True)
class Rival:
    """Who takes part.

    Attributes:
        title: what it is, in a few words.
        ranks: processes.
        prepared: whether it runs in the environment of our ranks (``prepare_rank``), or in that which
            DeepSpeed's launcher or torchrun's users find: torch's own number of threads, no huge pages.
        stages: pipeline stages, for what ``pipetutor.train`` runs; None where ``benchmarks.rivals`` does.
        dtype: in which it computes.
        compared: whether its losses must be those of the others.
    """

    title: str
    ranks: int = STAGES
    prepared: bool = True
    stages: int | None = None
    dtype: str = "fp32"
    compared: bool = True


RIVALS = {
    "reference": Rival("reference example, as it is", prepared=False),
    "pipeline": Rival("ours, cut by profile", stages=STAGES),
    "torch_default": Rival("torch 1F1B, default environment", prepared=False),
    "torch": Rival("torch 1F1B, our environment"),
    "data_parallel": Rival(f"DeepSpeed data-parallel, {STAGES} ranks", stages=0),
    "plain": Rival("plain PyTorch, one process", ranks=1),
    "limit": Rival("limit: no transfer, no waiting"),
    "bf16": Rival("ours in bf16", stages=STAGES, dtype="bf16", compared=False),
    "load_reference": Rival("loading alone, the reference", ranks=1, prepared=False, compared=False),
    "load": Rival("loading alone, ours", ranks=1, compared=False),
}


def environment(rival: Rival, rank: int, port: int) -> dict[str, str]:
    """Return what one rank finds in its environment; what the user has set of ``DEFAULTS`` is left out.

    Args:
        rival: whose rank.
        rank: its number.
        port: where the ranks meet.
    """
    env = rank_environment(rank, rival.ranks, port)
    env = {name: value for name, value in env.items() if name not in DEFAULTS}
    if gpus(STAGES).count < STAGES:  # the same device for everybody
        env["DS_ACCELERATOR"] = "cpu"
    if rival.prepared:
        prepare_rank(env, [])
    if rival.stages is not None:
        env["LOCAL_RANK"] = str(rank)
    return env


def command(name: str, directory: Path, steps: int, cut: str) -> list[str]:
    """Return what a rank of a rival executes.

    Args:
        name: a key of ``RIVALS``.
        directory: of the run; holds config.json.
        steps: to train.
        cut: the bounds of ours, and of torch's pipeline.
    """
    rival = RIVALS[name]
    if rival.stages is None:
        return [*machine.PYTHON, "-u", "-m", "benchmarks.rivals", name, str(directory), str(steps), cut]
    stages = rival.stages and cut.count(",")
    flags = {"-p": stages, "-s": steps, "--seed": SEED, "--dropout": 0, "--run-dir": directory}
    if stages:
        flags["--partition"] = cut
    flags |= {"--deepspeed_config": directory / "config.json", "--dtype": rival.dtype}
    flags["--weights"] = directory.with_name(WEIGHTS)
    if gpus(STAGES).count < STAGES:
        flags["--backend"] = "gloo"
    words = [str(word) for flag in flags.items() for word in flag]
    return [*machine.PYTHON, "-u", "-m", "pipetutor.train", *words]


def _busy() -> tuple[float, float]:
    """Return the seconds that this machine's cores have worked, and what our own processes took of them."""
    times, own = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(times) - times.idle - times.iowait, own.ru_utime + own.ru_stime


def compete(name: str, directory: Path, steps: int, config: dict[str, Any], cut: str) -> dict[str, Any]:
    """Run one rival once.

    Args:
        name: a key of ``RIVALS``.
        directory: of the run; made here.
        steps: to train; the first ``WARM_UP`` are not counted.
        config: DeepSpeed's.
        cut: see ``command``; ours has as many ranks as it has stages.

    Returns:
        ``rate`` in images a second, of the median step; ``losses`` and ``seconds`` of each step; ``others``, the
        cores that other programs kept busy meanwhile.

    Raises:
        RuntimeError: a rank failed, or no step ended for too long; ranks may be left running.
    """
    rival, port = RIVALS[name], free_port()
    if rival.stages:
        rival = replace(rival, ranks=cut.count(","))
    directory.mkdir(parents=True)
    records.write_json(directory / "config.json", config)
    if rival.stages is not None and not (weights := directory.with_name(WEIGHTS)).exists():
        subprocess.run([*machine.PYTHON, "-c", DRAW, str(SEED), str(weights)], check=True)
    begin, (busy, own) = time.monotonic(), _busy()
    steps_file, seen, moved = directory / records.STEPS, 0, begin
    ranks = []
    for rank in range(rival.ranks):
        with open(directory / f"rank{rank}.log", "w") as log:
            env = environment(rival, rank, port)
            words = command(name, directory, steps, cut)
            ranks.append(subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT))
    while any(codes := [rank.poll() for rank in ranks]) or None in codes:
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if (size := steps_file.stat().st_size if steps_file.exists() else 0) > seen:
            seen, moved = size, time.monotonic()
        if failed is not None or time.monotonic() - moved > PATIENCE_SECONDS:
            what = f"no step within {PATIENCE_SECONDS} s" if failed is None else f"rank {failed} failed"
            said = (directory / f"rank{failed or 0}.log").read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{name}: {what}; the last words of rank {failed or 0}:\n{said}")
        time.sleep(0.05)
    lasted = time.monotonic() - begin
    lines = list(records.read_lines(steps_file))
    seconds = [line["seconds"] for line in lines]
    rate = config["train_batch_size"] / statistics.median(seconds[WARM_UP:])
    busier, more = _busy()
    others = max(0.0, (busier - busy) - (more - own)) / lasted
    return {"rate": rate, "losses": [line["loss"] for line in lines], "seconds": seconds, "others": others}


def latency(directory: Path, cut: str) -> dict[str, Any]:
    """Call ``launch`` once, and return the seconds from the call to the beginning of the first step."""
    called = time.time()
    config = {"train_batch_size": 16}
    run = launch(STAGES, steps=1, config=config, partition=cut, dropout=0, runs_dir=directory)
    written = (run.directory / records.STEPS).stat().st_mtime
    return {"latency": written - run.seconds[0] - called}


def contest(
    directory: Path,
    rivals: list[str],
    train_batch: int,
    micro_batch: int,
    steps: int,
    repetitions: int,
    more: bool,
    cuts: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Run all rivals, again and again, and yield a row for each run; see ``benchmarks.bench.bench``.

    ``cuts`` has the bounds for each number of stages.
    """
    cut, many = cuts[str(STAGES)], train_batch // micro_batch
    for repetition in range(repetitions):
        length = steps if repetition == 0 else min(steps, WARM_UP + LATER)
        runs = [(name, "rivals", many, length, cut) for name in rivals]
        if more:
            runs += [("pipeline", "growth", count, WARM_UP + LATER, cut) for count in MICRO_BATCHES]
            runs += [("pipeline", "stages", many, WARM_UP + LATER, cuts[str(stages)]) for stages in GROWING_STAGES]
        for name, part, count, length, bounds in runs:
            # One number is taken from them, a rate, which fewer steps tell as well.
            length = length if RIVALS[name].compared and name != "limit" else min(length, WARM_UP + LATER)
            config = read_config(
                {
                    "train_batch_size": count * micro_batch,
                    "train_micro_batch_size_per_gpu": micro_batch,
                    "optimizer": OPTIMIZER,
                },
                RIVALS[name].dtype,
            )
            stages = bounds.count(",")
            place = directory / "ranks" / f"{repetition}-{part}-{name}-{count}-{stages}"
            about = {"part": part, "rival": name, "micro_batches": count, "stages": stages, "repetition": repetition}
            yield about | compete(name, place, length, config, bounds)
        if more:
            yield {"part": "latency", "repetition": repetition} | latency(directory / "launched", cut)


if __name__ == "__main__":
    do_job(lambda directory, asked: contest(directory, **asked))
