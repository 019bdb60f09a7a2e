"""A schedule of one's own, launched: it trains with the losses of one process, and its record has it."""

import pytest
from conftest import TINY, equal_but_for_rounding
from random_schedules import NOVEL

from pipetutor import launch
from pipetutor.schedule import orders, text
from pipetutor.schedule.timeline import CATEGORIES, KINDS
from pipetutor.tracing import trace

CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
}
ABOUT = TINY | {"model": "gpt:layers=3,width=16,heads=1", "config": CONFIG, "steps": 3}
FASTER = ABOUT | {"config": CONFIG | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The losses of one process, and those with another rate of learning."""
    runs = tmp_path_factory.mktemp("base")
    return [launch(stages=0, runs_dir=runs, **about).losses for about in (ABOUT, FASTER)]


def test_a_schedule_that_no_library_has_trains_with_the_losses_of_one_process(runs, base, capsys):
    run = launch(stages=2, engine="torch", schedule=NOVEL, trace=True, runs_dir=runs, **ABOUT)
    equal_but_for_rounding(run.losses, *base)
    said = capsys.readouterr().out
    assert "your schedule: 3 stages of equal work idle" in said and f"{run.directory.name}/schedule.csv" in said
    streams = text.parse(NOVEL)
    assert text.parse(run.details["schedule"]) == streams and len(run.bounds) == 4
    timeline = trace.load(run).typical.timeline
    for rank, stream in enumerate(streams):
        wanted = [(i.stage, i.micro_batch) for i in stream if i.micro_batch is not None]
        spans = [span for span in timeline.of(rank) if CATEGORIES[KINDS[span["kind"]]] == "compute"]
        assert [(span["stage"], span["micro_batch"]) for span in spans] == wanted


def backwards(ranks, micro_batches, rank):
    """GPipe, but the last micro-batch comes back first."""
    yield from (f"F{number}" for number in range(micro_batches))
    yield from (f"B{number}" for number in reversed(range(micro_batches)))


@pytest.mark.parametrize("schedule", [backwards, "file", "zbv", "dualpipev"])
def test_functions_files_and_v_shapes_train_with_the_losses_of_one_process(schedule, runs, base, tmp_path):
    if schedule == "file":
        schedule = tmp_path / "mine.csv"
        schedule.write_text(text.csv(orders.build("1f1b", 2, 4)))
    run = launch(stages=2, engine="torch", schedule=schedule, runs_dir=runs, **ABOUT)
    equal_but_for_rounding(run.losses, *base)
