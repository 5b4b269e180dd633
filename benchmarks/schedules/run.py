"""Runs the parts of the benchmark one behind the other, prints tables, writes results, ends with one line of JSON.

What is written is complete after every part: `--resume FILE` goes on where a run was ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.pipeline.run import missed_peers
from benchmarks.schedules import emulated, overhead, real
from benchmarks.schedules.contenders import HALVES, ONE, OURS, PEERS, TORCH
from benchmarks.schedules.model import SHAPES
from shardwise.launch import RankPool, RankStarter
from shardwise.schedule import generate

__all__ = ["main"]

ROUNDS = 4  # of real compute: every contender takes as many steps, in turn
EMULATED_STEPS = 3
EMULATED_RANKS = (4, 8, 16)
OVERHEAD_ROUNDS = 30
OVERHEAD_OF = tuple((name, ranks) for name in ("1f1b", "zb-h1", "zb-v") for ranks in (2, 4))
PRELOAD = ("torch.distributed.pipelining", "shardwise.execute.assemble")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, 4 ranks, few rounds: half a minute")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a busy machine; at least two")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="these parts")
    parser.add_argument("--schedules", nargs="+", default=(*OURS, *TORCH), help="of real compute, ours and torch's")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    parser.add_argument("--resume", type=Path, help="results of a run that was ended: parts that are there are kept")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {**circumstances("benchmarks.schedules"), "parts": {}}
    if options.resume is not None:
        record["parts"] = json.loads(options.resume.read_text())["parts"]
    output = options.output or options.resume or _file(record["date"], quick=options.quick)
    with RankStarter(preload=PRELOAD) as starter:
        for name in options.only:
            if options.resume is None or name not in record["parts"]:
                record["parts"][name] = PARTS[name](options, starter)
                record["figures"] = _figures(record["parts"])
                output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(_figures(record["parts"])))


def _real(options: argparse.Namespace, starter: RankStarter) -> dict[str, Any]:
    """Every contender on two ranks, in turn."""
    shape = SHAPES["quick" if options.quick else "full"]
    missed = {} if options.quick else missed_peers()
    for name, reason in missed.items():
        print(f"missed: {name}: {reason}")
    names = [
        ONE,
        HALVES,
        *(f"shardwise {name}" for name in OURS if name in options.schedules),
        *(f"torch {name}" for name in TORCH if name in options.schedules),
        *(name for name in PEERS if not (options.quick or name in missed)),
    ]
    rounds = _at_least_two(ROUNDS * options.share)
    with RankPool(2, num_threads=1, starter=starter) as pool:
        seconds = real.slower(pool.run(real.timed_rounds, names, shape, rounds, timeout_s=1800))
    found = real.figures(seconds)
    print(real.table(seconds, found), flush=True)
    return {"shape": shape.name, "rounds": rounds, "missed": missed, "seconds": seconds, "figures": found}


def _emulated(options: argparse.Namespace, starter: RankStarter) -> dict[str, Any]:
    """Every case on as many ranks as it has."""
    steps = _at_least_two(EMULATED_STEPS * options.share)
    rows = []
    print("emulated compute (every action sleeps)")
    print("  ranks stages  schedule       measured  simulated    error  predicted    error  over bound")
    for num_ranks in EMULATED_RANKS[:1] if options.quick else EMULATED_RANKS:
        for even in (True, False):
            cases = emulated.cases(num_ranks, even=even, search_s=1.0 if options.quick else 4.0)
            for case in cases:
                with RankPool(num_ranks, num_threads=1, starter=starter) as pool:
                    ran = pool.run(emulated.run_case, case, steps, timeout_s=300)
                rows.append(emulated.row_of(case, ran))
                print(emulated.line(rows[-1]), flush=True)
    return {"rows": rows, "figures": emulated.figures(rows)}


def _overhead(options: argparse.Namespace, starter: RankStarter) -> dict[str, Any]:
    """Both executors on 2 and on 4 ranks."""
    rows = []
    print("overhead of an action, us (wall: slower rank; cpu: all ranks)")
    for name, num_ranks in OVERHEAD_OF:
        schedule = generate(name, num_ranks=num_ranks, num_micro_batches=overhead.NUM_MICRO_BATCHES)
        with RankPool(num_ranks, num_threads=1, starter=starter) as pool:
            ran = pool.run(overhead.measured, schedule, _at_least_two(OVERHEAD_ROUNDS * options.share), timeout_s=300)
        rows.append(overhead.figures(schedule, ran))
        print(overhead.line(rows[-1]), flush=True)
    return {"rows": rows}


def _searched(options: argparse.Namespace, starter: RankStarter) -> dict[str, Any]:
    """`benchmarks.schedules.searched`, in a process of its own: its solver shares none with another one."""
    share = 0.05 if options.quick else 0.5 * options.share
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "searched.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.schedules.searched",
            "--share",
            f"{share}",
            "--output",
            f"{output}",
        ]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(output.read_text())
    return found


PARTS: Mapping[str, Callable[[argparse.Namespace, RankStarter], dict[str, Any]]] = {
    "real": _real,
    "emulated": _emulated,
    "overhead": _overhead,
    "searched": _searched,
}


def _figures(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The last line: what of it was measured."""
    found: dict[str, Any] = {}
    if "real" in parts:
        found |= {key: value for key, value in parts["real"]["figures"].items() if key != "efficiency"}
    if "emulated" in parts:
        found |= parts["emulated"]["figures"]
    if "overhead" in parts:
        two = [row for row in parts["overhead"]["rows"] if row["ranks"] == 2]  # as many as cores: the clock is right
        found["overhead_us"] = round(statistics.fmean(row["wall_us"][overhead.OURS] for row in two), 1)
        found["overhead_vs_torch"] = round(max(row["wall_ratio"] for row in two), 4)
    if "searched" in parts:
        found |= parts["searched"]["figures"]
    return found


def _at_least_two(count: float) -> int:
    return max(2, round(count))


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
