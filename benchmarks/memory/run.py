"""Trains one step of a large model from a factory and from safetensors, prints what every process took, writes the
results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.memory.model import QUICK, TINY_LLAMA, Shape, save_model, written_run
from benchmarks.memory.stages import Needs, needs_of_stages
from benchmarks.memory.watch import Watched, watched_command
from shardwise.layout import StageRule
from shardwise.train.run_file import load_run

__all__ = ["main"]

SOURCES = ("factory", "safetensors")
TIMEOUT_S = 900
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run of `shardwise train`: its loss, and its processes; ranks in their order."""

    loss: float
    launcher: Watched
    zygote: Watched
    ranks: tuple[Watched, ...]
    held_parameters: tuple[int, ...]  # elements that each rank says it holds
    peaks: tuple[int, ...]  # bytes: what each rank's kernel told it at its end


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs, not the figures")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES, help="only these")
    parser.add_argument("--balance", type=StageRule, choices=tuple(StageRule), default=StageRule.PARAMETERS)
    parser.add_argument("--samples", action="store_true", help="keep every look at every rank in the results")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    shape = QUICK if options.quick else TINY_LLAMA
    with tempfile.TemporaryDirectory() as folder:
        cases = {source: _case(shape, source, Path(folder) / source, options.balance) for source in options.sources}
        needs = needs_of_stages(load_run(Path(folder) / options.sources[0] / "run.toml"))
    losses = {case.loss for case in cases.values()}
    assert len(losses) == 1, f"the same weights have one loss, but it is {losses}"
    for case in cases.values():
        held = [stage.num_parameters for stage in needs]
        assert list(case.held_parameters) == held, f"ranks hold {case.held_parameters}, their stages have {held}"
    figures = _figures(cases, needs)
    record: dict[str, Any] = {
        **_circumstances(),
        "shape": dataclasses.asdict(shape),
        "stages_balanced_by": options.balance,
        "figures": figures,
        "needs_bytes": [dataclasses.asdict(stage) for stage in needs],
        "cases": {source: _told(case, samples=options.samples) for source, case in cases.items()},
    }
    output = options.output or _file(record["date"], quick=options.quick)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for source, case in cases.items():
        _show(source, case, needs)
    print(f"written to {output}")
    print(json.dumps(figures))


def _case(shape: Shape, source: str, folder: Path, balance: StageRule) -> Case:
    """The command of the command line, watched from outside; nothing is added to its processes."""
    folder.mkdir(parents=True)
    run_file, weights = folder / "run.toml", folder / "weights"
    run_file.write_text(written_run(shape, folder / "run", balance=balance))
    if source == "safetensors":
        save_model(load_run(run_file), weights)
        run_file.write_text(written_run(shape, folder / "run", weights=weights, balance=balance))
    run = load_run(run_file)
    _, watched = watched_command([sys.executable, "-m", "shardwise.cli", "train", str(run_file)], timeout_s=TIMEOUT_S)
    events = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(run.events_folder.iterdir())
    ]
    told = [{event["kind"]: event["data"] for event in events_of_rank} for events_of_rank in events]
    ranks = tuple(watched.pop(data["start"]["pid"]) for data in told)
    launcher, *others = watched.values()
    return Case(
        loss=told[0]["step"]["loss"],
        launcher=launcher,
        zygote=next(process for process in others if "shardwise.launch.zygote" in process.command),
        ranks=ranks,
        held_parameters=tuple(data["start"]["held_parameters"] for data in told),
        peaks=tuple(data["end"]["peak_bytes"] for data in told),
    )


def _figures(cases: Mapping[str, Case], needs: Sequence[Needs]) -> dict[str, float]:
    """The worst rank of every ratio."""
    figures: dict[str, float] = {}
    for source, case in cases.items():
        pairs = list(zip(case.ranks, case.peaks, needs, strict=True))
        figures[f"memory_ratio_{source}"] = round(max(peak / stage.total for _, peak, stage in pairs), 4)
        figures[f"memory_ratio_private_{source}"] = round(
            max(rank.peak_own / stage.total for rank, _, stage in pairs), 4
        )
    figures["launcher_gib"] = round(max(case.launcher.peak_resident for case in cases.values()) / GIB, 4)
    return figures


def _show(source: str, case: Case, needs: Sequence[Needs]) -> None:
    print(f"{source}: loss {case.loss:.6f}; GiB")
    print("  process    must hold  parameters gradients activations │ resident  ratio │   own  ratio │ private")
    for rank, (watched, peak, stage) in enumerate(zip(case.ranks, case.peaks, needs, strict=True)):
        own = watched.peak_own
        gradients, activations = stage.gradients / GIB, stage.activations / GIB
        print(
            f"  rank {rank}        {stage.total / GIB:7.3f}     {stage.parameters / GIB:7.3f}   {gradients:7.3f}"
            f"     {activations:7.3f} │  {peak / GIB:7.3f} {peak / stage.total:6.3f} │"
            f" {own / GIB:5.3f} {own / stage.total:6.3f} │ {watched.peak_private / GIB:7.3f}"
        )
    for name, process in (("launcher", case.launcher), ("zygote", case.zygote)):
        print(
            f"  {name:52} │  {process.peak_resident / GIB:7.3f}        │ {process.peak_own / GIB:5.3f}        │"
            f" {process.peak_private / GIB:7.3f}"
        )


def _told(case: Case, *, samples: bool) -> dict[str, Any]:
    processes = {
        "launcher": case.launcher,
        "zygote": case.zygote,
        **{f"rank {rank}": process for rank, process in enumerate(case.ranks)},
    }
    told: dict[str, Any] = {"loss": case.loss, "rank_peak_resident": case.peaks}
    for name, process in processes.items():
        told[name] = {
            "peak_resident": process.peak_resident,
            "peak_own": process.peak_own,
            "peak_private": process.peak_private,
        }
        if samples:
            told[name]["samples"] = [dataclasses.astuple(sample) for sample in process.samples]
    return told


def _circumstances() -> dict[str, Any]:
    cores = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "-m", "benchmarks.memory", *sys.argv[1:]]),
        "machine": f"{len(cores)} x {cores[0].partition(': ')[2] if cores else platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _file(date: str, *, quick: bool) -> Path:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{date[:19].replace(':', '')}{'-quick' if quick else ''}.json"
