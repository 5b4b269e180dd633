"""`python -m benchmarks.planner --local`: predicted beside measured, of every layout of three models on this machine.

    probe ─► cluster.toml ─► every layout of 2 and 4 ranks: price │ run, measure ─► table, one JSON line

The cluster is what `shardwise probe` measures; nothing of it is fitted to what is scored here. What was measured is
kept as it goes (`results/local.json`): stopped, it goes on where it was; `--fresh` begins anew. Every layout has ranks
of its own, forked from one process that has imported everything, as those of a run are: memory is that layout's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.planner.local_layouts import Planned
from benchmarks.planner.local_models import SETTINGS
from benchmarks.planner.local_rank import Task, Timed, ended, laid_out, timed
from benchmarks.planner.local_score import Outcome, figures_of, levelled
from benchmarks.planner.local_store import Entry, Store
from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import LaunchError, ShardwiseError
from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.layout.ranks import coordinates
from shardwise.plan.fit_cluster import fit_cluster
from shardwise.train.probe import probe

__all__ = ["main"]

_FOLDER = Path(__file__).parent / "results"
_DEADLINE_S = 120.0
_PRELOAD = ("benchmarks.planner.local_rank",)  # with transformers, and the models' own modules


def main(arguments: Sequence[str] | None = None) -> None:
    """`--local [--ranks 2,4] [--models decoder,...] [--only memory|time|score] [--again] [--budget-s S] ...`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner --local", description=__doc__)
    parser.add_argument("--local", action="store_true", help="what this is")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--models", default=",".join(SETTINGS), help="some of them")
    parser.add_argument("--match", default="", help="only layouts whose text this regular expression finds")
    parser.add_argument("--only", choices=("memory", "time", "score"), help="measure one of them, or nothing more")
    parser.add_argument("--rounds", type=int, default=3, help="times that ranks of every layout are started and timed")
    parser.add_argument("--visits", type=int, default=3, help="how often each of them is timed while they are alive")
    parser.add_argument(
        "--beside", type=int, default=8, help="layouts that are alive beside each other, timed in turns"
    )
    parser.add_argument("--timed-s", type=float, default=0.8, help="seconds of a visit")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="stop measuring behind so many seconds")
    parser.add_argument("--cluster", help="a file of `shardwise probe`; without it the machine is probed")
    parser.add_argument("--probe", action="store_true", help="probe again where there is a file already")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where results are kept")
    parser.add_argument("--again", action="store_true", help="time again what was timed before")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--json-only", action="store_true", help="only the JSON line")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ranks = [int(each) for each in given.ranks.split(",")]
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "local.json"
    if given.fresh:
        path.unlink(missing_ok=True)
    store = Store(path)
    cluster = given.cluster or str(_probed(given.folder / "local-cluster.toml", ranks, again=given.probe))
    planned = {
        (name, count): Planned(SETTINGS[name], load_cluster(cluster, ranks=count))
        for name, count in _each(given, ranks)
    }
    if given.only != "score":
        _measure(store, planned, given)
    seconds = {count: levelled(store.timed(count)) for count in ranks}
    outcomes = [each for own, one in planned.items() for each in _outcomes(store, one, *own, seconds[own[1]])]
    if not given.json_only:
        print("\n".join(_table(outcomes)))
    figures = {str(count): dataclasses.asdict(figures_of(outcomes, count)) for count in ranks}
    print(json.dumps({"about": store.about, "by_ranks": figures}))


def _each(given: argparse.Namespace, ranks: Sequence[int]) -> Iterator[tuple[str, int]]:
    for count in ranks:
        for name in given.models.split(","):
            yield name, count


