"""What a run learned is kept: the same losses after a resume, on any topology, and never half a checkpoint."""

import errno
import functools
import json
import os
import pickle
import shutil
import signal
import stat

import pytest
import torch
import torchvision
from conftest import SMALL, SMALL_SGD, RankFailed, equal_but_for_rounding, train

from pipetutor import weights
from pipetutor.core import checkpoint
from pipetutor.core.checkpoint import CheckpointError
from pipetutor.core.model import build_model
from pipetutor.system import disk

NET = ["--model", "tiny_norm"]  # dropout and batch normalisation
SCHEDULED = SMALL | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}


def few_images():
    """29 images: 14 micro-batches of 2 and a ragged one a pass, so 4 steps of 4 cross the end of one."""
    from pipetutor.data import loader

    whole = loader.load

    def cut(*args):
        found = whole(*args)
        found.data, found.targets = found.data[:29], found.targets[:29]
        return found

    loader.load = cut


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two stages that saved after steps 2 and 4, uninterrupted."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    run = train(directory, "-s", 4, "--save-every", 2, *NET, stages=2, config=SCHEDULED, patch=few_images)
    return run


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved.directory / "checkpoints", tmp_path / "run" / "checkpoints").parent


def test_the_same_topology_goes_on_bit_for_bit(saved, runs):
    """Dropout on, Adam, a schedule of learning rates, and an end of a pass on the way."""
    again = ["-s", 4, "--resume", saved.directory / "checkpoints/step-000002", *NET]
    run = train(runs, *again, stages=2, config=SCHEDULED, patch=few_images)
    assert run.first_step == 3 and run.losses == saved.losses[2:]
    assert "draws other random numbers" not in (runs / "rank0.txt").read_text()
    assert len(set(saved.losses)) == 4


def test_other_stages_go_on_with_equal_losses(runs):
    """4 -> 2 -> 1, and 2 -> 3: each continues the run before it, Adam's state and all, to the last bit."""
    common = dict(config=SMALL, patch=few_images)
    quiet = [*NET, "--dropout", 0, "--save-every", 2]
    whole = train(runs / "whole", "-s", 6, *quiet, stages=4, **common)
    first = train(runs / "4", "-s", 2, *quiet, stages=4, **common)
    second = train(runs / "2", "-s", 4, "--resume", first.directory, *quiet, stages=2, **common)
    third = train(runs / "1", "-s", 6, "--resume", second.directory, *quiet, stages=1, **common)
    other = train(runs / "3", "-s", 6, "--resume", second.directory, *quiet, stages=3, **common)
    assert first.losses + second.losses + third.losses == whole.losses
    assert other.losses == whole.losses[4:] and len(set(whole.losses)) == 6


MOMENTUM = SMALL_SGD | {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}


def test_other_replicas_and_the_baseline_go_on_with_equal_losses(runs):
    """Of a model whose loss does not depend on which images share a micro-batch. Replicas add up in another order."""
    quiet = ["-s", 4, "--model", "tiny", "--dropout", 0]
    whole = train(runs / "whole", *quiet, "--save-every", 2, config=MOMENTUM)
    rest = [*quiet, "--resume", runs / "whole" / "checkpoints/step-000002"]
    without = train(runs / "without", *rest, config=MOMENTUM, patch=functools.partial(forget, "optimizer."))
    for stages, replicas in ((2, 2), (0, 2), (0, 1)):
        run = train(runs / f"{stages}x{replicas}", *rest, stages=stages, replicas=replicas, config=MOMENTUM)
        equal_but_for_rounding(run.losses, whole.losses[2:], without.losses)


ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
ADAGRAD = {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}}
GPT = ["--model", "gpt:layers=1,width=16,dropout=0.1", "--dataset", "sums"]


@pytest.mark.parametrize(
    ("net", "stages", "extra"),
    [
        (NET, 2, ZERO),
        (NET, 2, ZERO | ADAGRAD),
        (NET, 0, ZERO | {"zero_optimization": {"stage": 2}}),
        (GPT, 2, ZERO),  # the ranks of both stages hold the tied weight
        (NET, 2, BF16),
        (NET, 0, BF16),
        (NET, 2, ZERO | BF16),
        (NET, 1, ZERO | BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}),
    ],
    ids=["ZeRO 1", "Adagrad", "ZeRO 2", "tied", "bf16", "bf16, baseline", "bf16, ZeRO 1", "bf16, sums in fp32"],
)
def test_what_replicas_share_out_goes_on_bit_for_bit(net, stages, extra, runs):
    """Dropout on, a schedule of learning rates: equal losses, and equal tensors in the checkpoint at the end."""
    common = dict(stages=stages, replicas=2, config=SCHEDULED | extra)
    whole = train(runs / "whole", "-s", 4, "--save-every", 2, *net, **common)
    start = whole.directory / "checkpoints/step-000002"
    then = train(runs / "then", "-s", 4, "--save-every", 2, "--resume", start, *net, **common)
    assert then.losses == whole.losses[2:]
    before, expected, found = map(tensors_of, (start, whole.directory, then.directory))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in expected.items() if "exp_avg" in name)


