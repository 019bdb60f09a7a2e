"""What is refused before a process starts: each with both numbers and a value that would work."""

import json
import subprocess
import sys

import pytest

from pipetutor import launch
from pipetutor.batch import Batch, batch_arithmetic, explain
from pipetutor.config import dtype_of, read_config
from pipetutor.preflight import DATASET_SIZES, preflight

GOOD = dict(
    ranks=2,
    stages=2,
    steps=1,
    model="alexnet",
    dataset="synthetic",
    partition="parameters",
    config={"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD"}},
    backend=None,
    gpus=0,
)
TORCH = {"engine": "torch"}


def batch(train, micro):
    return GOOD["config"] | {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro}


def test_a_good_run_is_planned():
    plan = preflight(**GOOD)
    assert (plan.bounds, plan.backend, plan.batch) == ([0, 19, 22], "gloo", Batch(256, 8, 32, 1))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(ranks=3), ["3 ranks", "2 stages", "2 or 4"]),
        (dict(ranks=1), ["1 rank ", "2 stages", "2 ranks"]),
        (dict(ranks=23, stages=23), ["23 stages", "22 layers", "1 to 8"]),
        (dict(ranks=9, stages=9), ["9 stages", "only 8 ", "1 to 8"]),
        (dict(steps=0), ["steps is 0", "at least 1"]),
        (dict(stages=-1), ["stages is -1", "at least 0"]),
        (dict(stages="2"), ["stages is '2'", "whole number"]),
        (dict(model="alexnot"), ["alexnot", "try 'alexnet'"]),
        (dict(model="resnet18"), ["resnet18", "try"]),
        (dict(dataset="cifar100"), ["cifar100", "try 'cifar10'"]),
        (dict(partition="best"), ["'best'", "parameters, uniform"]),
        (dict(partition="profile", gpus=2), ["CPU", "on GPUs", "--backend gloo"]),
        (dict(partition="profile", backend="nccl", gpus=4), ["CPU", "on GPUs", "--backend gloo"]),
        (dict(partition="profile", config=GOOD["config"] | {"bf16": {"enabled": True}}), ["fp32", "bf16"]),
        (dict(partition="profile", ranks=9, stages=9), ["9 stages", "only 8 ", "1 to 8"]),
        (dict(TORCH, partition="profile", schedule="interleaved_1f1b", chunks=5), ["10 stages", "1 to 8"]),
        (dict(partition="type:("), ["type:(", "not a regular expression"]),
        (dict(partition="type:lstm"), ["matches 0 layers", "2 stages", "Linear"]),
        (dict(partition="1,16,22"), ["1,16,22", "start at 0", "22", "0,11,22"]),
        (dict(partition="0,16,21"), ["0,16,21", "end at 22", "0,11,22"]),
        (dict(partition="0,0,22"), ["0,0,22", "rise"]),
        (dict(partition="0,22"), ["2 bounds", "2 stages need 3", "0,11,22"]),
        (dict(partition="0,1,22", stages=2), None),
        (dict(partition="0,1,3,22", stages=3, ranks=3), ["stage 1", "1 to 2", "weights", "use 0,"]),
        (dict(config={"train_batch_size": 250, "train_micro_batch_size_per_gpu": 8}), ["250", "248 = ", "8 x 31"]),
        (dict(config={}), ["train_batch_size", "256"]),
        (dict(config={"train_batch_size": "auto"}), ["'auto'", "whole number"]),
        (
            dict(config=GOOD["config"] | {"zero_optimization": {"stage": 2}}),
            ["stage 2", "2 pipeline stages", "stage 1 or 0"],
        ),
        (dict(config={"train_micro_batch_size_per_gpu": 2001}), ["2001", "2000", "at most 2000"]),
        (dict(backend="mpi"), ["mpi", "gloo"]),
        (dict(transforms="jpeg"), ["jpeg", "batched, pil"]),
        (dict(engine="megatron"), ["megatron", "deepspeed, torch"]),
        (dict(schedule="1f2b"), ["1f2b", "try '1f1b'", "zero_bubble"]),
        (dict(schedule="gpipe"), ["1f1b, not gpipe", "engine='torch'"]),
        (dict(chunks=2), ["chunks is 2", "1f1b gives each rank one stage", "interleaved_1f1b"]),
        (dict(chunks=0), ["chunks is 0", "at least 1"]),
        (dict(TORCH, schedule="interleaved_1f1b"), ["chunks is 1", "at least 2", "chunks=2"]),
        (dict(TORCH, schedule="interleaved_1f1b", chunks=5), ["10 stages", "1 to 8"]),
        (
            dict(TORCH, schedule="interleaved_1f1b", chunks=2, config=batch(24, 8)),
            ["3 micro-batches", "multiple of 2 ranks", "use 4"],
        ),
        (dict(TORCH, schedule="zero_bubble", config=batch(8, 8)), ["1 micro-batches on 2 ranks", "use 2 or more"]),
        (dict(TORCH, schedule="zero_bubble", recompute=True), ["cannot recompute", "use 1f1b"]),
        (dict(stages=0, recompute=True), ["recompute", "stages is 0"]),
        (dict(TORCH, stages=0), ["at least 1 stage", "baseline"]),
        (dict(TORCH, ranks=4), ["1 replica, not 2", "engine='deepspeed'"]),
        (dict(TORCH, eval_every=5), ["does not know eval_every", "engine='deepspeed'"]),
        (dict(TORCH, config=batch(64, 8) | {"gradient_clipping": 1.0}), ["does not know gradient_clipping"]),
        (dict(TORCH, config=batch(64, 8) | {"optimizer": {"type": "Lamb"}}), ["Adam, AdamW or SGD", "'Lamb'"]),
        (dict(backend="nccl"), ["2 ranks", "has 0", "gloo"]),
        (dict(backend="nccl", gpus=1), ["2 ranks", "has 1", "at most 1 ranks"]),
        (dict(dropout=1.5), ["1.5", "below 1"]),
        (dict(dropout="high"), ["'high'", "number"]),
        (dict(seed=2**32), ["below 2**32"]),
        (dict(partition=[0, 16, 22]), ["[0, 16, 22]", "must be a string", "0,16,22"]),
        (dict(config=GOOD["config"] | {"zero_optimization": {"stage": "1"}}), ["'1'", "whole number"]),
        (dict(config={"train_batch_size": 8}), ["no optimizer", "nothing would be learned", "Adam"]),
        (dict(eval_every=0), ["eval_every is 0", "at least 1: 10, say"]),
        (dict(save_every=2.5), ["save_every is 2.5", "whole number"]),
        (dict(resume="/nowhere"), ["/nowhere holds no checkpoint", "save_every=N", "checkpoints/step-"]),
        (dict(resume="a", weights="b.pt"), ["weights b.pt", "checkpoint a", "give one of them"]),
        (dict(fault="die:rank=0,step=2"), ["rank 0, step 2", "steps 1 to 1"]),
    ],
)
def test_bad_input_is_refused_with_both_numbers(change, words):
    if words is None:  # a control: this one is fine
        preflight(**(GOOD | change))
        return
    with pytest.raises(ValueError) as caught:
        preflight(**(GOOD | change))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_measured_cut_is_left_open():
    for good in ({}, {"gpus": 2, "backend": "gloo"}, {"gpus": 1}, {"stages": 0, "gpus": 2}):
        assert preflight(**(GOOD | {"partition": "profile"} | good)).bounds == []


