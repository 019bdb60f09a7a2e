"""What both modes do around a step: data, record, heartbeat, faults, evaluation and checkpoints."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.utils.data import Dataset

from pipetutor.core import checkpoint, records
from pipetutor.core.config import dtype_of, read_config
from pipetutor.core.engine import Instruction, is_pipeline, observe, replica_of, say
from pipetutor.core.evaluate import evaluate
from pipetutor.data import loader
from pipetutor.processes.faults import Fault
from pipetutor.processes.heartbeat import Heartbeat
from pipetutor.tracing.trace import Recorder, write_chrome

Batches = Iterator[list[torch.Tensor]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _full(batches: Batches, micro_batch: int, lacks_one: Callable[[], bool]) -> Batches:
    """Pass micro-batches on, refusing a ragged one where it is loaded, before it reaches another rank."""

    def full() -> list[torch.Tensor]:
        end = -1 if lacks_one() else None
        images, labels = (part[:end] for part in next(batches))
        if len(images) != micro_batch:
            raise ValueError(
                f"ragged micro-batch: it has {len(images)} of {micro_batch} images. A pipeline agrees "
                "on the shape of its activations once, so what is left at the end of a pass must be dropped"
            )
        return [images, labels]

    return iter(full, None)  # no generator, which would hold on to the last micro-batch


class Loop:
    """What both modes do around a step: the data, the record, the heartbeat, evaluation and checkpoints."""

    def __init__(self, args: argparse.Namespace, engine: Any, recorder: Recorder | None):
        self.args, self.engine, self.recorder = args, engine, recorder
        self.heart = Heartbeat(args.run_dir, dist.get_rank())
        self.fault = Fault.parse(args.fault) if args.fault else None
        if recorder:
            recorder.start(replica_of(engine), blocking=isinstance(engine, PipelineEngine))
        observe(engine, self._before, self._after)
        self.trainset = loader.load(args.dataset, True, args.local_rank, args.data_dir)
        self.size = len(self.trainset)  # type: ignore[arg-type]
        testset = loader.load(args.dataset, False, args.local_rank, args.data_dir) if args.eval_every else None
        self.testset = self._images(testset) if testset else None
        self.dtype = DTYPES[dtype_of(read_config(args.deepspeed_config, args.dtype))]
        self.topology = {"stages": args.pipeline_parallel_size, "replicas": engine.dp_world_size}
        self.step, self.start = 0, loader.Position()
        if replica_of(engine):  # the first one goes on from where the weights were drawn
            self._draw_own_numbers()
        if args.resume:
            self._resume()
        self.done = self.step
        shape = engine.train_micro_batch_size_per_gpu(), engine.dp_world_size
        first = not is_pipeline(engine) or engine.is_first_stage()
        source = self._images(self.trainset) if first else loader.Labels(self.trainset)
        order = replica_of(engine), args.seed
        batches = loader.micro_batches(source, *shape, *order, engine.device, self.start, self.dtype)
        self.micro_batches = _full(batches, shape[0], self._lacks_one)

    def _images(self, dataset: Dataset[Any]) -> Dataset[Any]:
        return dataset if self.args.transforms == "pil" else loader.Pixels(dataset)

    def _before(self, instruction: Instruction) -> None:
        self.heart.before(instruction.name, instruction.micro_batch, instruction.peers)
        if self.recorder:
            self.recorder.before(instruction.name, instruction.micro_batch, instruction.stage)
        if self.fault and self.heart.beat.phase == "training":
            self.fault.act(dist.get_rank(), self.step, instruction.name, instruction.micro_batch)

    def _after(self) -> None:
        if self.recorder:
            self.recorder.after()

    def _lacks_one(self) -> bool:
        if not is_pipeline(self.engine):  # a pipeline's engine loads by instruction, and has said so
            loaded = self.engine.micro_steps % self.engine.gradient_accumulation_steps()
            self._before(Instruction("LoadMicroBatch", loaded))
        beat = self.heart.beat
        return self.fault is not None and self.fault.cuts(beat.rank, beat.step, beat.micro_batch)

    def _draw_own_numbers(self) -> None:
        """Let each replica drop activations of its own: equal masks would make fewer samples of as many images.

        The stages of one replica are seeded alike, though layers on different stages then draw the same numbers: a
        pipeline with all its dropout layers on one stage, whichever that is, drops what one process drops.
        """
        replicas = self.engine.dp_world_size
        torch.manual_seed(self.args.seed + self.step * replicas + replica_of(self.engine))

    def _resume(self) -> None:
        path = checkpoint.find(self.args.resume)
        manifest = json.loads((path / checkpoint.MANIFEST).read_text())
        lost = checkpoint.restore(self.engine, path, manifest, self.topology)
        self.step, self.start = manifest["step"], loader.Position(*manifest["position"])
        say(f"resumed after step {self.step}, from {path}")
        if lost:
            self._draw_own_numbers()
            say(f"{lost}: dropout draws other random numbers than it would have")

    def run(self, one_step: Callable[[Batches], torch.Tensor]) -> None:
        """Train to the last step; ``one_step`` returns the mean loss over the train batch and all replicas."""
        args, engine = self.args, self.engine
        directory = args.run_dir if dist.get_rank() == 0 else None
        if directory:  # a run that is resumed into its own directory goes on from here, whatever came after
            records.keep_until(directory, self.step)
            checkpoint.keep_until(directory, self.step)
        writer = records.StepWriter(directory, engine.train_batch_size())
        evaluated, lost = -1, False
        while self.step < args.steps:
            self.step += 1
            self.heart.enter("training", self.step)
            if self.recorder:
                # A traced step begins on all ranks at once: none is still busy with the one before.
                self.heart.before("Barrier", peers=[r for r in range(dist.get_world_size()) if r != dist.get_rank()])
                dist.barrier()
            begin = time.perf_counter()
            if self.recorder:
                self.recorder.begin()
            loss = float(one_step(self.micro_batches))
            if self.recorder:
                self.recorder.end(self.step)
            writer.write(self.step, loss, time.perf_counter() - begin)
            if not math.isfinite(loss) and not lost:
                lost = True
                say(records.lost(self.step))
            if self.step % 10 == 0 or self.step == args.steps:
                say(f"step: {self.step:3d} / {args.steps:3d} loss: {loss:.6f}")
            if args.save_every and (self.step % args.save_every == 0 or self.step == args.steps):
                self._save()
            if args.eval_every and self.step % args.eval_every == 0:
                evaluated = self._evaluate()
        if args.eval_every and evaluated != self.step:
            self._evaluate()
        if self.recorder:
            dist.barrier()  # the other ranks have written their last step
            if dist.get_rank() == 0:
                say(f"trace: {write_chrome(args.run_dir)}, for https://ui.perfetto.dev")
        self.heart.enter("finished", self.step)

    def _evaluate(self) -> int:
        self.heart.enter("evaluating", self.step)
        assert self.testset is not None
        found = evaluate(self.engine, self.testset, self._before, self.dtype)
        say(
            f"step {self.step}: {found['correct']:.0f} of {found['images']:.0f} test images are right "
            f"({found['accuracy']:.1%}), loss {found['loss']:.4f}"
        )
        if self.args.run_dir and dist.get_rank() == 0:
            records.append(self.args.run_dir / records.EVALUATIONS, {"step": self.step} | found)
        return self.step

    def _save(self) -> None:
        self.heart.enter("saving", self.step)
        args, engine = self.args, self.engine
        read = (self.step - self.done) * engine.gradient_accumulation_steps()
        position = self.start.after(read, self.size, engine.train_micro_batch_size_per_gpu(), engine.dp_world_size)
        kept = {"step": self.step, "position": position, **self.topology}
        config = read_config(args.deepspeed_config, args.dtype)
        kept |= checkpoint.identity(args.model, args.dataset, args.seed, config)
        checkpoint.save(engine, args.run_dir, kept)
