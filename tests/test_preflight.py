"""What is refused before a process starts: each with what was given, what is needed and the next step, in a line."""

import importlib
import inspect
import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import bench
from pipetutor import launch
from pipetutor.certify import certificate
from pipetutor.core import config, records
from pipetutor.core.config import read_config
from pipetutor.core.description import DATASETS
from pipetutor.costs import measuring as costs
from pipetutor.data import fetch
from pipetutor.options import Options
from pipetutor.preflight import World, preflight
from pipetutor.processes.describe import describe
from pipetutor.schedule.orders import build
from pipetutor.schedule.text import csv
from pipetutor.system import machine
from pipetutor.system.gpus import Gpus
from pipetutor.system.kinds import shown
from pipetutor.train import get_args
from pipetutor.train.joining import make_plan
from pipetutor.weights import export

GOOD = dict(
    ranks=2,
    stages=2,
    steps=1,
    config={"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD"}},
    gpus=Gpus(0),
)
TORCH = {"engine": "torch"}
MINE = csv(build("gpipe", 2, 32)).replace("\n", " / ").removesuffix(" / ")


def batch(train, micro):
    return GOOD["config"] | {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro}


def planned(change):
    asked = GOOD | change
    ranks, devices = asked.pop("ranks"), asked.pop("gpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipetutor.preflight.read_config", lambda config, _: config)  # the whole of it is given
        options = Options(**asked)
        about = describe(options.model, options.dataset)
        return preflight(options, World(ranks, ranks, devices), about)


def launched(options):
    return launch(**options)


def typed(line):
    return make_plan(get_args(shlex.split(line)))


def typed_at_port(port):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", port)
        return typed("")


def planned_in_a_container(change, gigabytes=0.5):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "memory", lambda: machine.Memory(gigabytes * 2**30, 0))
        patch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
        return planned(change)


def exported(paths):
    return export(*paths)


def certified(options):
    return certificate.certify(**options)


def benched(options):
    return bench.bench(**options)


def measured(options):
    return costs.measure(**options)


def optimizer(kind, **params):
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind, **params):
    return {"scheduler": {"type": kind, "params": params}}


def read(config):
    return read_config(config)


UNUSED = [key for key, kind in config._known()["keys"].items() if kind == "unused"]

