"""``python -m pipetutor.train``: one rank, as a launcher starts it."""

import atexit
import os

from pipetutor.train.job import main

main()
atexit._run_exitfuncs()
os._exit(0)  # taking the engine and every module apart takes half a second, and the memory goes in any case
