"""`python -m benchmarks.relayout`: see `run`."""

from benchmarks.relayout.run import main

main()
