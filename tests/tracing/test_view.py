"""Perfetto's interface, served with a run's trace: to this machine alone, and without any other."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from urllib.error import HTTPError

import psutil
import pytest
from conftest import HANGS, TINY, train, wait_until

from pipetutor.processes.environment import free_port
from pipetutor.tracing.view import HOST, Viewer, find

EIGHT = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
ASKED = ["-s", 2, "--trace", "--dropout", 0, "--model", TINY["model"], "--dataset", TINY["dataset"]]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "traced", *ASKED, stages=2, config=EIGHT).directory


@contextmanager
def served(directory):
    with Viewer(directory) as viewer:
        thread = threading.Thread(target=viewer.serve_forever)
        thread.start()
        try:
            yield viewer
        finally:
            viewer.shutdown()
            thread.join()


def fetch(url):
    with urllib.request.urlopen(url, timeout=HANGS) as answer:
        return answer.headers, answer.read()


def test_the_interface_and_the_trace_are_served_to_this_machine_alone(traced):
    with served(traced) as viewer:
        headers, page = fetch(viewer.url)
        assert b"<title>Perfetto UI</title>" in page
        assert headers["Content-Security-Policy"].startswith("default-src 'self'"), "no other host is asked"
        assert "http" not in headers["Content-Security-Policy"]
        _, content = fetch(f"{viewer.url}/localtrace")
        assert content == (traced / "trace.json").read_bytes()
        with pytest.raises(HTTPError, match="404"):
            fetch(f"{viewer.url}/../viewer.py")
        listens = [c.laddr for c in psutil.Process().net_connections() if c.laddr.port == viewer.server_port]
        assert {address.ip for address in listens} == {HOST}


def test_a_trace_that_is_not_written_out_is_read_from_what_the_ranks_noted(traced, tmp_path):
    """Of a run that was killed, say."""
    for path in traced.glob("trace_rank*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    with Viewer(tmp_path) as viewer:
        assert viewer.trace == (traced / "trace.json").read_bytes()


def test_the_run_that_is_meant(traced, tmp_path):
    older, newer = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    for age, directory in enumerate((newer, older)):
        directory.mkdir(parents=True)
        (directory / "trace_rank0.jsonl").touch()
        os.utime(directory / "trace_rank0.jsonl", (100 - age, 100 - age))
    (tmp_path / "runs" / "c").mkdir()  # without a trace
    assert find(tmp_path / "runs") == newer
    assert find(older) == older
    assert find(traced / "trace.json") == traced


def view(*words, **environment):
    command = [sys.executable, "-m", "pipetutor", "view", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")} | environment
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )


def refusal(*words):
    done = view(*words)
    said, error = done.communicate(timeout=HANGS)
    assert done.returncode == 2 and said == "" and error.count("\n") == 1 and error.startswith("pipetutor: ")
    return error


def test_what_cannot_be_viewed_is_said_in_a_line(traced, tmp_path):
    assert "nowhere is not there: give the directory of a run, such as runs/2026" in refusal("nowhere")
    assert "is no run, and holds none with a trace: launch one with trace=True (--trace)" in refusal(tmp_path)
    notes = tmp_path / "notes.txt"
    notes.touch()
    assert f"{notes} is no file of a run: give a run's directory, or its trace.json" in refusal(notes)
    (tmp_path / "run.json").write_text("{}")
    assert f"{tmp_path} holds no traced step: launch the run with trace=True (--trace)" in refusal(tmp_path)
    with Viewer(traced) as viewer:
        taken = viewer.server_port
        words = f"cannot serve at port {taken}: Address already in use; give another --port, or none"
        assert words in refusal(traced, "--port", taken)
    assert "cannot serve at port 99999: there is no such port" in refusal(traced, "--port", 99999)


@pytest.mark.parametrize("has_browser", [True, False])
def test_the_command_opens_a_browser_where_there_is_one_and_ends_with_ctrl_c(traced, tmp_path, has_browser):
    opened, port = tmp_path / "opened", free_port()
    (tmp_path / "note.sh").write_text(f'#!/bin/sh\nprintf %s "$1" > "{opened}"\n')
    (tmp_path / "note.sh").chmod(0o755)
    process = view(traced, "--port", port, **({"BROWSER": f"{tmp_path}/note.sh %s"} if has_browser else {}))
    try:
        said = process.stdout.readline()
        assert said == f"{traced}: http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        if has_browser:
            assert wait_until(lambda: opened.exists() and opened.read_text()) == f"http://127.0.0.1:{port}"
        assert json.loads(fetch(f"http://127.0.0.1:{port}/localtrace")[1])["traceEvents"]
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=HANGS)
        assert process.returncode == 0 and rest.strip() == error == "" and opened.exists() == has_browser
    finally:
        process.kill()
        process.communicate()


ROWS = """
async sql => {
  const result = await app.trace.engine.query(sql), columns = result.columns(), found = [];
  for (const row = result.iter({}); row.valid(); row.next()) {
    found.push(columns.map(name => typeof row.get(name) === 'bigint' ? Number(row.get(name)) : row.get(name)));
  }
  return found;
}
"""
SLICES = (
    "select s.name, t.name, count(*) from slice s join thread_track k on s.track_id = k.id join thread t using (utid)"
)
ENDS = """
select op.name, o.name, ot.name, ip.name, i.name, it.name from flow f
join slice o on f.slice_out = o.id join thread_track ok on o.track_id = ok.id join thread ot on ok.utid = ot.utid
join slice i on f.slice_in = i.id join thread_track ik on i.track_id = ik.id join thread it on ik.utid = it.utid
left join slice op on o.parent_id = op.id left join slice ip on i.parent_id = ip.id
"""
COUNTERS = "select k.name, count(*), max(c.value) from counter c join counter_track k on c.track_id = k.id group by 1"
ERRORS = "select name, value from stats where severity in ('error', 'data_loss') and value > 0"


@pytest.mark.browser
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_perfetto_shows_a_real_trace_without_network(runs, engine):
    """Its own trace processor is asked what it has read: slices, arrows from rank to rank, and memory."""
    from test_browser import browser, screenshot

    flags = ["--engine", "torch", "--schedule", "gpipe"] if engine == "torch" else []
    run = train(runs, *ASKED, *flags, stages=2, config=EIGHT)
    messages = 2 * 2 * 4  # steps, ways, micro-batches
    with served(run.directory) as viewer, browser(runs) as page:
        asked, refused = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
        page.goto(viewer.url)
        page.wait_for_function("() => window.app?.trace?.engine", timeout=HANGS * 1000)
        page.get_by_text("rank 1").first.wait_for(timeout=HANGS * 1000)
        page.evaluate("() => waitForPerfettoIdle()")
        screenshot(page, f"perfetto-{engine}")

        def rows(sql):
            return [tuple(row) for row in page.evaluate(ROWS, sql)]

        assert rows(ERRORS) == []
        counted = {(name, rank): count for name, rank, count in rows(f"{SLICES} group by 1, 2")}
        for rank in ("rank 0", "rank 1"):
            for number in range(4):
                assert counted[f"ForwardPass {number}", rank] == counted[f"BackwardPass {number}", rank] == 2
        assert any(name == "waiting" for name, _ in counted)
        arrows = rows(ENDS)
        assert len(arrows) == messages
        made = {"deepspeed": ("SendActivation", "SendGrad"), "torch": ("ForwardPass", "BackwardPass")}[engine]
        for above, left, sender, receives, arrived, receiver in arrows:
            leaves, number = (above if left == "transfer" else left).split()
            back = sender == "rank 1"
            assert (leaves, receiver) == (made[back], f"rank {1 - back}") and arrived == "transfer"
            assert receives == f"Recv{'Grad' if back else 'Activation'} {number}"
        memory = {name: (count, most) for name, count, most in rows(COUNTERS)}
        assert memory.keys() == {"memory of rank 0 MB", "memory of rank 1 MB"}
        assert all(count > 10 and most > 1 for count, most in memory.values())

        others = [url for url in asked if not url.startswith((viewer.url, "data:", "blob:"))]
        assert all((url, "csp") in refused for url in others), "another host was asked"
