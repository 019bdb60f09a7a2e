"""The certificate of an engine that a learner wrote: does it compute what one process computes, and in which order?

    certify_engine(gpipe)               gradients, losses and weights, for several P and M
    certify_engine(mine, "1f1b")        the order of passes as well, and how many micro-batches are in flight

The model is a row of equal blocks, so that a stage receives what has the shape of its inputs. Each rank gets its
stage and all micro-batches; the certificate steps the weights, and begins the second step with gradients of None.
"""

import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipetutor.certify.certificate import Certificate
from pipetutor.certify.proof import LEARNING_RATE, SEED, TOLERANCE, Case, compare, judge
from pipetutor.processes.entry import briefly
from pipetutor.processes.ranks import Call, Outcome, outcomes
from pipetutor.schedule.orders import SCHEDULES
from pipetutor.system.kinds import check, list_of, whole

__all__ = ["certify_engine"]

BLOCKS, WIDTH, EXAMPLES, STEPS = 6, 8, 4, 2
ORDERS = {"gpipe": "GPipe", "1f1b": "1F1B"}
SPOILED = ("summed", "scaled", "weights")  # of certificate.CONTROLS
DEADLINE = 10.0
Engine = Callable[..., Any]  # (rank, ranks, stage, inputs, targets) -> the mean loss


@briefly
def certify_engine(
    engine: Engine,
    order: str | None = None,
    ranks: Sequence[int] = (1, 2, 3),
    micro_batches: Sequence[int] = (1, 2, 4),
    *,
    deadline: float = DEADLINE,
) -> Certificate:
    """Compare a learner's engine with one process, for each number of ranks and micro-batches.

    Every rank calls ``engine(rank, ranks, stage, inputs, targets)``: its part of the model, and lists with a tensor
    for each micro-batch. It adds up gradients in ``stage`` so that they are those of the mean over micro-batches of
    ``mse_loss``, which it returns on the last rank. The last rows are controls: the same engine, spoiled.

    Args:
        engine: the function.
        order: ``gpipe`` or ``1f1b``, if the passes of each rank must come in that order.
        ranks: numbers of stages P, 1 to 6.
        micro_batches: numbers of micro-batches M, 1 to 16.
        deadline: seconds after which an engine that does not return is taken to hang, in one row.

    Returns:
        The certificate; print it for its table.

    Raises:
        ValueError: the engine cannot be called this way, or another argument does not fit; nothing was started.
        RunFailed: the comparison itself ended early.

    >>> print(certify_engine(gpipe, ranks=[2]))  # doctest: +SKIP
    """
    check("order", order, [None, *ORDERS])
    check("ranks", ranks, list_of(whole(1, BLOCKS)))
    check("micro_batches", micro_batches, list_of(whole(1, 16)))
    Call(engine, 1, (None, [], [])).check()
    way = ORDERS[order] if order else ""
    cases = [Case("blocks", p, m, 1, "", way) for p, m in product(ranks, micro_batches)]
    cases += [Case("blocks", max(ranks), 4, 1, control, way) for control in SPOILED]
    with tempfile.TemporaryDirectory() as folder:
        calls = [Call(_rank, case.stages, (engine, case)) for case in cases]
        made = outcomes(calls, deadline, "rows", Path(folder, "certificate"))
    rows = [_row(case, outcome, order) for case, outcome in zip(cases, made, strict=False)]
    left = "not tried after a row that could not be computed"
    return Certificate(rows, [asdict(case) | {"reason": left} for case in cases[len(made) :]], None)


# --- in a rank -----------------------------------------------------------------------------------------------------


def _model(seed: int = SEED) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)))


