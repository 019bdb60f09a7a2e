"""Each option of a run, once: its name, its default, its flags, what its value may be, and what it is for.

From the fields of ``Options`` come the parser of ``pipetutor.train``, the signature and the Args of
``pipetutor.launch``, the command that ``launch`` prints, what run.json keeps, what ranks on several hosts compare,
and the README's table of flags. A new option is one field here, and the code that uses it.

Nothing here loads torch.
"""

import argparse
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from pipetutor.data.fetch import DATA_DIR, SHARED_DIR
from pipetutor.schedule.orders import LOOPED, SCHEDULES
from pipetutor.system import links
from pipetutor.system.kinds import KINDS, Kind, check

__all__ = [
    "DTYPES",
    "ENGINES",
    "METHODS",
    "PROFILE",
    "Options",
    "add_options",
    "table",
    "takes_options",
]

BACKENDS = ("gloo", "nccl")
DTYPES = ("fp32", "bf16")
ENGINES = ("deepspeed", "torch")
TRANSFORMS = ("batched", "pil")
PROFILE = "profile"
METHODS = "parameters, uniform, type:REGEX, profile (measured), or bounds such as 0,16,22"
T = TypeVar("T")
WIDTH = 112  # of a line of documentation
POSITIONAL = 3  # so many of the options may be given to launch without their names


