"""Pipetutor: learn pipeline parallelism by running it.

    from pipetutor import launch
    run = launch(stages=2, steps=20)

Importing this package loads neither torch nor DeepSpeed.
"""

import os
import sys

from pipetutor.processes.environment import prepare_rank
from pipetutor.processes.starters import is_rank, take_over

if not __debug__:
    raise ImportError(
        "Python was started with -O or PYTHONOPTIMIZE, and leaves out every assert: the checks of the exercises "
        "would accept any answer. Start it, or the notebook's kernel, without"
    )
# Where threads are bound to cores, the first thread of each process, and so of each rank, is bound to the same core.
os.environ["OMP_PROC_BIND"] = "false"
# A rank: a launcher started this process. A notebook that runs below torchrun has a LOCAL_RANK alone.
if is_rank(sys.orig_argv):
    take_over(os.environ)
if "LOCAL_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
    prepare_rank(os.environ, sys.argv)

from pipetutor.core.records import Run
from pipetutor.launcher import RunFailed, launch

__all__ = ["Run", "RunFailed", "launch"]
