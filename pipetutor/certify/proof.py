"""The proof behind the certificate: DeepSpeed's pipeline against a plain PyTorch loop, tensor by tensor.

Both sides begin with the same weights and read the same micro-batches, on the CPU, in fp32, with dropout off.
The optimizer is SGD without momentum: it carries a wrong gradient into the weights in proportion, where Adam
divides its scale away. Compared are all initial weights, the accumulated gradient of every parameter in the
first step, every parameter after the last one, and the loss of each step.

A model that normalises batches does so micro-batch by micro-batch on both sides; its running statistics are those of
replica 0, which has seen fewer micro-batches than one process, and are not compared.

Run by ``pipetutor.certify.certificate`` in a process of its own, which forks the ranks of each case after another.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipetutor.certify.certificate import CONTROLS, NARROW, TWO_STAGES_A_RANK
from pipetutor.core.clipping import clip_gradients
from pipetutor.core.model import Model, build_model
from pipetutor.core.partition import bounds_for
from pipetutor.data import loader
from pipetutor.data.fetch import DATA_DIR
from pipetutor.processes.forks import forked, meet
from pipetutor.processes.job import do_job
from pipetutor.schedule.orders import Instruction, build
from pipetutor.system.uncompiled import torchvision

__all__ = ["CONTROLS", "TOLERANCE", "Case", "compare", "reference"]

MICRO_BATCH, STEPS, LEARNING_RATE, SEED = 2, 3, 0.05, 1138
TOLERANCE = 1e-5  # of a tensor's largest entry: some eighty roundings of fp32
MARGIN = 1000  # a control must be wrong by so many tolerances: what passes is a thousandth of what is found out


@dataclass(frozen=True)
class Case:
    """One row of the certificate.

    Attributes:
        model: as in ``launch``, or ``vgg``, a narrow VGG11.
        stages: pipeline stages P.
        micro_batches: M, in each step and replica.
        replicas: copies of the pipeline.
        control: one of ``CONTROLS``, a fault that the comparison must find; empty for the pipeline as it is.
        way: one of ``WAYS`` in which the pipeline trains; empty for DeepSpeed's engine and plain SGD.
        dataset: as in ``launch``.
    """

    model: str
    stages: int
    micro_batches: int
    replicas: int
    control: str = ""
    way: str = ""
    dataset: str = "synthetic"

    @property
    def engine(self) -> str:
        """DeepSpeed's or torch's."""
        return "torch" if "torch" in self.way else "deepspeed"

    @property
    def parts(self) -> int:
        """Stages of the model: one or two on each rank."""
        return self.stages * (2 if self.way in TWO_STAGES_A_RANK else 1)

    @property
    def zero_stage(self) -> int:
        """Whether replicas share the optimizer's state."""
        return int("ZeRO-1" in self.way)

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped: to half the norm that they have in the first step."""
        return "clipped" in self.way

    @property
    def momentum(self) -> float:
        """Of SGD, where more than gradients counts: after the first step, it is what the optimizer took them for."""
        return 0.9 if self.way else 0.0


def model_of(name: str, seed: int = SEED) -> Model:
    """Build a model of the certificate, with weights that depend on the seed alone and without dropout."""
    if name != NARROW:
        return build_model(name, seed, dropout=0.0)
    torch.manual_seed(seed)
    with torch.device("meta"):  # VGG's own classifier has 100 million weights, and none of them is wanted
        net = torchvision.models.VGG(nn.Sequential(), num_classes=10, init_weights=False, dropout=0.0)
    net.features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"])
    for index, (inputs, outputs) in {0: (64 * 7 * 7, 64), 3: (64, 64), 6: (64, 10)}.items():
        net.classifier[index] = nn.Linear(inputs, outputs)
    return Model.of(net)


def micro_batches(case: Case, replica: int) -> Iterator[list[torch.Tensor]]:
    """Return the micro-batches of a replica, from the loader of every run."""
    trainset = loader.as_stored(loader.load(case.dataset, True, -1, DATA_DIR))
    return loader.micro_batches(trainset, MICRO_BATCH, case.replicas, replica, SEED, torch.device("cpu"))


def reference(case: Case) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train in this process, with torch alone.

    Args:
        case: how many micro-batches make a step; the stages do not matter here.

    Returns:
        Tensors by name: ``initial.NAME``, ``gradient.NAME`` of the first step and ``final.NAME``; and the mean
        loss of each step.
    """
    built = model_of(case.model)
    model, compute = built.whole, built.whole
    if case.control == "cleared":
        _fork(built, _bounds(case, built))
        compute = nn.Sequential(*built.layers)
    tensors = {f"initial.{name}": p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=case.momentum)
    replicas = [micro_batches(case, replica) for replica in range(case.replicas)]
    count = case.micro_batches * case.replicas
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(case.micro_batches):
            for replica in replicas:
                inputs, labels = next(replica)
                random = torch.get_rng_state()
                loss = built.loss_fn(compute(inputs), labels)
                if not torch.equal(torch.get_rng_state(), random):
                    raise RuntimeError(
                        "the model draws random numbers as it computes, so no two runs of it are equal"
                    )
                (loss / count).backward()
                total += loss.item()
        if step == 0:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            tensors["longest"] = norm / 2
        if case.clips:
            nn.utils.clip_grad_norm_(model.parameters(), tensors["longest"].item())
        if step == 0:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            tensors |= {f"gradient.{name}": gradient.clone() for name, gradient in gradients.items()}
        optimizer.step()
        losses.append(total / count)
    return tensors | {f"final.{name}": p.detach() for name, p in model.named_parameters()}, losses


