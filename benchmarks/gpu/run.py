"""Runs the contenders in turn, each in a process of its own, and prints tokens a second, MFU and peak memory.

Without a GPU it says so, writes that down, and ends well; `--quick` then still takes every path on the CPU, at tiny
sizes and without compiling to machine code, whose seconds say nothing. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.circumstances import circumstances
from benchmarks.gpu.shapes import SHAPES, peak_flops

__all__ = ["figures", "main"]

WARM_UP = 5  # steps in which graphs are compiled and memory is taken
NEEDS = {"trainer": "accelerate", "ours_float8": "torchao"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", "--tiny", action="store_true", help="a tiny model, few steps: on the CPU as well")
    parser.add_argument("--shapes", nargs="+", choices=("1b", "3b"), default=("1b", "3b"))
    parser.add_argument("--only", nargs="+", choices=("ours", "plain", "trainer", "ours_float8"))
    parser.add_argument("--steps", type=int, default=20, help=f"of every contender and round, after {WARM_UP}")
    parser.add_argument("--rounds", type=int, default=2, help="every contender runs in turn, so many times")
    parser.add_argument("--backend", help='of torch.compile; "inductor" if not given, "eager" with --quick')
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    record: dict[str, Any] = {**circumstances("benchmarks.gpu"), "gpu": _gpu(), "shapes": {}}
    if not has_gpu and not options.quick:
        record["note"] = "there is no GPU here: nothing was measured"
        _write(options, record)
        print(record["note"])
        print(json.dumps({"gpu": None}))
        return
    for shape in ("tiny",) if options.quick else options.shapes:
        record["shapes"][shape] = _compared(options, shape, "cuda" if has_gpu else "cpu")
        _write(options, record)
    told = {shape: figures(shape, found, record["gpu"]) for shape, found in record["shapes"].items()}
    for shape, found in told.items():
        print(_table(shape, record["shapes"][shape], found))
    print(json.dumps({"gpu": record["gpu"], **told}))


def figures(shape: str, found: Mapping[str, Any], gpu: str | None) -> dict[str, Any]:
    """Of every contender: tokens a second and MFU by its median step, peak memory; and ours over the best other."""
    sizes = SHAPES[shape]
    peak = None if gpu is None else peak_flops(gpu)
    told: dict[str, Any] = {}
    for name, runs in found["runs"].items():
        if not runs:
            continue
        seconds = statistics.median([each for run in runs for each in run["seconds"][found["warm_up"] :]])
        rate = sizes.tokens / seconds
        told[name] = {
            "tokens_per_s": rate,
            "mfu": None if peak is None else rate * sizes.flops_a_token / peak,
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "step_s": seconds,
            "first_loss": runs[0]["losses"][0],
            "last_loss": runs[0]["losses"][-1],
        }
    others = [told[name]["tokens_per_s"] for name in ("plain", "trainer") if name in told]
    if "ours" in told and others:
        told["ours_vs_best"] = told["ours"]["tokens_per_s"] / max(others)
    return told


def _compared(options: argparse.Namespace, shape: str, device: str) -> dict[str, Any]:
    steps, warm_up = (3, 1) if options.quick else (options.steps, WARM_UP)
    backend = options.backend or ("eager" if options.quick else "inductor")
    wanted = list(options.only or ("ours", "plain", "trainer", "ours_float8"))
    missing = {name: f"{NEEDS[name]} is not installed" for name in wanted if name in NEEDS and not _has(NEEDS[name])}
    if device == "cpu" and "ours_float8" in wanted:
        missing["ours_float8"] = "float8 needs a GPU"
    runs: dict[str, list[Any]] = {name: [] for name in wanted if name not in missing}
    for number in range(1 if options.quick else options.rounds):
        order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in order:
            run = _run(name, shape, device, backend, steps + warm_up)
            if "error" in run:
                missing[name] = run["error"]
                runs.pop(name)
            else:
                runs[name].append(run)
    return {"runs": runs, "missing": missing, "warm_up": warm_up, "backend": backend}


def _run(name: str, shape: str, device: str, backend: str, steps: int) -> dict[str, Any]:
    """One contender in a process of its own; what went wrong is in `error`."""
    command = [sys.executable, "-m", "benchmarks.gpu.contenders", name, "--shape", shape, "--device", device]
    command += ["--backend", backend, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def _table(shape: str, found: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    lines = [f"{shape}: {SHAPES[shape].tokens:,} tokens a step, backend {found['backend']}"]
    for name, row in told.items():
        if name == "ours_vs_best":
            lines.append(f"  ours / the best other: {row:.3f}")
            continue
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.3f}"
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines.append(
            f"  {name:12s} {row['tokens_per_s']:12,.0f} tokens/s{mfu}  peak {memory}  loss {row['last_loss']:.4f}"
        )
    lines += [f"  {name:12s} not measured: {why}" for name, why in found["missing"].items()]
    return "\n".join(lines)


def _gpu() -> str | None:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _has(package: str) -> bool:
    return find_spec(package) is not None


def _write(options: argparse.Namespace, record: Mapping[str, Any]) -> None:
    day = str(record["date"])[:16].replace(":", "")
    output = options.output or Path(__file__).parent / "results" / f"{day}{'-quick' if options.quick else ''}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
