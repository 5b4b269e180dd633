"""`python -m benchmarks.generation [--quick]`."""

from __future__ import annotations

from benchmarks.generation.run import main

if __name__ == "__main__":
    main()