@dataclass
class Difference:
    """How far tensors are from what they should be.

    Attributes:
        absolute: the largest difference of two entries.
        relative: the same, in units of the largest entry of the tensor that it is in.
        factor: by how much the found tensors are too large as a whole (least squares); 1 when they are not.
    """

    absolute: float = 0.0
    relative: float = 0.0
    factor: float = 1.0


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Difference:
    """Compare tensors of the same names; a NaN, on either side, counts as an infinite difference.

    >>> compare({"w": torch.tensor([2.0, 4.0])}, {"w": torch.tensor([1.0, 2.0])})
    Difference(absolute=2.0, relative=1.0, factor=2.0)
    """
    worst = Difference()
    product = square = 0.0
    for name, tensor in found.items():
        wanted = expected[name]
        absolute = _or_infinite((tensor - wanted).abs().max().item())
        worst.absolute = max(worst.absolute, absolute)
        if absolute:
            relative = _or_infinite(absolute / max(wanted.abs().max().item(), 1e-30))
            worst.relative = max(worst.relative, relative)
        product += torch.dot(tensor.flatten(), wanted.flatten()).item()
        square += torch.dot(wanted.flatten(), wanted.flatten()).item()
    worst.factor = product / square if square else 1.0
    return worst


def _or_infinite(difference: float) -> float:
    """Return a difference, and infinity for a NaN, which no comparison would find too large."""
    return difference if difference == difference else float("inf")


