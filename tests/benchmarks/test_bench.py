"""The bench measures rivals that compute the same, says so when one does not, and is honest about the reference."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import HANGS, processes_of, wait_until

from benchmarks import contest
from benchmarks.bench import Bench, bench, limit, main
from pipetutor.launcher import RunFailed
from pipetutor.system import machine

TINY = {"train_batch": 4, "micro_batch": 2, "steps": 3, "repetitions": 1}
FLAGS = ["--train-batch", "4", "--micro-batch", "2", "--steps", "3", "--repetitions", "1"]


def row(rival, rate, losses=(2.0, 1.5), micro_batches=16, part="rivals", others=0.0):
    return {
        "part": part,
        "rival": rival,
        "rate": rate,
        "losses": list(losses),
        "micro_batches": micro_batches,
        "others": others,
    }


ROWS = [
    row("reference", 30.0),
    row("pipeline", 44.0, [2.0, 1.50005]),
    row("limit", 28.0, [2.0]),
    row("reference", 20.0, [2.0]),
    row("pipeline", 45.0),
    row("limit", 24.0, [2.0]),
    row("reference", 31.0),
    row("pipeline", 40.0),
    row("limit", 29.0, [2.0]),
    *(
        row("pipeline", rate, micro_batches=count, part="growth")
        for count, rate in [(1, 20.0), (16, 41.0), (1, 22.0)]
    ),
    {"part": "latency", "latency": 9.0},
    {"part": "latency", "latency": 12.0},
    {"part": "latency", "latency": 10.0},
]


def test_the_limit_is_the_ranks_without_waiting():
    assert limit(28.0, 16) == pytest.approx(2 * 28 * 16 / 17)
    assert limit(28.0, 1) == pytest.approx(28.0), "one micro-batch: one rank works at a time"


def test_medians_ratios_and_differences(tmp_path):
    reference, ours, bound = Bench(ROWS, tmp_path).summary
    assert [reference["median"], reference["minimum"], reference["maximum"]] == [30.0, 20.0, 31.0]
    assert [ours["median"], ours["minimum"], ours["maximum"]] == [44.0, 40.0, 45.0]
    assert ours["to_reference"] == pytest.approx(44 / 30) and ours["to_ours"] == 1.0
    assert reference["to_ours"] == pytest.approx(30 / 44) and reference["difference"] == 0.0
    assert ours["difference"] == pytest.approx(5e-5)
    assert [bound[name] for name in ("median", "minimum", "maximum")] == [limit(r, 16) for r in (28.0, 24.0, 29.0)]


def test_growth_and_latency(tmp_path):
    found = Bench(ROWS, tmp_path)
    assert found.growth == {
        1: {"median": 21.0, "minimum": 20.0, "maximum": 22.0, "limit": 28.0},
        16: {"median": 41.0, "minimum": 41.0, "maximum": 41.0, "limit": limit(28.0, 16)},
    }
    assert found.latency == {"median": 10.0, "minimum": 9.0, "maximum": 12.0}
    said = str(found)
    assert "ours with M =  1: 21.0 (20.0 to 22.0) images/s, limit 28.0" in said
    assert "from the call to the first step: 10.0 (9.0 to 12.0) s" in said
    assert "FAILED" not in said and "other programs" not in said
    bare = Bench(ROWS[:2], tmp_path)
    assert bare.growth == {} and bare.latency == {}


def test_stages_loading_and_what_is_not_compared(tmp_path):
    more = [
        row("pipeline", rate, part="stages") | {"stages": count} for count, rate in [(4, 3.0), (1, 2.0), (4, 5.0)]
    ]
    alone = [row("bf16", 60.0, [9.0]), row("load_reference", 100.0, [0.0]), row("load", 500.0, [0.0])]
    found = Bench([*ROWS, *more, *alone], tmp_path)
    assert list(found.by_stages) == [1, 4] and found.by_stages[4]["median"] == 4.0
    assert found.loading == {"ours": 2.0, "reference": 10.0} and found.wrong == []
    said = str(found)
    assert "loading an image: 2.00 ms, the reference 10.00 ms: 0.20 of it" in said
    assert "ours with P =  4: 4.0 (3.0 to 5.0) images/s" in said
    (line,) = [line for line in said.splitlines() if line.startswith("ours in bf16")]
    assert line.split()[3:] == ["60.0", "60.0", "60.0", "2.00", "1.36", "-"]
    assert Bench(ROWS, tmp_path).loading == {} and Bench(ROWS, tmp_path).by_stages == {}


@pytest.mark.parametrize("loss", [1.6, float("nan"), None])
def test_a_rival_with_other_losses_is_named(tmp_path, loss):
    found = Bench([*ROWS, row("plain", 99.0, [2.0, loss])], tmp_path)
    assert found.wrong == ["plain"]
    assert "FAILED: the losses of plain are not those of reference" in str(found)


def test_a_busy_machine_is_mentioned(tmp_path):
    assert "other programs kept up to 0.7 cores busy" in str(Bench([*ROWS, row("plain", 9.0, others=0.7)], tmp_path))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"rivals": ["plain", "plain"]}, "each can take part once"),
        ({"train_batch": 100}, "train batch 100 "),
        ({"train_batch": 8}, "train batch 8 "),
    ],
)
def test_bad_input_is_refused_before_anything_starts(given, words, runs):
    with pytest.raises(ValueError, match=words):
        bench(**given, runs_dir=runs)
    assert not runs.exists()


def test_the_command_refuses_bad_input_with_status_2(tmp_path):
    for flags, words in [(["--rivals", "jax"], "rivals is ['jax']"), (["--steps", "x"], "invalid int value")]:
        command = [sys.executable, "-m", "benchmarks", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 2 and words in done.stderr and not list(tmp_path.iterdir())


def test_bf16_is_left_out_where_it_would_crawl(runs, monkeypatch):
    monkeypatch.setattr(machine, "bf16_is_native", lambda: False)
    with pytest.raises(ValueError, match=r"no instructions for it.*compare other rivals"):
        bench(["bf16"], runs_dir=runs)
    assert not runs.exists()
    monkeypatch.setattr("benchmarks.bench._cuts", lambda *_: {"2": "0,16,22"})
    monkeypatch.setattr("benchmarks.bench.run_job", lambda _, __, asked, *___: [row(n, 9) for n in asked["rivals"]])
    found = bench(["load", "bf16"], **TINY, runs_dir=runs)
    assert [row["rival"] for row in found.rows] == ["load"]
    assert "\nbf16 is left out: this processor has no instructions" in str(found)
    assert json.loads((found.directory / "bench.json").read_text())["left_out"] == found.left_out


def test_a_run_may_take_its_time_as_long_as_steps_end(tmp_path, monkeypatch):
    """Steps that take longer together than the patience for one; then none comes."""
    monkeypatch.setattr(contest, "PATIENCE_SECONDS", 3)
    line = {"loss": 1.0, "seconds": 4.0}
    step = f"time.sleep(1.2); file.write('{json.dumps(line)}' + chr(10)); file.flush()"
    for name, last in (("ends", "pass"), ("hangs", "time.sleep(100)")):
        place = tmp_path / name
        code = (
            f"import time\nwith open({str(place / 'steps.jsonl')!r}, 'a') as file:\n    for _ in range(3): {step}\n"
        )
        monkeypatch.setattr(contest, "command", lambda *_, code=code, last=last: [sys.executable, "-c", code + last])
        config = {"train_batch_size": 8}
        if name == "ends":
            assert contest.compete("load", place, 3, config, "0,22")["rate"] == 2.0
        else:
            with pytest.raises(RuntimeError, match="load: no step within 3 s"):
                contest.compete("load", place, 3, config, "0,22")


def test_the_reference_gets_no_environment_of_ours(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, rival in contest.RIVALS.items():
        env = contest.environment(rival, 0, 1)
        assert ("THP_MEM_ALLOC_ENABLE" in env) == ("OMP_NUM_THREADS" in env) == rival.prepared, name


# Loaded by every process of a run: notes each image that is transformed, and at its end its threads and whether it
# asked for huge pages; and gives plain PyTorch other weights. The bench itself is told the cut, and measures none.
OBSERVE = """
import os, sys
if "benchmarks" in sys.orig_argv:
    from benchmarks import bench
    bench._cuts = lambda *_: {"2": "0,16,22"}
