"""Runs the contenders in turn on two ranks, prints tables, writes the results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.data.contenders import CONTENDERS, GROUPS, OPTIONAL
from benchmarks.data.ranks import expected_losses, missing, peaks, sums_alone, timed_steps
from benchmarks.data.setting import RANKS, SETTINGS
from shardwise.errors import LaunchError
from shardwise.launch import RankPool, RankStarter

__all__ = ["main"]

FULL = {"sequence-64": 15, "sequence-256": 11}  # setting -> rounds
QUICK = {"quick": 5}
PRELOAD = ("torch.distributed.fsdp", "shardwise.execute.assemble")
BUCKET_BYTES = 4 * 2**20

# figure -> (ours, theirs)
RATIOS = {
    "dp2_vs_ddp": ("shardwise dp2", "ddp"),
    "dp2_vs_megatron": ("shardwise dp2", "megatron"),
    "zero1_vs_deepspeed": ("shardwise zero1", "deepspeed zero1"),
    "zero2_vs_fsdp2": ("shardwise zero2", "fsdp2 zero2"),
    "zero2_vs_deepspeed": ("shardwise zero2", "deepspeed zero2"),
    "zero3_vs_fsdp2": ("shardwise zero3", "fsdp2 zero3"),
    "zero3_vs_deepspeed": ("shardwise zero3", "deepspeed zero3"),
}
MEMORY = {  # ours -> theirs, for the figure about memory
    "shardwise dp2": "ddp",
    "shardwise zero2": "fsdp2 zero2",
    "shardwise zero3": "fsdp2 zero3",
}

Seconds = Mapping[str, Sequence[float]]  # contender -> of its steps, in order of rounds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one smaller setting, and no peers that live elsewhere")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), help="only these")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), help="only these")
    parser.add_argument("--without", nargs="+", default=[], choices=tuple(CONTENDERS), help="contenders to leave out")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a busy machine; at least three")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    chosen = {name: FULL.get(name, 5) for name in options.settings or (QUICK if options.quick else FULL)}
    groups = [name for name in GROUPS if options.groups is None or name in options.groups]
    wanted = {name for group in groups for name in GROUPS[group]} - set(options.without)
    missed = {name: "left out by --quick" if options.quick else _missing(name) for name in OPTIONAL if name in wanted}
    missed = {name: reason for name, reason in missed.items() if reason}
    for name, reason in missed.items():
        print(f"missed: {name}: {reason}")
    present = wanted - missed.keys()
    timings: dict[str, dict[str, Seconds]] = {}
    sums: dict[str, list[float]] = {}
    with RankStarter(preload=PRELOAD) as starter:
        for setting, rounds in chosen.items():
            number = max(3, round(rounds * options.share))
            timings[setting] = {
                group: _timings(starter, [name for name in GROUPS[group] if name in present], setting, number)
                for group in groups
            }
            with RankPool(RANKS, num_threads=1, starter=starter) as pool:
                both = pool.run(sums_alone, SETTINGS[setting], number, BUCKET_BYTES, timeout_s=600)
            sums[setting] = [max(pair) for pair in zip(*both, strict=True)]
        setting = next(iter(chosen))
        pairs = [pair for pair in MEMORY.items() if set(pair) <= present]
        memory = {name: _memory(starter, name, setting) for name in dict.fromkeys(n for pair in pairs for n in pair)}
    figures = _figures(timings, memory, pairs)
    record: dict[str, Any] = {
        **circumstances("benchmarks.data"),
        "missed": missed,
        "figures": figures,
        "ratios": {setting: _ratios(groups_of) for setting, groups_of in timings.items()},
        "medians_s": {
            setting: {group: {n: statistics.median(s) for n, s in of.items()} for group, of in groups_of.items()}
            for setting, groups_of in timings.items()
        },
        "communication": {setting: _hidden(timings[setting], sums[setting]) for setting in timings},
        "memory_bytes": memory,
    }
    for setting, shares in record["communication"].items():
        print(f"communication, {setting}: {json.dumps(shares)}")
    output = options.output or _file(record["date"], quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(figures))


def _missing(name: str) -> str:
    """Why a peer cannot run, tried in ranks of its own: what it breaks breaks nobody else."""
    with RankPool(RANKS, num_threads=1, preload=PRELOAD) as pool:
        try:
            return pool.run(missing, name, timeout_s=300)[0]
        except LaunchError as error:
            return str(error).splitlines()[0]


def _timings(starter: RankStarter, names: Sequence[str], setting: str, rounds: int) -> Seconds:
    """Seconds of each step: those of the slower rank."""
    with RankPool(1, num_threads=1, starter=starter) as pool:
        expected = pool.run(expected_losses, SETTINGS[setting], timeout_s=600)[0]
    with RankPool(RANKS, num_threads=1, starter=starter) as pool:
        first, second = pool.run(timed_steps, names, SETTINGS[setting], rounds, expected, timeout_s=1800)
    seconds = {name: [max(pair) for pair in zip(first[name], second[name], strict=True)] for name in names}
    ours = names[0]
    print(f"{setting}: median of {rounds} steps; {ours} / it, median of rounds")
    for name in names:
        print(f"  {name:16} {statistics.median(seconds[name]) * 1e3:9.2f} ms  {_ratio(seconds, ours, name):6.3f}")
    return seconds


def _memory(starter: RankStarter, name: str, setting: str) -> list[tuple[int, int, int]]:
    with RankPool(RANKS, num_threads=1, starter=starter) as pool:
        ranks = pool.run(peaks, name, SETTINGS[setting], timeout_s=600)
    mib = 2**20
    told = "  ".join(
        f"{peak / mib:7.1f} (+{(peak - before) / mib:.1f}), {share / mib:.1f}" for peak, before, share in ranks
    )
    print(f"peak of the ranks, {setting} (MiB; resident, rise above no model; proportional): {name:16} {told}")
    return ranks


def _ratio(seconds: Seconds, ours: str, theirs: str) -> float:
    return round(statistics.median(o / t for o, t in zip(seconds[ours], seconds[theirs], strict=True)), 4)


def _ratios(groups: Mapping[str, Seconds]) -> dict[str, float]:
    """Figure -> the median of ours / theirs, step by step."""
    found: dict[str, float] = {}
    for figure, (ours, theirs) in RATIOS.items():
        for seconds in groups.values():
            if ours in seconds and theirs in seconds:
                found[figure] = _ratio(seconds, ours, theirs)
    return found


def _hidden(groups: Mapping[str, Seconds], sums: Sequence[float]) -> dict[str, float]:
    """What exchanging costs a step beyond a process that exchanges nothing (both ranks compute, as in the others), and
    for whole gradients the share of the time of the sums alone that this is less by."""
    alone_s = statistics.median(sums)
    told = {"gloo_sums_alone_ms": round(alone_s * 1e3, 2)}
    for seconds in groups.values():
        for name, steps in seconds.items():
            if name != "one process" and "one process" in seconds:
                exposed_s = statistics.median(s - a for s, a in zip(steps, seconds["one process"], strict=True))
                told[f"{name}: exposed_ms"] = round(exposed_s * 1e3, 2)
                told[f"{name}: hidden_share"] = round(1 - exposed_s / alone_s, 3)
    return told


def _figures(
    timings: Mapping[str, Mapping[str, Seconds]],
    memory: Mapping[str, Sequence[tuple[int, int, int]]],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, float]:
    """The worst ratio over the settings; the worst rank's memory over the pairs."""
    figures: dict[str, float] = {}
    for groups in timings.values():
        for figure, ratio in _ratios(groups).items():
            figures[figure] = max(ratio, figures.get(figure, 0.0))
    for ours, theirs in pairs:
        of_ranks = [mine[0] / their[0] for mine, their in zip(memory[ours], memory[theirs], strict=True)]
        name = ours.partition(" ")[2]
        figures[f"peak_memory_{name}"] = round(max(of_ranks), 4)
        shares = [mine[2] / their[2] for mine, their in zip(memory[ours], memory[theirs], strict=True)]
        figures[f"proportional_memory_{name}"] = round(max(shares), 4)
    worst = [value for figure, value in figures.items() if figure.startswith("peak_memory_zero")]
    if worst:
        figures["peak_memory_vs_fsdp2"] = max(worst)
    return figures


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
