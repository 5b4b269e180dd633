"""`shardwise probe`: measures this machine, and writes the cluster that plans are made for. Starts ranks."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.probe_table import report
from shardwise.describe.cluster_file import cluster_text
from shardwise.errors import ConfigError
from shardwise.plan.fit_cluster import FittedCluster, fit_cluster
from shardwise.train.probe import default_ranks, probe
from shardwise.train.probe_rank import Thoroughness

__all__ = ["command"]


def command(
    ranks: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Numbers of ranks; as many as cores and twice as many, or all GPUs."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Where to write the cluster.")] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="What computes.")] = "cpu",
    imports: Annotated[
        str, typer.Option("--import", metavar="NAME,NAME", help="What your runs import: it is in their ranks' memory.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A first look: less of everything, in half the time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything that was measured and fitted, as JSON.")] = False,
) -> None:
    """Measure this machine: products by shape and dtype, attention, memory, exchanges by kind, size and group,
    messages, what a program takes for an action and a step, and how much slower ranks are that share cores.

    Prints what was measured, what was fitted with its spread over the rounds, and how far the fit is from what was
    measured. Takes three to four minutes.

    shardwise probe

    shardwise probe --ranks 2,4 --import transformers --out cluster.toml

    shardwise plan run.toml --cluster cluster.toml@4
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"{out} is to be written into a folder that is not there; make {out.parent}")
    counts = default_ranks(device) if ranks is None else tuple(_counts(ranks))
    begun = time.perf_counter()
    how = Thoroughness.quickly() if quick else Thoroughness()
    preload = tuple(filter(None, imports.split(",")))
    tell = _told if sys.stderr.isatty() else _nobody
    measured = probe(counts, device=device, how=how, preload=preload, tell=tell)
    fitted = [fit_cluster(times, on_gpu=device == "cuda") for times in measured]
    passed_s = time.perf_counter() - begun
    if as_json:
        print(json.dumps({"seconds": passed_s, "measured": _plain(measured), "fitted": _plain(fitted)}, indent=1))
    else:
        print(report(measured, fitted, passed_s))
    if out is not None:
        out.write_text(_file(fitted), encoding="utf-8")
        print(f"written to {out}", file=sys.stderr if as_json else sys.stdout)


def _counts(text: str) -> Iterator[int]:
    for each in text.split(","):
        if not each.strip().isdigit() or int(each) < 1:
            raise ConfigError(f"--ranks is numbers of ranks with commas, such as 2,4, but got {text!r}; mend it")
        yield int(each)


def _file(fitted: Sequence[FittedCluster]) -> str:
    several = "The first is taken unless another is asked for: --cluster FILE.toml@RANKS.\n" if len(fitted) > 1 else ""
    clusters = [each.cluster for each in fitted]
    comment = f"Measured by shardwise probe on {time.strftime('%Y-%m-%d')}.\n{several}"
    return cluster_text(clusters if several else clusters[0], comment=comment)


def _plain(value: Any) -> Any:
    return [dataclasses.asdict(each) for each in value]


def _told(what: str) -> None:
    print(f"\r\x1b[K{what} ...", end="", file=sys.stderr, flush=True)


def _nobody(_: str) -> None:
    """Nobody watches."""
