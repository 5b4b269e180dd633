"""`python -m benchmarks.precision [--quick]`."""

from __future__ import annotations

from benchmarks.precision.run import main

if __name__ == "__main__":
    main()
