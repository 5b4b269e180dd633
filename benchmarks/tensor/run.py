"""Runs the contenders in turn on two ranks, prints a table, writes the results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tensor.contenders import DTENSOR, MEGATRON, MEGATRON_WORDS, MODELS, OURS, TRANSFORMERS
from benchmarks.tensor.model import SHAPES, needed_bytes
from benchmarks.tensor.ranks import Timed, missing_peer, peak_bytes, timed_steps
from shardwise.errors import LaunchError
from shardwise.launch import RankPool, RankStarter

__all__ = ["main"]

FULL = {("decoder", "256"): 120, ("decoder", "512"): 60, ("decoder", "1024"): 25, ("llama", "512"): 60}
QUICK = {("decoder", "64"): 20, ("decoder", "256"): 20, ("llama", "64"): 20}
FIGURES = {
    "h256_vs_dtensor": ("decoder", "256", (DTENSOR,)),
    "h512_vs_dtensor": ("decoder", "512", (DTENSOR,)),
    "h1024_vs_dtensor": ("decoder", "1024", (DTENSOR,)),
    "h512_vs_transformers": ("llama", "512", (TRANSFORMERS,)),
    "h512_vs_megatron": ("decoder", "512", (MEGATRON, MEGATRON_WORDS)),
}
PRELOAD = (
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "shardwise.execute.assemble",
)

Case = tuple[str, str]  # model, shape
Measured = Mapping[str, Sequence[Timed]]  # contender -> of its two ranks
Peaks = Mapping[
    str, Sequence[tuple[int, int, int]]
]  # contender -> of its two ranks: peak, before the model, while made


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, not the figures")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="only these")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="only these; the others' figures are null")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a busy machine; at least three")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    rounds = {
        (model, shape): max(3, round(number * options.share))
        for (model, shape), number in (QUICK if options.quick else FULL).items()
        if (options.models is None or model in options.models) and (options.shapes is None or shape in options.shapes)
    }
    with RankStarter(preload=PRELOAD) as starter:
        missed = _missed(starter, {model for model, _ in rounds})
        for name, reason in missed.items():
            print(f"missed: {name}: {reason}")
        names = {model: [name for name in MODELS[model][1] if name not in missed] for model in MODELS}
        measured = {case: _measured(starter, case, names[case[0]], number) for case, number in rounds.items()}
        memory_case = [case for case in rounds if case[0] == "decoder" or len(rounds) == 1][-1:]
        memory = {name: _memory(starter, case, name) for case in memory_case for name in names[case[0]]}
    figures = _figures(measured, memory)
    record: dict[str, Any] = {
        **_circumstances(),
        "rounds": {"/".join(case): number for case, number in rounds.items()},
        "missed": missed,
        "figures": figures,
        "ratios": {"/".join(case): {peer: _ratio(of, peer) for peer in of} for case, of in measured.items()},
        "medians_s": {"/".join(case): {name: _median(of, name) for name in of} for case, of in measured.items()},
        "bytes_per_step": {
            "/".join(case): {name: dict(ranks[0].nbytes) for name, ranks in of.items()} for case, of in measured.items()
        },
        "memory_bytes": {"case": ["/".join(case) for case in memory_case], **memory},
    }
    output = options.output or _file(record["date"], quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for case in memory_case:
        print(f"peak resident set of the ranks, {' '.join(case)} (MiB; rise over no model; peak until then)")
    for name, peaks in memory.items():
        print(f"  {name:20}", "  ".join(_mebibytes(*peak) for peak in peaks))
    print(f"written to {output}")
    print(json.dumps(figures))


def _missed(starter: RankStarter, models: set[str]) -> dict[str, str]:
    """Peers that cannot take a step, each tried in ranks of its own: what it breaks breaks nobody else."""
    missed: dict[str, str] = {}
    for model in sorted(models):
        for name in MODELS[model][1]:
            if name != OURS:
                with RankPool(2, num_threads=1, starter=starter) as pool:
                    try:
                        reason = pool.run(missing_peer, model, name, SHAPES["64"], timeout_s=120)[0]
                    except LaunchError as error:
                        reason = str(error).splitlines()[0]
                if reason is not None:
                    missed[name] = reason
    return missed


def _measured(starter: RankStarter, case: Case, names: Sequence[str], rounds: int) -> Measured:
    model, shape = case
    with RankPool(2, num_threads=1, starter=starter) as pool:
        ranks = pool.run(timed_steps, model, names, SHAPES[shape], rounds, timeout_s=1800)
    measured = {name: [rank[name] for rank in ranks] for name in names}
    print(f"{model} {shape}: median of {rounds} steps; {OURS} / it, median of rounds; bytes of a step by axis")
    for name, of in measured.items():
        axes = ", ".join(f"{axis} {count:,}" for axis, count in of[0].nbytes.items())
        print(f"  {name:20} {_median(measured, name) * 1e3:9.2f} ms  {_ratio(measured, name):6.3f}  {axes}", flush=True)
    print(f"  {'blocks alone need':20} {'':9}     {'':6}  tensor {needed_bytes(SHAPES[shape]):,}", flush=True)
    return measured


def _memory(starter: RankStarter, case: Case, name: str) -> list[tuple[int, int, int]]:
    with RankPool(2, num_threads=1, starter=starter) as pool:
        return pool.run(peak_bytes, case[0], name, SHAPES[case[1]], timeout_s=600)


def _mebibytes(peak: int, before: int, making: int) -> str:
    return f"{peak / 2**20:7.1f} (+{(peak - before) / 2**20:.1f}; {making / 2**20:.1f})"


def _steps(measured: Measured, name: str) -> list[float]:
    """Seconds of each step: those of the slower rank."""
    return [max(pair) for pair in zip(*(rank.seconds for rank in measured[name]), strict=True)]


def _median(measured: Measured, name: str) -> float:
    return statistics.median(_steps(measured, name))


def _ratio(measured: Measured, peer: str) -> float:
    """The median of ours / theirs, step by step."""
    pairs = zip(_steps(measured, OURS), _steps(measured, peer), strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 4)


def _figures(measured: Mapping[Case, Measured], memory: Peaks) -> dict[str, float | None]:
    """What the last line says; None for what was not measured."""
    figures: dict[str, float | None] = {
        key: max((_ratio(of, peer) for peer in peers if peer in of), default=None)
        for key, (model, shape, peers) in FIGURES.items()
        for of in [measured.get((model, shape), {})]
    }
    both = [of for of in measured.values() if MEGATRON_WORDS in of]
    figures["bytes_vs_megatron"] = max(
        (round(of[OURS][0].nbytes["tensor"] / of[MEGATRON_WORDS][0].nbytes["tensor"], 4) for of in both), default=None
    )
    for peer, name in (("dtensor", DTENSOR), ("megatron", MEGATRON_WORDS)):
        pairs = zip(memory[OURS], memory[name], strict=True) if name in memory else ()
        figures[f"peak_memory_vs_{peer}"] = max((round(ours[0] / theirs[0], 4) for ours, theirs in pairs), default=None)
    return figures


def _circumstances() -> dict[str, Any]:
    cores = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "-m", "benchmarks.tensor", *sys.argv[1:]]),
        "machine": f"{len(cores)} x {cores[0].partition(': ')[2] if cores else platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
