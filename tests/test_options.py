"""Each option of a run stands in one place: one field more is an option more, everywhere."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, SMALL, train
from jupyter_client.manager import start_new_kernel

import course
import pipetutor
from pipetutor import launch
from pipetutor.options import POSITIONAL, Options
from pipetutor.train import get_args

FIELD = """    made_up: int = option(7, "count", "how often the moon is looked at", "--made-up")
    deadline: float"""


@pytest.fixture
def one_more(tmp_path):
    """The package with an option more, in a directory of its own; returns what a Python that uses it prints."""
    shutil.copytree(Path(pipetutor.__file__).parent, tmp_path / "pipetutor")
    file = tmp_path / "pipetutor" / "options.py"
    text = file.read_text()
    assert text.count("    deadline: float") == 1
    file.write_text(text.replace("    deadline: float", FIELD))

    def run(script):
        before = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pipetutor import launch\n"
        said = subprocess.run([sys.executable, "-c", before + script], capture_output=True, text=True, timeout=HANGS)
        return said.stdout + said.stderr

    return run


def test_one_field_more_is_an_option_of_the_parser_of_launch_of_the_command_and_of_the_record(one_more, runs):
    said = one_more("from pipetutor.train import get_args; get_args(['--help'])")
    assert "--made-up MADE_UP" in said and "how often the moon is looked at (default 7)" in " ".join(said.split())
    assert "made_up: int = 7" in one_more("import inspect; print(inspect.signature(launch))")
    assert "made_up: how often the moon is looked at." in one_more("print(launch.__doc__)")
    assert "| `made_up` | `--made-up` | `7` |" in one_more("from pipetutor.options import table; print(table())")
    assert "made_up is 0, but must be a whole number of at least 1" in one_more("launch(made_up=0)")
    script = (
        f"launch(made_up=8, steps=1, stages=1, model='mobilenet_v3_small', config={SMALL!r}, runs_dir={str(runs)!r})"
    )
    assert " --made-up 8 " in one_more(script)
    (record,) = runs.glob("*/run.json")
    found = json.loads(record.read_text())
    assert found["options"]["made_up"] == 8 and " --made-up 8 " in found["command"]


def test_launch_shows_every_option_with_its_default():
    taken = inspect.signature(launch).parameters
    assert list(taken)[:POSITIONAL] == ["stages", "replicas", "steps"]
    assert {name: one.default for name, one in taken.items()} == {name: getattr(Options(), name) for name in taken}
    assert all(f"\n        {name}: " in launch.__doc__ for name in taken)


def test_a_notebook_completes_the_options_and_shows_them_all():
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute("from pipetutor import launch", reply=True, timeout=HANGS)
        completed = client.complete("launch(stages=2, save_", reply=True, timeout=HANGS)["content"]["matches"]
        shown = client.inspect("launch", reply=True, timeout=HANGS)["content"]["data"]["text/plain"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert completed == ["save_every="]
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "seed: int = 1138" in plain and "seed: of weights, dropout and data order." in plain


def test_an_unknown_option_is_named_with_the_one_that_is_meant():
    with pytest.raises(
        TypeError, match=r"launch\(\) got an unexpected keyword argument 'step'; did you mean 'steps'\?"
    ):
        launch(step=3)


@pytest.mark.parametrize(
    "options, words",
    [
        (Options(), "-p 2 -s 20"),
        (Options(steps=100, recompute=True, dropout=0), "-p 2 -s 100 --dropout 0 --recompute"),
        (Options(stages=0, seed=7, weights=Path("a b.pt")), "-p 0 -s 20 --seed 7 --weights a b.pt"),
    ],
)
def test_a_command_says_what_differs_from_the_defaults_and_is_read_back(options, words):
    assert " ".join(options.words()) == words
    read = Options.from_command_line(get_args(options.words()), ranks=2)
    assert Options.from_command_line(get_args(read.words()), 2) == read
    assert read.replicas == (1 if options.stages else 2)
    assert (read.stages, read.steps, read.seed, read.dropout) == (
        options.stages,
        options.steps,
        options.seed,
        options.dropout,
    )


def test_ranks_on_another_host_keep_what_is_theirs():
    first, mine = Options(seed=7, resume="theirs", local_rank=0), Options(resume="mine", run_dir="here", local_rank=1)
    found = first.on_this_host(mine)
    assert (found.seed, found.resume, found.run_dir, found.local_rank) == (7, "mine", "here", 1)
    assert not {"resume", "weights", "run_dir", "data_dir", "local_rank", "deepspeed_config"} & first.common().keys()
    assert first.common()["pipeline_parallel_size"] == 2


def test_a_terminals_run_is_recorded_with_its_options(runs):
    run = train(runs, "--model", "tiny", "-s", 1, "--seed", 3)
    assert run.details["options"]["seed"] == 3 and run.details["options"]["stages"] == 1


def test_the_table_of_flags_in_the_readme_is_up_to_date():
    text = course.README.read_text()
    assert text == course.with_flags(text), "make map"
