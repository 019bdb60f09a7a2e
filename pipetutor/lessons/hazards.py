"""What goes wrong without the care that ``pipetutor.data.loader`` takes, done for real so that a lesson can show it.

    play("AABB")     two processes fetch as if they were alone, in the order that you give them
    barrier()        the same, with one that fetches while the others wait
    ragged()         a pipeline whose loader keeps the ragged micro-batch at the end of a pass

Each works in processes of its own, with data of its own, and leaves neither behind.
"""

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pipetutor.core import records
from pipetutor.data import synthetic
from pipetutor.processes.environment import cpu_environment
from pipetutor.processes.forks import forked, meet
from pipetutor.processes.job import do_job, run_job
from pipetutor.system import machine

__all__ = ["barrier", "naive", "play", "ragged"]

PATIENCE_SECONDS = 60
DID = "did: "  # begins a line by which a process tells what it did


class Move(NamedTuple):
    """One step of one process: who moved, what it did, and whether it failed."""

    who: str
    did: str
    failed: bool

    def __str__(self) -> str:
        return f"{self.who} {self.did}"


def naive(folder: Path) -> Iterator[str]:
    """Fetch and read a data set as a program does that thinks it is alone; each ``yield`` ends a step."""
    found = folder.exists()
    yield "looks: the folder is there" if found else "looks: nothing there"
    if not found:
        folder.mkdir(exist_ok=True)
        yield "makes the folder"
        synthetic.write(folder)
        yield "draws every image"
    labels = pickle.loads((folder / "data_batch_1").read_bytes())["labels"]
    yield f"reads {len(labels):,} labels"


def play(turns: str) -> list[Move]:
    r"""Let real processes fetch into one directory, one step at a time, in a given order.

    A processor does the same, but in an order that nobody gives it.

    Args:
        turns: a letter for each step: ``AAB`` gives process A two steps, and then process B its first.

    Returns:
        What each step did.

    >>> print(*play("AABB"), sep="\n")
    A looks: nothing there
    A makes the folder
    B looks: the folder is there
    B fails: FileNotFoundError, No such file or directory: data_batch_1
    """
    if not turns.isalpha():
        raise ValueError(f"turns is {turns!r}, but must be a letter for each step: 'AABB', say")
    players: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        command = [*machine.PYTHON, "-m", "pipetutor.lessons.hazards", "naive", str(Path(directory, "drawn"))]
        try:
            for who in sorted(set(turns)):  # they end of themselves when this process does: their input ends
                players[who] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            return [_move(who, players[who]) for who in turns]
        finally:
            for player in players.values():
                player.kill()
                player.communicate()


def _move(who: str, player: subprocess.Popen[str]) -> Move:
    assert player.stdin and player.stdout
    player.stdin.write("your turn\n")
    player.stdin.flush()
    said = next((line for line in player.stdout if line.startswith(DID)), "")  # a site's Python may greet first
    did = said.removeprefix(DID).strip()
    return Move(who, did, did.startswith("fails"))


def _take_turns(folder: Path) -> None:
    steps = naive(folder)
    for _ in sys.stdin:
        try:
            did = next(steps, "has ended")
        except OSError as error:  # its generator has ended with it
            did = f"fails: {type(error).__name__}, {error.strerror}: {Path(error.filename or folder).name}"
        print(f"{DID}{did}", flush=True)


def barrier(ranks: int = 4, runs_dir: str | Path = "runs") -> list[dict[str, Any]]:
    """Let the ranks of one host open a data set that is not there, through ``pipetutor.data.loader.load``.

    Args:
        ranks: how many, at once.
        runs_dir: where the directory of their logs is made.

    Returns:
        For each rank, ``drew``: how often it drew the data set; ``waited``: seconds at the barrier; and ``images``
        that it can read afterwards.
    """
    return _run("barrier", ranks, Path(runs_dir))


def ragged(runs_dir: str | Path = "runs") -> list[str]:
    """Train a pipeline of two linear layers on 20 images in micro-batches of 8, and drop none.

    Args:
        runs_dir: where the directory of its logs is made.

    Returns:
        How each of the two ranks ended.
    """
    return _run("ragged", 2, Path(runs_dir))


def _run(what: str, ranks: int, runs_dir: Path) -> list[Any]:
    directory = records.create(runs_dir, what)
    asked = {"what": what, "ranks": ranks}
    rows = run_job(
        "pipetutor.lessons.hazards", directory, asked, cpu_environment(ranks), ranks, "ranks", lambda row: ""
    )
    return [row["found"] for row in rows]


def _barrier_rank(rank: int, ranks: int, directory: Path, place: str) -> dict[str, Any]:
    import torch.distributed as dist

    from pipetutor.data import loader

    meet(rank, ranks, directory / "store")
    waited, wait = [], dist.barrier

    def timed() -> None:
        begin = time.perf_counter()
        wait()
        waited.append(time.perf_counter() - begin)

    with (
        mock.patch.object(synthetic, "write", wraps=synthetic.write) as drawing,
        mock.patch.object(dist, "barrier", timed),
    ):
        images = loader.load("synthetic", True, rank, place)
    return {"rank": rank, "drew": drawing.call_count, "waited": sum(waited), "images": len(images)}  # type: ignore[arg-type]


def _ragged_rank(rank: int, ranks: int, directory: Path) -> str:
    import deepspeed
    import torch
    from deepspeed.utils import RepeatingLoader

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    meet(rank, ranks, directory / "store")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 10)]
    net = deepspeed.pipe.PipelineModule(layers, num_stages=2, loss_fn=torch.nn.CrossEntropyLoss())
    optimizer = {"type": "SGD", "params": {"lr": 0.01}}
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "optimizer": optimizer}
    engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)
    drawn = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.zeros(20, dtype=torch.long))
    batches = RepeatingLoader(torch.utils.data.DataLoader(drawn, batch_size=8))
    for step in (1, 2, 3):
        try:
            engine.train_batch(data_iter=batches)
        except Exception as error:
            return f"step {step}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"


def _accident(directory: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    ranks, log = asked["ranks"], directory / "logs" / f"{asked['what']}.log"
    with tempfile.TemporaryDirectory() as cold:
        if asked["what"] == "barrier":
            import pipetutor.data.loader  # noqa: F401 (once, for all forks)

            works: list[Any] = [partial(_barrier_rank, rank, ranks, directory, cold) for rank in range(ranks)]
        else:
            import deepspeed  # noqa: F401

            works = [partial(_ragged_rank, rank, ranks, directory) for rank in range(ranks)]
        for found in forked(works, log, PATIENCE_SECONDS):
            yield {"found": found}


if __name__ == "__main__":  # one of the processes that the functions above start
    if sys.argv[1] == "naive":
        _take_turns(Path(sys.argv[2]))
    else:
        do_job(_accident)
