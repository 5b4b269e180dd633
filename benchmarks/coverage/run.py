"""Every architecture of transformers, made small, trained one step, and verified on layouts: the benchmark itself.

Starts one worker process at a time and watches its clock; writes one line an architecture as it goes and takes up
where it stopped. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage.table import figures, markdown

__all__ = ["main"]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.jsonl"
TABLE = HERE.parent.parent / "docs" / "coverage.md"
QUICK = ("bert", "gpt2", "llama", "t5", "vit", "resnet", "mixtral", "whisper", "mamba", "clip")
LAYOUTS = ("pp2",)  # those that `layouts` has a function for
SECONDS = 240  # of one architecture


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and not yet known; write the table where all is known; print one JSON line."""
    options = _options(arguments)
    results = RESULTS.with_name("quick.jsonl") if options.quick else options.results
    names = _names(options)
    if options.again or options.quick:
        _forget(results, names)
    known = _read(results)
    if not options.table:
        asked = {name: _missing(known.get(name), options.layouts) for name in names}
        for row in _run({name: layouts for name, layouts in asked.items() if layouts}, options.seconds):
            row = _merged(known.get(row["architecture"]), row)
            known[row["architecture"]] = row
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)
    rows = [known[name] for name in names if name in known]
    if not (options.only or options.part or options.quick):
        TABLE.write_text(markdown(rows, [name for name in names if name not in known]), encoding="utf-8")
    print(json.dumps(figures(rows)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten architectures, results apart")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types of transformers alone")
    parser.add_argument("--part", metavar="I/N", help="every N-th architecture, starting with the I-th of 1..N")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, help="these layouts alone")
    parser.add_argument("--again", action="store_true", help="run also what has a result already")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table from the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one architecture")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results, one line each")
    return parser.parse_args(arguments)


def _names(options: argparse.Namespace) -> tuple[str, ...]:
    if options.only:
        return tuple(options.only)
    if options.quick:
        return QUICK
    listed = subprocess.run(
        [sys.executable, "-c", "from benchmarks.coverage.case import architectures as a; print(*a())"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = tuple(listed.stdout.split())
    if not options.part:
        return names
    which, of = (int(number) for number in options.part.split("/"))
    if not 1 <= which <= of:
        raise SystemExit(f"--part i/n has 1 <= i <= n, but got {options.part}; write for example --part 1/4")
    return names[which - 1 :: of]


def _read(results: Path) -> dict[str, dict[str, Any]]:
    if not results.exists():
        return {}
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["architecture"]: row for row in rows}


def _forget(results: Path, names: Iterable[str]) -> None:
    kept = [row for name, row in _read(results).items() if name not in set(names)]
    results.parent.mkdir(exist_ok=True)
    results.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def _missing(known: dict[str, Any] | None, layouts: Sequence[str]) -> tuple[str, ...]:
    """The layouts that an architecture has no result of; none where it does not train."""
    if known is None:
        return tuple(layouts)
    return tuple(name for name in layouts if known["trained"] and known["layouts"].get(name) is None)


def _merged(known: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A new row with the layouts that were known of the architecture before."""
    if known is None or not known["trained"]:
        return row
    if not row["trained"]:  # it did before: no answer in time, for the layouts that were asked for
        failed = {"proven": False, "wrong": False, "gradient_error": None, "reason": row["reason"]}
        return {
            **known,
            "layouts": {name: old or (name in LAYOUTS and failed) or None for name, old in known["layouts"].items()},
        }
    fresh = {name: outcome for name, outcome in row["layouts"].items() if outcome is not None}
    return {**row, "layouts": {**known["layouts"], **fresh}, "seconds": round(known["seconds"] + row["seconds"], 2)}


# -- the worker ----------------------------------------------------------------------------------------


def _run(asked: Mapping[str, Sequence[str]], seconds: float) -> Iterable[dict[str, Any]]:
    """A row of every name, from one worker after another; one that hangs or dies costs its architecture alone."""
    worker: subprocess.Popen[str] | None = None
    try:
        for name, layouts in asked.items():
            worker = worker or _started()
            row = _asked(worker, name, layouts, seconds)
            if row is None:
                died = worker.poll()
                worker.kill()
                worker.wait()
                worker = None
                reason = f"no answer within {seconds:.0f} s" if died is None else f"the process died with {died}"
                row = {"architecture": name, "trained": False, "layouts": {}, "reason": reason, "seconds": seconds}
            yield row
    finally:
        if worker is not None:
            worker.kill()
            worker.wait()


def _started() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.coverage.worker"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    )


def _asked(worker: subprocess.Popen[str], name: str, layouts: Sequence[str], seconds: float) -> dict[str, Any] | None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(" ".join((name, *layouts)) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ready, _, _ = select.select([worker.stdout], [], [], max(0.0, end - time.monotonic()))
        if ready:
            line = worker.stdout.readline()
            return json.loads(line) if line else None
    return None


def _line(row: dict[str, Any]) -> str:
    if not row["trained"]:
        return f"{row['architecture']:32} not trained: {row['reason'][:120]}"
    parts = []
    for name, outcome in row["layouts"].items():
        if outcome is not None:
            word = "proven" if outcome["proven"] else "WRONG" if outcome["wrong"] else "missed"
            parts.append(f"{name} {word} {outcome['reason'][:100]}")
    return f"{row['architecture']:32} {row['class']:44} {row['seconds']:6.1f} s  {'; '.join(parts)}"
