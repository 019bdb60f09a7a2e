"""DeepSpeed's config, read whole, with what it would only stumble over later refused at once. No torch.

``config_keys.json`` says which keys there are, and of what kind their values are; see ``pipetutor.system.kinds``.
"""

import importlib.resources
import importlib.util
import json
from pathlib import Path
from typing import Any

from pipetutor.options import DTYPES
from pipetutor.system.kinds import check, check_keys, closest, shown

__all__ = ["OBJECTS", "REDUCE_BUCKET", "dtype_of", "half_precision", "read_config"]

OBJECTS = {
    "optimizer": '{"type": "Adam", "params": {"lr": 0.001}}',
    "scheduler": '{"type": "WarmupLR"}',
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": true}',
    "bfloat16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
}
REDUCE_BUCKET = 5_000_000  # gradients that ZeRO reduces at a time, unless a config says otherwise
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # that a section needs


def read_config(config: str | Path | dict[str, Any] | None, dtype: str | None = None) -> dict[str, Any]:
    """Return a whole DeepSpeed config, as JSON would hold it.

    Args:
        config: a file's path, taken as it is; a dict, laid key by key over the packaged default; or None,
            the packaged default: train batch 256, micro-batch 8, Adam 1e-3. The default's optimizer stays where the
            dict gives it other params alone, and goes with all of its params where the dict has another type.
        dtype: one of ``DTYPES``, put above what the config says; None leaves it to the config.

    Returns:
        The config, with the names that DeepSpeed has several of given one: ``bfloat16`` is ``bf16``, and optimizers
        and schedulers are called as they are in torch and DeepSpeed, ``SGD`` and not ``sgd``.

    Raises:
        ValueError: there is no such dtype.
        ValueError: the file is missing, not JSON, or not an object (with file and line); a key is unknown, or its
            value is of another kind than it must be.
    """
    check("dtype", dtype, [None, *DTYPES])
    check("config", config, "config?")
    where = "config: " if config is None or isinstance(config, dict) else f"{config}: "
    whole = _default()
    if isinstance(config, dict):
        if "gradient_accumulation_steps" in config:  # the default's train batch would contradict it
            del whole["train_batch_size"]
        adam, whole = whole["optimizer"], whole | config
        whole["optimizer"] = _over(adam, whole["optimizer"])
    elif config is not None:
        whole = _read(config)
    known = _known()
    _check(whole, known, where)
    for part in ("optimizer", "scheduler"):
        if part in whole:
            whole[part] = _named(part, whole[part], known[part], where)
    whole = json.loads(json.dumps(whole, allow_nan=False))
    if "bfloat16" in whole:
        if "bf16" in whole:
            raise ValueError(f"{where}bfloat16 is another name of bf16, and both are given: leave bfloat16 out")
        whole["bf16"] = whole.pop("bfloat16")
    if dtype is not None:
        for name in ("bf16", "fp16", "torch_autocast"):
            if name == dtype or name in whole:
                whole[name] = whole.get(name, {}) | {"enabled": name == dtype}
    both = [name for name in ("bf16", "fp16", "torch_autocast") if whole.get(name, {}).get("enabled")]
    if len(both) > 1:
        raise ValueError(f"{where}{both[0]} and {both[1]} are both enabled: a run computes in one of them")
    _check_numbers(whole, where)
    for section, package in PACKAGES.items():
        if whole.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{where}{section} is enabled, and needs a package: pip install {package}, or leave it out"
            )
    return whole


def _default() -> dict[str, Any]:
    return json.loads(importlib.resources.files("pipetutor.core").joinpath("default_config.json").read_text())


def _known() -> dict[str, dict[str, Any]]:
    return json.loads(importlib.resources.files("pipetutor.core").joinpath("config_keys.json").read_text())


def _over(default: dict[str, Any], given: Any) -> Any:
    """Lay an optimizer over the default's: params key by key where the type is the same, and none where it is not."""
    if not isinstance(given, dict) or not isinstance(given.get("params", {}), dict):
        return given  # and is refused
    kind = given.get("type", default["type"])
    if not isinstance(kind, str) or kind.lower() != default["type"].lower():
        return given
    return default | given | {"params": default["params"] | given.get("params", {})}


def _read(config: str | Path) -> dict[str, Any]:
    """Read a config file."""
    try:
        found = json.loads(Path(config).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except OSError as error:
        raise ValueError(f"config file {config}: {error.strerror}; give the path of a DeepSpeed JSON") from None
    except UnicodeDecodeError:
        raise ValueError(f"config file {config}, line 1: not text; give a DeepSpeed JSON") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"config file {config}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise ValueError(f"config file {config}: not JSON for a config ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"config file {config}, line 1: holds a {type(found).__name__}, needs an object {{...}}")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, and raise ValueError where a key is in it twice: the last one alone would count."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{shown(twice[0])} is there twice")
    return dict(pairs)


def _check(found: dict[Any, Any], known: dict[str, dict[str, Any]], where: str) -> None:
    """Refuse keys that DeepSpeed does not have, and values of another kind."""
    for key, value in found.items():
        if key not in known["keys"]:
            close = closest(key, list(known["keys"]), 0.5)
            hint = f"did you mean {close!r}?" if close else "see deepspeed.ai/docs/config-json"
            raise ValueError(f"{where}DeepSpeed has no config key {shown(key)}; {hint}")
        check(key, value, known["keys"][key], where, OBJECTS.get(key, ""))


def _check_numbers(whole: dict[str, Any], where: str) -> None:
    """Refuse number formats that DeepSpeed does not combine; ZeRO alone adds gradients up in another one."""
    dtype, types = dtype_of(whole), dict(whole.get("data_types", {}))
    if whole.get("zero_optimization", {}).get("stage"):
        types.pop("grad_accum_dtype", None)
    for key, value in types.items():
        if value not in (None, dtype):
            raise ValueError(f"{where}data_types {key} is {value!r}, and the run computes in {dtype}: leave it out")


def _named(part: str, given: dict[str, Any], known: dict[str, Any], where: str) -> dict[str, Any]:
    """Return an optimizer or a scheduler under its own name, having checked its params."""
    names = {name.lower(): name for name in known}
    kind = names.get(given["type"].lower(), given["type"])
    check(f"{part} type", kind, list(known), where)
    check_keys(f"{part} {kind}", given.get("params", {}), known[kind], where)
    if given.get("params", {}).get("nesterov") and not given["params"].get("momentum"):
        raise ValueError(f"{where}optimizer {kind} nesterov needs a momentum: 0.9, say")
    if given.get("params", {}).get("nesterov") and given["params"].get("dampening"):
        raise ValueError(f"{where}optimizer {kind} nesterov goes without dampening: leave one of them out")
    named = given | {"type": kind}
    if "betas" in given.get("params", {}):  # torch takes no whole numbers
        named["params"] = given["params"] | {"betas": [float(beta) for beta in given["params"]["betas"]]}
    return named


def dtype_of(config: dict[str, Any]) -> str:
    """Return in which numbers a config has the model's weights: ``fp32``, ``bf16`` or ``fp16``."""
    return next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")


def half_precision(config: dict[str, Any]) -> str:
    """Return the key that has a config compute in numbers of 16 bits; empty where none does."""
    names = ("bf16", "fp16", "torch_autocast")
    return next((name for name in names if config.get(name, {}).get("enabled")), "")
