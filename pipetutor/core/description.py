"""What is known of a model and a data set ahead of any rank: the layers to cut, the examples to share. No torch.

For names of ours that stands in tables and closed forms. A model or a data set of one's own is code, which has to
run: ``pipetutor.processes.describe`` does so in a process of its own.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pipetutor.core.gpt_sizes import gpt_sizes
from pipetutor.core.partition import Layer, catalog
from pipetutor.data.sums import ALPHABET, LENGTH
from pipetutor.system.kinds import check
from pipetutor.system.named import FORM, Named

__all__ = ["DATASETS", "Data", "Description", "check_pair", "known_data", "known_layers"]


@dataclass(frozen=True)
class Data:
    """What is known of a data set.

    Attributes:
        train: examples to learn from.
        test: examples to evaluate on.
        shape: of one input.
        dtype: of it, as torch calls it.
    """

    train: int
    test: int
    shape: Sequence[int]
    dtype: str


@dataclass(frozen=True)
class Description:
    """What is known of a run's model and data; see ``known_layers`` and ``Data``."""

    layers: Sequence[Layer]
    data: Data


IMAGE = (3, 224, 224)
WITH_HEADS = ("googlenet", "inception_v3")
DATASETS = {
    "synthetic": Data(2_000, 500, IMAGE, "float32"),
    "cifar10": Data(50_000, 10_000, IMAGE, "float32"),
    "sums": Data(5_000, 5_000, (LENGTH,), "int64"),
}


def known_layers(model: str) -> Sequence[Layer] | None:
    """Return the layers of a model of ours; None for a function of one's own.

    Raises:
        ValueError: there is no such model, or it takes no such arguments.

    >>> len(known_layers("gpt:layers=2"))
    6
    """
    if model in WITH_HEADS:
        raise ValueError(
            f"model {model!r} has auxiliary heads, whose outputs leave it in the middle, and a pipeline has that of "
            "its last layer alone: try 'resnet18'"
        )
    named = _named("model", model, [*sorted(catalog()), "gpt"])
    if named.is_own:
        return None
    if named.name == "gpt":
        try:
            return gpt_sizes(**named.arguments)
        except TypeError as error:
            words = str(error).removeprefix("gpt_sizes() ")
            raise ValueError(
                f"model {model}: {words}; a gpt takes layers, width, heads, vocabulary, length, dropout"
            ) from None
    if named.arguments:
        raise ValueError(f"model {model}: {named.name} takes no arguments; gpt does, and functions of your own")
    return catalog()[named.name]


def known_data(dataset: str) -> Data | None:
    """Return what is known of a data set of ours; None for a function of one's own.

    Raises:
        ValueError: there is no such data set.
    """
    named = _named("dataset", dataset, list(DATASETS))
    if named.is_own:
        return None
    if named.arguments:
        raise ValueError(f"dataset {dataset}: {named.name} takes no arguments; functions of your own do")
    return DATASETS[named.name]


def _named(option: str, text: str, known: list[str]) -> Named:
    """Take a name apart, and refuse one of ours that is none."""
    try:
        named = Named.parse(text)
        if not named.is_own:
            check(option, named.name, known)
    except ValueError as error:
        words = str(error) if str(error).startswith("unknown") else f"{option} {error}"
        there = os.path.isfile(f"{text}.py")  # False as well for what is too long for a name
        form = f"{text}:FUNCTION of your {text}.py" if there else FORM
        raise ValueError(f"{words}; or give a function of your own, {form}") from None
    return named


def check_pair(model: str, dataset: str) -> None:
    """Raise ValueError where a model of ours cannot read a data set of ours."""
    named = Named.parse(model)
    if named.is_own or Named.parse(dataset).is_own:
        return
    text = dataset == "sums"
    if (named.name == "gpt") != text:
        reads, holds = ("images", "tokens") if text else ("tokens", "images")
        raise ValueError(
            f"{named.name} reads {reads}, and {dataset} holds {holds}: "
            f"give it {'synthetic (--dataset synthetic)' if text else 'sums (--dataset sums)'}, or data of your own"
        )
    if text:
        least = {"vocabulary": len(ALPHABET), "length": LENGTH}
        for name, needed in least.items():
            if named.arguments.get(name, needed) < needed:
                raise ValueError(f"{model}: sums need a {name} of at least {needed}")
