"""`python -m benchmarks.asynchronous`."""

from benchmarks.asynchronous.run import main

main()
