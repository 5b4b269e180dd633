"""`python -m benchmarks.memory [--quick]`."""

from __future__ import annotations

from benchmarks.memory.run import main

if __name__ == "__main__":
    main()
