"""`python -m benchmarks.schedules.searched [--share X]`."""

from __future__ import annotations

from benchmarks.schedules.searched.run import main

if __name__ == "__main__":
    main()
