"""What does not fit is refused memory, a part of it fits, and building a part takes no more than it keeps."""

import re
import resource
from pathlib import Path

import pytest
from conftest import RankFailed, run, train

from pipetutor.core.limit import limited
from pipetutor.core.model import build_model

GPT = "gpt:layers=8,width=512"  # 25 million parameters, 100 MB
CONFIG = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}


def build(held):
    """Return the bytes that building took at its highest, and those of what was built; or how it failed."""
    build_model(GPT, held=[])  # what is loaded and kept at the first time
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is
    before = resident("VmRSS")
    try:
        with limited(0.05):
            model = build_model(GPT, held=held)
    except RuntimeError as error:
        return str(error)
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    return resident("VmHWM") - before, sum(t.nbytes for t in model.state().values() if not t.is_meta)


def resident(name):
    (found,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found)


def test_a_rank_builds_its_part_in_little_more_memory_than_that_keeps(tmp_path):
    ((peak, kept),) = run(tmp_path, 1, build, [range(2, 4)])
    assert kept == 2 * 4 * (12 * 512**2 + 13 * 512)
    assert kept < 1.3 * peak and peak < 1.2 * kept  # some of it lies where there was memory already


def test_the_whole_does_not_fit_into_the_same(tmp_path):
    (error,) = run(tmp_path, 1, build, None)
    assert "can't allocate memory" in error


def test_a_model_that_one_process_has_no_memory_for_trains_in_two(runs):
    asked = ["--model", GPT, "--dataset", "sums", "-s", "2", "--partition", "type:Block", "--memory-limit", "0.3"]
    with pytest.raises(RankFailed, match="can't allocate memory"):
        train(runs / "one", *asked, config=CONFIG)
    assert len(train(runs / "two", *asked, stages=2, config=CONFIG).losses) == 2
