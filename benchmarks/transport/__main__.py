"""`python -m benchmarks.transport [--quick]`."""

from __future__ import annotations

from benchmarks.transport.run import main

if __name__ == "__main__":
    main()
