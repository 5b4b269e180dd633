"""Runs both contenders in turn on two and four ranks, prints a table, writes the results, ends with a line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.transport.ranks import GLOO, OURS, Seconds, timed_sums, timed_transfers
from shardwise.launch import RankPool, RankStarter

__all__ = ["main"]

FULL = {4 << 10: 200, 64 << 10: 200, 1 << 20: 60, 4 << 20: 30, 16 << 20: 12, 64 << 20: 5}  # bytes -> rounds
QUICK = {4 << 10: 50, 1 << 20: 20}
PRELOAD = ("shardwise.comm.same_host_group", "shardwise.comm.collective_over")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, fewer rounds, two ranks")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    worlds = (2,) if options.quick else (2, 4)
    rows: list[dict[str, Any]] = []
    with RankStarter(preload=PRELOAD) as starter:
        for world in worlds:
            with RankPool(world, num_threads=1, starter=starter) as pool:
                for num_bytes, rounds in sizes.items():
                    if world == 2:
                        of_ranks = pool.run(timed_transfers, num_bytes, rounds, timeout_s=300)
                        rows += _rows(of_ranks[0], num_bytes, world)  # rank 0 sees there and back
                    of_ranks = pool.run(timed_sums, num_bytes, rounds, timeout_s=300)
                    rows += _rows(_slowest(of_ranks), num_bytes, world)
    figures = _figures(rows)
    record: dict[str, Any] = {**circumstances("benchmarks.transport"), "figures": figures, "rows": rows}
    output = options.output or _file(record["date"], quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(figures))


def _rows(measured: Mapping[str, Seconds], num_bytes: int, world: int) -> list[dict[str, Any]]:
    rows = []
    for what, seconds in measured.items():
        ours, gloo = (statistics.median(seconds[name]) for name in (OURS, GLOO))
        ratio = statistics.median(o / g for o, g in zip(seconds[OURS], seconds[GLOO], strict=True))
        row = {
            "what": what,
            "ranks": world,
            "bytes": num_bytes,
            "shardwise_us": round(ours * 1e6, 1),
            "gloo_us": round(gloo * 1e6, 1),
            "ratio": round(ratio, 4),
            "shardwise_gb_per_s": round(num_bytes / ours / 1e9, 3),
            "gloo_gb_per_s": round(num_bytes / gloo / 1e9, 3),
        }
        rows.append(row)
        print(
            f"{what:24} {world} ranks {num_bytes / 1024:8.0f} KiB   {row['shardwise_us']:10.1f} us   "
            f"gloo {row['gloo_us']:10.1f} us   {row['ratio']:6.3f}",
            flush=True,
        )
    return rows


def _slowest(of_ranks: Sequence[Mapping[str, Seconds]]) -> Mapping[str, Seconds]:
    """A sum is there when the last rank has it."""
    return {
        what: {
            name: [max(turn) for turn in zip(*(rank[what][name] for rank in of_ranks), strict=True)]
            for name in (OURS, GLOO)
        }
        for what in of_ranks[0]
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    def worst(what: str, ranks: int, least: int = 0) -> float | None:
        found = [r["ratio"] for r in rows if r["what"] == what and r["ranks"] == ranks and r["bytes"] >= least]
        return max(found, default=None)

    figures = {
        "one_way_vs_gloo": worst("one way", 2),
        "all_reduce_2_vs_gloo": worst("all-reduce", 2),
        "all_reduce_4_vs_gloo": worst("all-reduce", 4),
    }
    for ranks in (2, 4):  # of 1 MiB and more
        for what in ("all-reduce in place", "all-reduce of any memory", "reduce-scatter", "all-gather"):
            figures[f"{what.replace('-', '_').replace(' ', '_')}_{ranks}_vs_gloo"] = worst(what, ranks, 1 << 20)
    return figures


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
