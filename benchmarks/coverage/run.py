"""Every architecture of transformers, made small, trained one step, and verified on layouts: the benchmark itself.

Starts one worker process at a time and watches the processor time that it takes; keeps one line an architecture, and
takes up where it stopped. Several runs may write into one file. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.coverage.table import figures, is_miss, markdown

__all__ = ["main"]

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.jsonl"
TABLE = HERE.parent.parent / "docs" / "coverage.md"
QUICK = ("bert", "gpt2", "llama", "t5", "vit", "resnet", "mixtral", "whisper", "mamba", "clip")
LAYOUTS = ("pp2", "tp2", "tp2_pp2")  # those that `layouts` has a function for
SECONDS = 120  # of a processor, for one step of an architecture: finding a model that trains, or one layout
_PATIENCE = 6  # times as many seconds of the clock: other work may have the processors
_LIFE = 40  # architectures of one worker


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and not yet known; write the table where all is known; print one JSON line."""
    options = _options(arguments)
    results = RESULTS.with_name("quick.jsonl") if options.quick else options.results
    names = _names(options)
    if options.quick:
        _forget(results, names)
    known = _read(results)
    if not options.table:
        commit = _commit()
        asked = {name: _asked_of(known.get(name), options, commit) for name in names}
        for row in _run({name: layouts for name, layouts in asked.items() if layouts}, options.seconds):
            row = _record(results, row)
            print(_line(row), flush=True)
        known = _read(results)
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
    parser.add_argument("--current", action="store_true", help="run again what another commit's code has answered")
    parser.add_argument("--misses", action="store_true", help="run again the layouts that are not proven, or too small")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table from the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time of one step")
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


