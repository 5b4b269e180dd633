"""The command."""

from benchmarks.fuzz.run import main

main()