if "benchmarks.rivals" in sys.orig_argv:
    import atexit
    from pathlib import Path
    if "plain" in sys.orig_argv:
        from benchmarks import contest
        contest.SEED = 7
    import torch
    from torchvision import transforms
    name = Path(__file__).with_name(f"{sys.orig_argv[-4]}-{os.environ['RANK']}")
    resize = transforms.Resize.forward
    def forward(self, image):
        with name.with_suffix(".images").open("a") as file:
            file.write("x")
        return resize(self, image)
    transforms.Resize.forward = forward
    def note():
        asked = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
        name.with_suffix(".seen").write_text(f"{torch.get_num_threads()} {asked}")
    atexit.register(note)
"""


def test_a_tiny_bench(runs, monkeypatch):
    """The reference is what its authors wrote, observed, not assumed; who computes something else is named."""
    (runs.parent / "sitecustomize.py").write_text(OBSERVE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.parent), os.environ.get("PYTHONPATH", "")]))
    rivals = ["reference", "pipeline", "torch", "plain"]
    command = [sys.executable, "-m", "benchmarks", "--rivals", ",".join(rivals), *FLAGS, "--runs-dir", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 1, done.stderr
    assert "FAILED: the losses of plain are not those of reference" in done.stdout
    assert done.stdout.count("FAILED") == 1
    (directory,) = runs.iterdir()
    content = json.loads((directory / "bench.json").read_text())
    assert [r["rival"] for r in content["summary"]] == rivals and content["wrong"] == ["plain"]
    *same, other = (r["difference"] for r in content["summary"])
    assert max(same) <= other / 1000, "rounding is nothing beside what other weights make"
    assert all(len(r["losses"]) == 3 and r["rate"] > 0 and r["others"] >= 0 for r in content["rows"])
    assert content["asked"]["train_batch"] == 4 and len(set(content["rows"][0]["losses"])) == 3
    log = next(directory.glob("ranks/*reference*/rank0.log")).read_text()
    assert re.findall(r"stage=(\d) layers=(\d+)", log) == [("0", "19"), ("1", "3")]
    images = {rank: len((runs.parent / f"reference-{rank}.images").read_text()) for rank in (0, 1)}
    assert min(images.values()) >= 12, "12 images were trained on, and each end transforms all of them"
    assert (runs.parent / "torch-0.images").exists() and not (runs.parent / "torch-1.images").exists()
    seen = {p.stem: [int(n) for n in p.read_text().split()] for p in runs.parent.glob("*.seen")}
    bare = {name: value for name, value in os.environ.items() if name not in contest.DEFAULTS}
    words = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    default = int(subprocess.run(words, env=bare, capture_output=True, text=True, timeout=HANGS).stdout)
    for rank in (0, 1):
        assert seen[f"reference-{rank}"] == [default, 0], "threads as torch itself has them, no huge pages"
        assert seen[f"torch-{rank}"] == [max(1, len(os.sched_getaffinity(0)) // 2), 1]
    assert not processes_of(runs.parent)


@pytest.mark.parametrize("loss, status", [(1.5, 0), (1.6, 1)])
def test_the_status_says_whether_losses_agree(loss, status, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.bench"])
    monkeypatch.setattr("benchmarks.bench.bench", lambda: Bench([*ROWS, row("plain", 9.0, [2, loss])], tmp_path))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status


def test_a_rival_that_fails_says_why(runs, monkeypatch):
    (runs.parent / "torchvision.py").write_text("raise RuntimeError('no eyes')")
    monkeypatch.setenv("PYTHONPATH", f"{runs.parent}:{os.environ.get('PYTHONPATH', '')}")  # found before the real one
    monkeypatch.setattr("benchmarks.bench._cuts", lambda *_: {"2": "0,16,22"})  # nor can it be measured now
    with pytest.raises(RunFailed, match=r"torch: rank . failed; the last words(.|\n)*RuntimeError: no eyes"):
        bench(["torch"], **TINY, runs_dir=runs)
    assert not processes_of(runs.parent)


def test_an_interrupt_leaves_nothing_running(runs):
    kernel = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--rivals", "reference", *FLAGS, "--runs-dir", str(runs)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    try:
        ranks = "-m benchmarks.rivals reference"
        wait_until(lambda: sum(ranks in " ".join(p.cmdline()) for p in processes_of(runs)) >= 2)
        kernel.send_signal(signal.SIGINT)
        assert kernel.wait(HANGS) == 130
    finally:
        kernel.kill()
        kernel.wait()
    assert not processes_of(runs.parent)


@pytest.mark.slow
def test_every_rival_and_more(runs):
    found = bench(**TINY, more=True, runs_dir=runs)
    assert not found.wrong and len(found.summary) == len(contest.RIVALS), str(found)
    assert set(found.growth) == set(contest.MICRO_BATCHES) and set(found.by_stages) == set(contest.GROWING_STAGES)
    assert 1 < found.latency["median"] < 100
    assert not processes_of(runs.parent)
