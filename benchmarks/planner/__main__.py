"""`python -m benchmarks.planner --fit FILE --score FILE [--json-only]`, or `--local`: on this machine."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    name = "local" if "--local" in sys.argv[1:] else "run"
    importlib.import_module(f"benchmarks.planner.{name}").main()
