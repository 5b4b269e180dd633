"""`python -m benchmarks.schedules.matrix [--covering] [--only WORD ...] [--json FILE]`: one line a case, one table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.circumstances import circumstances
from benchmarks.schedules.matrix.cases import COMPOSITIONS, Case, all_cases, covering_cases
from benchmarks.schedules.matrix.side import STEPS, TOLERANCE, Result, run_case
from shardwise.launch import RankPool, RankStarter

_NAME = "benchmarks.schedules.matrix"


def main() -> None:
    """Run the cases on real ranks; exit status 1 if one is beyond the tolerance."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--covering", action="store_true", help="only the cases that the tests run")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only cases whose names have all words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every error there")
    told = parser.parse_args()
    cases = [
        each for each in (covering_cases() if told.covering else all_cases()) if all(w in str(each) for w in told.only)
    ]
    start = time.perf_counter()
    found = _run(cases)
    print(_table(found))
    worst = max((result.worst for _, result in found if result is not None), default=0.0)
    failed = [str(case) for case, result in found if result is None or not result.worst <= TOLERANCE]
    print(
        f"{len(found)} cases of {STEPS} steps on real ranks in {time.perf_counter() - start:.0f} s; worst error of "
        f"loss, gradients, norm, updated weights, evaluation {worst:.1e} (tolerance {TOLERANCE:.0e}); "
        f"{len(failed)} failed"
    )
    if told.json is not None:
        errors = {str(case): None if result is None else dataclasses.asdict(result) for case, result in found}
        figures = {"tolerance": TOLERANCE, "worst": worst, "failed": failed, "cases": errors}
        told.json.write_text(json.dumps(circumstances(_NAME) | figures, indent=1) + "\n", encoding="utf-8")
    if failed:
        print("failed:", *failed, sep="\n  ")
        sys.exit(1)


def _run(cases: Sequence[Case]) -> list[tuple[Case, Result | None]]:
    """One pool of ranks at a time, the smallest first."""
    found: list[tuple[Case, Result | None]] = []
    with RankStarter(preload=(run_case.__module__,)) as starter:
        for size in sorted({case.world_size for case in cases}):
            with RankPool(size, starter=starter, num_threads=1) as pool:
                for case in (each for each in cases if each.world_size == size):
                    found.append((case, _one(pool, case)))
                    print(_line(*found[-1]), flush=True)
    return found


def _one(pool: RankPool, case: Case) -> Result | None:
    """The worst of all ranks."""
    with contextlib.suppress(KeyboardInterrupt):
        try:
            return max(pool.run(run_case, case, timeout_s=120.0), key=lambda result: result.worst)
        except Exception as error:  # a case that fails is a line of the table
            print(f"{case}: {error}", file=sys.stderr)
            return None
    raise KeyboardInterrupt


def _line(case: Case, result: Result | None) -> str:
    if result is None:
        return f"{case!s:44s} FAILED"
    return (
        f"{case!s:44s} gradient {result.gradient:7.1e}  norm {result.norm:7.1e}  weight {result.weight:7.1e}  "
        f"loss {result.loss:7.1e}  evaluation {result.evaluation:7.1e}  {result.kinds}"
    )


def _table(found: Sequence[tuple[Case, Result | None]]) -> str:
    """Worst gradient error by schedule and composition."""
    rows: dict[str, dict[str, str]] = {}
    for case, result in found:
        row = rows.setdefault(f"{case.schedule} x{case.chunks} pp{case.pp}", {})
        row[case.composition] = "FAILED" if result is None else f"{result.gradient:.0e}"
    lines = [f"{'':22s}" + "".join(f"{name:>11s}" for name in COMPOSITIONS)]
    lines += [f"{name:22s}" + "".join(f"{row.get(c, ''):>11s}" for c in COMPOSITIONS) for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
