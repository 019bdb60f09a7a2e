"""What can be seen on GPUs alone: NCCL, the device's own clock and allocator, and its arithmetic; `make gpu`.

Ranks are processes of their own here: a fork cannot use CUDA once its parent has looked at it.
"""

import time

import pytest
import torch
from conftest import FAST_SGD, SMALL_SGD, TWICE_AS_FAST, equal_but_for_rounding, processes_of

from pipetutor import RunFailed, launch
from pipetutor.core.partition import catalog
from pipetutor.data import loader
from pipetutor.system.gpus import gpus
from pipetutor.tracing import trace
from pipetutor.tracing.clock import CudaClock

pytestmark = pytest.mark.gpu
MB = 2**20
BLOCK = 512  # bytes: torch's allocator gives out multiples of it
QUIET = {"dropout": 0.0, "steps": 3}


@pytest.fixture(autouse=True)
def all_devices(monkeypatch):
    """The other tests keep to the CPU. TF32 would round each product of fp32 to 10 bits."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")


def need(count: int) -> None:
    found = gpus(count)
    assert found.count, f"no GPU that torch can use {found.why}"
    if found.count < count:
        pytest.skip(f"{count} GPUs are needed, and there is {found.count}")


@pytest.mark.parametrize("stages, replicas", [(0, 1), (1, 1), (0, 2), (2, 1), (2, 2)])
def test_ranks_that_talk_over_nccl_compute_what_the_cpu_computes(stages, replicas, runs):
    """But for rounding; the mistake beside it is a gradient twice as large."""
    need(max(stages, 1) * replicas)
    common = dict(stages=stages, replicas=replicas, runs_dir=runs, **QUIET)
    on_gpus = launch(config=FAST_SGD, **common)
    assert on_gpus.details["backend"] == "nccl" and on_gpus.details["device"].startswith("cuda")
    on_cpu = launch(config=FAST_SGD, backend="gloo", **common)
    mistaken = launch(config=TWICE_AS_FAST, backend="gloo", **common)
    equal_but_for_rounding(on_gpus.losses, on_cpu.losses, mistaken.losses)
    assert not processes_of(runs.parent)


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble"])
@pytest.mark.parametrize("stages", [1, 2])
def test_torchs_pipeline_computes_the_same(stages, schedule, runs):
    need(stages)
    config = SMALL_SGD | {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.05}}}
    common = dict(stages=stages, config=config, runs_dir=runs, **QUIET)
    ours = launch(engine="torch", schedule=schedule, **common)
    stock = launch(**common)
    rate = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    mistaken = launch(**common | {"config": config | rate})
    equal_but_for_rounding(ours.losses, stock.losses, mistaken.losses)


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
@pytest.mark.parametrize("stages", [1, 2])
def test_tied_weights_and_clipping_compute_what_the_cpu_computes(stages, engine, runs):
    """Both places of a tied weight on one device, and one on each of two."""
    need(stages)
    clipped = FAST_SGD | {"gradient_clipping": 0.1}
    common = dict(model="gpt:layers=2", dataset="sums", stages=stages, engine=engine, steps=3, runs_dir=runs)
    on_gpus = launch(config=clipped, **common)
    on_cpu = launch(config=clipped, backend="gloo", **common)
    mistaken = launch(config=FAST_SGD, backend="gloo", **common)
    equal_but_for_rounding(on_gpus.losses, on_cpu.losses, mistaken.losses)


def test_a_checkpoint_of_zero_goes_on_without_it(runs):
    need(2)
    zero = SMALL_SGD | {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}
    shared = zero | {"zero_optimization": {"stage": 1}}
    common = dict(stages=1, dropout=0.0, runs_dir=runs)
    saved = launch(replicas=2, steps=2, save_every=2, config=shared, **common)
    went_on = launch(replicas=1, steps=4, resume=saved.directory, config=zero, **common)
    whole = launch(replicas=2, steps=4, config=shared, **common)
    assert went_on.losses == pytest.approx(whole.losses[2:], rel=1e-3)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_numbers_of_16_bits_train(kind, runs):
    """The first loss is that of fp32 within torch's bound for bf16, which is wider than that for fp16."""
    need(1)
    exact = launch(stages=1, config=SMALL_SGD, runs_dir=runs, **QUIET)
    coarse = launch(stages=1, config=SMALL_SGD | {kind: {"enabled": True}}, runs_dir=runs, **QUIET)
    assert coarse.losses[0] == pytest.approx(exact.losses[0], rel=1.6e-2) and coarse.losses != exact.losses
    assert all(loss == loss for loss in coarse.losses)


