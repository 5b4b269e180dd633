"""`python -m benchmarks.backends [--quick]`."""

from __future__ import annotations

from benchmarks.backends.run import main

if __name__ == "__main__":
    main()