def tensors_of(path):
    found = checkpoint.find(path)
    tensors = checkpoint.stored_tensors(found)
    checkpoint.load_tensors(found, tensors)
    return tensors


@pytest.mark.parametrize("net", [["--model", "tiny"], GPT], ids=["tiny", "gpt"])
def test_whatever_shares_out_a_checkpoint_is_the_same(net, runs):
    """The same names and shapes, all of them in fp32; and after a step of SGD the same values."""
    quiet = ["-s", 1, "--save-every", 1, "--dropout", 0, *net]
    cases = {(2, 1, "alone"): {}, (2, 2, "ZeRO"): UNTESTED, (0, 2, "baseline"): UNTESTED, (2, 2, "bf16"): BF16}
    found = {
        case: {
            name: tensor
            for name, tensor in tensors_of(
                train(runs / case[2], *quiet, stages=case[0], replicas=case[1], config=MOMENTUM | extra).directory
            ).items()
            if not name.startswith("random.")
        }
        for case, extra in cases.items()
    }
    alone = found[2, 1, "alone"]
    assert any(name.endswith("momentum_buffer") for name in alone)
    for (*_, how), tensors in found.items():
        assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in alone.items()
        }
        for name, tensor in tensors.items():
            if how != "bf16":
                torch.testing.assert_close(tensor, alone[name], msg=lambda m, name=name: f"{name}: {m}")
    weights = [tensor for name, tensor in found[2, 2, "bf16"].items() if name.endswith("weight")]
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in weights), "rounded"


UNTESTED = ZERO | {"zero_allow_untested_optimizer": True}  # for SGD


@pytest.mark.parametrize("saved_by", [{}, UNTESTED], ids=["ZeRO 0", "ZeRO 1"])
def test_zero_goes_on_from_any_stages_and_replicas(saved_by, runs):
    quiet = ["--model", "tiny", "--dropout", 0, "-s", 4]
    whole = train(runs / "whole", *quiet, "--save-every", 2, stages=2, replicas=2, config=MOMENTUM | saved_by)
    rest = [*quiet, "--resume", runs / "whole" / "checkpoints/step-000002"]
    forgetful = functools.partial(forget, "optimizer.")
    without = train(runs / "without", *rest, stages=2, replicas=2, config=MOMENTUM, patch=forgetful)
    for stages, replicas, extra in (
        (4, 1, UNTESTED),
        (1, 2, UNTESTED),
        (0, 2, UNTESTED),
        (2, 2, UNTESTED),
        (2, 1, {}),
    ):
        run = train(
            runs / f"{stages}x{replicas}{len(extra)}",
            *rest,
            stages=stages,
            replicas=replicas,
            config=MOMENTUM | extra,
        )
        equal_but_for_rounding(run.losses, whole.losses[2:], without.losses)


def test_a_model_of_the_same_name_and_another_shape_is_refused(runs):
    saved = train(runs / "saved", "-s", 1, "--save-every", 1, *NET)
    with pytest.raises(RankFailed, match=r"keeps classifier.5.weight as \(10, 8\), and the model has \(3, 8\)"):
        train(runs / "other", "-s", 2, "--resume", saved.directory, *NET, patch=three_classes)


def three_classes():
    import tiny
    from torch import nn

    class Linear(nn.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, 3 if outputs == 10 else outputs)

    tiny.nn = type("NN", (), vars(nn) | {"Linear": Linear})


def forget(part):
    from pipetutor.core import checkpoint

    stored = checkpoint.stored_tensors
    checkpoint.stored_tensors = lambda path: {n: t for n, t in stored(path).items() if not n.startswith(part)}


def forget_with_few_images(part):
    few_images()
    forget(part)


