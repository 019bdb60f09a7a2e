"""What a machine has and a rank may take of it; GPUs are played by a stand-in for the driver's library."""

import importlib.util
import os
import shlex
import subprocess
import sys
import types

import pytest
from conftest import HANGS, SMALL

from pipetutor import launch
from pipetutor.options import Options
from pipetutor.preflight import World, preflight
from pipetutor.processes import environment, launchers
from pipetutor.processes.describe import describe
from pipetutor.system import machine
from pipetutor.system.gpus import Gpus, gpus

UUIDS = ("GPU-8d1e6f0a-1111", "GPU-8d2c3b4d-2222", "GPU-f00dcafe-3333", "GPU-f11dcafe-4444")
MIG = ("MIG-0a1b2c3d-5555", "MIG-0a1b2c3d-6666")


class Driver(types.ModuleType):
    """Stands for ``pynvml`` on a machine with GPUs."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(self, uuids=UUIDS, cuda=13000, divided=(), mig=MIG):
        super().__init__("pynvml")
        self._uuids, self._cuda, self._divided, self._mig, self.open = uuids, cuda, divided, mig, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self):
        if not self._cuda:
            raise self.NVMLError("library not found")
        return self._cuda

    def nvmlDeviceGetCount(self):
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index):
        return object(), self._uuids[index]

    def nvmlDeviceGetUUID(self, handle):
        return handle[1]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self._uuids + self._mig:
            raise self.NVMLError("not found")
        return object(), uuid

    def nvmlDeviceGetMigMode(self, handle):
        if not self._divided:
            raise self.NVMLError("not supported")
        return [int(self._uuids.index(handle[1]) in self._divided), 0]


@pytest.fixture
def torch_is(tmp_path, monkeypatch):
    """Say which build of torch is installed; it is not loaded, and one for CUDA 13.2 until said otherwise."""

    def become(version="2.15.0+cu132", cuda="13.2", hip=None):
        (tmp_path / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = {hip!r}\n")
        spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    become()
    return become


@pytest.fixture
def driver_is(monkeypatch, torch_is):
    def become(driver):
        monkeypatch.setitem(sys.modules, "pynvml", driver)
        return driver

    become(Driver())
    return become


@pytest.mark.parametrize(
    "visible, count",
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0", 1),
        ("3,1", 2),
        (" 0, 2", 2),
        ("0,9,1", 1),
        ("1,-1,0", 1),
        ("0,0", 0),
        ("7", 0),
        ("GPU-8d1e6f0a-1111", 1),
        ("GPU-8d1,GPU-8d2", 2),
        ("GPU-8d", 0),
        ("GPU-f00,GPU-f00dcafe", 0),
        ("GPU-f00,GPU-no,GPU-8d1", 1),
        ("GPU-f00,1", 1),
        ("MIG-0a1b2c3d-5555", 1),
        ("MIG-0a1b2c3d-5555,MIG-0a1b2c3d-6666", 1),
        ("MIG-no", 0),
    ],
)
def test_visible_devices_are_counted_as_cuda_counts_them(visible, count, driver_is):
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = gpus(env=env)
    assert found.count == count
    assert found.why == ("" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} leaves {count} of 4")


def test_no_gpu_is_there_to_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus(env={"CUDA_VISIBLE_DEVICES": "0,1"}) == Gpus(0)
    monkeypatch.setitem(sys.modules, "pynvml", Driver(uuids=()))
    assert gpus(env={"CUDA_VISIBLE_DEVICES": "0,1"}) == Gpus(0)


def test_gpus_that_are_divided_count_as_one(driver_is):
    driver = driver_is(Driver(divided=(0, 1)))
    assert gpus(env={}) == Gpus(1, "CUDA uses one MIG device at a time leaves 1 of 4")
    assert [gpus(env={"CUDA_VISIBLE_DEVICES": names}).count for names in ("0,1", "2,3", "1,2")] == [1, 2, 1]
    assert not driver.open


@pytest.mark.parametrize(
    "build, cuda, why",
    [
        (dict(version="2.15.0+cpu", cuda=None), 13000, "torch 2.15.0+cpu is built for the CPU, not for CUDA"),
        (
            dict(version="2.15.0+rocm7", cuda=None, hip="7.1"),
            13000,
            "torch 2.15.0+rocm7 is built for ROCm, not for CUDA",
        ),
        ({}, 12040, "torch is built for CUDA 13.2, and the driver is one for CUDA 12.4: too old"),
        ({}, 0, "the driver's library, libcuda.so.1, is missing"),
        ({}, 13000, ""),
        ({}, 14000, ""),
    ],
)
def test_gpus_that_torch_cannot_use_do_not_count(build, cuda, why, torch_is, driver_is):
    torch_is(**build)
    driver_is(Driver(cuda=cuda))
    assert gpus(env={}) == (Gpus(0, why) if why else Gpus(4))


def test_a_device_that_the_user_chose_is_kept(driver_is):
    """Where there is a GPU for every rank; else it may be what ``prepare_rank`` has set, and the number tells."""
    env = {"DS_ACCELERATOR": "cpu"}
    assert gpus(2, env) == gpus(0, env) == Gpus(0, "DS_ACCELERATOR=cpu")
    assert gpus(5, env) == gpus(5, {"DS_ACCELERATOR": "cuda"}) == Gpus(4)


def test_torchs_build_is_read_without_loading_it():
    code = "import sys; from pipetutor.system import gpus; print(gpus._torch_build()); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=True)
    import torch

    assert said.stdout.endswith("False\n")
    assert torch.__version__ in said.stdout and f"'cuda': {torch.version.cuda!r}" in said.stdout


def test_gpus_that_cannot_be_used_are_explained(driver_is, torch_is, monkeypatch):
    """To who looks at the machine, who asks for nccl, and who asks for nothing."""
    torch_is(version="2.15.0+cpu", cuda=None)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why = "torch 2.15.0+cpu is built for the CPU, not for CUDA"
    rows = {what: (found, advice) for what, found, advice in machine.check()}
    assert rows["GPUs"] == ("0", f"{why}: the pipeline runs on the CPU with gloo")
    with pytest.raises(ValueError) as refusal:
        launch(backend="nccl")
    assert f"2 ranks, and this machine has 0 to use ({why}): leave the backend out" in str(refusal.value)
    plan = preflight(Options(config=SMALL), World(2, 2, gpus(2)), describe("alexnet", "synthetic"))
    assert plan.backend == "gloo" and f"0 GPUs to use ({why}) cannot serve 2 ranks" in plan.notice
    for backend, devices in ((None, Gpus(0)), ("gloo", gpus(2))):
        assert not preflight(
            Options(config=SMALL, backend=backend), World(2, 2, devices), describe("alexnet", "synthetic")
        ).notice


@pytest.mark.parametrize(
    "argv, env, device, threads",
    [
        ([], {}, None, None),
        ([], {"CUDA_VISIBLE_DEVICES": "0"}, "cpu", True),
        (["--backend", "gloo"], {}, "cpu", True),
        (["--backend=gloo"], {"DS_ACCELERATOR": "cuda"}, "cuda", True),
        ([], {"DS_ACCELERATOR": "cpu"}, "cpu", True),
    ],
)
def test_a_rank_takes_a_gpu_or_its_share_of_the_cores(argv, env, device, threads, driver_is):
    env = env | {"LOCAL_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment.prepare_rank(env, argv)
    assert env.get("DS_ACCELERATOR") == device and ("OMP_NUM_THREADS" in env) == bool(threads)
    assert "TORCHELASTIC_USE_AGENT_STORE" not in env


@pytest.mark.parametrize(
    "allowed, launchers, kept",
    [
        (None, "0,1", "0,1"),
        ("", "0,1", ""),
        ("2,3", "0,1", "2,3"),
        ("GPU-f00,GPU-f11", "0,1", "GPU-f00,GPU-f11"),
        ("MIG-0a1b2c3d-5555", "0", "MIG-0a1b2c3d-5555"),
        ("2, 3", "3", "3"),
        ("0,1,2", "0,1", "0,1"),
        ("2,3", "2,3", "2,3"),
    ],
)
def test_the_launchers_numbers_are_no_leave_to_take_other_gpus(allowed, launchers, kept, monkeypatch):
    monkeypatch.setattr(environment, "_allowed_devices", lambda: allowed)
    env = {"CUDA_VISIBLE_DEVICES": launchers}
    environment.prepare_rank(env, [])
    assert env["CUDA_VISIBLE_DEVICES"] == kept


@pytest.mark.parametrize("visible", ["GPU-8d1e6f0a-1111,GPU-f00dcafe-3333", ""])
def test_deepspeeds_command_uses_the_devices_that_the_user_allows(visible, tmp_path):
    """The real launcher overwrites them in its ranks, and the runner takes them out of the launcher's environment."""
    (tmp_path / "rank.py").write_text(
        "import os, pipetutor\nos.write(1, f\"sees {os.environ['CUDA_VISIBLE_DEVICES'] or 'none'}\\n\".encode())\n"
    )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "rank"]
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": visible,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, check=True)
    assert done.stdout.count(f"sees {visible or 'none'}\n") == 2, done.stdout