# The table of wrong inputs: whom they are given to, what is given, and words of the one line that refuses it.
WRONG = [
    # A job, whoever starts it.
    (planned, dict(ranks=3), ["3 ranks", "2 stages", "2 or 4"]),
    (planned, dict(ranks=1), ["1 rank ", "2 stages", "2 ranks"]),
    (planned, dict(ranks=23, stages=23), ["23 stages", "22 layers", "1 to 8"]),
    (planned, dict(ranks=9, stages=9), ["9 stages", "only 8 ", "1 to 8"]),
    (planned, dict(steps=0), ["steps is 0", "at least 1"]),
    (planned, dict(stages=-1), ["stages is -1", "at least 0"]),
    (planned, dict(stages="2"), ["stages is '2'", "whole number"]),
    (planned, dict(model="alexnot"), ["alexnot", "try 'alexnet'"]),
    (planned, dict(model="googlenet"), ["googlenet", "auxiliary heads", "'resnet18'"]),
    (planned, dict(dataset="mnist"), ["try 'synthetic' (there is synthetic, cifar10, sums)"]),
    (planned, dict(dataset="cifar100"), ["cifar100", "try 'cifar10'"]),
    (planned, dict(partition="best"), ["'best'", "parameters, uniform"]),
    (planned, dict(partition="profile", gpus=Gpus(2)), ["CPU", "on GPUs", "--backend gloo"]),
    (planned, dict(partition="profile", backend="nccl", gpus=Gpus(4)), ["CPU", "on GPUs", "--backend gloo"]),
    (planned, dict(partition="profile", config=GOOD["config"] | {"bf16": {"enabled": True}}), ["fp32", "bf16"]),
    (planned, dict(partition="profile", ranks=9, stages=9), ["9 stages", "only 8 ", "1 to 8"]),
    (planned, dict(TORCH, partition="profile", schedule="interleaved_1f1b", chunks=5), ["10 stages", "1 to 8"]),
    (planned, dict(partition="16"), ["2 stages need 3 bounds, not 1", "0,11,22"]),
    (planned, dict(partition="0,16,22", ranks=1, stages=1), ["1 stage needs 2 bounds, not 3", "0,22"]),
    (planned, dict(partition="type:"), ["unknown partition 'type:'", "type:REGEX"]),
    (planned, dict(partition="type:("), ["type:(", "not a regular expression"]),
    (planned, dict(partition="type:lstm"), ["matches 0 layers", "2 stages", "Linear"]),
    (planned, dict(partition="1,16,22"), ["1,16,22", "start at 0", "22", "0,11,22"]),
    (planned, dict(partition="0,16,21"), ["0,16,21", "end at 22", "0,11,22"]),
    (planned, dict(partition="0,0,22"), ["0,0,22", "rise"]),
    (planned, dict(partition="0,22"), ["2 stages need 3 bounds, not 2", "0,11,22"]),
    (planned, dict(partition="0,1,3,22", stages=3, ranks=3), ["stage 1", "1 to 2", "weights", "use 0,"]),
    (
        planned,
        dict(config={"train_batch_size": 250, "train_micro_batch_size_per_gpu": 8}),
        ["250", "248 = ", "x 1 replica; ", "8 x 31"],
    ),
    (planned, dict(config={}), ["train_batch_size", "256"]),
    (planned, dict(config={"train_batch_size": "auto"}), ["'auto'", "whole number"]),
    (
        planned,
        dict(config=GOOD["config"] | {"zero_optimization": {"stage": 2}}),
        ["stage 2", "2 pipeline stages", "stage 1 or 0"],
    ),
    (planned, dict(config={"train_micro_batch_size_per_gpu": 2001}), ["2001", "2000", "at most 2000"]),
    (planned, dict(backend="mpi"), ["mpi", "gloo"]),
    (planned, dict(transforms="jpeg"), ["jpeg", "batched, pil"]),
    (planned, dict(engine="megatron"), ["megatron", "deepspeed, torch"]),
    (planned, dict(schedule="1f2b"), ["1f2b", "try '1f1b'", "zero_bubble"]),
    (planned, dict(schedule="gpipe"), ["1f1b, not gpipe", "engine='torch'"]),
    (planned, dict(stages=0, schedule="gpipe"), ["stages is 0", "no schedule and no chunks", "leave them out"]),
    (planned, dict(stages=0, chunks=2), ["stages is 0", "no schedule and no chunks"]),
    (planned, dict(TORCH, stages=0, schedule="gpipe"), ["stages is 0", "no schedule and no chunks"]),
    (planned, dict(chunks=2), ["chunks is 2", "1f1b gives each rank 1 stage", "--schedule interleaved_1f1b"]),
    (planned, dict(chunks=0), ["chunks is 0", "at least 1"]),
    (planned, dict(TORCH, schedule="interleaved_1f1b"), ["chunks is 1", "at least 2", "chunks=2", "--chunks 2"]),
    (planned, dict(TORCH, schedule="interleaved_1f1b", chunks=5), ["10 stages", "1 to 8"]),
    (
        planned,
        dict(TORCH, schedule="interleaved_1f1b", chunks=2, config=batch(24, 8)),
        ["3 micro-batches", "multiple of 2 ranks", "use 4"],
    ),
    (
        planned,
        dict(TORCH, schedule="zero_bubble", config=batch(8, 8)),
        ["1 micro-batch on 2 ranks", "use 2 or more"],
    ),
    (planned, dict(TORCH, schedule="zero_bubble", recompute=True), ["zero_bubble cannot recompute", "use 1f1b"]),
    (planned, dict(TORCH, schedule="zbv", chunks=3), ["chunks is 3", "zbv gives each rank 2 stages"]),
    (planned, dict(TORCH, schedule="dualpipev", ranks=5, stages=5), ["10 stages", "1 to 8"]),
    (
        planned,
        dict(TORCH, schedule="F0 F1 B0 B1 / F0 B0 F1 B1"),
        ["2 micro-batches", "256", "has 32", "size 16, say"],
    ),
    (planned, dict(TORCH, schedule=MINE.partition("/")[0]), ["for 1 rank, and stages is 2", "stages=1 (-p 1)"]),
    (planned, dict(schedule=MINE), ["1f1b, not a schedule of one's own", "engine='torch'"]),
    (planned, dict(TORCH, schedule=MINE, chunks=2), ["chunks is 2", "your own schedule says itself"]),
    (planned, dict(TORCH, schedule=MINE, stages=0), ["stages is 0", "no schedule"]),
    (planned, dict(TORCH, schedule=MINE, partition="0,5,10,22"), ["2 stages need 3 bounds, not 4"]),
    (
        planned,
        dict(TORCH, schedule=MINE.replace("0B31", "0I31,0W31"), recompute=True),
        ["own cannot recompute"],
    ),
    (planned, dict(TORCH, schedule=MINE.replace("0F3,", "0B3,")), ["rank 0 runs BackwardPass 3 of stage 0 twice"]),
    (planned, dict(TORCH, schedule="/"), ["schedule /", "cannot be read"]),
    (planned, dict(TORCH, schedule=Path("none.csv")), ["schedule: there is no file none.csv"]),
    (planned, dict(TORCH, schedule="gpip"), ["unknown schedule 'gpip', and no file: try 'gpipe'", "F0 F1 B0 B1"]),
    (planned, dict(TORCH, schedule=5), ["schedule is 5", "or your own: a function, a text or a file"]),
    (planned, dict(TORCH, schedule=len), ["len must be a function of ranks, micro_batches and rank"]),
    (planned, dict(stages=0, recompute=True), ["recompute", "stages is 0"]),
    (planned, dict(TORCH, stages=0), ["at least 1 stage", "-p 1", "--engine deepspeed", "baseline"]),
    (planned, dict(TORCH, ranks=4), ["1 replica, not 2", "--engine deepspeed"]),
    (planned, dict(TORCH, eval_every=5), ["does not know eval_every", "--engine deepspeed"]),
    (planned, dict(TORCH, config=batch(64, 8) | {"prescale_gradients": True}), ["does not know prescale_gradients"]),
    (planned, dict(TORCH, config=batch(64, 8) | {"optimizer": {"type": "Lamb"}}), ["Adam, AdamW or SGD", "'Lamb'"]),
    (planned, dict(backend="nccl"), ["2 ranks", "has 0", "gloo"]),
    (planned, dict(backend="nccl", gpus=Gpus(1)), ["2 ranks", "has 1", "at most 1 rank,"]),
    (planned, dict(dropout=1.5), ["1.5", "below 1"]),
    (planned, dict(dropout="high"), ["'high'", "number"]),
    (planned, dict(seed=2**32), ["seed is 4294967296", "at most 4294967295"]),
    (planned, dict(partition=[0, 16, 22]), ["[0, 16, 22]", "must be a string", "0,16,22"]),
    (planned, dict(config={"train_batch_size": 8}), ["no optimizer", "nothing would be learned", "Adam"]),
    (planned, dict(eval_every=0), ["eval_every is 0", "at least 1: 2, say"]),
    (planned, dict(save_every=2.5), ["save_every is 2.5", "whole number"]),
    (planned, dict(resume="/nowhere"), ["/nowhere holds no checkpoint", "save_every=N", "checkpoints/step-"]),
    (planned, dict(resume="a", weights="b.pt"), ["weights b.pt", "checkpoint a", "give one of them"]),
    (planned, dict(fault="die:rank=0,step=2"), ["rank 0, step 2", "steps 1 to 1"]),
    (planned, dict(stages=0, ranks=1, partition="0,16,22"), ["partition 0,16,22", "stages is 0", "leave it out"]),
    (planned, dict(stages=0, ranks=1, partition="profile"), ["partition profile", "stages is 0"]),
    (planned, dict(stages=30), ["30 stages", "22 layers", "1 to 8"]),
    (planned, dict(stages=7), ["2 ranks", "7 stages", "start 7 ranks", "another number of stages (-p): 1, 2"]),
    (planned, dict(stages=10**30), ["stages is 1000", "below 1e+15"]),
    (planned, dict(steps=10**5000), ["steps", "below 1e+15"]),
    (planned, dict(dropout=[1]), ["dropout is [1]", "a number from 0 and below 1"]),
    (planned, dict(dropout=float("nan")), ["dropout is nan"]),
    (planned, dict(dropout=True), ["dropout is True"]),
    (planned, dict(seed=-1), ["seed is -1"]),
    (planned, dict(seed=None), ["seed is None", "1138, say"]),
    (planned, dict(model=None), ["model is None", "'alexnet', say"]),
    (planned, dict(model=["alexnet"]), ["model is ['alexnet']", "'alexnet', say"]),
    (planned, dict(partition=""), ["partition is ''", "profile"]),
    (planned, dict(partition="0,1\n6,22"), ["partition is '0,1\\n6,22'"]),
    (planned, dict(partition=f"0,{9 * '9876543210'},22"), ["partition '0,98", "parameters, uniform"]),
    (planned, dict(partition="type:a{99999999999999999999}"), ["partition 'type:a{", "not a regular expression"]),
    (planned, dict(partition=f"type:{9000 * '('}{9000 * ')'}"), ["partition 'type:", "not a regular expression"]),
    (planned, dict(recompute=1), ["recompute is 1", "True or False"]),
    (planned, dict(resume=5), ["resume is 5", "a path"]),
    (planned, dict(resume=""), ["resume is ''", "a path"]),
    (planned, dict(resume="a" * 5000), ["checkpoint aaa", "File name too long"]),
    (planned, dict(weights=["a.pt"]), ["weights is ['a.pt']", "a path"]),
    (planned, dict(fault=5), ["fault is 5", "a string"]),
    (planned, dict(fault="die:rank=1,rank=0,step=1"), ["die:rank=1,rank=0", "something twice"]),
    (planned, dict(fault="slow:rank=0,step=1,seconds=nan"), ["seconds is nan", "at least 0"]),
    (planned, dict(fault="slow:rank=0,step=1,seconds=inf"), ["seconds is inf", "at most 86400"]),
    (
        planned,
        dict(config=GOOD["config"] | {"zero_optimization": {"stage": 1}}),
        ["stage 1", "not SGD", "untested"],
    ),
    (
        planned,
        dict(config=GOOD["config"] | {"fp16": {"enabled": True}}),
        ["fp16", "GPU", "--dtype fp32"],
    ),
    (
        planned,
        dict(config=GOOD["config"] | {"fp16": {"enabled": True}}, gpus=Gpus(2), save_every=1),
        ["fp16 cannot be saved", "loss scale", "fp32 or bf16"],
    ),
    (
        planned,
        dict(stages=0, config=read_config({"zero_optimization": {"stage": 3}}), save_every=1),
        ["stage 3 cannot be saved", "stage 2, 1 or 0"],
    ),
    # Memory: 57 million parameters, of 4 bytes each.
    (
        planned_in_a_container,
        dict(config=read_config({})),
        ["alexnet and Adam take 0.9 GiB", "has 0.5", "smaller model"],
    ),
    (
        planned_in_a_container,
        dict(ranks=4, config=batch(16, 8)),
        ["alexnet and SGD in 2 replicas take 0.9 GiB", "container", "has 0.5 GiB", "fewer replicas"],
    ),
    # A cell.
    (launched, dict(stages="2"), ["stages is '2'"]),
    (launched, dict(replicas=0), ["replicas is 0", "at least 1"]),
    (launched, dict(replicas=None), ["replicas is None"]),
    (launched, dict(trace="yes"), ["trace is 'yes', but must be True or False"]),
    (launched, dict(recompute="yes"), ["recompute is 'yes', but must be True or False"]),
    (launched, dict(deadline=None), ["deadline is None", "above 0"]),
    (launched, dict(deadline=True), ["deadline is True"]),
    (launched, dict(deadline=0), ["deadline is 0", "above 0: 300, say"]),
    (launched, dict(deadline=float("nan")), ["deadline is nan"]),
    (launched, dict(deadline=float("inf")), ["deadline is inf"]),
    (launched, dict(deadline=[10]), ["deadline is [10]"]),
    (launched, dict(data_dir=None), ["data_dir is None", "a path"]),
    (launched, dict(data_dir="/etc/passwd"), ["/etc/passwd: File exists; give another data directory"]),
    (launched, dict(data_dir="a" * 5000), ["synthetic data to aaa", "File name too long", "--data-dir"]),
    (launched, dict(runs_dir=None), ["runs_dir is None", "a path"]),
    (launched, dict(runs_dir=""), ["runs_dir is ''", "a path"]),
    (launched, dict(runs_dir="runs\nelsewhere"), ["runs_dir is 'runs\\nelsewhere'"]),
    (launched, dict(transforms=None), ["transforms None", "batched, pil"]),
    (launched, dict(engine=5), ["engine 5", "deepspeed, torch"]),
    (launched, dict(dtype="int8"), ["unknown dtype 'int8'", "fp32, bf16"]),
    (launched, dict(dtype=True), ["unknown dtype True", "fp32, bf16"]),
    (launched, dict(config=5), ["config is 5", "a path"]),
    (launched, dict(config={"fp16": {"enabled": True}}, backend="gloo"), ["fp16", "GPU"]),
    (launched, dict(weights="nowhere.pt"), ["weights nowhere.pt", "No such file"]),
    # A terminal.
    (typed, "--steps many", ["--steps", "'many'", "--help"]),
    (typed, "-p two", ["-p", "'two'"]),
    (typed, "--stepz=5", ["--stepz=5; did you mean --steps?"]),
    (typed, "--step 5", ["unrecognized arguments: --step 5; did you mean --steps?"]),
    (typed, "--run-dir ''", ["run_dir is ''", "a path"]),
    (typed, "--weights nowhere.pt", ["weights nowhere.pt: No such file"]),
    (typed, "--weights ''", ["weights is ''", "a path"]),
    (typed, "'--no\nsuch' 5", ["--no such"]),
    (typed, "--seed -1", ["seed is -1"]),
    (typed, "--dropout much", ["--dropout", "'much'"]),
    (typed, "--dropout nan", ["dropout is nan"]),
    (typed, "--trace yes", ["yes"]),
    (typed, "--recompute=yes", ["--recompute", "'yes'"]),
    (typed, "--chunks x", ["--chunks", "'x'"]),
    (typed, "--eval-every 0", ["eval_every is 0"]),
    (typed, "--save-every never", ["--save-every", "'never'"]),
    (typed, "--backend mpi", ["backend 'mpi'", "gloo, nccl"]),
    (typed, "--dtype int8", ["dtype 'int8'", "fp32, bf16"]),
    (typed, "--model alexnot", ["'alexnot'", "try 'alexnet'"]),
    (typed, "--dataset mnist", ["dataset 'mnist'", "synthetic, cifar10"]),
    (typed, "-p 0 --partition 0,16,22", ["partition 0,16,22", "stages is 0"]),
    (typed, "-p 30", ["30 stages", "1 to 8"]),
    (typed, "--deepspeed_config nowhere.json", ["nowhere.json", "No such file"]),
    (typed, "--fault stall", ["fault 'stall'", "stall:rank=1,step=3"]),
    (typed, "--data-dir ''", ["data_dir is ''", "a path"]),
    (typed, "--resume nowhere", ["nowhere holds no checkpoint", "--save-every N"]),
    (typed_at_port, "99999", ["--master_port is 99999", "at most 65535: 29501, say"]),
    # A config: names,
    (read, {"train_batchsize": 8}, ["train_batchsize", "did you mean 'train_batch_size'"]),
    (read, {5: 8}, ["no config key 5"]),
    (read, {"amp": {"enabled": True}}, ["no config key 'amp'"]),
    (read, {"gradient_clipping": "auto"}, ["gradient_clipping is 'auto'", "a number of at least 0"]),
    (read, {"bf16": {"enabled": "auto"}}, ["bf16 enabled is 'auto'", "True or False"]),
    (
        read,
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
        ["AdamW lr is 'auto'", "a number of at least 0"],
    ),
    (read, {"zero_optimization": {"stagee": 1}}, ["zero_optimization has no key 'stagee'", "'stage'"]),
    (read, {"bf16": {"enable": True}}, ["bf16 has no key 'enable'", "'enabled'"]),
    (read, {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, ["bfloat16", "another name of bf16"]),
    (read, {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16 and fp16", "one of them"]),
    (read, {"bfloat16": {"enabled": True}, "torch_autocast": {"enabled": True}}, ["bf16 and torch_autocast"]),
    (read, {"torch_autocast": {"enabled": True, "dtype": "int8"}}, ["torch_autocast dtype 'int8'", "bfloat16"]),
    (read, {"pipeline": {"seed_layer": True}}, ["pipeline has no key 'seed_layer'", "'seed_layers'"]),
    (read, {"pipeline": {"stages": "4"}}, ["pipeline stages is '4'", "must be left out", "-p, --partition"]),
    (read, {"pipeline": {"partition": "nonsense"}}, ["pipeline partition is 'nonsense'", "must be left out"]),
    (read, {"pipeline": {"seed_layers": True}}, ["seed_layers is True", "left out: runs here do without it"]),
    (read, {"zero_optimization": {"leaf_module": {}}}, ["zero_optimization leaf_module", "left out"]),
    (read, {"zero_optimization": {"offload_optimizer": {"device": "floppy"}}}, ["device 'floppy'", "none, cpu"]),
    *((read, {section: {"enabled": "x"}}, [f"{section} is {{'enabled': 'x'}}", "left out"]) for section in UNUSED),
    (read, {"tensorboard": {"enabled": "perhaps"}}, ["tensorboard enabled is 'perhaps'", "True or False"]),
    (read, {"tensorboard": {"enabled": True, "foo": 3}}, ["tensorboard has no key 'foo'"]),
    (read, {"wandb": {"enabled": True}}, ["wandb is enabled", "pip install wandb"]),
    (read, {"comms_logger": {"prof_ops": 5}}, ["comms_logger prof_ops is 5", "a list"]),
    (read, {"csv_monitor": {"output_path": 5}}, ["csv_monitor output_path is 5", "a string"]),
    (read, {"data_types": {"grad_accum_dtype": "int8"}}, ["grad_accum_dtype 'int8'", "fp32, fp16, bf16"]),
    (read, {"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype is 'bf16'", "computes in fp32"]),
    (
        read,
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        ["grad_accum_dtype is 'fp32'", "computes in bf16"],
    ),
    (read, {"data_types": {"param_dtype": "fp16"}}, ["param_dtype is 'fp16'", "computes in fp32"]),
    (read, {"activation_checkpointing": {"cpu": True}}, ["activation_checkpointing has no key 'cpu'"]),
    (read, optimizer("Lambb"), ["optimizer type 'Lambb'", "SGD"]),
    (read, optimizer("Lamb"), ["optimizer type 'Lamb'", "SGD"]),
    (read, optimizer("SGD", lrr=1), ["optimizer SGD has no key 'lrr'", "did you mean 'lr'"]),
    (read, optimizer("SGD", betas=[0.9, 0.999]), ["optimizer SGD has no key 'betas'"]),
    (read, {"optimizer": {"type": None}}, ["optimizer type is None"]),
    (read, scheduler("WarmUp"), ["scheduler type 'WarmUp'", "try 'WarmupLR'"]),
    (read, scheduler("WarmupLR", warmup_steps=1), ["scheduler WarmupLR has no key", "'warmup_num_steps'"]),
    (read, scheduler("StepLR"), ["scheduler StepLR needs step_size", "whole number"]),
    (read, {"scheduler": {"params": {}}}, ["scheduler needs type"]),
    # and values.
    (read, {"train_batch_size": None}, ["train_batch_size is None", "whole number"]),
    (read, {"train_batch_size": "256"}, ["train_batch_size is '256'"]),
    (read, {"train_batch_size": 2.0}, ["train_batch_size is 2.0"]),
    (read, {"train_batch_size": True}, ["train_batch_size is True"]),
    (read, {"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps is 0"]),
    (read, {"gradient_clipping": "1.0"}, ["gradient_clipping is '1.0'", "a number"]),
    (read, {"gradient_clipping": -1}, ["gradient_clipping is -1", "1.0, say"]),
    (read, {"optimizer": "adam"}, ["optimizer is 'adam'", 'as in {"type": "Adam"']),
    (read, {"optimizer": {"params": [1]}}, ["optimizer params is [1]"]),
    (read, optimizer("SGD", lr="0.1"), ["optimizer SGD lr is '0.1'", "a number"]),
    (read, optimizer("SGD", lr=-0.1), ["optimizer SGD lr is -0.1", "at least 0"]),
    (read, optimizer("SGD", lr=float("nan")), ["optimizer SGD lr is nan"]),
    (read, optimizer("SGD", lr=0.1, nesterov=True), ["nesterov needs a momentum"]),
    (
        read,
        optimizer("SGD", momentum=0.9, nesterov=True, dampening=0.1),
        ["nesterov goes without dampening", "leave one"],
    ),
    (read, optimizer("Adam", betas=0.9), ["optimizer Adam betas is 0.9", "[0.9, 0.999]"]),
    (read, optimizer("Adam", betas=[0.9, 1]), ["optimizer Adam betas is [0.9, 1]"]),
    (read, scheduler("WarmupLR", warmup_num_steps=0), ["WarmupLR warmup_num_steps is 0"]),
    (read, scheduler("WarmupLR", warmup_type="sine"), ["warmup_type 'sine'", "log, linear"]),
    (read, {"zero_optimization": {"stage": 4}}, ["zero_optimization stage 4", "there is 0, 1, 2, 3"]),
    (read, {"zero_optimization": {"stage": "1"}}, ["zero_optimization stage '1'", "there is 0, 1, 2, 3"]),
    (read, {"zero_optimization": {"stage": True}}, ["zero_optimization stage True"]),
    (read, {"zero_optimization": {"reduce_bucket_size": "5e8"}}, ["reduce_bucket_size is '5e8'"]),
    (read, {"zero_optimization": 1}, ["zero_optimization is 1", 'as in {"stage": 1}']),
    (read, {"fp16": {"enabled": "true"}}, ["fp16 enabled is 'true'", "True or False"]),
    (read, {"bf16": True}, ["bf16 is True", 'as in {"enabled": true}']),
    (read, {"wall_clock_breakdown": "no"}, ["wall_clock_breakdown is 'no'"]),
    (read, {"wandb": {"project": {1, 2}}}, ["wandb project is {1, 2}", "a string"]),
    (read, {"comet": {"samples_log_interval": float("nan")}}, ["comet samples_log_interval is nan"]),
    (read, "nowhere.json", ["nowhere.json", "No such file"]),
    (read, "", ["config is ''", "a path"]),
    (read, [1], ["config is [1]", "a dict or a path"]),
    # The other commands.
    (certified, dict(models=[]), ["models is []", "a string in one line"]),
    (certified, dict(models="vgg"), ["models is 'vgg'", "a list"]),
    (certified, dict(models=["resnet"]), ["unknown model 'resnet'", "79 are known"]),
    (certified, dict(stages=2), ["stages is 2", "a list"]),
    (certified, dict(stages=[5]), ["stages is [5]", "at most 4"]),
    (certified, dict(stages=["1"]), ["stages is ['1']", "whole number"]),
    (certified, dict(micro_batches=None), ["micro_batches is None"]),
    (certified, dict(replicas=[True]), ["replicas is [True]"]),
    (certified, dict(runs_dir=5), ["runs_dir is 5", "a path"]),
    (benched, dict(rivals="reference"), ["rivals is 'reference'", "a list"]),
    (benched, dict(rivals=["jax"]), ["rivals is ['jax']", "reference, pipeline"]),
    (benched, dict(steps="10"), ["steps is '10'", "at least 3"]),
    (benched, dict(repetitions=None), ["repetitions is None"]),
    (benched, dict(train_batch="128"), ["train_batch_size is '128'"]),
    (benched, dict(micro_batch=[8]), ["train_micro_batch_size_per_gpu is [8]"]),
    (benched, dict(more="yes"), ["more is 'yes'", "True or False"]),
    (benched, dict(runs_dir=None), ["runs_dir is None"]),
    (measured, dict(model=None), ["model is None"]),
    (measured, dict(micro_batch="8"), ["micro_batch is '8'"]),
    (measured, dict(ranks=0.5), ["ranks is 0.5"]),
    (measured, dict(dropout="none"), ["dropout is 'none'"]),
    (measured, dict(runs_dir=True), ["runs_dir is True"]),
    (exported, (5, "a.pt"), ["path is 5", "a path"]),
    (exported, ("runs", ""), ["file is ''", "a path"]),
    (exported, ("nowhere", "a.pt"), ["nowhere holds no checkpoint"]),
    (exported, ("a" * 5000, "a.pt"), ["checkpoint aaa", "File name too long"]),
]


@pytest.fixture
def nothing_starts(runs, monkeypatch):
    """A job of two ranks on this machine's CPU, in an empty directory, where no process can be started."""

    def start(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(subprocess.Popen, "__init__", start)


@pytest.mark.parametrize("call, given, words", WRONG, ids=[f"{call.__name__}-{words[0]}" for call, _, words in WRONG])
def test_wrong_input_is_refused_in_one_line(call, given, words, nothing_starts, runs):
    with pytest.raises(ValueError) as caught:
        call(given)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(runs.parent.iterdir()), "nothing is made"


@pytest.mark.parametrize(
    "change",
    [
        dict(partition="0,1,22"),
        dict(dropout=0),
        dict(seed=2**32 - 1),
        dict(steps=10**12),
        dict(backend="gloo", resume=None, fault="slow:rank=1,step=1,seconds=0"),
        dict(stages=0, ranks=3, config=batch(24, 8)),
        dict(config=read_config({"zero_optimization": {"stage": 1}}), save_every=1),
        dict(config=read_config({}, "bf16"), save_every=1),
        dict(TORCH, config=batch(64, 8) | {"gradient_clipping": 1.0}),
        dict(config=batch(64, 8) | {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}),
        dict(gpus=Gpus(2), config=read_config({"fp16": {"enabled": True}})),
        dict(config=read_config({"csv_monitor": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}})),
        dict(
            config=read_config(
                {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, "bf16"
            )
        ),
        dict(config=read_config(optimizer("SGD", momentum=0.9, nesterov=True))),
        dict(config=read_config(Path(__file__).parents[1] / "configs" / "synthetic_90.json")),
    ],
)
def test_what_is_near_the_wrong_inputs_is_accepted(change):
    """The table's controls."""
    planned(change)


def test_what_fits_into_memory_is_accepted():
    planned_in_a_container({})  # SGD keeps nothing
    zero = read_config({"zero_optimization": {"stage": 1}})
    planned_in_a_container(dict(ranks=4, config=zero), 1.1)  # ZeRO keeps the moments of one replica
    with pytest.raises(ValueError, match=r"take 1.1 GiB"):
        planned_in_a_container(dict(ranks=4, config=zero), 1.0)
    with pytest.raises(ValueError, match=r"take 1.7 GiB"):
        planned_in_a_container(dict(ranks=4, config=read_config({})), 1.1)


COMMANDS = {
    "certify": "pipetutor.certify.certificate",
    "bench": "benchmarks.bench",
    "costs": "pipetutor.costs.measuring",
    "weights": "pipetutor.weights",
}


@pytest.mark.parametrize(
    "module, line, words",
    [
        ("certify", "--stages 1,x", "--stages: '1,x' must be whole numbers and commas"),
        ("certify", "--stages 9", "stages is [9]"),
        ("bench", "--steps many", "--steps: invalid int value: 'many'"),
        ("bench", "--rivals ''", "rivals is ['']"),
        ("costs", "--ranks x", "--ranks: invalid int value: 'x'"),
        ("costs", "--dropout 2", "dropout is 2.0"),
        ("weights", "", "required: path, file"),
        ("weights", "nowhere a.pt", "nowhere holds no checkpoint"),
    ],
)
def test_a_command_refuses_in_one_line_with_status_2(module, line, words, nothing_starts, runs, monkeypatch, capsys):
    command = importlib.import_module(COMMANDS[module]).main
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(line)])
    with pytest.raises(SystemExit) as ended:
        command()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and len(said.splitlines()) == 1, said
    assert not list(runs.parent.iterdir())


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(-3, 40),
    st.sampled_from([10**18, 2**63, -(10**30), 10**5000, float("nan"), float("inf"), 1e308]),
    st.text(max_size=8),
    st.sampled_from(["", "a" * 5000, "a\0b", "0,16,22", "type:(", "2", "\ud800", "/proc/none/there", "fp32", "gloo"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([Path("x"), Path(""), b"bytes", object(), {1}, (0.9, 0.999), print, SimpleNamespace(a=1)]),
)
SEEN = settings(
    deadline=None, max_examples=1000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def names(error, name, value):
    """Say whether an error names an option, or has the text that was given for it."""
    return name in str(error) or (value if isinstance(value, str) else shown(value))[:20] in str(error)


class Started(Exception):
    """All was accepted, and the run would be made now."""


def parameters(function):
    return sorted(inspect.signature(function).parameters)


@SEEN
@given(st.dictionaries(st.sampled_from(parameters(launch)), ANYTHING, min_size=1, max_size=2))
def test_launch_starts_a_run_or_says_in_one_line_why_not(nothing_starts, runs, options):
    def start(*_):
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "create", start)
        patch.setattr(fetch, "prepare", lambda *_: None)
        patch.setattr(machine, "bf16_is_native", lambda: True)
        try:
            launch(**options)
        except Started:
            pass
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            assert any(names(error, *option) for option in options.items()), error
    assert not list(runs.parent.iterdir())


def test_a_schedule_is_read_below_a_path_with_blanks_and_commas(tmp_path):
    path = tmp_path / "of mine, too" / "schedule.csv"
    path.parent.mkdir()
    path.write_text(MINE)
    for way in (path, str(path), MINE):
        assert planned(dict(TORCH, schedule=way)).streams == build("gpipe", 2, 32)


@SEEN
@given(st.dictionaries(st.sampled_from(parameters(Options)), ANYTHING, min_size=1, max_size=2))
def test_what_preflight_accepts_is_consistent(options):
    options = {name: value for name, value in options.items() if name != "config"}
    try:
        plan = planned(options)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    ranks = options.get("ranks", 2)
    assert plan.batch.train == plan.batch.micro * plan.batch.accumulation * plan.batch.replicas
    assert plan.batch.replicas == (ranks // plan.options.stages if plan.options.stages else ranks)
    assert len(plan.bounds) in (0, len(plan.placement) + 1 if plan.options.stages else 0)
    json.dumps(plan.record())


def keys_of(kinds, before=()):
    """Every key of a table of kinds, with the way to it."""
    for key, kind in kinds.items():
        yield (*before, key)
        if isinstance(kind, dict):
            yield from keys_of(kind, (*before, key))


KNOWN = config._known()
KEYS = list(keys_of(KNOWN["keys"]))
PARAMS = [
    (part, name, key) for part in ("optimizer", "scheduler") for name, keys in KNOWN[part].items() for key in keys
]
NEEDED = {
    "total_num_steps": 10,
    "gamma": 0.5,
    "cycle_min_lr": 0.1,
    "cycle_max_lr": 0.2,
    "step_size": 2,
    "milestones": [2],
    "T_max": 5,
}


@SEEN
@given(st.sampled_from(KEYS), ANYTHING)
def test_deepspeed_reads_what_is_accepted_of_a_config(monkeypatch, way, value):
    """The params of an optimizer and a scheduler have a test of their own: they stay empty here."""
    kind = KNOWN["keys"]
    for key in way:
        kind = kind[key]
    value = {} if str(kind).startswith("object") and isinstance(value, dict) else value
    given = value
    for key in reversed(way):
        given = {key: given}
    try:
        whole = read_config(given)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and any(key in str(error) for key in way), error
        return
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    try:
        planned({"config": whole, "gpus": Gpus(2)})
    except ValueError as error:
        assert way[0] in str(error) or "batch" in way[0], error
        return
    DeepSpeedConfig(whole)


@SEEN
@given(st.sampled_from(PARAMS), ANYTHING)
def test_torch_and_deepspeed_take_what_is_accepted_of_an_optimizer_and_a_scheduler(way, value):
    part, kind, key = way
    params = {name: NEEDED[name] for name, needed in KNOWN[part][kind].items() if str(needed).endswith("!")}
    try:
        whole = read_config({part: {"type": kind.lower(), "params": params | {key: value}}})
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and key in str(error), error
        return
    assert whole[part]["type"] == kind
    weight = torch.nn.Parameter(torch.ones(2))
    built = dict(whole["optimizer"]["params"])
    for ours in ("torch_adam", "adam_w_mode"):
        built.pop(ours, None)
    found = getattr(torch.optim, whole["optimizer"]["type"])([weight], **built)
    if part == "scheduler":
        module = lr_schedules if hasattr(lr_schedules, kind) else torch.optim.lr_scheduler
        schedule = getattr(module, kind)(found, **whole[part]["params"])
    for _ in range(3):
        weight.grad = torch.ones(2)
        found.step()
        if part == "scheduler":
            schedule.step()


def test_a_measured_cut_is_left_open():
    for good in ({}, {"gpus": Gpus(2), "backend": "gloo"}, {"gpus": Gpus(1)}):
        assert planned({"partition": "profile"} | good).bounds == []


def test_zero_2_is_fine_without_a_pipeline():
    planned({"stages": 0, "config": read_config({"zero_optimization": {"stage": 2}})})


def test_too_few_gpus_choose_the_cpu_and_say_so():
    plan = planned({"gpus": Gpus(1)})
    assert plan.backend == "gloo" and "1 GPU" in plan.notice and "2 ranks" in plan.notice
    assert planned({"gpus": Gpus(2)}).backend == "nccl"


@pytest.mark.parametrize(
    "backend, given, fits",
    [
        ("gloo", "lo", True),
        ("gloo", "", True),
        ("gloo", "lo,eth77", False),
        ("nccl", "eth77,lo", True),
        ("nccl", "l", True),
        ("nccl", "=l", False),
        ("nccl", "=lo", True),
        ("nccl", "^eth77", True),
        ("nccl", "eth77", False),
    ],
)
def test_a_network_interface_that_is_not_there_is_named(backend, given, fits, monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv(f"{backend.upper()}_SOCKET_IFNAME", given)
    change = {"backend": backend, "gpus": Gpus(2)}
    if fits:
        assert planned(change).backend == backend
        return
    with pytest.raises(
        ValueError, match=f"{given}, but this host has no such network interface: use one of lo, eth0"
    ):
        planned(change)


HEAVY = ("torch", "deepspeed", "torchvision", "numpy", "matplotlib", "IPython", "pydantic")


def test_launch_refuses_without_loading_torch(runs):
    """So an answer takes a third of a second: none of the modules that take longer is loaded for it."""
    script = (
        "import sys; from pipetutor import launch\n"
        "try: launch(stages=9)\n"
        f"except ValueError as error: print(len(sys.modules), set({HEAVY}) & set(sys.modules), error)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    modules, loaded, message = out.split(" ", 2)
    assert loaded == "set()" and "only 8" in message
    assert int(modules) < 600, "torch alone brings a thousand"
    assert not runs.exists()


def test_numbers_of_16_bits_on_a_processor_without_instructions_for_them_are_said_to_be_slow(monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "bf16_is_native", lambda: bool(asked.append(1)))
    assert planned({}).notice == "" and not asked, "an fp32 run does not load torch to ask"
    for slow in (dict(dtype="bf16"), dict(config={"bfloat16": {"enabled": True}})):
        notice = planned(dict(config=read_config(**{"config": None} | slow))).notice
        assert notice.startswith("bf16: ") and "times as long as in fp32" in notice and "dtype='fp32'" in notice
    notice = planned(dict(gpus=Gpus(1), config=read_config({"torch_autocast": {"enabled": True}}))).notice
    assert [line.split(":")[0] for line in notice.splitlines()][1] == "torch_autocast"
    assert planned(dict(gpus=Gpus(2), config=read_config(None, "bf16"))).notice == "", "a GPU has them"
    monkeypatch.setattr(machine, "bf16_is_native", lambda: True)
    assert planned(dict(config=read_config(None, "bf16"))).notice == ""


@pytest.mark.parametrize(
    "mkldnn, onednn, avx512_bf16, processor, native",
    [
        (True, True, True, "x86_64", True),
        (True, True, False, "x86_64", False),  # AVX-512 without bf16: oneDNN takes twice as long as for fp32
        (True, False, False, "x86_64", False),
        (True, True, False, "aarch64", True),
        (False, None, False, "aarch64", False),
    ],
)
def test_bf16_is_native_where_there_are_instructions(monkeypatch, mkldnn, onednn, avx512_bf16, processor, native):
    asked = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: onednn) if mkldnn else None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    monkeypatch.setattr(torch.ops, "mkldnn", asked, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    assert machine.bf16_is_native() is native


@pytest.mark.parametrize("name", ["synthetic", "sums"])
def test_what_is_known_of_a_data_set_is_so(name):
    from pipetutor.data import loader

    known = DATASETS[name]
    train, test = (loader.load(name, part, -1, fetch.DATA_DIR) for part in (True, False))
    inputs, _ = loader.example(train, 2)
    assert (len(train), len(test)) == (known.train, known.test)
    assert (tuple(inputs.shape[1:]), str(inputs.dtype)) == (known.shape, f"torch.{known.dtype}")
