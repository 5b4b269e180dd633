"""Trains the demo task once for each way to send less, writes the results, ends with a line of JSON.

Every run has the same seed, model and batches. Bytes are those that leave rank 0 in a step behind the first, by the
cheapest algorithm; the loss is that of the last ten steps and, on texts that were not trained on, of the last one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.compression import page
from benchmarks.compression.contenders import CONTENDERS, Contender
from shardwise.comm.collective import KINDS, moved_bytes
from shardwise.events import Event
from shardwise.train.run import train
from shardwise.train.run_file import load_run

__all__ = ["RESULTS", "main"]

RESULTS = Path(__file__).parent / "results" / "demo.json"
DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"
LAST = 10
SMALL = (
    "model.config.hidden_size=96",
    "model.config.intermediate_size=256",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=4",
)


class _Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 64 tokens in a step; the demo has 16")
    parser.add_argument("--small", action="store_true", help="a model of 0.8 M parameters instead of the demo's 6 M")
    parser.add_argument("--quick", action="store_true", help="that model, 20 steps, not published")
    parser.add_argument("--only", nargs="*", help="names such as 'dp=2 int8'; the others stay as they were measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="measure nothing: write docs/compression.md anew")
    options = parser.parse_args(arguments)
    if options.quick:
        options.small, options.steps, options.output = True, 20, RESULTS.with_name("quick.json")
    if options.render:
        page.write(json.loads(options.output.read_text()))
        return
    rows: dict[str, dict[str, Any]] = {}
    if options.only and options.output.exists():
        rows = {row["name"]: row for row in json.loads(options.output.read_text())["rows"]}
    for contender in CONTENDERS:
        if options.only and contender.name not in options.only:
            continue
        row = measured(contender, steps=options.steps, batch=options.batch, small=options.small)
        known = circumstances("benchmarks.compression")
        rows[contender.name] = row | {name: known[name] for name in ("command", "commit", "date")}
        print(
            f"{row['name']:20} {row['bytes'] / 1e6:9.3f} MB a step   loss {row['loss']:.4f}   "
            f"evaluated {row['evaluated']:.4f}",
            flush=True,
        )
        record = {
            **known,
            "task": f"examples/demo.toml with {options.batch} sequences of 64 tokens in a step, {options.steps} steps"
            + (", and a model of 4 layers, width 96 and 0.8 M parameters" if options.small else ""),
            "figures": figures(list(rows.values())),
            "rows": [rows[each.name] for each in CONTENDERS if each.name in rows],
        }
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    if options.output == RESULTS:
        page.write(record)
    print(f"written to {options.output.name}")
    print(json.dumps(record["figures"]))


def measured(contender: Contender, *, steps: int, batch: int, small: bool) -> dict[str, Any]:
    """One run: its losses, and the bytes of a step."""
    kept = _Kept()
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(
            DEMO,
            [
                f"folder={folder}",
                f"layout={contender.layout}",
                f"training.steps={steps}",
                f"training.global_batch={batch}",
                f"training.evaluate_every={steps}",
                "checkpoint.every=0",
                f"communication.gradients={contender.gradients}",
                f"communication.activations={contender.activations}",
                *(SMALL if small else ()),
            ],
        )
        losses = train(run, progress=kept).losses
    told: list[tuple[str, dict[str, Any]]] = [(event.kind, dict(event.data)) for event in kept.events]
    sent: dict[str, int] = [data["sent_bytes"] for kind, data in told if kind == "step"][-1]
    evaluated = [data["loss"] for kind, data in told if kind == "evaluation"]
    return {
        "name": contender.name,
        "layout": contender.layout,
        "gradients": contender.gradients,
        "activations": contender.activations,
        "bytes": wire_bytes(sent, contender.axis),
        "saved": sent.get(f"{contender.axis}.saved", 0),
        "loss": round(statistics.fmean(losses[-LAST:]), 4),
        "evaluated": round(evaluated[-1], 4),
        "curve": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
    }


def wire_bytes(sent: Mapping[str, int], axis: str) -> int:
    """That leave a rank of two."""
    if axis == "pp":
        return sent["pp.send"]
    return moved_bytes({kind: sent.get(f"{axis}.{kind}", 0) for kind in KINDS}, 2)


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of every way to send less: its bytes and its loss, as shares of those of sending everything."""
    found: dict[str, float] = {}
    for row in rows:
        whole = next((each for each in rows if each["layout"] == row["layout"] and each["name"].endswith("none")), None)
        if whole is not None and row is not whole:
            found[f"{row['name']} bytes"] = round(row["bytes"] / whole["bytes"], 4)
            found[f"{row['name']} loss"] = round(row["loss"] / whole["loss"], 4)
    return found
