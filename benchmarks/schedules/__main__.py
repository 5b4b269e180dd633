"""`python -m benchmarks.schedules [--quick] [--share X] [--only PART ...]`."""

from __future__ import annotations

from benchmarks.schedules.run import main

if __name__ == "__main__":
    main()