def test_zero_2_is_fine_without_a_pipeline():
    preflight(**(GOOD | {"stages": 0, "config": GOOD["config"] | {"zero_optimization": {"stage": 2}}}))


def test_too_few_gpus_choose_the_cpu_and_say_so():
    plan = preflight(**(GOOD | {"gpus": 1}))
    assert plan.backend == "gloo" and "1 GPU" in plan.notice and "2 ranks" in plan.notice
    assert preflight(**(GOOD | {"gpus": 2})).backend == "nccl"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["No such file"]),
        ('{\n"a": 1,,\n}', ["line 2", "not JSON"]),
        ("[1]", ["line 1", "list", "object"]),
        ('{"train_batchsize": 8}', ["train_batchsize", "did you mean 'train_batch_size'"]),
        (b"\xff\xfe\x00", ["line 1", "not text"]),
    ],
)
def test_a_bad_config_file_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "my config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_config(path)
    for word in ["my config.json", *words]:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("config, words", [({"optimizer": "adam"}, "optimizer is 'adam'"), (5, "config is a int")])
def test_a_config_of_the_wrong_shape_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        read_config(config)


def test_the_dtype_is_put_above_the_config():
    assert "bf16" not in read_config(None) and "bf16" not in read_config(None, "fp32")
    assert read_config(None, "bf16")["bf16"] == {"enabled": True}
    assert dtype_of(read_config({"bf16": {"enabled": True}})) == "bf16"
    assert dtype_of(read_config({"bf16": {"enabled": True}}, "fp32")) == "fp32"
    assert dtype_of(read_config({"fp16": {"enabled": True}}, "bf16")) == "bf16"
    with pytest.raises(ValueError, match="unknown dtype 'int8': use fp32 or bf16"):
        read_config(None, "int8")


