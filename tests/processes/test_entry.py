"""Whoever calls from a cell or from Python is told in a line, at the place that called."""

import inspect
import re

import pytest
from conftest import HANGS
from jupyter_client.manager import start_new_kernel

from pipetutor import launch
from pipetutor.certify import certify
from pipetutor.costs import measure

IMPORTS = "from pipetutor import launch\nfrom pipetutor.certify import certify\n"
FIRST_THREE = "got 4 values without a name; only the first 3 need none: stages, replicas, steps"


@pytest.fixture(scope="module")
def failing_cell():
    """Return what a real kernel shows of a cell that fails."""
    manager, client = start_new_kernel(kernel_name="python3")

    def show(cell):
        found = []
        client.execute_interactive(cell, timeout=HANGS, output_hook=found.append)
        (error,) = [message["content"] for message in found if message["msg_type"] == "error"]
        return re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error["traceback"]))

    client.execute(IMPORTS, reply=True, timeout=HANGS)
    yield show
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    "line, words",
    [
        ("launch(steps='3')", "ValueError: steps is '3', but must be a whole number of at least 1: 2, say"),
        ("certify(runs_dir=7)", "ValueError: runs_dir is 7, but must be a path: 'some/where', say"),
        ("launch(step=3)", "TypeError: launch() got an unexpected keyword argument 'step'; did you mean 'steps'?"),
        ("launch(2, 1, 2, 5)", f"TypeError: launch() {FIRST_THREE}"),
        ("certify(model=['vgg'])", "TypeError: certify() got an unexpected keyword argument 'model'; did you mean"),
    ],
)
def test_a_cell_shows_its_own_line_and_the_words_alone(line, words, failing_cell):
    shown = failing_cell(f"asked = 1\n{line}")
    assert f"----> 2 {line}" in shown and words in shown.splitlines()[-1]
    assert ".py" not in shown, shown


def test_a_function_of_the_learners_own_stays_in_sight(failing_cell):
    shown = failing_cell("def mine():\n    launch(steps='3')\n\nmine()")
    assert "----> 4 mine()" in shown and "----> 2     launch(steps='3')" in shown and ".py" not in shown


@pytest.mark.parametrize("function", [launch, measure, certify])
def test_plain_python_shows_who_called_and_one_place_more(function):
    with pytest.raises(ValueError, match="runs_dir is 7, but must be a path") as caught:
        function(runs_dir=7)
    mine, _ = caught.traceback
    assert mine.name == "test_plain_python_shows_who_called_and_one_place_more"
    assert caught.value.__suppress_context__
    assert list(inspect.signature(function).parameters)[-1] in ("runs_dir", "data_dir")
