"""Another user's files, and users without a home of their own: what they do works, or is refused by name."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import HANGS

from pipetutor.data import fetch

PATH = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])
CLOSED, READ_ONLY = 0o000, 0o555  # to an ordinary user, whoever owns it


@pytest.fixture
def place():
    """A directory of the user's own, one that is closed to them, and one that they can only read."""
    path = Path(tempfile.mkdtemp(prefix="pipetutor users "))
    for name, mode in {"own": 0o700, "closed": CLOSED, "read only": READ_ONLY}.items():
        (path / name).mkdir()
        (path / name).chmod(mode)
    yield path
    for folder, *_ in os.walk(path):
        for child in Path(folder).iterdir():
            child.chmod(0o700)
    shutil.rmtree(path)


def as_user(place, script, home="own"):
    """Run Python as a user whom the modes of files bind, and return what it prints."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": PATH} | ({"HOME": str(place / home)} if home else {})
    without_powers = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.getuid() == 0 else []
    if without_powers and not shutil.which("setpriv"):
        pytest.skip("root can do everything, and setpriv, which takes its powers away, is missing")
    run = [*without_powers, sys.executable, "-c", "import pipetutor\n" + script]
    said = subprocess.run(run, cwd=place / "own", env=env, capture_output=True, text=True, timeout=HANGS)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def drawn(folder, *names):
    for name in names:
        (folder / fetch.FILES[name].folder).mkdir()


def test_a_user_for_whom_the_shared_data_is_of_no_use_has_a_directory_of_their_own(place):
    for name, datasets in {"mine": [], "whole": fetch.FILES, "half": ["synthetic"], "hidden": fetch.FILES}.items():
        (place / name).mkdir()
        drawn(place / name, *datasets)
        (place / name).chmod(0o700 if name == "mine" else READ_ONLY)
    (place / "hidden" / fetch.FILES["cifar10"].folder).chmod(CLOSED)
    good, bad = ["not there", "mine", "whole"], ["closed", "half", "hidden"]
    found = as_user(
        place, f"from pipetutor.data.fetch import own_dir\nfor name in {good + bad}: print(own_dir('../' + name))"
    )
    assert found == [*(f"../{name}" for name in good), *(f"../{name}-{os.getuid()}" for name in bad)]


REFUSED = {
    "fetch.prepare('synthetic', '../closed')": "cannot read ../closed/synthetic-batches-py",
    "fetch.prepare('synthetic', '../closed/data')": "cannot read ../closed/data/synthetic-batches-py",
    "fetch.prepare('synthetic', '../read only')": "cannot write the synthetic data to ../read only",
    "checkpoint.find('../closed')": "cannot read checkpoint ../closed",
    "checkpoint.find('run')": "cannot read checkpoint run",
    "checkpoint.verify('listed')": "cannot read checkpoint listed",
    "checkpoint.verify('shards')": "cannot read checkpoint shards",
    "records.create(Path('../closed'), 'p2')": "cannot write runs to ../closed",
    "records.create(Path('../read only'), 'p2')": "cannot write runs to ../read only",
    "records.Run.load('../closed')": "cannot read run ../closed",
    "costs.LayerCosts.load('../closed')": "cannot read the costs in ../closed",
    "config.read_config('../closed/ds.json')": "../closed/ds.json",
    "weights.load_weights(None, '../closed/alexnet.pt')": "../closed/alexnet.pt",
    "weights.export('saved', '../closed/alexnet.pt')": "cannot write the weights to ../closed/alexnet.pt",
    "weights.export('saved', '../read only/alexnet.pt')": "cannot write the weights to ../read only/alexnet.pt",
}
CALL = """
from pathlib import Path
from pipetutor import weights
from pipetutor.core import checkpoint, config, records
from pipetutor.costs import measuring as costs
from pipetutor.data import fetch
weights.checkpoint.load_tensors = weights.checkpoint.stored_tensors = lambda path, *tensors: {{}}
for call in {calls}:
    try:
        print("passed", eval(call))
    except Exception as error:
        print(type(error).__name__, "|", error)
"""


def test_what_belongs_to_another_user_is_refused_by_name(place):
    own = place / "own"
    manifest = {"step": 1, "position": [0, 0], "stages": 1, "replicas": 1, "files": {"a.safetensors": "00"}}
    (own / "run" / "checkpoints").mkdir(parents=True)
    for name, files in {"listed": {}, "shards": manifest["files"], "saved": {}}.items():
        (own / name).mkdir()
        (own / name / "checkpoint.json").write_text(json.dumps(manifest | {"files": files}))
    (own / "shards" / "a.safetensors").write_text("")
    shut = [own / "run" / "checkpoints", own / "listed" / "checkpoint.json", own / "shards" / "a.safetensors"]
    for path in shut:
        path.chmod(CLOSED)
    found = as_user(place, CALL.format(calls=list(REFUSED)))
    for call, line in zip(REFUSED, found, strict=True):
        assert line.startswith(("ValueError", "DataError", "CheckpointError")), (call, line)
        assert REFUSED[call] in line and "ermission denied" in line and "disk" not in line, (call, line)


@pytest.mark.parametrize("home", ["own", "read only", "closed", "closed/too", "unknown"])
def test_costs_are_kept_where_the_user_can_write(place, home):
    """A user whom the machine does not know, as in a container with any uid, has no home."""
    unknown = "import pathlib\ndef home(): raise RuntimeError('no home')\npathlib.Path.home = home\n"
    script = unknown * (home == "unknown") + "from pipetutor.costs import profile\nprint(profile.home())"
    (found,) = as_user(place, script, home)
    elsewhere = Path(tempfile.gettempdir(), f"pipetutor-{os.getuid()}")
    assert Path(found) == (place / "own" / ".cache" / "pipetutor" if home == "own" else elsewhere)


@pytest.mark.parametrize(
    "command",
    [
        "pipetutor.costs --micro-batch 1 --ranks 1 --model mobilenet_v3_small",
        "pipetutor.certify --models vgg --stages 1",
        "benchmarks --rivals load --train-batch 4 --micro-batch 2 --steps 3 --repetitions 1",
    ],
    ids=lambda command: command.split()[0],
)
def test_data_is_where_the_user_says(runs, command):
    """Everything that these commands start reads it there, too, since the default is no directory."""
    env = os.environ | {"PIPETUTOR_DATA_DIR": "/dev/null/none", "XDG_CACHE_HOME": str(runs.parent / "cache")}
    run = [sys.executable, "-m", *command.split()]
    refused = subprocess.run(run, cwd=runs.parent, env=env, capture_output=True, text=True, timeout=HANGS)
    assert refused.returncode == 2 and refused.stderr.endswith(
        "give another data directory (data_dir, --data-dir or PIPETUTOR_DATA_DIR)\n"
    )
    given = [*run, "--data-dir", "my data"]
    done = subprocess.run(given, cwd=runs.parent, env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert (runs.parent / "my data" / fetch.FILES["synthetic"].folder).is_dir()
