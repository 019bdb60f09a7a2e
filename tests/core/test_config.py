"""A config is read whole: what is laid over the default, what is normalised, and the batch arithmetic of it."""

import inspect

import pytest

from pipetutor.core import config as config_module
from pipetutor.core.batch import Batch, batch_arithmetic, explain
from pipetutor.core.config import dtype_of, half_precision, read_config

KNOWN = config_module._known()


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["No such file"]),
        ('{\n"a": 1,,\n}', ["line 2", "not JSON"]),
        ("[1]", ["line 1", "list", "object"]),
        ('{"steps_per_print": 1, "steps_per_print": 2}', ["'steps_per_print' is there twice"]),
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


def test_the_dtype_is_put_above_the_config():
    assert "bf16" not in read_config(None) and "bf16" not in read_config(None, "fp32")
    assert read_config(None, "bf16")["bf16"] == {"enabled": True}
    assert dtype_of(read_config({"bf16": {"enabled": True}})) == "bf16"
    assert dtype_of(read_config({"bf16": {"enabled": True}}, "fp32")) == "fp32"
    assert dtype_of(read_config({"fp16": {"enabled": True}}, "bf16")) == "bf16"
    assert half_precision(read_config({"torch_autocast": {"enabled": True}}, "fp32")) == ""
    assert read_config({"bf16": {"enabled": False, "check_grad_overflow": False}}, "bf16")["bf16"] == {
        "enabled": True,
        "check_grad_overflow": False,
    }


def test_a_name_is_normalised():
    assert read_config({"bfloat16": {"enabled": True}})["bf16"] == {"enabled": True}
    assert "bfloat16" not in read_config({"bfloat16": {"enabled": True}})
    assert dtype_of(read_config({"bfloat16": {"enabled": True}})) == "bf16"
    assert read_config({"optimizer": {"type": "sgd"}})["optimizer"] == {"type": "SGD"}
    assert read_config({"scheduler": {"type": "warmuplr"}})["scheduler"] == {"type": "WarmupLR"}
    assert read_config({"optimizer": {"params": {"betas": (0.5, 0.9)}}})["optimizer"]["params"]["betas"] == [0.5, 0.9]


DEFAULT = {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8}


@pytest.mark.parametrize(
    "given, whole",
    [
        ({}, {"type": "Adam", "params": DEFAULT}),
        ({"params": {"lr": 1}}, {"type": "Adam", "params": DEFAULT | {"lr": 1}}),
        ({"type": "adam", "params": {"lr": 1}}, {"type": "Adam", "params": DEFAULT | {"lr": 1}}),
        ({"type": "SGD"}, {"type": "SGD"}),
        ({"type": "SGD", "params": {"lr": 1}}, {"type": "SGD", "params": {"lr": 1}}),
        ({"type": "AdamW", "params": {"lr": 1}}, {"type": "AdamW", "params": {"lr": 1}}),
    ],
)
def test_an_optimizer_is_laid_over_the_defaults(given, whole):
    """Key by key; another type keeps no params of the default's: SGD has no betas."""
    assert read_config({"optimizer": given})["optimizer"] == whole
    assert read_config(None)["optimizer"] == {"type": "Adam", "params": DEFAULT}, "the default stays"


def test_all_three_batch_keys_keep_the_default_optimizer():
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert read_config(dict(zip(names, (8, 2, 4), strict=True)))["optimizer"]["type"] == "Adam"


def test_a_dict_is_laid_over_the_default():
    config = read_config({"train_batch_size": 32})
    assert config["train_batch_size"] == 32 and config["optimizer"]["params"]["lr"] == 1e-3
    assert batch_arithmetic(read_config({"gradient_accumulation_steps": 3}), 2) == Batch(48, 8, 3, 2)


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


def test_config_keys_are_those_that_deepspeed_asks_for(monkeypatch):
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

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

    DeepSpeedConfig(Asked(train_batch_size=8))
    assert len(asked) > 40
    assert asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - {"sequence_parallel_size"} <= set(KNOWN["keys"])
    assert not set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) & set(KNOWN["keys"])


def test_keys_of_a_section_are_those_that_deepspeed_takes():
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import get_pipeline_config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    keys = KNOWN["keys"]
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    with_zero_alone = {
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
        "fp16_master_weights_and_grads",
        "compute_grad_norm",
    }
    for name, model in models.items():
        fields = {field.alias or key: field.json_schema_extra or {} for key, field in model.model_fields.items()}
        current = {key for key, more in fields.items() if not more.get("deprecated")}
        assert set(keys[name]) == current - with_zero_alone, name
    assert keys["bfloat16"] == keys["bf16"]
    assert set(keys["activation_checkpointing"]) == set(ACT_CHKPT_DEFAULT)
    assert set(keys["pipeline"]) == {*get_pipeline_config({}), "use_reentrant"}


def test_params_are_those_that_an_optimizer_and_a_scheduler_take():
    import torch
    from deepspeed.runtime import lr_schedules

    for part, modules in {"optimizer": [torch.optim], "scheduler": [lr_schedules, torch.optim.lr_scheduler]}.items():
        for name, params in KNOWN[part].items():
            module = next(module for module in modules if hasattr(module, name))
            taken = inspect.signature(getattr(module, name)).parameters
            assert set(params) - {"torch_adam", "adam_w_mode"} <= set(taken), name
            needed = {key for key, kind in params.items() if str(kind).endswith("!")}
            assert needed == {key for key in [*taken][1:] if taken[key].default is inspect.Parameter.empty}, name


@pytest.mark.parametrize(("asked", "wanted"), [({}, 5_000_000), ({"reduce_bucket_size": 7}, 7)])
def test_zero_reduces_through_a_small_buffer_unless_another_is_asked_for(asked, wanted):
    from pipetutor.core.deepspeed_engines import engine_config

    given = read_config({"zero_optimization": {"stage": 1} | asked})
    assert engine_config(given, 2)["zero_optimization"] == {"stage": 1, "reduce_bucket_size": wanted}
    assert given["zero_optimization"] == {"stage": 1} | asked, "what was given stays as it is"
