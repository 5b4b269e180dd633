"""`python -m benchmarks.context [--quick]`."""

from __future__ import annotations

from benchmarks.context.run import main

if __name__ == "__main__":
    main()