@pytest.mark.parametrize("named", ["", "checkpoints/step-000002"])
def test_a_run_that_goes_on_in_its_own_directory_has_each_step_once(saved, runs, named):
    """What came after the checkpoint is dropped, and what the ranks of the earlier part said of themselves."""
    directory = shutil.copytree(saved.directory, runs / "run")
    if not named:
        shutil.rmtree(directory / "checkpoints/step-000004")  # as if it had been cut off before it saved
    evaluated = [f'{{"step": {step}, "accuracy": 0.5, "loss": 2.0}}\n' for step in (1, 4)]
    (directory / "evaluations.jsonl").write_text("".join(evaluated))
    for stale in ("failure_rank0.json", "failure_rank7.json", "heartbeat_rank7.json", "trace_rank1.jsonl"):
        (directory / stale).write_text("{}")
    again = ["-s", 3, "--resume", directory / named, *NET]
    run = train(directory, *again, stages=2, config=SCHEDULED, patch=few_images)
    steps = [json.loads(line)["step"] for line in (directory / "steps.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and run.losses == saved.losses[:3] and len(run.seconds) == 3
    assert [evaluation["step"] for evaluation in run.evaluations] == [1]
    assert run.first_step == 1 and run.status == "finished" and run.details["done"] == 3
    assert run.details["result"]["loss"] == saved.losses[2]
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-000002"]
    assert not [path for stale in ("*_rank7*", "failure*", "trace*") for path in directory.glob(stale)]


@pytest.mark.parametrize("part", ["optimizer.", "random."])
def test_the_optimizer_and_the_random_numbers_matter(saved, runs, part):
    """Without either the losses differ: what the tests above compare does depend on both."""
    again = ["-s", 4, "--resume", saved.directory / "checkpoints/step-000002", *NET]
    run = train(runs, *again, stages=2, config=SCHEDULED, patch=functools.partial(forget_with_few_images, part))
    assert len(run.losses) == 2 and run.losses != saved.losses[2:]


def on_another_device():
    from pipetutor.core import checkpoint

    few_images()
    random_state = checkpoint._random_state

    def of_a_gpu(rank):
        state = random_state(rank)
        return state | {f"random.{rank}.cuda": state[f"random.{rank}.cpu"][:16]}

    checkpoint._random_state = of_a_gpu


@pytest.mark.parametrize("first, then", [(on_another_device, few_images), (few_images, on_another_device)])
def test_random_numbers_of_another_device_do_not_go_on_and_that_is_said(runs, first, then):
    """What dropout drew on a GPU it cannot go on to draw on a CPU, nor the other way round."""
    train(runs / "first", "-s", 1, "--save-every", 1, *NET, patch=first)
    train(runs / "then", "-s", 2, "--resume", runs / "first", *NET, patch=then)
    words = "another kind of device than that of the checkpoint: dropout draws other random numbers"
    assert words in (runs / "then" / "rank0.txt").read_text()


def test_exported_weights_are_torchvisions_own(tmp_path):
    saved = train(tmp_path / "run", "-s", 2, "--save-every", 2, "--model", "mobilenet_v3_small", stages=2)
    exported = tmp_path / "exported"
    exported.mkdir()
    weights.export(saved.directory, exported / "net.pt")
    state = torch.load(exported / "net.pt", weights_only=True)
    net = torchvision.models.mobilenet_v3_small(num_classes=10)
    net.load_state_dict(state)
    assert list(exported.iterdir()) == [exported / "net.pt"]
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in net.state_dict().items()}
    assert int(state["features.0.1.num_batches_tracked"]) == 2 * 2, "2 steps of 2 micro-batches"
    with pytest.raises(CheckpointError, match="cannot write the weights to /proc"):
        weights.export(saved.directory, "/proc/net.pt")


def test_only_the_newest_two_are_kept(runs):
    run = train(runs, "-s", 5, "--save-every", 1, *NET)
    names = sorted(path.name for path in (run.directory / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "content, words",
    [
        (pickle.dumps(Payload()), "is not a state_dict that holds tensors alone"),
        (b"no archive", "is not a state_dict that holds tensors alone"),
        ({"features.0.weight": torch.zeros(1)}, r"features.0.weight is \(1,\), and the model's is \(64, 3, 11, 11\)"),
        ({}, "features.0.weight is missing"),
        ([torch.zeros(1)], "is not a state_dict, but a list"),
        (torchvision.models.alexnet(num_classes=10).state_dict() | {"more": torch.zeros(1)}, "it has no more"),
        (None, "No such file"),
    ],
)
def test_weights_of_something_else_are_refused(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=words):
        weights.load_weights(build_model("alexnet"), file)
    assert not (tmp_path / "executed").exists()


def spoil(run, how):
    newest = run / "checkpoints/step-000004"
    shard = next(newest.glob("shard-00001-*"))
    if how == "altered":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "cut short":
        os.truncate(shard, 1000)
    elif how == "missing":
        shard.unlink()
    elif how == "surplus":
        shutil.copy(shard, newest / "other.safetensors")
    elif how == "no manifest":
        (newest / "checkpoint.json").unlink()
    else:
        (newest / "checkpoint.json").write_text(how)


@pytest.mark.parametrize(
    "how, words",
    [
        ("altered", "is damaged: shard-00001-.* does not have its sha256; resume from .*step-000002 instead"),
        ("cut short", "does not have its sha256"),
        ("missing", "is incomplete: shard-00001-.* is missing; resume from"),
        ("no manifest", r"checkpoint.json is damaged \(FileNotFoundError\)"),
        ("{}", r"checkpoint.json is damaged \(it has no files\); resume from"),
        ('{"files": {}, "step": 4}', r"checkpoint.json is damaged \(it has no position\); resume from"),
        ('{"files": {}, "step": "4", "position": [0, 0], "stages": 1, "replicas": 1}', r"\(its step is '4'\)"),
        ('{"files": 3, "step": 4, "position": [0, 0], "stages": 1, "replicas": 1}', r"is damaged \(TypeError\)"),
        ("surplus", "has a file that was not saved with it, other.safetensors: remove it"),
        ("[1, 2", r"checkpoint.json is damaged \(JSONDecodeError\)"),
        ("[1, 2]", r"checkpoint.json is damaged \(AttributeError\)"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(copy, how, words):
    spoil(copy, how)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.verify(copy)
    assert checkpoint.verify(copy / "checkpoints/step-000002")["step"] == 2


def test_no_code_in_a_checkpoint_is_executed(copy, runs):
    """DCP's own format keeps its metadata in `.metadata`, a pickle; one that is put there is not even read."""
    for place in (copy / "checkpoints/step-000004").iterdir():
        (place.parent / ".metadata").write_bytes(pickle.dumps(Payload()))
    train(runs, "-s", 5, "--resume", copy, *NET, stages=2, config=SCHEDULED, patch=few_images)
    assert not list(runs.parent.rglob("executed"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "alexnet"], "saved with model 'tiny_norm', and this run has 'alexnet'"),
        (["--seed", 7], "saved with seed 1138, and this run has 7"),
        (["-s", 3], "stands after step 4, and this run ends with step 3"),
        (["-s", 4], "nothing is left to do: the checkpoint stands after step 4"),
        (["--resume", "nowhere"], "nowhere holds no checkpoint"),
        (
            ["--fault", "stall:rank=0,step=4"],
            "has the ranks 0 to 0 and the steps 5 to 5, for it resumes after step 4",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_before_anything_starts(saved, runs, arguments, words):
    with pytest.raises(RankFailed, match=words) as refusal:
        train(runs, "-s", 5, "--resume", saved.directory, *NET, *arguments, config=SCHEDULED)
    assert "exit codes [2]" in str(refusal.value) and "Traceback" not in str(refusal.value)


def killed_while_it_saves_step_two():
    import torch.distributed.checkpoint as dcp

    save, saves = dcp.save, []

    def half(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(1)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = half


def disk_full_at_step_two():
    import torch.distributed.checkpoint as dcp

    save, saves = dcp.save, []

    def full(*args, **kwargs):
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    dcp.save = full


def directories_cannot_be_synced():
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    os.fsync = fsync


def test_a_file_system_that_syncs_no_directory_holds_checkpoints(runs):
    train(runs, "-s", 1, "--save-every", 1, *NET, patch=directories_cannot_be_synced)
    assert checkpoint.verify(runs)["step"] == 1


def test_a_disk_that_fails_while_it_syncs_is_no_such_file_system(tmp_path, monkeypatch):
    def fails(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        disk.sync(tmp_path)


@pytest.mark.parametrize("patch", [killed_while_it_saves_step_two, disk_full_at_step_two])
def test_a_crash_while_saving_leaves_the_checkpoint_before_it(runs, patch):
    arguments = ["--save-every", 1, *NET]
    whole = train(runs / "whole", "-s", 3, *arguments)
    with pytest.raises(RankFailed):
        train(runs / "crashed", "-s", 3, *arguments, patch=patch)
    left = runs / "crashed" / "checkpoints"
    assert [path.name for path in left.glob("step-*")] == ["step-000001"]
    assert [path.name for path in left.glob(".step-*")] == [".step-000002.partial"]
    run = train(runs / "crashed", "-s", 3, "--resume", runs / "crashed", *arguments)
    assert (run.first_step, run.losses) == (1, whole.losses), "the step before the crash is still told"
    assert sorted(path.name for path in left.iterdir()) == ["step-000002", "step-000003"]
    assert json.loads((left / "step-000003/checkpoint.json").read_text())["step"] == 3
