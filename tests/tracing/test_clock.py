"""Clocks: marks become seconds of the host's clock, and memory is this process's own."""

import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from pipetutor.tracing.clock import CudaClock, HostClock

MB = 2**20


class Device:
    """Stands for torch.cuda: a device whose clock runs from 0 in milliseconds, behind what is submitted to it."""

    def __init__(self):
        self.now, self.said = 50.0, []
        self.Event = lambda enable_timing: SimpleNamespace(
            record=lambda: self.said.append("record"),
            synchronize=lambda: self.said.append("wait"),
            elapsed_time=lambda mark: mark.at - self.now,
        )
        self.synchronize = lambda: self.said.append("synchronize")
        self.reset_peak_memory_stats = lambda: self.said.append("reset")
        self.memory_allocated, self.max_memory_allocated = lambda: 3 * MB, lambda: 5 * MB


def test_events_of_a_device_are_tied_to_the_clock_of_its_host():
    """Once a step, with the device idle: then an event and a reading of the host's clock are the same moment."""
    clock = CudaClock()
    clock._cuda = device = Device()
    before = time.perf_counter()
    clock.start()
    after = time.perf_counter()
    assert device.said == ["reset", "synchronize", "record"]
    mark = clock.now()
    mark.at = device.now + 250.0
    assert before + 0.25 <= clock.seconds(mark) <= after + 0.25
    assert device.said[-1] == "wait", "an event that the device has not passed has no time"
    assert (clock.memory(), clock.tensors(), clock.peak()) == (3 * MB, 3 * MB, 5 * MB)


def test_tensors_count_once_and_while_they_are_there():
    """Two views of one storage are one, and other memory of the process is none of theirs."""
    clock = HostClock()
    before = clock.tensors()
    tensor, other = torch.zeros(1000), bytearray(MB)
    views = [tensor[:10], tensor.view(10, 100), torch.zeros(5, device="meta")]
    assert clock.tensors() - before == 4000 and len(other) == MB
    del tensor, views
    assert clock.tensors() == before


def test_the_hosts_memory_is_this_process_own(tmp_path):
    """Private pages count, also once they are given back; pages of a file do not."""
    clock = HostClock()
    clock.start()
    before = clock.memory()
    with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        private.write(b"x" * 64 * MB)
        assert clock.memory() - before == pytest.approx(64 * MB, rel=0.1)
    assert clock.memory() - before < 8 * MB, "given back"
    assert clock.peak() - before > 60 * MB, "and remembered"
    clock.start()
    assert clock.peak() - before < 8 * MB, "until the next step"
    path = tmp_path / "file"
    path.write_bytes(b"x" * 64 * MB)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped.read().count(b"x") == 64 * MB
        assert clock.memory() - before < 8 * MB
