"""`python -m benchmarks.recompute [--quick]`."""

from __future__ import annotations

from benchmarks.recompute.run import main

if __name__ == "__main__":
    main()
