"""Trains the demo task in float32 and in 16 bits, and compares the losses: at the last step, of the last ten, held out.

Every contender sees the same batches in the same order, from the same initial weights. What is written is complete
after every contender: `--resume FILE` goes on where a run was ended. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common.circumstances import circumstances
from shardwise.events import MemorySink
from shardwise.train.run import train

__all__ = ["CONTENDERS", "figures", "main"]

CONTENDERS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "float32": (),
        "bfloat16": ('precision.compute="bfloat16"', "precision.emulate=true"),
        "float16": ('precision.compute="float16"', "precision.emulate=true"),
    }
)
RUN_FILE = Path(__file__).parents[2] / "examples" / "demo.toml"
_LAST = 10  # steps whose mean loss is compared


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of the demo task")
    parser.add_argument("--layout", default="dp=2", help="of every contender")
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="values of the demo to change")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="a small model and few steps, to see that it runs")
    parser.add_argument("--data", type=Path, help="a folder to keep the prepared corpus in")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    parser.add_argument("--resume", type=Path, help="results of a run that was ended: contenders that are there stay")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {**circumstances("benchmarks.precision"), "steps": options.steps, "runs": {}}
    if options.resume is not None:
        record["runs"] = json.loads(options.resume.read_text())["runs"]
    output = options.output or options.resume or _file(record["date"])
    for name in options.only:
        if name not in record["runs"]:
            record["runs"][name] = _trained(options, CONTENDERS[name])
            record["figures"] = figures(record["runs"])
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(figures(record["runs"])))


def figures(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Of every contender its loss over that of float32, minus one: at the last step, of the last ten, held out."""
    if "float32" not in runs:
        return {}
    exact = runs["float32"]
    found: dict[str, float] = {}
    for name, run in runs.items():
        if name == "float32":
            continue
        last, mean = run["losses"][-1] / exact["losses"][-1], _mean(run["losses"]) / _mean(exact["losses"])
        found[f"{name}_last_step"] = last - 1
        found[f"{name}_last_{_LAST}_steps"] = mean - 1
        found[f"{name}_held_out"] = run["held_out"] / exact["held_out"] - 1
        found[f"{name}_time"] = run["step_s"] / exact["step_s"]
        found[f"{name}_skipped_steps"] = run["skipped_steps"]
    return found


def _mean(losses: Sequence[float]) -> float:
    last = losses[-_LAST:]
    return sum(last) / len(last)


def _trained(options: argparse.Namespace, precision: Sequence[str]) -> dict[str, Any]:
    steps = 4 if options.quick else options.steps
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardwise-precision-") as folder:
        overrides = [
            f'folder="{folder}"',
            f'layout="{options.layout}"',
            f"training.steps={steps}",
            f"training.warm_up={min(20, steps)}",
            f"training.evaluate_every={steps}",
            "checkpoint.every=0",
            *options.set,
            *([f'task.cache="{options.data}"'] if options.data is not None else []),
            *(_QUICK if options.quick else ()),
            *precision,
        ]
        sink = MemorySink()
        trained = train(RUN_FILE, overrides=overrides, progress=sink)
    told = {event.kind: event.data for event in sink.events}
    seconds = sorted(float(str(event.data["step_s"])) for event in sink.events if event.kind == "step")
    return {
        "precision": told["start"]["precision"],
        "layout": options.layout,
        "set": options.set,
        "losses": list(trained.losses),
        "held_out": told["evaluation"]["loss"],
        "skipped_steps": told.get("loss_scale", {}).get("skipped_steps", 0),
        "step_s": seconds[len(seconds) // 2],
        "seconds": time.perf_counter() - start,
    }


_QUICK = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=4",
    "model.config.vocab_size=300",
    "task.vocabulary_size=300",
    "task.sequence_length=16",
    "training.global_batch=8",
)


def _file(date: str) -> Path:
    day = date[:16].replace(":", "")
    return Path(__file__).parent / "results" / f"{day}.json"