def test_images_are_enlarged_on_the_device_to_the_last_bit():
    need(1)
    noise = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loader.enlarge(noise.cuda()).cpu(), loader.enlarge(noise))


def test_micro_batches_are_loaded_ahead_onto_the_device():
    need(1)
    images = torch.utils.data.TensorDataset(torch.rand(9, 3, 4, 4), torch.arange(9))
    whole = list(loader.Loader(images, range(9), 2, torch.device("cuda")))
    assert [labels.tolist() for _, labels in whole] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(images.device.type == labels.device.type == "cuda" for images, labels in whole)


def test_the_device_has_a_clock_that_knows_what_was_submitted():
    """The host is done at once with what takes the device longer; both clocks agree on when that was."""
    need(1)
    clock, work = CudaClock(), torch.rand(4096, 4096, device="cuda")
    (work @ work).sum().item()  # libraries are loaded
    clock.start()
    host, mark = time.perf_counter(), clock.now()
    for _ in range(50):
        work = work @ work
    submitted, end = time.perf_counter() - host, clock.now()
    seconds = clock.seconds(end) - clock.seconds(mark)
    waited = time.perf_counter() - host
    assert submitted < seconds <= waited
    assert host <= clock.seconds(mark) <= clock.seconds(end) <= host + waited


def test_the_allocator_tells_what_is_there_and_what_was():
    need(1)
    clock = CudaClock()
    clock.start()
    before = clock.memory()
    tensor = torch.zeros(64 * MB, dtype=torch.uint8, device="cuda")
    assert clock.memory() - before == 64 * MB and clock.tensors() == clock.memory()
    del tensor
    assert clock.memory() == before and clock.peak() - before == 64 * MB
    clock.start()
    assert clock.peak() == before


@pytest.mark.parametrize("stages", [1, 2])
def test_a_trace_is_the_devices(stages, runs):
    """Spans in order on its clock, the weights of each rank's own stage to the block, and peaks above what stays."""
    need(stages)
    run = launch(stages=stages, partition="parameters", config=SMALL_SGD, trace=True, runs_dir=runs, **QUIET)
    traced = trace.load(run)
    for rank, head in enumerate(traced.heads):
        held = catalog()["alexnet"][run.bounds[rank] : run.bounds[rank + 1]]
        weights, tensors = 4 * sum(layer.parameters for layer in held), 2 * len(held)
        assert head["device"].startswith("cuda")
        assert 0 <= head["with_model"] - head["without_model"] - weights <= (tensors + 10) * BLOCK
    for step in traced.steps:
        for account in step.timeline.accounting():
            assert sum(account.values()) == pytest.approx(step.timeline.seconds) and min(account.values()) >= 0
        for rank in range(stages):
            spans = step.timeline.of(rank)
            assert (spans["begin"] <= spans["end"]).all() and (spans["end"][:-1] <= spans["begin"][1:]).all()
            assert step.peaks[rank] >= spans["memory"].max() > 0


def test_a_run_goes_on_with_the_devices_random_numbers(runs):
    """Dropout is on, and the losses after a resume are those of the run that went through; cuDNN may round anew."""
    need(1)
    common = dict(stages=1, config=FAST_SGD, save_every=2, runs_dir=runs)
    whole = launch(steps=4, **common)
    saved = whole.directory / "checkpoints" / "step-000002"
    resumed = launch(steps=4, resume=saved, **common)
    other = launch(steps=4, resume=saved, **common | {"backend": "gloo"})
    equal_but_for_rounding(resumed.losses, whole.losses[2:], other.losses)
    said = [(run.directory / "logs" / "rank0.log").read_text() for run in (resumed, other)]
    assert ["draws other random numbers" in text for text in said] == [False, True]


def test_every_rank_ends_where_one_device_is_full(runs):
    """The error names who, and what to do."""
    need(1)
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 200 * MB, dtype=torch.uint8, device="cuda")
    with pytest.raises(RunFailed, match="rank 0 ran out of memory: use a smaller micro-batch"):
        launch(stages=1, config=SMALL_SGD, runs_dir=runs, **QUIET)
    del taken
    torch.cuda.empty_cache()
    assert not processes_of(runs.parent)
