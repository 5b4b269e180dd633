"""Runs the contenders in turn on two ranks, prints a table, writes the results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.pipeline.contenders import CONTENDERS, OURS, PEERS, TORCH
from benchmarks.pipeline.model import SHAPES
from benchmarks.pipeline.ranks import missing_peers, peak_bytes, timed_steps
from shardwise.errors import LaunchError
from shardwise.launch import RankPool, RankStarter

__all__ = ["main", "missed_peers"]

FULL = {"tiny": 200, "large-64": 25, "large-256": 9}  # shape -> rounds
QUICK = {"tiny": 40, "quick": 5}
ALWAYS = (OURS, "shardwise gpipe", *TORCH)
PRELOAD = ("torch.distributed.pipelining", "shardwise.execute.assemble")

Seconds = Mapping[str, Sequence[float]]  # contender -> of its steps, in order of rounds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the tiny shape and one that stands in for the large ones")
    parser.add_argument("--shapes", nargs="+", choices=tuple(FULL), help="only these; the figures speak of these alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a busy machine; at least three")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    chosen = QUICK if options.quick else FULL
    shapes = [shape for shape in chosen if options.shapes is None or shape in options.shapes]
    rounds = {shape: max(3, round(chosen[shape] * options.share)) for shape in shapes}
    with RankStarter(preload=PRELOAD) as starter:
        missed = {} if options.quick else missed_peers()
        for name, reason in missed.items():
            print(f"missed: {name}: {reason}")
        names = [name for name in CONTENDERS if name in ALWAYS or not (options.quick or name in missed)]
        timings = {shape: _timings(starter, names, shape, number) for shape, number in rounds.items()}
        memory_shape = shapes[-1]
        memory = {name: _memory(starter, name, memory_shape) for name in (OURS, *TORCH)}
    figures = _figures(timings, memory)
    record: dict[str, Any] = {
        **circumstances("benchmarks.pipeline"),
        "rounds": rounds,
        "missed": missed,
        "figures": figures,
        "ratios": {shape: _ratios(seconds) for shape, seconds in timings.items()},
        "medians_s": _medians(timings),
        "memory_bytes": memory,
    }
    output = options.output or _file(record["date"], quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"peak resident set of the ranks, {memory_shape} (MiB; rise above the process without a model)")
    for name, ranks in memory.items():
        print(f"  {name:16}", "  ".join(f"{p / 2**20:7.1f} (+{(p - b) / 2**20:.1f})" for p, b in ranks))
    print(f"written to {output}")
    print(json.dumps(figures))


def missed_peers() -> dict[str, str]:
    """Peers that cannot be made, each tried in ranks of its own: what it breaks breaks nobody else."""
    missed: dict[str, str] = {}
    for name in PEERS:
        if name not in TORCH:
            with RankPool(2, num_threads=1, preload=PRELOAD) as pool:
                try:
                    missed.update(pool.run(missing_peers, [name], timeout_s=300)[0])
                except LaunchError as error:
                    missed[name] = str(error).splitlines()[0]
    return missed


def _timings(starter: RankStarter, names: Sequence[str], shape: str, rounds: int) -> Seconds:
    """Seconds of each step: those of the slower rank."""
    with RankPool(2, num_threads=1, starter=starter) as pool:
        first, second = pool.run(timed_steps, names, SHAPES[shape], rounds, timeout_s=1800)
    seconds = {name: [max(pair) for pair in zip(first[name], second[name], strict=True)] for name in names}
    print(f"{shape}: median of {rounds} steps; {OURS} / it, median of rounds")
    for name in names:
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[OURS], seconds[name], strict=True))
        print(f"  {name:16} {statistics.median(seconds[name]) * 1e3:9.2f} ms  {ratio:6.3f}", flush=True)
    return seconds


def _memory(starter: RankStarter, name: str, shape: str) -> list[tuple[int, int]]:
    with RankPool(2, num_threads=1, starter=starter) as pool:
        return pool.run(peak_bytes, name, SHAPES[shape], timeout_s=600)


def _ratios(seconds: Seconds) -> dict[str, float]:
    """Peer -> median of ours / theirs, step by step."""
    return {
        name: round(statistics.median(o / t for o, t in zip(seconds[OURS], seconds[name], strict=True)), 4)
        for name in seconds
        if name in PEERS
    }


def _figures(
    timings: Mapping[str, Seconds], memory: Mapping[str, Sequence[tuple[int, int]]]
) -> dict[str, float | None]:
    ratios = {shape: _ratios(seconds) for shape, seconds in timings.items()}
    large = [shape for shape in ratios if shape != "tiny"]
    leaner = [min(memory[name][rank][0] for name in TORCH) for rank in range(2)]
    return {
        "tiny_vs_torch": max((ratios["tiny"][name] for name in TORCH if "tiny" in ratios), default=None),
        "large_vs_torch": max((ratios[shape][name] for shape in large for name in TORCH), default=None),
        "large_vs_best_peer": max((ratio for name in large for ratio in ratios[name].values()), default=None),
        "peak_memory_vs_torch": round(max(memory[OURS][rank][0] / leaner[rank] for rank in range(2)), 4),
    }


def _medians(timings: Mapping[str, Seconds]) -> dict[str, dict[str, float]]:
    return {
        shape: {name: statistics.median(steps) for name, steps in seconds.items()} for shape, seconds in timings.items()
    }


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
