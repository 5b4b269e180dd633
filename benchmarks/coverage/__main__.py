"""`python -m benchmarks.coverage [--quick] [--only NAMES] [--part i/n]`."""

from __future__ import annotations

from benchmarks.coverage.run import main

if __name__ == "__main__":
    main()
