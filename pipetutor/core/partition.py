"""Where to cut: from a partition method to the bounds of every stage.

Bounds such as ``0,16,22`` say that stage s holds the layers bounds[s] ... bounds[s+1]-1. DeepSpeed computes
them inside the ranks; here they are computed before any process starts, from the packaged catalog of
models, so that a cut that cannot train is refused at once. No torch: the launcher imports this.
"""

import functools
import importlib.resources
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pipetutor.options import METHODS, PROFILE
from pipetutor.system.kinds import counted

__all__ = ["Layer", "bounds_for", "catalog", "check_stages", "fastest", "parameters_of"]


class Layer(NamedTuple):
    """One entry of a model's flat list.

    Attributes:
        kind: its class name.
        parameters: how many of them are trained.
        tied: what several entries have in common that hold the same parameters; empty for those that share none.
    """

    kind: str
    parameters: int
    tied: str = ""


def parameters_of(layers: Iterable[Any]) -> int:
    """Return how many parameters one rank holds that holds these layers, those of tied ones once.

    >>> parameters_of([Layer("Embedding", 8, "tokens"), Layer("Linear", 20), Layer("Embedding", 8, "tokens")])
    28
    """
    return sum({layer.tied or place: layer.parameters for place, layer in enumerate(layers)}.values())


@functools.cache
def catalog() -> dict[str, tuple[Layer, ...]]:
    """Return the flat layer list of every torchvision model that ``join_layers`` accepts.

    The file is written by ``python -m pipetutor.core.model`` and held to torchvision by a test.
    """
    text = importlib.resources.files("pipetutor.core").joinpath("models.json").read_text()
    return {name: tuple(Layer(*layer) for layer in layers) for name, layers in json.loads(text).items()}


def uniform(count: int, stages: int) -> list[int]:
    """Cut ``count`` layers so that each stage holds as many as any other; the first stages take the rest.

    >>> uniform(22, 4)
    [0, 6, 12, 17, 22]
    """
    size, rest = divmod(count, stages)
    return [stage * size + min(stage, rest) for stage in range(stages + 1)]


def balanced(weights: Sequence[int], stages: int) -> list[int]:
    """Cut so that the heaviest and the lightest stage differ least, as DeepSpeed 0.19 does.

    best(n, s) is the smallest spread (heaviest - lightest) of n layers in s stages; its last stage starts
    at some k, and of equally good k the last is taken, as DeepSpeed's ``partition_balanced`` takes it:

        best(n, s) = min over k of spread(best(k, s-1) + [weights[k] + ... + weights[n-1]])

    >>> balanced([3, 1, 1, 1, 2], 2)
    [0, 2, 5]
    """
    if len(weights) <= stages:
        return [min(stage, len(weights)) for stage in range(stages + 1)]
    total = [0, *itertools.accumulate(weights)]
    best: dict[tuple[int, int], tuple[float, float, int]] = {(0, 0): (0, math.inf, 0)}
    for end in range(1, len(weights) + 1):
        for stage in range(1, min(end, stages) + 1):
            spread = math.inf
            for start in range(end):
                if (start, stage - 1) not in best:
                    continue
                heaviest, lightest, _ = best[start, stage - 1]
                load = total[end] - total[start]
                heaviest, lightest = max(heaviest, load), min(lightest, load)
                if heaviest - lightest <= spread:
                    spread = heaviest - lightest
                    best[end, stage] = heaviest, lightest, start
    bounds = [len(weights)]
    for stage in range(stages, 0, -1):
        bounds.append(best[bounds[-1], stage][2])
    return bounds[::-1]


Span = tuple[int, int]  # (low, high): the layers low ... high-1


def _least_worst(count: int, stages: Sequence[Mapping[Span, float]]) -> float:
    """Return the least that the worst stage can cost; infinite where no split is made of the spans given.

    best(n) is the least for the stages so far, when they hold the layers below n; the last one starts at some k:

        best(n) = min over k of max(best(k) of the stages before, cost of the layers k ... n-1)
    """
    best = {0: 0.0}
    for costs in stages:
        reached: dict[int, float] = {}
        for (low, high), cost in costs.items():
            if low in best:
                reached[high] = min(reached.get(high, math.inf), max(best[low], cost))
        best = reached
    return best.get(count, math.inf)