@pytest.mark.parametrize(
    "visible, printed",
    [
        (None, "deepspeed --num_gpus 2 "),
        ("3,1", "deepspeed --include localhost:3,1 "),
        ("2, 0,1", "deepspeed --include localhost:2,0 "),
        ("GPU-f00,GPU-8d1", "env CUDA_VISIBLE_DEVICES=GPU-f00,GPU-8d1 deepspeed --num_gpus 2 "),
        ("GPU-f00", "deepspeed --num_gpus 2 "),
        ("0,9", "deepspeed --num_gpus 2 "),
    ],
)
def test_the_printed_command_names_the_devices_and_stays_on_this_host(
    visible, printed, driver_is, monkeypatch, tmp_path
):
    """Where there are too few, it runs on the CPU, and DeepSpeed would refuse numbers of GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launchers, "_program", lambda: ["deepspeed"])  # else, below a path with spaces, another
    assert shlex.join(launchers.deepspeed(2)).replace("'", "").startswith(f"{printed}--master_port")
    (tmp_path / "hostfile").write_text("another slots=2\n")
    monkeypatch.setattr(launchers, "HOSTFILE", tmp_path / "hostfile")
    assert "--hostfile /dev/null" in shlex.join(launchers.deepspeed(2))


def test_a_kernel_below_another_job_is_no_rank():
    """torchrun's variables, in a notebook: nothing is set that a launch would hand on."""
    code = "import os; before = dict(os.environ); import pipetutor; assert os.environ == before"
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = {name: value for name, value in env.items() if name not in ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=HANGS, check=True)
