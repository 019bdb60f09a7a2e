"""Ranks on the nodes of a real Slurm, started by docs/cluster.sbatch and by srun."""

import json
from pathlib import Path

import pytest
from conftest import SMALL_SGD, Run, wait_until

from pipetutor.core import records

pytestmark = pytest.mark.cluster

TEMPLATE = Path(__file__).parents[2] / "docs" / "cluster.sbatch"


@pytest.fixture
def flags(runs, monkeypatch) -> list[str]:
    """The smallest training, in the working directory of a test."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    Path("small.json").write_text(json.dumps(SMALL_SGD))
    data = ["--dataset", "sums", "--data-dir", f"{runs.parent}/data"]
    return ["--model", "gpt:layers=1,width=32,heads=1", *data, "--deepspeed_config", "small.json"]


def submit(slurm, *words: object) -> tuple[str, Path]:
    """Submit a job on the first host; return its number, and the run directory that will be its own."""
    done = slurm[0].run("sbatch", "--parsable", *words)
    assert not done.returncode, done.stderr
    return (job := done.stdout.strip()), Path("runs", f"slurm-{job}")


def end_of(slurm, job: str) -> str:
    """Wait until a job has ended, and return Slurm's word for how. (``sbatch --wait`` looks every half minute.)"""
    busy = ("PENDING", "RUNNING", "COMPLETING")
    show = ("scontrol", "--oneliner", "show", "job", job)
    (state,) = wait_until(
        lambda: [
            word.removeprefix("JobState=")
            for word in slurm[0].run(*show).stdout.split()
            if word.startswith("JobState=") and not word.endswith(busy)
        ]
    )
    return state


def said() -> str:
    return "\n".join(path.read_text() for path in Path().glob("pipetutor-*.out"))


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_template_trains_on_two_nodes(tasks, slurm, flags):
    job, directory = submit(slurm, f"--ntasks-per-node={tasks}", TEMPLATE, "--steps", 3, *flags)
    assert end_of(slurm, job) == "COMPLETED", said()
    run, record = Run.load(directory), records.read(directory)
    assert len(run.losses) == 3 and record["stages"] == 2 * tasks and record["threads_per_rank"] == 2, said()


def test_two_jobs_share_nodes(slurm, flags):
    one_core = ("--ntasks-per-node=1", "--cpus-per-task=1")
    jobs = [submit(slurm, *one_core, TEMPLATE, "--steps", 3, *flags) for _ in range(2)]
    assert [end_of(slurm, job) for job, _ in jobs] == ["COMPLETED"] * 2, said()
    assert [len(Run.load(directory).losses) for _, directory in jobs] == [3, 3]


def test_scancel_ends_all_ranks(slurm, flags):
    job, directory = submit(slurm, TEMPLATE, "--steps", 1_000_000, *flags)
    wait_until(lambda: (directory / "run.json").exists() and Run.load(directory).losses)
    assert [len(host.ranks()) for host in slurm] == [2, 2]
    slurm[0].run("scancel", job)
    assert end_of(slurm, job) == "CANCELLED"
    assert not any(host.ranks() for host in slurm)
    assert records.read(directory)["status"] == "interrupted"


def test_a_rank_that_dies_ends_the_others(slurm, flags):
    job, _ = submit(slurm, TEMPLATE, "--steps", 1_000_000, *flags, "--fault", "die:rank=3,step=2")
    assert end_of(slurm, job) == "FAILED" and "task 3: Killed" in said(), said()
    assert not any(host.ranks() for host in slurm)


def test_srun_alone_starts_ranks_of_unequal_nodes(slurm, flags):
    command = ["python", "-m", "pipetutor.train", "-p", 3, "--steps", 2, "--run-dir", "runs/alone", *flags]
    done = slurm[0].run("srun", "--nodes=2", "--ntasks=3", *command)
    assert not done.returncode, done.stderr
    assert len(Run.load(Path("runs/alone")).losses) == 2


def test_a_script_without_srun_is_told_to_use_it(slurm, flags):
    done = slurm[0].run("salloc", "--nodes=2", "--ntasks-per-node=1", "python", "-m", "pipetutor.train", *flags)
    assert done.returncode == 2
    assert "is not set): use srun --ntasks 2 python -m pipetutor.train --model gpt" in done.stderr
