"""Where and when a figure was measured: command, machine, versions, commit, date. Knows no benchmark."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["circumstances"]


def circumstances(benchmark: str) -> dict[str, Any]:
    """What stands beside every published figure; `benchmark` is the module that was run."""
    cores = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "-m", benchmark, *sys.argv[1:]]),
        "machine": f"{len(cores)} x {cores[0].partition(': ')[2] if cores else platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