def test_all_three_batch_keys_keep_the_default_optimizer():
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert read_config(dict(zip(names, (8, 2, 4), strict=True)))["optimizer"]["type"] == "Adam"


def test_a_dict_is_laid_over_the_default():
    config = read_config({"train_batch_size": 32})
    assert config["train_batch_size"] == 32 and config["optimizer"]["params"]["lr"] == 1e-3
    assert batch_arithmetic(read_config({"gradient_accumulation_steps": 3}), 2) == Batch(48, 8, 3, 2)


@pytest.mark.parametrize("name", ["trace", "recompute"])
def test_a_switch_is_true_or_false(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 'yes', but must be True or False"):
        launch(**{name: "yes"}, runs_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_bubble_is_explained_for_each_schedule():
    config = read_config({"train_batch_size": 64})
    for schedule, chunks, end in (
        ("gpipe", 1, "(P-1)/(M+P-1) = 1/9 = 11.1 % of each step"),
        ("naive", 1, "(P-1)/P = 1/2 = 50.0 % of each step"),
        ("interleaved_1f1b", 2, "(P-1)/(vM+P-1) = 1/17 = 5.9 % of each step"),
        ("zero_bubble", 1, "(P-1)/(3M+P-1) = 1/25 = 4.0 % of each step"),
    ):
        assert explain(config, 2, 1, schedule, chunks).endswith(end)


def test_the_batch_arithmetic_is_explained_with_the_runs_own_numbers():
    assert explain(read_config(None), stages=3, replicas=2).splitlines() == [
        "train batch 256 = micro-batch 8 x 16 micro-batches x 2 replicas",
        "gradient accumulation 16 = 256 / (8 x 2): it is the pipeline's M",
        "P = 3, M = 16: stages of equal work idle (P-1)/(M+P-1) = 2/18 = 11.1 % of each step",
    ]
    alone = explain(read_config({"train_batch_size": 32}), stages=0).splitlines()
    assert len(alone) == 2 and alone[1].endswith("gradients of so many micro-batches are added up, then one step")


@pytest.mark.parametrize(
    "config, replicas, batch",
    [
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8}, 2, (256, 8, 16)),
        ({"train_batch_size": 256, "gradient_accumulation_steps": 4}, 2, (256, 32, 4)),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}, 2, (64, 8, 4)),
        ({"train_batch_size": 256}, 4, (256, 64, 1)),
        ({"train_micro_batch_size_per_gpu": 8}, 4, (32, 8, 1)),
    ],
)
def test_what_the_config_leaves_out_is_solved(config, replicas, batch):
    assert batch_arithmetic(config, replicas) == Batch(*batch, replicas)


def test_launch_refuses_in_under_a_second_and_starts_nothing(runs):
    script = (
        "import sys, time; from pipetutor import launch\n"
        "begin = time.perf_counter()\n"
        "try: launch(stages=9)\n"
        "except ValueError as error: print(time.perf_counter() - begin, 'torch' in sys.modules, error)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    seconds, torch_loaded, message = out.split(" ", 2)
    assert float(seconds) < 1 and torch_loaded == "False" and "only 8" in message
    assert not runs.exists()
    with pytest.raises(ValueError, match="replicas is 0"):
        launch(replicas=0)


def test_torch_free_modules_import_in_a_third_of_a_second():
    code = "import time; t = time.perf_counter(); import pipetutor, sys; s = time.perf_counter() - t\n"
    code += "print(min(s, 9), 'torch' in sys.modules, 'deepspeed' in sys.modules)"
    best = min(subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3))
    seconds, *loaded = best.split()
    assert float(seconds) < 0.3 and loaded == ["False", "False"]


def test_config_keys_are_those_that_deepspeed_asks_for(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    asked = set()

    class Asked(dict):
        def get(self, key, *default):
            asked.add(key)
            return super().get(key, *default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

        def __deepcopy__(self, memo):
            return self

    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(Asked(train_batch_size=8))
    assert len(asked) > 40
    read_config({key: {} for key in asked})
    read_config(json.loads(json.dumps({"train_batch_size": 8})))


def test_data_set_sizes_are_those_of_the_data_sets():
    from pipetutor import synthetic

    assert DATASET_SIZES["synthetic"] == synthetic.TRAIN
