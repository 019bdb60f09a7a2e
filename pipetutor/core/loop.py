"""What stands around a step, whoever trains it: data, record, evaluation, checkpoints, and a word to observers."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from pipetutor.core import checkpoint, records
from pipetutor.core.config import dtype_of
from pipetutor.core.engine import Batches, Engine, others, say
from pipetutor.core.evaluate import evaluate
from pipetutor.core.observer import Observer, Peers
from pipetutor.core.plan import Plan
from pipetutor.data import loader
from pipetutor.schedule.orders import Instruction
from pipetutor.system.named import Named

__all__ = ["Loop"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """One rank's way through a run.

    Args:
        plan: of the run.
        engine: of the rank.
        observers: told of everything, in this order.
    """

    def __init__(self, plan: Plan, engine: Engine, observers: Sequence[Observer]):
        self.plan, self.options, self.engine, self.observers = plan, plan.options, engine, observers
        self._tell("built", engine)
        engine.observe(self._before, self._after)
        options = self.options
        self.trainset = self._data(train=True)
        self.size = len(self.trainset)  # type: ignore[arg-type]
        self.testset = self._images(self._data(train=False)) if options.eval_every else None
        self.dtype = DTYPES[dtype_of(plan.config)]
        self.topology = {"stages": options.stages, "replicas": engine.batch.replicas}
        self.step, self.start = 0, loader.Position()
        if engine.replica:  # the first one begins at the seed itself
            self._draw_own_numbers()
        if options.resume:
            self._resume(checkpoint.find(options.resume))
        self.done = self.step
        source = self._images(self.trainset) if engine.is_first else loader.Labels(self.trainset)
        shape, order = (engine.batch.micro, engine.batch.replicas), (engine.replica, options.seed)
        batches = loader.micro_batches(source, *shape, *order, engine.device, self.start, self.dtype)
        self.micro_batches = engine.feed(map(self._checked, batches))  # no generator, which would hold on to the last

    def _data(self, train: bool) -> Dataset[Any]:
        options = self.options
        found = loader.load(options.dataset, train, options.local_rank, options.data_dir)
        if Named.parse(options.dataset).is_own:
            loader.check_same(found, options.dataset)
        return found

    def _images(self, dataset: Dataset[Any]) -> Dataset[Any]:
        return dataset if self.options.transforms == "pil" else loader.as_stored(dataset)

    def _checked(self, micro_batch: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return what observers make of a micro-batch; a ragged one is refused before it reaches another rank."""
        for observer in self.observers:
            micro_batch = observer.loaded(micro_batch)
        if len(micro_batch[0]) != self.engine.batch.micro:
            raise ValueError(
                f"ragged micro-batch: it has {len(micro_batch[0])} of {self.engine.batch.micro} images. A pipeline "
                "agrees on the shape of its activations once, so what is left at the end of a pass must be dropped"
            )
        return micro_batch

    def _tell(self, what: str, *about: Any) -> None:
        for observer in self.observers:
            getattr(observer, what)(*about)

    def _before(self, instruction: Instruction, peers: Peers) -> None:
        for observer in self.observers:
            observer.before(instruction, peers)

    def _after(self) -> None:
        for observer in self.observers:
            observer.after()

    def _enter(self, phase: str) -> None:
        self._tell("enter", phase, self.step)

    def _draw_own_numbers(self) -> None:
        """Let each replica drop activations of its own: equal masks would make fewer samples of as many images.

        The stages of one replica are seeded alike, though layers on different stages then draw the same numbers: a
        pipeline with all its dropout layers on one stage, whichever that is, drops what one process drops.
        """
        torch.manual_seed(self.options.seed + self.step * self.engine.batch.replicas + self.engine.replica)

    def _resume(self, path: Any) -> None:
        manifest = checkpoint.read_manifest(path)
        other = checkpoint.restore(self.engine, path, manifest, self.topology)
        self.step, self.start = manifest["step"], loader.Position(*manifest["position"])
        say(f"resumed after step {self.step}, from {path}")
        if other:
            self._draw_own_numbers()
            say(f"{other}: dropout draws other random numbers than it would have")

    def run(self, one_step: Callable[[Batches], torch.Tensor]) -> None:
        """Train to the last step.

        Args:
            one_step: trains on the micro-batches of a step, and returns their mean loss, that of all replicas.
        """
        options, last = self.options, self.options.steps
        directory = options.directory if dist.get_rank() == 0 else None
        if directory:  # a run that is resumed into its own directory goes on from here, whatever came after
            records.keep_until(directory, self.step)
            checkpoint.keep_until(directory, self.step)
        writer = records.StepWriter(directory, self.engine.batch.train)
        evaluated, learns = -1, True
        while self.step < last:
            self.step += 1
            self._enter("training")
            loss, seconds = self._time(one_step)
            writer.write(self.step, loss, seconds)
            if learns and not math.isfinite(loss):
                learns = False
                say(records.lost(self.step))
            if self.step % 10 == 0 or self.step == last:
                say(f"step: {self.step:3d} / {last:3d} loss: {loss:.6f}")
            if options.save_every and (self.step % options.save_every == 0 or self.step == last):
                self._save()
            if options.eval_every and self.step % options.eval_every == 0:
                evaluated = self._evaluate()
        if options.eval_every and evaluated != self.step:
            self._evaluate()
        self._tell("trained")
        self._enter("finished")

    def _time(self, one_step: Callable[[Batches], torch.Tensor]) -> tuple[float, float]:
        """Train a step, and return its loss and its seconds."""
        if any(observer.starts_together for observer in self.observers):
            self._before(Instruction("Barrier", 0), others())
            dist.barrier()
        begin = time.perf_counter()
        self._tell("begin", self.step)
        loss = float(one_step(self.micro_batches))
        self._tell("end", self.step)
        return loss, time.perf_counter() - begin

    def _evaluate(self) -> int:
        self._enter("evaluating")
        assert self.testset is not None
        found = evaluate(self.engine, self.testset, self._before, self.dtype)
        say(f"step {self.step}: {records.marks(found)}")
        directory = self.options.directory
        if directory and dist.get_rank() == 0:
            records.append(directory / records.EVALUATIONS, {"step": self.step} | found)
        return self.step

    def _save(self) -> None:
        self._enter("saving")
        options, batch, directory = self.options, self.engine.batch, self.options.directory
        assert directory
        read = (self.step - self.done) * batch.accumulation
        kept = {"step": self.step, "position": self.start.after(read, self.size, batch.micro, batch.replicas)}
        kept |= self.topology | checkpoint.identity(options, self.plan.config)
        checkpoint.save(self.engine, directory, kept)
