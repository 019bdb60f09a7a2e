"""Pipetutor: learn pipeline parallelism by running it.

    from pipetutor import launch
    run = launch(stages=2, steps=20)

Importing this package loads neither torch nor DeepSpeed.
"""

import os
import sys

from pipetutor.machine import prepare_rank

# A rank: DeepSpeed's launcher started this process. A notebook that runs below torchrun has a LOCAL_RANK alone.
if "LOCAL_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
    prepare_rank(os.environ, sys.argv)

from pipetutor.launch import RunFailed, launch
from pipetutor.records import Run

__all__ = ["Run", "RunFailed", "launch"]
