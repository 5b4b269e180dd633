"""Trains every contender on ranks of this machine, in turn; prints a table, writes results, ends with a line of JSON.

    python -m benchmarks.asynchronous [--begin 320] [--steps 320] [--only 0 1 2] [--resume FILE]

What is written is complete after every contender: `--resume FILE` goes on where a run was ended, if the folder
`--runs` of that run is there too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.asynchronous.setting import COMMON, CONTENDERS, DEMO, QUICK, REFERENCE, SMALL, Contender
from benchmarks.common.circumstances import circumstances
from shardwise.events import MemorySink, read_events
from shardwise.train.run import train

__all__ = ["figures", "main", "table"]

_LAST = 20  # steps whose mean is the training loss at the end


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.asynchronous", description=__doc__)
    parser.add_argument("--begin", type=int, default=320, help="steps that all have in common, synchronous")
    parser.add_argument("--steps", type=int, default=320, help="steps behind these")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CONTENDERS)), help="numbers of contenders")
    parser.add_argument("--small", action="store_true", help="the model of the search instead of the demo's")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a vocabulary of 512")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    parser.add_argument("--resume", type=Path, help="results of a run that was ended: contenders in it are kept")
    parser.add_argument("--runs", type=Path, help="a folder for the runs that is kept, for --resume")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {
        **circumstances("benchmarks.asynchronous"),
        "begin": options.begin,
        "steps": options.steps,
        "runs": {},
    }
    if options.resume is not None:
        record["runs"] = json.loads(options.resume.read_text())["runs"]
    written = Path(__file__).parent / "results" / f"{record['date'][:10]}{'-small' if options.small else ''}.json"
    output = options.output or options.resume or written
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        for contender in (CONTENDERS[number] for number in options.only):
            if contender.name not in record["runs"]:
                record["runs"][contender.name] = _trained(contender, options, folder)
                record["figures"] = figures(record["runs"])
                output.write_text(json.dumps(record, indent=1) + "\n")
                print(table(record["runs"]), flush=True)
    print(f"written to {output}")
    print(json.dumps(figures(record["runs"])))


def _trained(contender: Contender, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The curves behind the common start, and the bytes that rank 0 sent there."""
    own = folder / contender.name.replace(" ", "-").replace(",", "")
    resumed = contender.name != REFERENCE
    if resumed:
        _take_start(folder / REFERENCE.replace(" ", "-").replace(",", ""), own, step=options.begin)
    overrides = [
        f"layout=dp={contender.num_workers},micro_batches=1",
        f"training.steps={options.begin + options.steps}",
        f"training.evaluate_every={max(1, options.steps // 10)}",
        *COMMON,
        *(SMALL if options.small else ()),
        *(QUICK if options.quick else ()),
        *contender.overrides,
    ]
    places = [f"folder={own}", f"task.cache={folder / 'data'}", f"checkpoint.every={options.begin}"]
    train(DEMO, overrides=[*overrides, *places], resume=resumed, progress=MemorySink())
    events = [event for event in read_events(own / "events") if not event.rank and (event.step or 0) >= options.begin]
    steps: list[Mapping[str, Any]] = [event.data for event in events if event.kind == "step"]
    return {
        "num_workers": contender.num_workers,
        "overrides": overrides,
        "losses": [step["loss"] for step in steps],
        "held_out": [[(event.step or 0) + 1, event.data["loss"]] for event in events if event.kind == "evaluation"],
        "sent_bytes": sum(step["sent_bytes"].get(kind, 0) for step in steps for kind in _SUMS),
        "tokens": sum(step["weight"] for step in steps),
        "median_step_s": sorted(step["step_s"] for step in steps)[len(steps) // 2],
    }


_SUMS = ("dp.all_reduce", "dp.exchange")


def _take_start(reference: Path, own: Path, *, step: int) -> None:
    """The reference's checkpoint of the common start, where a run looks for its own."""
    folder = own / "checkpoints"
    shutil.rmtree(own, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(reference / "checkpoints" / f"step_{step}", folder / f"step_{step}")
    (folder / "latest").write_text(f"step_{step}\n")


def figures(runs: Mapping[str, Any]) -> dict[str, float]:
    """Bytes saved and loss against the reference, by contender."""
    if REFERENCE not in runs:
        return {}
    reference, found = runs[REFERENCE], {}
    for name, run in runs.items():
        if name != REFERENCE:
            short = name.lower().replace(",", "").replace(" ", "_")
            found[f"{short}_fewer_bytes"] = round(reference["sent_bytes"] / run["sent_bytes"], 2)
            found[f"{short}_held_out_loss"] = round(run["held_out"][-1][1] / reference["held_out"][-1][1], 4)
            found[f"{short}_training_loss"] = round(_end(run) / _end(reference), 4)
    return found


def table(runs: Mapping[str, Any]) -> str:
    """Markdown: one row a contender."""
    rows = [
        "| | held-out loss | training loss, last 20 steps | MB that a rank sends | fewer bytes | tokens |",
        "|---|---|---|---|---|---|",
    ]
    reference = runs.get(REFERENCE)
    for name, run in runs.items():
        fewer = reference["sent_bytes"] / run["sent_bytes"] if reference else float("nan")
        loss, end = run["held_out"][-1][1], _end(run)
        more = f" ({loss / reference['held_out'][-1][1] - 1:+.1%})" if reference and run is not reference else ""
        sent = run["sent_bytes"] / 1e6
        rows.append(f"| {name} | {loss:.3f}{more} | {end:.3f} | {sent:,.0f} | {fewer:.1f}× | {run['tokens']:,.0f} |")
    return "\n".join(rows)


def _end(run: Mapping[str, Any]) -> float:
    last = run["losses"][-_LAST:]
    return float(sum(last) / len(last))