def option(
    default: Any,
    kind: Any,
    purpose: str,
    *flags: str,
    typed: Any = MISSING,
    launched: bool = True,
    common: bool = True,
) -> Any:
    """Return the field of an option.

    Args:
        default: its value where none is given.
        kind: what its value may be; see ``pipetutor.system.kinds``.
        purpose: what it is for, in a few words or sentences.
        flags: on the command line, of which the last gives the name there; none for an option of ``launch`` alone.
        typed: the default on the command line, where it is another one.
        launched: whether ``launch`` takes it.
        common: whether it must be the same on every rank. Files may have other names on other hosts.
    """
    typed = default if typed is MISSING else typed
    about = {"kind": kind, "purpose": purpose, "flags": flags, "typed": typed, "launched": launched, "common": common}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Options:
    """What is asked of a run.

    Raises:
        ValueError: a value is not of its option's kind; the message says what was given and what is needed.
    """

    stages: int = option(
        2, "whole", "pipeline stages P; 0 trains the data-parallel baseline", "-p", "--pipeline-parallel-size"
    )
    replicas: int = option(
        1, "count", "copies of the pipeline, or of the model with stages=0, each on its own share of a batch"
    )
    steps: int = option(
        20, "count", "train batches to run, those before a checkpoint included", "-s", "--steps", typed=100
    )
    hosts: int = option(
        1,
        "count",
        "hosts on this machine that share the ranks, each with a network of its own; a terminal's hosts are those of "
        "deepspeed --hostfile",
    )
    link: str | dict[str, str] | None = option(
        None,
        Kind("a rate, and maybe a delay", lambda value: value is None or isinstance(value, str | dict), "'100mbit'"),
        f"what the network between these hosts lets through a second, such as {links.EXAMPLE}; no limit by default",
    )
    hostfile: str | Path | None = option(
        None,
        "path?",
        "start the ranks on the hosts of this file by ssh, as deepspeed --hostfile does: a line each, such as first "
        "slots=2; they share the working directory and runs_dir",
    )
    model: str = option(
        "alexnet",
        Kind("the name of a model, or of a function in a file ('mine:net')", KINDS["text"].fits, "'alexnet'"),
        "a torchvision model whose forward is a chain of blocks, see pipetutor.core.partition.catalog(); "
        "gpt or gpt:layers=8,width=256; or a function of your own, module:function, that returns a list of layers",
        "--model",
    )
    dataset: str = option(
        "synthetic",
        Kind("the name of a data set, or of a function in a file ('mine:data')", KINDS["text"].fits, "'synthetic'"),
        "synthetic: ten drawn shapes, 2,000 train and 500 test images; cifar10, downloaded once; sums, text for gpt; "
        "or a function of your own, module:function, that takes train (True or False) and returns a data set",
        "--dataset",
    )
    data_dir: str | Path = option(
        DATA_DIR,
        "path",
        "where the data is or will be; PIPETUTOR_DATA_DIR sets the default",
        "--data-dir",
        common=False,
    )
    partition: str = option(
        "parameters",
        Kind(f"a string: {METHODS}", KINDS["text"].fits),
        "where to cut: parameters, uniform, type:REGEX, bounds such as 0,16,22, or profile: the best cut by what "
        "each layer costs on this CPU, which is measured the first time; not for the baseline",
        "--partition",
    )
    config: str | Path | dict[str, Any] | None = option(
        None,
        "config?",
        "a DeepSpeed config: a file's path, taken whole; launch takes a dict as well, and lays it over the default",
        "--deepspeed_config",
        common=False,
    )
    dropout: float | None = option(
        None, "share?", "probability for every dropout layer; 0 turns dropout off", "--dropout"
    )
    seed: int = option(1138, "seed", "of weights, dropout and data order", "--seed")
    backend: str | None = option(
        None,
        (None, *BACKENDS),
        "nccl or gloo; by default nccl where every rank has a GPU, else gloo",
        "--backend",
        common=False,
    )
    eval_every: int | None = option(
        None,
        "count?",
        "evaluate on the whole test set every so many steps and at the end; each image counts exactly once",
        "--eval-every",
    )
    save_every: int | None = option(
        None,
        "count?",
        "save a checkpoint every so many steps and at the end; the newest two are kept",
        "--save-every",
    )
    resume: str | Path | None = option(
        None,
        "path?",
        "go on from a checkpoint, or from the newest of a run directory, with any number of stages and replicas",
        "--resume",
        common=False,
    )
    weights: str | Path | None = option(
        None, "path?", "start from a torchvision state_dict", "--weights", common=False
    )
    dtype: str | None = option(
        None,
        (None, *DTYPES),
        "fp32 or bf16, put above what the config says: bf16 makes a step shorter on processors that have "
        "instructions for it, and far longer on others, which a run says first",
        "--dtype",
    )
    transforms: str = option(
        "batched",
        TRANSFORMS,
        "batched: 8-bit images are enlarged a micro-batch at a time, on the rank's device; pil: one by one",
        "--transforms",
    )
    engine: str = option(
        "deepspeed",
        ENGINES,
        "deepspeed, or torch: the same model, cut and data through torch.distributed.pipelining, which plays every "
        "schedule",
        "--engine",
    )
    schedule: str | Path | Callable[..., Any] | list[Any] = option(
        "1f1b",
        Kind(
            f"{', '.join(SCHEDULES)}, or your own: a function, a text or a file",
            lambda value: callable(value) or (isinstance(value, str | Path | list | tuple) and bool(value)),
            f"{next(iter(SCHEDULES))!r}",
        ),
        f"in which order a rank computes: {', '.join(SCHEDULES)}; or your own, in which a rank holds the stages it "
        "runs: a text such as 'F0 F1 B0 B1 / F0 B0 F1 B1', a file with it or with torch's CSV, and from Python a "
        "function of ranks, micro_batches and rank; see pipetutor.schedule.text. DeepSpeed's engine runs 1f1b",
        "--schedule",
    )
    chunks: int = option(
        1,
        "count",
        f"stages of the model on each rank, for {' and '.join(LOOPED)}; rank r holds the stages r, r + P, ...",
        "--chunks",
    )
    recompute: bool = option(
        False,
        "switch",
        "activation checkpointing: a stage keeps its input alone and computes the rest once more",
        "--recompute",
    )
    memory_limit: float | None = option(
        None,
        "above 0?",
        "gigabytes (10^9 bytes) that each rank may allocate from when it begins to build its part of the model: what "
        "does not fit into so much fails, as on a smaller machine",
        "--memory-limit",
    )
    trace: bool = option(False, "switch", "time every instruction on every rank, into the run directory", "--trace")
    fault: str | None = option(
        None,
        "text?",
        "inject a fault, such as stall:rank=1,step=3; also die, slow, ragged, and cut and slow-link between hosts; "
        "see pipetutor.processes.faults",
        "--fault",
    )
    deadline: float = option(
        300,
        dataclasses.replace(KINDS["above 0"], example="300"),
        "seconds without a completed step after which the run is ended and explained",
    )
    runs_dir: str | Path = option("runs", "path", "where run directories are made")
    run_dir: str | Path | None = option(
        None,
        "path?",
        "record the run there: a new directory, or the one that the run goes on from",
        "--run-dir",
        launched=False,
        common=False,
    )
    local_rank: int = option(
        -1, Kind("a whole number", lambda value: isinstance(value, int)), "set by the launcher", "--local_rank",
        launched=False, common=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            check(one.name, getattr(self, one.name), one.metadata["kind"])

    @classmethod
    def from_command_line(cls, args: argparse.Namespace, ranks: int) -> "Options":
        """Return what a command line says.

        Args:
            args: of a parser that has been through ``add_options``.
            ranks: of the job, which the command line of a rank does not say.

        Raises:
            ValueError: see ``Options``.
        """
        given = {one.name: getattr(args, _dest(one)) for one in _with_flags()}
        check("stages", given["stages"], "whole")
        return cls(**given, replicas=max(1, ranks // max(1, given["stages"])))

    @property
    def directory(self) -> Path | None:
        """Where a rank is to record the run; None where nowhere."""
        return None if self.run_dir is None else Path(self.run_dir)

    def words(self) -> list[str]:
        """Return the words of a command line that says the same: what differs from the defaults there.

        Those that have a letter are said in any case.
        """
        found: list[str] = []
        for one in _with_flags():
            flags, value = one.metadata["flags"], getattr(self, one.name)
            if value != one.metadata["typed"] or len(flags) > 1:
                found += [flags[0]] if value is True else [flags[0], str(value)]
        return found

    def record(self) -> dict[str, Any]:
        """Return what run.json keeps of them: what ``launch`` takes, but the config, which it has whole."""
        kept = [one.name for one in dataclasses.fields(self) if one.metadata["launched"] and one.name != "config"]
        found = {name: getattr(self, name) for name in kept}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}

    def common(self) -> dict[str, Any]:
        """Return those that must be the same on every rank, by the names that they have on the command line."""
        return {_dest(one): getattr(self, one.name) for one in _with_flags() if one.metadata["common"]}

    def on_this_host(self, mine: "Options") -> "Options":
        """Return these options, with those that a rank's own command says of its host."""
        own = {one.name: getattr(mine, one.name) for one in dataclasses.fields(self) if not one.metadata["common"]}
        return dataclasses.replace(self, **own)


def _with_flags() -> Iterator[Field[Any]]:
    return (one for one in dataclasses.fields(Options) if one.metadata["flags"])


def _dest(one: Field[Any]) -> str:
    return one.metadata["flags"][-1].lstrip("-").replace("-", "_")


def _reader(hint: Any) -> Any:
    """Return what makes an option's value of a word."""
    return next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str)


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of all options to a parser, and return it."""
    hints = get_type_hints(Options)
    for one in _with_flags():
        default = one.metadata["typed"]
        about: dict[str, Any] = {"default": default, "help": _purpose(one, default).replace("%", "%%")}
        if hints[one.name] is bool:
            about["action"] = "store_true"
        else:
            about |= {"type": _reader(hints[one.name]), "metavar": one.name.upper()}
        parser.add_argument(*one.metadata["flags"], **about)
    return parser


def _is_nothing(default: Any) -> bool:
    return default is None or default is False


def _purpose(one: Field[Any], default: Any) -> str:
    return one.metadata["purpose"] + ("" if _is_nothing(default) else f" (default {default})")


def takes_options(function: Callable[[Options], T]) -> Callable[..., T]:
    """Have a function be called with the options of a launch themselves, as its signature and documentation say.

    Args:
        function: its documentation has ``{options}`` where its arguments are to stand.
    """
    taken = {one.name: one for one in dataclasses.fields(Options) if one.metadata["launched"]}
    hints = get_type_hints(Options)
    kinds = [
        inspect.Parameter.POSITIONAL_OR_KEYWORD if place < POSITIONAL else inspect.Parameter.KEYWORD_ONLY
        for place in range(len(taken))
    ]
    signature = inspect.Signature(
        [
            inspect.Parameter(name, kind, default=one.default, annotation=hints[name])
            for kind, (name, one) in zip(kinds, taken.items(), strict=True)
        ],
        return_annotation=get_type_hints(function)["return"],
    )

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> T:
        return function(Options(**signature.bind(*given, **named).arguments))

    lines = (f"{name}: {one.metadata['purpose']}." for name, one in taken.items())
    wrapped = (textwrap.fill(line, WIDTH, initial_indent=8 * " ", subsequent_indent=12 * " ") for line in lines)
    call.__doc__ = (function.__doc__ or "").replace("        {options}", "\n".join(wrapped))
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def table() -> str:
    """Return the options as a markdown table."""
    rows = ["| `launch` | flag | default | what it is for |", "|---|---|---|---|"]
    for one in dataclasses.fields(Options):
        about = one.metadata
        name = f"`{one.name}`" if about["launched"] else ""
        flags = ", ".join(f"`{flag}`" for flag in about["flags"])
        default = SHARED_DIR if one.default == DATA_DIR else one.default  # whoever writes the table
        shown = "" if _is_nothing(default) else f"`{default}`"
        typed = f"; flag: `{about['typed']}`" if about["typed"] != one.default else ""
        rows.append(f"| {name} | {flags} | {shown}{typed} | {about['purpose']} |")
    return "\n".join(rows)
