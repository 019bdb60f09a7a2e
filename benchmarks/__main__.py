"""``python -m benchmarks``: the bench; ``--help`` says what it takes."""

from benchmarks.bench import main

main()
