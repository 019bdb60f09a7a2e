"""What one rank runs: the data-parallel baseline and the pipeline, over the same data, model and loss.

    deepspeed --num_gpus 2 --module pipetutor.train -p 2 --steps 20

``trainers`` reads beside ``training/pipeline_parallelism/train.py`` of DeepSpeedExamples; ``joining`` goes from a
command line to the plan of the job, and ``job`` through it.
"""

from pipetutor.core.layers import join_layers
from pipetutor.data.loader import cifar_trainset
from pipetutor.train.job import main
from pipetutor.train.trainers import get_args, train_base, train_pipe

__all__ = ["cifar_trainset", "get_args", "join_layers", "main", "train_base", "train_pipe"]
