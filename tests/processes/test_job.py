"""A job hands on its rows, and its record says how it ended."""

import json
import os

import pytest

from pipetutor.core import records
from pipetutor.processes.job import run_job
from pipetutor.processes.watch import RunFailed

MODULE = """
from pipetutor.processes.job import do_job

def work(directory, asked):
    for number in range(asked["numbers"]):
        yield {"number": number}
    assert asked["numbers"] < 3, "too many"

do_job(work)
"""


@pytest.fixture
def counted(runs):
    """Run a job that counts, and return its rows."""
    runs.parent.mkdir(exist_ok=True)
    (runs.parent / "counting.py").write_text(MODULE)
    directory = records.create(runs, "counting")
    places = f"{runs.parent}:{os.environ.get('PYTHONPATH', '')}"

    def count(numbers):
        rows = run_job("counting", directory, {"numbers": numbers}, {"PYTHONPATH": places}, numbers, "rows", str)
        return list(rows), directory

    return count


def test_a_job_hands_on_its_rows_and_has_finished(counted):
    rows, directory = counted(2)
    assert [row["number"] for row in rows] == [0, 1] and records.read(directory)["status"] == "finished"


def test_a_job_that_fails_says_why(counted):
    with pytest.raises(RunFailed, match=r"counting ended with status 1:(.|\n)*AssertionError: too many") as failed:
        counted(3)
    assert json.loads((failed.value.directory / "run.json").read_text())["status"] == "failed"