def _probed(path: Path, ranks: Sequence[int], *, again: bool) -> Path:
    """The machine as `shardwise probe` measures it, with what the models import in its ranks' memory."""
    if again or not path.is_file():
        clusters = [fit_cluster(times).cluster for times in probe(ranks, preload=_PRELOAD, tell=_tell)]
        comment = f"Measured by python -m benchmarks.planner --local on {time.strftime('%Y-%m-%d')}.\n"
        path.write_text(cluster_text(clusters, comment=comment), encoding="utf-8")
    return path


# -- measuring ----------------------------------------------------------------------------------------

_Asked = tuple[Entry, Planned, Layout]


def _measure(store: Store, planned: dict[tuple[str, int], Planned], given: argparse.Namespace) -> None:
    """What is missing. Memory of each layout by itself; seconds of several that stay alive beside each other and are
    visited in turns, so that what the machine does for a minute is in a visit or two of all of them."""
    end = time.monotonic() + given.budget_s
    asked: list[_Asked] = [
        (store.of(name, count, str(layout)), one, layout)
        for (name, count), one in planned.items()
        for layout in one.layouts
        if re.search(given.match, str(layout))
    ]
    for entry, _, _ in asked if given.again else ():
        entry.runs.clear()
    with RankStarter(preload=_PRELOAD) as starter:
        for each in asked if given.only != "time" else ():
            if not each[0].peak_bytes and not each[0].failed and time.monotonic() < end:
                _hold(each, starter)
                store.keep(_about())
        for turn in range(given.rounds if given.only != "memory" else 0):
            for count in dict.fromkeys(count for _, count in planned):
                left = [
                    (entry, one, layout)
                    for entry, one, layout in asked
                    if entry.ranks == count and not entry.failed and len(entry.runs) <= turn * given.visits
                ]
                random.Random(turn).shuffle(left)  # neighbours are alike: they are not to share a minute
                for first in range(0, len(left), given.beside):
                    if time.monotonic() < end:
                        _visit(left[first : first + given.beside], given, starter, store)
                        store.keep(_about())


def _hold(each: _Asked, starter: RankStarter) -> None:
    entry, planned, layout = each
    with contextlib.ExitStack() as stack:
        pool = _laid_out(entry, planned, layout, stack, starter)
        if pool is not None:
            _tell(f"{entry.model} {layout}: {max(entry.peak_bytes) / 2**20:.0f} MiB")


def _visit(some: Sequence[_Asked], given: argparse.Namespace, starter: RankStarter, store: Store) -> None:
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        pools = [(entry, _laid_out(entry, one, layout, stack, starter)) for entry, one, layout in some]
        for _ in range(given.visits):
            turn = store.next_turn()
            for place, (entry, pool) in enumerate(pools):
                if pool is None:
                    continue
                try:
                    ranks = pool.run(timed, given.timed_s, timeout_s=_DEADLINE_S)
                    entry.runs.append({"turn": turn, **_run_of(ranks)})
                except LaunchError as error:  # too slow here, and its ranks have ended
                    _tell(f"{entry.model} {entry.layout}: {error}")
                    pools[place] = entry, None
    for entry, pool in pools:
        if pool is not None and entry.runs:
            visits = " ".join(f"{run['step_s'] * 1e3:.0f}" for run in entry.runs[-given.visits :])
            _tell(f"{entry.model} {entry.layout}: {visits} ms")
    _tell(f"{len(some)} layouts in {time.monotonic() - begun:.0f} s")


def _laid_out(
    entry: Entry, planned: Planned, layout: Layout, stack: contextlib.ExitStack, starter: RankStarter
) -> RankPool | None:
    """Ranks that wait to be timed; None where there is an error, which is kept unless it was one of time. Their memory
    counts where it was not known: with others alive, pages that all share are divided among more."""
    pool = stack.enter_context(RankPool(entry.ranks, num_threads=1, starter=starter))
    try:
        ranks = pool.run(
            laid_out, Task(model=entry.model, layout=layout, plans=planned.plans(layout)), timeout_s=_DEADLINE_S
        )
    except LaunchError as error:  # too slow here: another time
        _tell(f"{entry.model} {layout}: {error}")
        return None
    except (ShardwiseError, RuntimeError) as error:
        entry.failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
        _tell(f"{entry.model} {layout}: {entry.failed}")
        return None
    stack.callback(pool.run, ended)
    if not entry.peak_bytes:
        entry.peak_bytes = [each.peak_bytes for each in ranks]
        entry.before_bytes = [each.before_bytes for each in ranks]
        entry.loss = ranks[0].loss
    return pool


