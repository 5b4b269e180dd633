"""Starting tests' processes with mpirun, where there is one and mpi4py beside it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

__all__ = ["MISSING", "mpirun", "needs_mpi"]

MISSING = [name for name in ("mpirun",) if shutil.which(name) is None]
MISSING += [name for name in ("mpi4py",) if importlib.util.find_spec(name) is None]
needs_mpi = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (see docs/launching.md)")

_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def mpirun(
    ranks: int,
    arguments: Sequence[str | Path],
    *,
    timeout_s: float = 110,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` on as many ranks; its output, whatever its end. Ranks end with it."""
    command = ["mpirun", "--oversubscribe", "-np", str(ranks), sys.executable, *map(str, arguments)]
    given = {**os.environ, **_AS_ROOT, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=given, cwd=folder, input=stdin
    )
