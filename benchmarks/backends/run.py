"""Starts ranks with mpirun, once an algorithm, on two and four; prints a table, writes the results, ends with JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.backends.page import table
from benchmarks.common.circumstances import circumstances

__all__ = ["main"]

FULL = {1 << 10: 100, 32 << 10: 60, 1 << 20: 30, 8 << 20: 8, 64 << 20: 3}  # bytes -> rounds
QUICK = {1 << 10: 20, 1 << 20: 5}
# one start each: what Open MPI is told of its all-reduce, and of its all-gather
ALGORITHMS = (
    ("auto", "auto"),
    ("ring", "linear"),
    ("binomial", "recursive-doubling"),
    ("rabenseifner", "auto"),
    ("recursive-doubling", "auto"),
)
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, two ranks, two algorithms")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    if shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None:
        print("mpirun or mpi4py is not installed (docs/launching.md): nothing to compare")
        print(json.dumps({}))
        return
    sizes, worlds = (QUICK, (2,)) if options.quick else (FULL, (2, 4))
    rows: list[dict[str, Any]] = []
    for world in worlds:
        for allreduce, allgather in ALGORITHMS[: 2 if options.quick else None]:
            for found in _start(world, allreduce, allgather, sizes):
                rows += _rows(found, allreduce, allgather)
    print(table(rows))
    record = {**circumstances("benchmarks.backends"), "figures": _figures(rows), "rows": rows}
    output = options.output or _file(str(record["date"]), quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(record["figures"]))


def _start(world: int, allreduce: str, allgather: str, sizes: Mapping[int, int]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        told = ",".join(f"{size}:{rounds}" for size, rounds in sizes.items())
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(world)]
        command += [sys.executable, "-m", "benchmarks.backends.ranks", "--sizes", told, "--output", str(output)]
        command += ["--allreduce", allreduce, "--allgather", allgather]
        subprocess.run(command, check=True, env={**os.environ, **AS_ROOT}, timeout=900)
        found: list[dict[str, Any]] = json.loads(output.read_text())
    return found


def _rows(found: Mapping[str, Any], allreduce: str, allgather: str) -> list[dict[str, Any]]:
    """One a backend: median microseconds, and the median of the ratios to gloo's of the same round."""
    told = {"all-reduce": allreduce, "all-gather": allgather}.get(found["what"], "auto")
    rows = []
    for name, seconds in found["seconds"].items():
        if name == "gloo" and allreduce != "auto":
            continue  # the first start has it
        ratio = statistics.median(ours / gloo for ours, gloo in zip(seconds, found["seconds"]["gloo"], strict=True))
        rows.append(
            {
                "what": found["what"],
                "ranks": found["ranks"],
                "bytes": found["bytes"],
                "backend": name,
                "algorithm": told if name == "MPI" else "",
                "us": round(statistics.median(seconds) * 1e6, 1),
                "to_gloo": round(ratio, 3),
            }
        )
    return rows


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The geometric mean over sizes of MPI's time to gloo's, as Open MPI chooses, and of the best algorithm's."""
    figures = {}
    for what in ("all-reduce", "all-gather", "reduce-scatter", "one way"):
        for ranks in sorted({row["ranks"] for row in rows}):
            mine = [r for r in rows if r["what"] == what and r["ranks"] == ranks and r["backend"] == "MPI"]
            by_size: dict[int, list[Mapping[str, Any]]] = {}
            for row in mine:
                by_size.setdefault(row["bytes"], []).append(row)
            chosen = [r["to_gloo"] for r in mine if r["algorithm"] == "auto"]
            best = [min(r["to_gloo"] for r in each) for each in by_size.values()]
            name = f"mpi_{what.replace('-', '_').replace(' ', '_')}_{ranks}"
            figures[f"{name}_vs_gloo"] = round(statistics.geometric_mean(chosen), 3)
            figures[f"{name}_best_vs_gloo"] = round(statistics.geometric_mean(best), 3)
    return figures


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
