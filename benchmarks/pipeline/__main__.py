"""`python -m benchmarks.pipeline [--quick]`."""

from __future__ import annotations

from benchmarks.pipeline.run import main

if __name__ == "__main__":
    main()
