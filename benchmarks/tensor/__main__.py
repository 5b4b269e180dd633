"""`python -m benchmarks.tensor [--quick]`."""

from __future__ import annotations

from benchmarks.tensor.run import main

if __name__ == "__main__":
    main()
