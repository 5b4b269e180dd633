"""`python -m benchmarks.data [--quick]`."""

from __future__ import annotations

from benchmarks.data.run import main

if __name__ == "__main__":
    main()
