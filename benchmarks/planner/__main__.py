"""`python -m benchmarks.planner --fit FILE --score FILE [--json-only]`."""

from __future__ import annotations

from benchmarks.planner.run import main

if __name__ == "__main__":
    main()
