"""`python -m benchmarks.compression [--steps 200] [--batch 4] [--only NAME ...]`."""

from __future__ import annotations

from benchmarks.compression.run import main

if __name__ == "__main__":
    main()