def fastest(
    weights: Sequence[int],
    stages: int,
    seconds: Callable[[int, int], float],
    needed: Callable[[int, int, int], float] | None = None,
    limit: float = math.inf,
) -> list[int]:
    """Cut so that the slowest stage takes the least that any split allows: exact, by dynamic programming.

    A pipeline is as fast as its slowest stage, so many splits are as fast as each other. Of those the one is taken
    whose stages take the least in sum, which fills and drains the pipeline soonest; of several such, the one that
    cuts earliest.

    Args:
        weights: trainable parameters of each layer; a stage without any is never made.
        stages: the number of stages P.
        seconds: of (low, high): what a stage takes for a micro-batch when it holds the layers low ... high-1.
        needed: of (stage, low, high): the bytes that it needs then; None where memory does not matter.
        limit: bytes that a stage may need.

    Returns:
        P + 1 rising layer indices, from 0 to ``len(weights)``.

    Raises:
        ValueError: fewer layers with weights than stages, or a limit that every split breaks; the message names the
            least that would do.

    >>> fastest([1, 1, 1, 1], 2, lambda low, high: sum([3, 1, 1, 2][low:high]))
    [0, 1, 4]
    """
    count, weighted = len(weights), sum(weight > 0 for weight in weights)
    if not 1 <= stages <= weighted:
        raise ValueError(f"{stages} stages, but {weighted} layers have weights: use 1 to {weighted} stages")
    spans = [(low, high) for low, high in itertools.combinations(range(count + 1), 2) if any(weights[low:high])]
    taken = {span: seconds(*span) for span in spans}
    fitting = [taken] * stages
    if needed:
        sizes = [{span: needed(stage, *span) for span in spans} for stage in range(stages)]
        fitting = [{span: taken[span] for span in spans if size[span] <= limit} for size in sizes]
        least = _least_worst(count, sizes)
        if least > limit:
            raise ValueError(
                f"a stage may need {limit:,.0f} bytes, but every split into {stages} stages has one that needs more: "
                f"allow at least {math.ceil(least):,}, or use more stages"
            )
    slowest = _least_worst(count, fitting)
    # From the last stage to the first: first layer -> the sum from there on, and its bounds, the less the better.
    best: dict[int, tuple[float, tuple[int, ...]]] = {count: (0.0, (count,))}
    for costs in reversed(fitting):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (low, high), cost in costs.items():
            if high in best and cost <= slowest:
                total, bounds = best[high]
                found = (cost + total, (low, *bounds))
                reached[low] = min(reached.get(low, found), found)
        best = reached
    return list(best[0][1])


def _explicit(partition: str, count: int, stages: int) -> list[int]:
    bounds = [int(number) for number in partition.split(",")]
    example = ",".join(map(str, uniform(count, stages)))
    if len(bounds) != stages + 1:
        raise ValueError(
            f"partition {partition}: {counted(stages, 'stage')} need{'s' * (stages == 1)} {stages + 1} bounds, not "
            f"{len(bounds)}, for example {example}"
        )
    rises = all(low < high for low, high in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != count or not rises:
        raise ValueError(
            f"partition {partition} must start at 0, rise, and end at {count}, the model's number of layers, "
            f"for example {example}"
        )
    return bounds


def check_stages(layers: Sequence[Layer], stages: int) -> None:
    """Raise ValueError where the layers cannot give every stage something to train, wherever they are cut."""
    weighted = sum(layer.parameters > 0 for layer in layers)
    if not weighted:
        raise ValueError(f"none of the model's {len(layers)} layers has weights to train (requires_grad)")
    if stages > len(layers):
        raise ValueError(
            f"{stages} stages, but the model has {len(layers)} layers, {weighted} of them with weights: use 1 to "
            f"{weighted} stages"
        )
    if stages > weighted:
        raise ValueError(
            f"{stages} stages, but only {weighted} of the model's {len(layers)} layers have weights, and a stage "
            f"without weights has nothing to train: use 1 to {weighted} stages"
        )


def bounds_for(layers: Sequence[Layer], stages: int, partition: str) -> list[int]:
    """Turn a partition method into bounds, refusing every cut that leaves a stage nothing to train.

    Args:
        layers: the model's flat list, from ``catalog()``.
        stages: the number of pipeline stages P.
        partition: ``parameters``, ``uniform``, ``type:REGEX`` (DeepSpeed's methods) or explicit bounds. ``profile``
            takes more than a layer list: see ``pipetutor.costs.profile``.

    Returns:
        P + 1 rising layer indices, from 0 to ``len(layers)``.

    Raises:
        ValueError: too many stages, an unknown method, bounds that do not fit, or a stage without weights.

    >>> bounds_for(catalog()["alexnet"], 2, "parameters")
    [0, 19, 22]
    """
    check_stages(layers, stages)
    weights = [layer.parameters for layer in layers]
    if partition == "parameters":
        bounds = balanced(weights, stages)
    elif partition == "uniform":
        bounds = uniform(len(layers), stages)
    elif partition.startswith("type:") and partition != "type:":
        try:
            pattern = re.compile(partition.removeprefix("type:"), re.IGNORECASE)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"partition {partition!r}: not a regular expression ({error})") from None
        found = [int(bool(pattern.search(layer.kind))) for layer in layers]
        if sum(found) < stages:
            kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers if layer.parameters))
            raise ValueError(
                f"partition {partition!r} matches {sum(found)} layers, fewer than {stages} stages; "
                f"layers with weights are {kinds}"
            )
        bounds = balanced(found, stages)
    elif re.fullmatch(r" *-?\d{1,9} *(, *-?\d{1,9} *)*", partition):
        bounds = _explicit(partition, len(layers), stages)
    elif partition == PROFILE:
        raise ValueError(
            "partition 'profile' needs measured costs: pipetutor.costs.profile.choose(costs, stages) takes them"
        )
    else:
        raise ValueError(f"unknown partition {partition!r}: use {METHODS}")
    for stage, (low, high) in enumerate(itertools.pairwise(bounds)):
        if not any(weights[low:high]):
            raise ValueError(
                f"partition {partition} gives stage {stage} the layers {low} to {high - 1}, none of which has "
                f"weights: use {','.join(map(str, balanced([int(w > 0) for w in weights], stages)))}"
            )
    return bounds