def _rank(case: Case, rank: int, store: Path, scratch: str) -> dict[str, Any]:
    """Train one rank of the pipeline, and compare what it holds with the reference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    meet(rank, case.stages * case.replicas, store)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    expected = torch.load(scratch, mmap=True, weights_only=True)
    stage = rank // case.replicas
    other = case.control == "weights" and stage == case.stages - 1
    model = model_of(case.model, SEED + other)
    bounds = _bounds(case, model)
    if case.control == "cleared":
        _fork(model, bounds)
    engine = _engine(case, model, bounds, float(expected["longest"]))
    found: dict[str, Difference] = {}

    def look(part: str, tensors: dict[str, torch.Tensor]) -> None:
        found[part] = compare(tensors, {name: expected[f"{part}.{name}"] for name in tensors})

    def before(instruction: Instruction, _: Any = ()) -> None:
        if instruction.name != "OptimizerStep":
            return
        gradients = {name: p.grad for name, p in engine.state().items() if p.grad is not None}
        factor = {"summed": float(case.micro_batches), "scaled": 1.0 if stage else 1 / case.micro_batches}
        for gradient in gradients.values():
            gradient.mul_(factor.get(case.control, 1.0))
        if not case.way and "gradient" not in found:
            look("gradient", gradients)

    weights = {name: p.detach() for name, p in engine.state().items() if isinstance(p, nn.Parameter)}
    _spoil(case, engine, stage, float(expected["longest"]))
    look("initial", weights)
    engine.observe(before, after=lambda: None)
    batches = micro_batches(case, engine.replica)
    losses = []
    for step in range(STEPS):
        losses.append(float(engine.train_batch(batches)))
        if case.way and step == 0:
            look("gradient", _momenta(engine))
    look("final", weights)
    return {"stage": stage, "losses": losses} | {part: asdict(difference) for part, difference in found.items()}


def _bounds(case: Case, model: Model) -> list[int]:
    return bounds_for(model.about(), case.parts, "parameters")


def _fork(model: Model, bounds: list[int]) -> None:
    """Have the first stage hand on two tensors, of which one is made of the other; the next takes their sum."""
    cut = bounds[1]
    model.layers[cut - 1].register_forward_hook(lambda layer, inputs, x: (x, 8 * x * x))
    model.layers[cut].register_forward_pre_hook(lambda layer, inputs: sum(inputs[0]))


def _engine(case: Case, model: Model, bounds: list[int], longest: float) -> Any:
    from pipetutor.certify.dualpipev import DualPipeV
    from pipetutor.core.deepspeed_engines import Pipeline

    config: dict[str, Any] = {
        "train_batch_size": MICRO_BATCH * case.micro_batches * case.replicas,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE, "momentum": case.momentum}},
    }
    if case.zero_stage:
        config |= {"zero_optimization": {"stage": case.zero_stage}, "zero_allow_untested_optimizer": True}
    if case.clips:
        config["gradient_clipping"] = longest
    if case.way == "DualPipeV":
        return DualPipeV(model, case.stages, ",".join(map(str, bounds)), config)
    if case.engine == "deepspeed":
        return Pipeline(model, case.stages, ",".join(map(str, bounds)), config)
    from pipetutor.core.torch_engine import TorchPipeline

    inputs, _ = loader.example(loader.load(case.dataset, True, -1, DATA_DIR), MICRO_BATCH)
    streams = build("dualpipev" if case.way in TWO_STAGES_A_RANK else "1f1b", case.stages, case.micro_batches)
    return TorchPipeline(model, streams, bounds, config, inputs)


def _momenta(engine: Any) -> dict[str, torch.Tensor]:
    """Return what the optimizer has made of the gradients of the first step: its momentum is these gradients."""
    if engine.batch.replicas > 1:
        return {name: parts["momentum_buffer"] for name, _, parts in engine.kept() if parts}
    states = engine.optimizer.state
    return {name: states[p]["momentum_buffer"] for name, p in engine.state().items() if p in states}


def _spoil(case: Case, engine: Any, stage: int, longest: float) -> None:
    """Put in the fault of a control that is neither one of all gradients nor of the weights of a whole stage."""
    from deepspeed.runtime.pipe.schedule import ReduceTiedGrads

    if case.control == "untied":
        engine.deepspeed._INSTRUCTION_MAP = engine.deepspeed._INSTRUCTION_MAP | {ReduceTiedGrads: lambda *_: None}
    if case.control == "apart" and stage == case.stages - 1:
        for copy in engine.deepspeed.module.tied_modules.parameters():
            nn.init.normal_(copy, std=copy.std().item())
    if case.control == "cleared":
        net = engine.deepspeed.module
        net._stages = tuple(nn.Sequential(*stage) for stage in net._stages)  # ours hand on a single tensor
        _clear(engine.deepspeed)
    if case.control == "stagewise":
        alone = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
        parameters = list(engine.deepspeed.module.parameters())
        engine.deepspeed.clip_fp32_gradients = lambda: clip_gradients(parameters, longest, engine.device, alone)


def _clear(engine: Any) -> None:
    """Have DeepSpeed clear what it has sent, as its versions after 0.19.8 do: their documentation warns of it.

    Once a stage's output is sent, the backward pass needs the graph behind it alone, unless another operation of the
    stage took it in, too. When its gradient comes, the output borrows that one's memory, so that shapes agree and no
    error tells that the operation goes backward with other numbers than it went forward with.
    """
    from deepspeed.runtime.pipe.schedule import BackwardPass

    whole = engine._INSTRUCTION_MAP[BackwardPass]

    def backward(engine: Any, buffer_id: int, phase: int) -> None:
        outputs, gradients = (engine.pipe_buffers[what][buffer_id] for what in ("outputs", "grads"))
        if gradients is not None:  # else nothing was sent: this rank holds the next stage, too, or the loss
            pairs = zip(outputs, gradients, strict=True) if isinstance(outputs, tuple) else [(outputs, gradients)]
            for output, gradient in pairs:
                output.data = gradient
        whole(engine, buffer_id=buffer_id, phase=phase)

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {BackwardPass: backward}


def judge(case: Case, ranks: list[dict[str, Any]], losses: list[float]) -> dict[str, Any]:
    """Put the ranks' findings together as one row of the certificate.

    Args:
        case: the row.
        ranks: what each rank found.
        losses: of the reference.

    Returns:
        The case, the largest absolute and relative difference of each quantity, ``equal``, and ``reason``: what
        is wrong where they are not equal. Initial weights must be equal to the last bit, all else within
        ``TOLERANCE``; a control counts as equal within ``MARGIN`` times that, so it must be wrong by far.
    """
    row: dict[str, Any] = asdict(case)
    for part in ("initial", "gradient", "final"):
        row[part] = {kind: max(rank[part][kind] for rank in ranks) for kind in ("absolute", "relative")}
    loss = [
        max(_or_infinite(abs(rank["losses"][step] - wanted)) for rank in ranks) for step, wanted in enumerate(losses)
    ]
    relative = [_or_infinite(difference / abs(wanted)) for difference, wanted in zip(loss, losses, strict=True)]
    row["loss"] = {"absolute": max(loss), "relative": max(relative)}
    reasons = []
    same, limit = (MARGIN * TOLERANCE, MARGIN * TOLERANCE) if case.control else (0.0, TOLERANCE)
    part = "rank" if case.way in TWO_STAGES_A_RANK else "stage"  # such a rank holds two
    others = sorted({rank["stage"] for rank in ranks if rank["initial"]["relative"] > same})
    wrong = {rank["stage"]: rank["gradient"]["factor"] for rank in ranks if rank["gradient"]["relative"] > limit}
    if others:
        reasons.append(f"{part} {_list(others)} did not begin with the reference's weights")
    elif wrong:
        for factor in sorted({round(factor, 3) for factor in wrong.values()}):
            stages = [stage for stage, found in sorted(wrong.items()) if round(found, 3) == factor]
            amount = (
                f"{factor:g} times what they should be" if factor != 1 else "wrong, and as long as they should be"
            )
            reasons.append(f"gradients of {part} {_list(stages)} are {amount}")
    elif row["final"]["relative"] > limit:
        reasons.append("the gradients agree, and the updated parameters do not")
    elif row["loss"]["relative"] > limit:
        reasons.append("the parameters agree, and the losses do not")
    row["reason"] = "; ".join(reasons)
    row["equal"] = not reasons
    return row


def _list(stages: list[int]) -> str:
    return ", ".join(map(str, stages))


def _save_reference(case: Case, scratch: str) -> list[float]:
    tensors, losses = reference(case)
    torch.save(tensors, scratch)
    return losses


def prove(cases: list[Case], folder: Path) -> Iterator[dict[str, Any]]:
    """Compare case after case.

    Args:
        cases: the rows; neighbours with the same model, M and replicas share one reference.
        folder: an existing directory, for what libraries print and where ranks meet.

    Yields:
        A row for each case; see ``judge``. A case that fails to run is a row whose ``reason`` says why.
    """
    import deepspeed  # noqa: F401 (loaded once, here, and not once in every fork)

    log, store = folder / "proof.log", folder / "store"
    known, losses = None, []
    with tempfile.TemporaryFile() as file:  # without a name: however this ends, it is gone
        scratch = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        for case in cases:
            store.unlink(missing_ok=True)
            try:
                wanted = case.model, case.micro_batches, case.replicas, case.clips, case.momentum
                if known != wanted:
                    known = None
                    losses = forked([functools.partial(_save_reference, case, scratch)], log)[0]
                    known = wanted
                ranks = range(case.stages * case.replicas)
                works = [functools.partial(_rank, case, rank, store, scratch) for rank in ranks]
                yield judge(case, forked(works, log), losses)
            except RuntimeError as error:
                yield asdict(case) | {"equal": False, "reason": str(error)}


if __name__ == "__main__":
    do_job(lambda directory, cases: prove([Case(**case) for case in cases], directory))