def _record(results: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The row with what is known of its architecture, after it has been written."""
    with _alone(results):
        known = _read(results)
        known[row["architecture"]] = row = _merged(known.get(row["architecture"]), row)
        _write(results, known.values())
    return row


def _forget(results: Path, names: Iterable[str]) -> None:
    with _alone(results):
        _write(results, [row for name, row in _read(results).items() if name not in set(names)])


def _write(results: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line an architecture; who reads at the same time sees all of the old file or all of the new one."""
    new = results.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    new.replace(results)


@contextlib.contextmanager
def _alone(results: Path) -> Iterator[None]:
    """No other run writes results there inside the block."""
    results.parent.mkdir(exist_ok=True)
    folder = os.open(results.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _asked_of(known: Mapping[str, Any] | None, options: argparse.Namespace, commit: str) -> tuple[str, ...]:
    """The layouts of an architecture that are to be run; `commit` is the code's."""
    layouts = tuple(options.layouts)
    if known is None or options.again:
        return layouts
    if not known["trained"]:
        return layouts if options.current and known.get("commit") != commit else ()
    if options.misses:
        return tuple(name for name in layouts if is_miss(known, name))
    outcomes = {name: known["layouts"].get(name) for name in layouts}
    return tuple(
        name
        for name, outcome in outcomes.items()
        if outcome is None or (options.current and outcome.get("commit") != commit)
    )


def _merged(known: Mapping[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """A new row with the layouts that were known of the architecture before; alone where it no longer trains."""
    if known is None or not (known["trained"] and row["trained"]):
        return row
    fresh = {name: outcome for name, outcome in row["layouts"].items() if outcome is not None}
    return {**row, "layouts": {**dict.fromkeys(LAYOUTS), **known["layouts"], **fresh}}


# -- the worker ----------------------------------------------------------------------------------------


def _run(asked: Mapping[str, Sequence[str]], seconds: float) -> Iterable[dict[str, Any]]:
    """A row of every name, from one worker after another; one that hangs or dies costs its architecture alone."""
    worker: _Worker | None = None
    try:
        for name, layouts in asked.items():
            if worker is not None and (worker.served >= _LIFE or not worker.lives):
                worker.end()
                worker = None
            worker = worker or _Worker()
            yield worker.row(name, layouts, seconds)
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A worker process, and the commit of the code that it has imported. Raises SystemExit where it does not start."""

    def __init__(self) -> None:
        self.served = 0
        self.commit = _commit()
        command = [sys.executable, "-m", "benchmarks.coverage.worker"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        self._lines: deque[bytes] = deque()
        self._rest = b""
        if self._next(300.0) is None:
            self.end()
            raise SystemExit("a worker does not start; see why with: python -m benchmarks.coverage.worker")

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """The process, and the ranks that it has forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def row(self, name: str, layouts: Sequence[str], seconds: float) -> dict[str, Any]:
        """What came of an architecture; what did not, because of the time or an end of the worker, says so."""
        assert self._process.stdin is not None
        self.served += 1
        row: dict[str, Any] = {"architecture": name, "trained": False, "layouts": {}, "seconds": 0.0}
        self._process.stdin.write(" ".join((name, *layouts)).encode() + b"\n")
        self._process.stdin.flush()
        reason = ""
        while not row.get("done"):
            step = self._next(seconds)
            if step is None:
                died = self._process.poll()
                reason = f"no answer in {seconds:.0f} s" if died is None else f"the process died with {died}"
                self.end()
                break
            row = step
        row.pop("done", None)
        return _failed(row, layouts, row.pop("reason", reason) or reason, self.commit)

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next line of the worker; None where it does not come in time, or never will."""
        end, taken = time.monotonic() + _PATIENCE * seconds, _processor_seconds(self._process.pid)
        while not self._lines:
            ready, _, _ = select.select([self._answers], [], [], 1.0)
            if not ready and time.monotonic() < end and _processor_seconds(self._process.pid) - taken < seconds:
                continue
            piece = os.read(self._answers, 1 << 16) if ready else b""
            if not piece:
                return None
            *whole, self._rest = (self._rest + piece).split(b"\n")
            self._lines.extend(whole)
        answer: dict[str, Any] = json.loads(self._lines.popleft())
        return answer


def _processor_seconds(session: int) -> float:
    """What the processes of a session have taken of the processors; of the clock where the system does not tell."""
    stats = list(Path("/proc").glob("[0-9]*/stat"))
    if not stats:
        return time.monotonic()
    ticks = 0
    for stat in stats:
        with contextlib.suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()  # after the name: state, parent, group, session, ...
            if int(fields[3]) == session:
                ticks += sum(int(field) for field in fields[11:15])  # its own, and its children's that have ended
    return ticks / os.sysconf("SC_CLK_TCK")


def _failed(row: dict[str, Any], layouts: Sequence[str], reason: str, commit: str) -> dict[str, Any]:
    """A row with the reason where something is missing, and with the commit at every layout."""
    if not row["trained"]:
        return {**row, "reason": reason, "commit": commit}
    failure = {"proven": False, "wrong": False, "gradient_error": None, "reason": reason}
    asked = [name for name in layouts if row["layouts"].get(name) is None]
    outcomes = {**dict.fromkeys(LAYOUTS), **row["layouts"]}
    for number, name in enumerate(asked):  # what came after the failure was not begun
        outcomes[name] = failure if number == 0 else {**failure, "reason": f"not begun: {reason} before"}
    return {**row, "layouts": {name: one and {**one, "commit": commit} for name, one in outcomes.items()}}


def _commit() -> str:
    """The last commit that changed the sources, with + where they differ from it; empty without git."""
    paths = ["src/shardwise", "benchmarks/coverage", ":(exclude)benchmarks/coverage/results"]
    command = ["git", "log", "-1", "--format=%h", "--", *paths]
    try:
        head = subprocess.run(command, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "--no-optional-locks", "diff", "--quiet", "HEAD", "--", *paths], check=False
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed else "")


def _line(row: dict[str, Any]) -> str:
    if not row["trained"]:
        return f"{row['architecture']:32} not trained: {row['reason'][:120]}"
    parts = []
    for name, outcome in row["layouts"].items():
        if outcome is not None:
            share = outcome.get("sharded_share")
            word = "proven" if outcome["proven"] else "WRONG" if outcome["wrong"] else "missed"
            parts.append(f"{name} {word} {'' if share is None else f'{share:.2f} '}{outcome['reason'][:100]}".strip())
    return f"{row['architecture']:32} {row['class']:44} {row['seconds']:6.1f} s  {'; '.join(parts)}"
