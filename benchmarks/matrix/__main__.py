"""`python -m benchmarks.matrix [--covering] [--only WORD ...] [--json FILE]`: one line a case, tables of errors."""

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
from benchmarks.matrix.cases import BESIDE, DATA, USES, Case, all_cases, covering_cases
from benchmarks.matrix.side import STEPS, TOLERANCE, Plans, Result, plans_for, run_case
from shardwise.launch import RankPool, RankStarter

_NAME = "benchmarks.matrix"


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
    print(_tables(found))
    worst = max((result.worst for _, result, _ in found if result is not None), default=0.0)
    failed = [(str(case), why) for case, result, why in found if result is None or not result.worst <= TOLERANCE]
    print(
        f"{len(found)} cases of {STEPS} steps on real ranks in {time.perf_counter() - start:.0f} s; worst error of "
        f"loss, gradients, norm, updated weights, evaluation {worst:.1e} (tolerance {TOLERANCE:.0e}); "
        f"{len(failed)} failed"
    )
    if told.json is not None:
        errors = {str(case): None if result is None else dataclasses.asdict(result) for case, result, _ in found}
        figures = {"tolerance": TOLERANCE, "steps": STEPS, "worst": worst, "failed": dict(failed), "cases": errors}
        told.json.parent.mkdir(parents=True, exist_ok=True)
        told.json.write_text(json.dumps(circumstances(_NAME) | figures, indent=1) + "\n", encoding="utf-8")
    if failed:
        print("failed:", *(f"{case}: {why}" for case, why in failed), sep="\n  ")
        sys.exit(1)


def _run(cases: Sequence[Case]) -> list[tuple[Case, Result | None, str]]:
    """One pool of ranks at a time, the smallest first; each case with its worst rank, or why there is none."""
    found: list[tuple[Case, Result | None, str]] = []
    plans = plans_for(cases)
    with RankStarter(preload=(run_case.__module__,)) as starter:
        for size in sorted({case.world_size for case in cases}):
            with RankPool(size, starter=starter, num_threads=1) as pool:
                for case in (each for each in cases if each.world_size == size):
                    start = time.perf_counter()
                    found.append((case, *_one(pool, case, plans)))
                    print(_line(*found[-1], seconds=time.perf_counter() - start), flush=True)
    return found


def _one(pool: RankPool, case: Case, plans: Plans) -> tuple[Result | None, str]:
    with contextlib.suppress(KeyboardInterrupt):
        try:
            worst = max(pool.run(run_case, case, plans, timeout_s=120.0), key=lambda result: result.worst)
        except Exception as error:  # a case that fails is a line of the table
            return None, f"{type(error).__name__}: {error}"
        return worst, "" if worst.worst <= TOLERANCE else "beyond the tolerance"
    raise KeyboardInterrupt


def _line(case: Case, result: Result | None, why: str, *, seconds: float) -> str:
    if result is None:
        return f"{case!s:34s} FAILED {why.splitlines()[0][:200]}"
    return (
        f"{case!s:34s} gradient {result.gradient:7.1e}  norm {result.norm:7.1e}  weight {result.weight:7.1e}  "
        f"loss {result.loss:7.1e}  evaluation {result.evaluation:7.1e}  {seconds:4.1f} s"
        + (f"  MISSING {', '.join(result.missing[:3])}" if result.missing else "")
    )


def _tables(found: Sequence[tuple[Case, Result | None, str]]) -> str:
    """Worst error by data and what is beside, one table a use."""
    lines: list[str] = []
    for use in USES:
        cells = {
            (case.data, case.beside): "FAILED" if result is None else f"{result.worst:.0e}"
            for case, result, _ in found
            if case.use == use
        }
        lines += ["", f"{use:14s}" + "".join(f"{name:>12s}" for name in BESIDE)]
        lines += [
            f"{data:14s}" + "".join(f"{cells.get((data, beside), ''):>12s}" for beside in BESIDE) for data in DATA
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