def _data(micro_batches: int, step: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(SEED + step)
    return list(torch.randn(micro_batches, EXAMPLES, WIDTH)), list(torch.randn(micro_batches, EXAMPLES, WIDTH))


def _plain(micro_batches: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train in one process; see ``pipetutor.certify.proof.reference``."""
    model = _model()
    tensors = {f"initial.{name}": p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        total = 0.0
        for x, target in zip(*_data(micro_batches, step), strict=True):
            loss = nn.functional.mse_loss(model(x), target) / micro_batches
            loss.backward()
            total += loss.item()
        if step == 0:
            tensors |= {
                f"gradient.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
            }
        _step(model)
        losses.append(total)
    return tensors | {f"final.{name}": p.detach() for name, p in model.named_parameters()}, losses


def _step(module: nn.Module) -> None:
    """Plain SGD, which carries a wrong gradient into the weights in proportion."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.data -= LEARNING_RATE * parameter.grad
        parameter.grad = None


class _Record:
    """What a rank does with its stage: the passes in their order, and the inputs that outlive theirs."""

    def __init__(self, stage: nn.Module):
        self.passes: list[str] = []
        self.most_alive = 0
        self._inputs: list[weakref.ref[torch.Tensor]] = []
        self._hooks = [stage.register_forward_pre_hook(self._before), stage.register_forward_hook(self._behind)]

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.passes.append("F")
        self._inputs += [weakref.ref(x) for x in args if isinstance(x, torch.Tensor)]
        self.most_alive = max(self.most_alive, sum(x() is not None for x in self._inputs))

    def _behind(self, _: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.passes.append("B"))

    def end(self) -> None:
        """Look no further."""
        for hook in self._hooks:
            hook.remove()


def _rank(rank: int, ranks: int, engine: Engine, case: Case) -> dict[str, Any]:
    """Train one rank with the engine, and compare what it holds with what one process has."""
    expected, wanted = _plain(case.micro_batches)
    low, high = (s * BLOCKS // ranks for s in (rank, rank + 1))
    model = _model(SEED + 1 if case.control == "weights" and rank == ranks - 1 else SEED)
    weights = {f"{low + place}{name}": p for place, block in enumerate(model[low:high]) for name, p in _named(block)}
    stage = nn.Sequential(*model[low:high])
    record, found = _Record(stage), dict[str, Any]()

    def look(part: str, tensors: dict[str, torch.Tensor]) -> None:
        difference = compare(tensors, {name: expected[f"{part}.{name}"] for name in tensors})
        found[part] = asdict(difference)
        if part == "gradient":
            rest = {name: tensor - difference.factor * expected[f"{part}.{name}"] for name, tensor in tensors.items()}
            size = max(tensor.abs().max().item() for tensor in tensors.values())
            found["proportional"] = max(tensor.abs().max().item() for tensor in rest.values()) <= 1e-3 * size

    look("initial", {name: p.detach() for name, p in weights.items()})
    losses, found["stepped"] = [], False
    for step in range(STEPS):
        before = [p.detach().clone() for p in weights.values()]
        loss = engine(rank, ranks, stage, *_data(case.micro_batches, step))
        found["stepped"] |= not all(map(torch.equal, before, weights.values()))
        losses.append(_number(loss) if rank == ranks - 1 else wanted[step])
        factor = {"summed": float(case.micro_batches), "scaled": 1.0 if rank else 1 / case.micro_batches}
        for p in weights.values():
            if p.grad is not None:
                p.grad *= factor.get(case.control, 1.0)
        if step == 0:
            record.end()
            found["missing"] = any(p.grad is None for p in weights.values())
            found["returned"] = repr(loss)
            look("gradient", {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in weights.items()})
        _step(stage)
    look("final", {name: p.detach() for name, p in weights.items()})
    about = {"stage": rank, "losses": losses, "wanted": wanted, "passes": record.passes}
    return found | about | {"most_alive": record.most_alive}


def _named(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f".{name}", parameter) for name, parameter in block.named_parameters()]


def _number(loss: Any) -> float:
    """Return a loss as a number: NaN for what is none."""
    try:
        return torch.as_tensor(loss).detach().item()
    except (TypeError, ValueError, RuntimeError):
        return float("nan")


# --- the verdict ---------------------------------------------------------------------------------------------------


def _row(case: Case, outcome: Outcome, order: str | None) -> dict[str, Any]:
    """Return a row of the certificate, with the reason in words that say what to look for."""
    if outcome.reason:
        return asdict(case) | {"equal": False, "reason": outcome.reason + _hint(outcome.reason)}
    ranks = outcome.returned
    row = judge(case, ranks, ranks[-1]["wanted"])
    if case.control:
        return row
    if not row["equal"]:
        row["reason"] = _why(case, ranks, row["reason"])
    elif order:
        row["reason"] = next(filter(None, (_disorder(case, rank, order) for rank in ranks)), "")
        row["equal"] = not row["reason"]
    return row


def _hint(reason: str) -> str:
    """Say what an exception means, where it is of a kind that beginners meet."""
    if "NoneType" in reason and ".grad" in reason:
        return (
            "\n    A tensor has a .grad only behind a backward pass, and only if it wanted one before the forward "
            "pass: requires_grad_()"
        )
    return ""


def _why(case: Case, ranks: Sequence[dict[str, Any]], reason: str) -> str:
    """Say what a difference looks like, where the certificate's own words do not."""
    count, last = case.micro_batches, ranks[-1]
    wrong = [rank for rank in ranks if rank["gradient"]["relative"] > TOLERANCE]
    stages = ", ".join(str(rank["stage"]) for rank in wrong)
    if stepped := [str(rank["stage"]) for rank in ranks if rank["stepped"]]:
        return (
            f"the engine changed the weights of stage {', '.join(stepped)}; it should leave gradients in .grad and "
            "nothing else: the certificate steps the weights"
        )
    if missing := [str(rank["stage"]) for rank in ranks if rank["missing"]]:
        return f"stage {', '.join(missing)} has weights without a gradient: no backward pass came to them"
    if all(rank["proportional"] for rank in wrong) and count > 1:
        factors = {round(rank["gradient"]["factor"], 3) for rank in wrong}
        if factors == {count}:
            return f"{reason}: they are the sum over {count} micro-batches, and the mean is wanted"
        if factors == {round(1 / count, 3)}:
            return f"{reason}: they are divided by the {count} micro-batches once too often"
    if not all(rank["proportional"] for rank in wrong):
        head = f"gradients of stage {stages} are not those of one process, nor a multiple of them"
        if last in wrong:
            return f"{head}: does every micro-batch come to every stage once, and with its own target?"
        return (
            f"{head}; those of stage {last['stage']} are right: look at the gradient that stage {wrong[-1]['stage']} "
            "receives, and at what its backward pass makes of it"
        )
    if wrong:
        return reason
    if not abs(last["losses"][0] - last["wanted"][0]) <= TOLERANCE * last["wanted"][0]:  # a NaN is wrong, too
        return (
            f"the gradients are right, and the loss is not: rank {last['stage']} returned {last['returned']}, and "
            f"the mean over micro-batches is {last['wanted'][0]:.4f}"
        )
    return (
        f"{reason}: the first step is right, and the second is not. What does the engine keep from one to the next?"
    )


def _disorder(case: Case, rank: dict[str, Any], order: str) -> str:
    """Say what is wrong with the order of a rank's passes, if anything."""
    number, name = rank["stage"], ORDERS[order]
    stream = [i for i in SCHEDULES[order](case.stages, case.micro_batches, number) if i.micro_batch is not None]
    wanted = [i.name[0] for i in stream]
    kept, most = _most(rank["passes"]), _most(wanted)
    both = f"its passes are {' '.join(rank['passes'])}, and those of {name} {' '.join(wanted)}"
    if kept > most:
        return f"rank {number} keeps {kept} micro-batches in flight, and {name} at most {most} there: {both}"
    if rank["passes"] != wanted:
        return f"rank {number} does not keep to {name}: {both}"
    # A local variable may still hold the last one.
    if order == "1f1b" and 0 < number == case.stages - 1 and rank["most_alive"] > most + 1:
        return (
            f"rank {number} still holds the inputs of {rank['most_alive']} micro-batches at once, and {most} is in "
            "flight: take what a backward pass has used out of your dict (pop), and keep of a loss its item() alone"
        )
    return ""


def _most(passes: Sequence[str]) -> int:
    return max(accumulate(1 if one == "F" else -1 for one in passes), default=0)
