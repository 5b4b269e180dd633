"""`python -m benchmarks.matrix [--covering] [--only WORD ...] [--json FILE]`: one line a case, and tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.matrix.cases import Case, all_cases, covering_cases
from benchmarks.matrix.side import STEPS, TOLERANCE, Plans, Result, plans_for, run_case
from benchmarks.matrix.table import table
from shardwise.launch import RankPool, RankStarter

_NAME = "benchmarks.matrix"
_DEADLINE_S = 600.0  # of a case, also on a machine that does something else


def main() -> None:
    """Run the cases on real ranks; exit status 1 if one is beyond the tolerance."""
    parser = argparse.ArgumentParser(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--covering", action="store_true", help="only the cases that the tests run")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only cases whose names have all words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every error there, after every case")
    parser.add_argument("--missing", action="store_true", help="only cases that FILE has not; it keeps its others")
    told = parser.parse_args()
    cases = [
        each for each in (covering_cases() if told.covering else all_cases()) if all(w in str(each) for w in told.only)
    ]
    found: dict[str, dict[str, Any]] = {}
    if told.missing and told.json is not None and told.json.exists():
        found = json.loads(told.json.read_text(encoding="utf-8"))["cases"]
        cases = [case for case in cases if str(case) not in found]
    start = time.perf_counter()
    for case, result, why in _run(cases):
        found[str(case)] = {"worst": None} if result is None else {"worst": result.worst, **dataclasses.asdict(result)}
        found[str(case)]["why"] = why
        if told.json is not None:
            _write(told.json, found)
    print(table(found))
    failed = {case: each["why"] for case, each in found.items() if each["why"]}
    worst = max((each["worst"] for each in found.values() if each["worst"] is not None), default=0.0)
    print(
        f"{len(found)} cases of {STEPS} steps on real ranks in {time.perf_counter() - start:.0f} s; worst error of "
        f"loss, gradients, norm, updated weights, evaluation {worst:.1e} (tolerance {TOLERANCE:.0e}); "
        f"{len(failed)} failed"
    )
    if failed:
        print("failed:", *(f"{case}: {why}" for case, why in failed.items()), sep="\n  ")
        sys.exit(1)


def _write(file: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """All figures, in the order of the cases, whole or not at all."""
    ordered = {str(case): found[str(case)] for case in all_cases() if str(case) in found}
    figures = {"tolerance": TOLERANCE, "steps": STEPS, "cases": ordered}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(circumstances(_NAME) | figures, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def _run(cases: Sequence[Case]) -> Iterator[tuple[Case, Result | None, str]]:
    """One pool of ranks at a time, the smallest first; each case with its worst rank, or why there is none."""
    plans = plans_for(cases)
    with RankStarter(preload=(run_case.__module__,)) as starter:
        for size in sorted({case.world_size for case in cases}):
            with RankPool(size, starter=starter, num_threads=1) as pool:
                for case in (each for each in cases if each.world_size == size):
                    start = time.perf_counter()
                    result, why = _one(pool, case, plans)
                    print(_line(case, result, why, seconds=time.perf_counter() - start), flush=True)
                    yield case, result, why


def _one(pool: RankPool, case: Case, plans: Plans) -> tuple[Result | None, str]:
    with contextlib.suppress(KeyboardInterrupt):
        try:
            worst = max(pool.run(run_case, case, plans, timeout_s=_DEADLINE_S), key=lambda result: result.worst)
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


if __name__ == "__main__":
    main()
