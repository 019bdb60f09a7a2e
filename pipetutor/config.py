"""DeepSpeed's config, read whole, with what it would only stumble over later refused at once. No torch."""

import difflib
import importlib.resources
import json
from pathlib import Path
from typing import Any

DTYPES = ("fp32", "bf16")
OBJECTS = {
    "optimizer": '{"type": "Adam", "params": {"lr": 0.001}}',
    "scheduler": '{"type": "WarmupLR"}',
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
}


def read_config(config: str | Path | dict[str, Any] | None, dtype: str | None = None) -> dict[str, Any]:
    """Return a whole DeepSpeed config.

    Args:
        config: a file's path, taken as it is; a dict, laid key by key over the packaged default; or None,
            the packaged default: train batch 256, micro-batch 8, Adam 1e-3.
        dtype: one of ``DTYPES``, put above what the config says; None leaves it to the config.

    Raises:
        ValueError: there is no such dtype.
        ValueError: the file is missing, not JSON, or not an object (with file and line), or a key is unknown.
    """
    whole = _whole(config)
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: use {' or '.join(DTYPES)}")
        whole = whole | {
            name: {"enabled": name == dtype} for name in ("bf16", "fp16") if name == dtype or name in whole
        }
    return whole


def _whole(config: str | Path | dict[str, Any] | None) -> dict[str, Any]:
    resources = importlib.resources.files("pipetutor")
    default = json.loads(resources.joinpath("default_config.json").read_text())
    if config is None:
        return default
    if isinstance(config, dict):
        found = config
        if "gradient_accumulation_steps" in config:  # the default's train batch would contradict it
            del default["train_batch_size"]
        whole = default | config
        source = "config"
    elif not isinstance(config, str | Path):
        raise ValueError(f"config is a {type(config).__name__}, but must be a file's path or a dict")
    else:
        source = str(config)
        try:
            text = Path(config).read_text(encoding="utf-8")
            found = whole = json.loads(text)
        except OSError as error:
            raise ValueError(f"config file {source}: {error.strerror}; give the path of a DeepSpeed JSON") from None
        except UnicodeDecodeError:
            raise ValueError(f"config file {source}, line 1: not text; give a DeepSpeed JSON") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"config file {source}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(found, dict):
            raise ValueError(f"config file {source}, line 1: holds a {type(found).__name__}, needs an object {{...}}")
    known = json.loads(resources.joinpath("config_keys.json").read_text())
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "see deepspeed.ai/docs/config-json"
            raise ValueError(f"{source}: DeepSpeed has no config key {key!r}; {hint}")
    for key, example in OBJECTS.items():
        if key in found and not isinstance(found[key], dict):
            raise ValueError(f"{source}: {key} is {found[key]!r}, but must be an object, as in {example}")
    return whole


def dtype_of(config: dict[str, Any]) -> str:
    """Return in which numbers a config computes: ``fp32``, ``bf16`` or ``fp16``."""
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
