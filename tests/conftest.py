"""Shared by the tests: small runs, and proof that they leave no process behind."""

import os
from pathlib import Path

import psutil
import pytest

SMALL = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}


def processes_of(directory: Path) -> list[psutil.Process]:
    """Every process whose command line or working directory names this test's own directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(directory) in " ".join(process.cmdline()) or process.cwd().startswith(str(directory)):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A directory for runs; afterwards, none of its processes may be alive."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "runs"
    left = processes_of(tmp_path)
    for process in left:
        process.kill()
    assert not left, f"left running: {left}"
