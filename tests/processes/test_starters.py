"""Other starters than DeepSpeed's launcher: what they tell a rank, as it was recorded, and what becomes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, SMALL_SGD, Run

from pipetutor.core.config import read_config
from pipetutor.core.records import write_json
from pipetutor.processes.starters import command, is_rank, take_over

STANDALONE = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "40363",
    "OMP_NUM_THREADS": "1",
}
STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "first,second",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
BATCH = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "3"}
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "env, told",
    [
        (STANDALONE, "1 1 2 2 0 1 localhost 22363"),
        (STANDALONE | {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "3"}, "1 1 3 2 1 2 localhost 22363"),
        (STEP, "2 0 3 1 1 2 first 20010"),
        (STEP | {"SLURM_JOB_ID": "2"}, "2 0 3 1 1 2 first 20020"),
        (STEP | {"SLURM_STEP_ID": "1"}, "2 0 3 1 1 2 first 20011"),
        (STEP | {"SLURM_JOB_ID": "4005017"}, "2 0 3 1 1 2 first 27670"),
        (STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "7"}, "2 0 3 1 1 2 10.0.0.7 7"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, "2 0 3 1 3 4 first 20010"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4,2(x2)", "SLURM_NODEID": "0"}, "2 0 3 4 0 3 first 20010"),
        (STEP | {"SLURM_STEP_NODELIST": "gpu[07-09,12],login"}, "2 0 3 1 1 2 gpu07 20010"),
        (STEP | {"SLURM_STEP_NODELIST": "r[0-1]n[12,20]-ib"}, "2 0 3 1 1 2 r0n12-ib 20010"),
        (STEP | {"SLURM_STEP_NODELIST": "login,gpu[07-09]"}, "2 0 3 1 1 2 login 20010"),
        (STEP | STANDALONE, "1 1 2 2 0 1 localhost 22363"),
    ],
)
def test_a_rank_is_told_what_deepspeeds_launcher_would_say(env, told):
    env = dict(env)
    take_over(env)
    assert " ".join(env[name] for name in NAMES) == told


@pytest.mark.parametrize("env", [BATCH, {"RANK": "0", "LOCAL_RANK": "0"}, STANDALONE | {"LOCAL_SIZE": "8"}])
def test_what_no_starter_says_is_left_as_it_is(env):
    after = dict(env)
    take_over(after)
    assert after == env


@pytest.mark.parametrize("given, threads", [({}, "4"), ({"OMP_NUM_THREADS": "2"}, "2")])
def test_a_task_of_slurm_has_its_cores_to_itself(given, threads):
    env = STEP | {"SLURM_CPUS_PER_TASK": "4"} | given
    take_over(env)
    assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(
    "words, rank",
    [
        ("python -u -m pipetutor.train -p 2", True),
        ("python -m ipykernel_launcher -f pipetutor.train", False),
        ("python -m deepspeed.launcher.launch --module pipetutor.train -p 2", False),
    ],
)
def test_only_a_rank_takes_over(words, rank):
    assert is_rank(words.split()) == rank


@pytest.mark.parametrize(
    "env, words",
    [
        ({}, "deepspeed --num_gpus 3 --module pipetutor.train"),
        (BATCH, "srun --ntasks 3 python -m pipetutor.train"),
        (STANDALONE, "torchrun --nproc-per-node 2 -m pipetutor.train"),
    ],
)
def test_who_started_python_alone_is_told_what_to_type(env, words):
    assert command(env, 3) == words


def test_torchrun_starts_ranks(runs):
    write_json(Path("small.json"), read_config(SMALL_SGD))
    train = ["-m", "pipetutor.train", "-p", "2", "-s", "2", "--deepspeed_config", "small.json", "--run-dir", "runs"]
    train += ["--model", "gpt:layers=1,width=32,heads=1", "--dataset", "sums", "--data-dir", f"{runs.parent}/data"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([*torchrun, *train], env=env, capture_output=True, text=True, timeout=HANGS)
    assert not done.returncode, done.stderr
    assert len(Run.load(runs).losses) == 2