def _run_of(ranks: Sequence[Timed]) -> dict[str, float]:
    """One visit: of the slowest rank in every step; ranks meet in each."""
    steps = [max(column) for column in zip(*(each.steps for each in ranks), strict=True)]
    low, middle, high = statistics.quantiles(steps, n=4)
    return {
        "step_s": middle,
        "spread": (high - low) / 2 / middle,
        "steps": len(steps),
        "computed_s": max(each.computed_s for each in ranks),
        "sums_s": max(each.sums_s for each in ranks),
        "update_s": max(each.update_s for each in ranks),
    }


def _about() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    models = {line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    return {
        "command": "python -m benchmarks.planner --local",
        "machine": f"{' '.join(sorted(models)) or platform.machine()}, {len(_cores())} cores",
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cores() -> list[str]:
    return [line for line in _lines("/proc/cpuinfo") if line.startswith("processor")]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


# -- telling ------------------------------------------------------------------------------------------


def _outcomes(
    store: Store, planned: Planned, model: str, ranks: int, seconds: Mapping[Hashable, tuple[float, ...]]
) -> Iterator[Outcome]:
    for layout in planned.layouts:
        entry = store.of(model, ranks, str(layout))
        if not entry.peak_bytes:
            continue
        price = planned.price(layout).price
        yield Outcome(
            model=model,
            ranks=ranks,
            layout=str(layout),
            predicted_s=price.step_s,
            predicted_bytes=tuple(price.memory[coordinates(layout, rank).position].total for rank in range(ranks)),
            measured_bytes=tuple(entry.peak_bytes),
            runs_s=seconds.get((model, str(layout)), ()),
            spread=entry.spread,
        )


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    head = f"{'model':9}{'layout':62}{'predicted':>11}{'measured':>11}{'error':>8}{'±':>6}"
    yield head + f"{'MiB':>7}{'measured':>10}{'error':>8}"
    for each in outcomes:
        measured = f"{each.measured_s * 1e3:.1f} ms" if each.runs_s else "-"
        error = f"{each.time_error:+.1%}" if each.runs_s else "-"
        noise = f"{each.noise:.1%}" if each.runs_s else "-"
        worst = max(range(each.ranks), key=lambda rank: abs(each.memory_errors[rank]))
        yield (
            f"{each.model:9}{each.layout:62}{each.predicted_s * 1e3:8.1f} ms{measured:>11}{error:>8}{noise:>6}"
            f"{each.predicted_bytes[worst] / 2**20:7.0f}{each.measured_bytes[worst] / 2**20:10.0f}"
            f"{each.memory_errors[worst]:+8.1%}"
        )
    for count in dict.fromkeys(each.ranks for each in outcomes):
        found = figures_of(outcomes, count)
        yield ""
        yield f"{count} ranks, {found.layouts} layouts"
        yield f"  memory per rank   median error {found.memory_median:.1%}, largest {found.memory_largest:.1%}"
        yield (
            f"  step              median error {found.time_median:.1%}, largest {found.time_largest:.1%}; two "
            f"measurements differ by {found.noise_median:.1%} (median)"
        )
        for model, chosen in found.chosen.items():
            order = f", rank correlation {found.spearman[model]:.3f}" if model in found.spearman else ""
            yield (
                f"  {model:9} chosen {chosen.layout}: {chosen.behind:.1%} behind the best measured ({chosen.best}), "
                f"± {chosen.noise:.1%}{order}"
            )


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
