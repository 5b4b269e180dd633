"""Runs the parts of the benchmark, prints tables, writes the results, ends with one line of JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.circumstances import circumstances
from benchmarks.context.attention import WAYS, WHOLE, timed_attention
from benchmarks.context.model import SHAPES, Shape
from benchmarks.context.ranks import ONE, Bytes, Timed, bytes_of_steps, same_as_one, timed_steps
from shardwise.launch import RankPool, RankStarter

__all__ = ["main"]

RANKS = 4  # that divide a sequence as many times as long as that of one device
EXCHANGES = ("ring", "ulysses")
ROUNDS = 8
WHATS = ("seconds", "processor")
PRELOAD = ("transformers.models.llama.modeling_llama", "shardwise.execute.assemble")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs, not the figures")
    parser.add_argument("--share", type=float, default=1.0, help="of the rounds, for a busy machine; at least three")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="these parts")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    shape = SHAPES["quick" if options.quick else "full"]
    rounds = max(3, round((3 if options.quick else ROUNDS) * options.share))
    record: dict[str, Any] = {
        **circumstances("benchmarks.context"), "shape": dataclasses.asdict(shape), "rounds": rounds, "figures": {}
    }  # fmt: skip
    output = options.output or _file(record["date"], quick=options.quick)
    with RankStarter(preload=PRELOAD) as starter:
        for name in options.only:
            record[name], figures = PARTS[name](starter, shape, rounds)
            record["figures"] |= figures
            output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {output}")
    print(json.dumps(record["figures"]))


Told = tuple[dict[str, Any], dict[str, float]]


def _memory(starter: RankStarter, shape: Shape, rounds: int) -> Told:
    """The bytes of a step: one device with a sequence, ranks with one as many times as long."""
    with RankPool(1, num_threads=1, starter=starter) as pool:
        alone = pool.run(bytes_of_steps, shape, shape.sequence, ONE, timeout_s=600)[0]
    told: dict[str, Any] = {ONE: dataclasses.asdict(alone)}
    figures: dict[str, float] = {}
    print(f"bytes of a step, MiB: {RANKS} ranks with {RANKS * shape.sequence} tokens, one with {shape.sequence}")
    print(f"  {'':12} {'saved':>9} {'peak':>9} {'resident':>9}")
    print(f"  {ONE:12} {_mebibytes(alone)}", flush=True)
    for way in EXCHANGES:
        with RankPool(RANKS, num_threads=1, starter=starter) as pool:
            pool.run(same_as_one, shape, RANKS * shape.sequence, way, timeout_s=1200)
        with RankPool(RANKS, num_threads=1, starter=starter) as pool:
            ranks = pool.run(bytes_of_steps, shape, RANKS * shape.sequence, way, timeout_s=1200)
        told[way] = [dataclasses.asdict(rank) for rank in ranks]
        for what in ("saved", "peak", "resident"):
            worst = max(getattr(rank, what) for rank in ranks)
            figures[f"{way}_{what}_cp{RANKS}_vs_one"] = round(worst / getattr(alone, what), 4)
        for number, rank in enumerate(ranks):
            print(f"  {way + f' {number}':12} {_mebibytes(rank)}", flush=True)
    return told, figures


def _steps(starter: RankStarter, shape: Shape, rounds: int) -> Told:
    """Steps of the model on two ranks, against one device with the same sequence."""
    sequence = RANKS * shape.sequence
    with RankPool(2, num_threads=1, starter=starter) as pool:
        ranks = pool.run(timed_steps, shape, sequence, (ONE, *EXCHANGES), rounds, timeout_s=1800)
    figures = {f"{way}_step_cp2_vs_one": _ratio(ranks, way, ONE) for way in EXCHANGES}
    figures |= {f"{way}_step_processor_cp2_vs_one": _ratio(ranks, way, ONE, "processor") for way in EXCHANGES}
    _table(f"a step of {sequence} tokens, two ranks", ranks, ONE)
    return {"sequence": sequence, "ranks": _plain(ranks)}, figures


def _attention(starter: RankStarter, shape: Shape, rounds: int) -> Told:
    """Causal attention alone on two ranks."""
    sequence = 2 * RANKS * shape.sequence
    with RankPool(2, num_threads=1, starter=starter) as pool:
        ranks = pool.run(timed_attention, shape, sequence, (WHOLE, *WAYS), rounds, timeout_s=1800)
    _table(f"causal attention over {sequence} tokens, two ranks", ranks, WHOLE)
    pairs = {
        "ring_vs_one": ("ring, zigzag", WHOLE),
        "ulysses_vs_one": ("ulysses, contiguous", WHOLE),
        "zigzag_vs_contiguous": ("ring, zigzag", "ring, contiguous"),
        "ring_vs_ulysses": ("ring, zigzag", "ulysses, contiguous"),
    }
    figures = {f"attention_{name}": _ratio(ranks, *pair) for name, pair in pairs.items()}
    figures |= {f"attention_processor_{name}": _ratio(ranks, *pair, "processor") for name, pair in pairs.items()}
    return {"sequence": sequence, "ranks": _plain(ranks)}, figures


PARTS: Mapping[str, Callable[[RankStarter, Shape, int], Told]] = {
    "memory": _memory,
    "steps": _steps,
    "attention": _attention,
}


Ranks = Sequence[Mapping[str, Timed]]


def _slower(ranks: Ranks, name: str, what: str = "seconds") -> list[float]:
    """Of every round, the seconds of the rank that needed more."""
    return [max(each) for each in zip(*(getattr(rank[name], what) for rank in ranks), strict=True)]


def _ratio(ranks: Ranks, name: str, other: str, what: str = "seconds") -> float:
    """The median over rounds of one / other of the same round."""
    pairs = zip(_slower(ranks, name, what), _slower(ranks, other, what), strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def _table(title: str, ranks: Ranks, base: str) -> None:
    print(f"{title}: medians of the clock and of the busier processor, and of the rounds' ratios to {base}")
    for name in ranks[0]:
        both = [(statistics.median(_slower(ranks, name, w)) * 1e3, _ratio(ranks, name, base, w)) for w in WHATS]
        print(f"  {name:20}", "   ".join(f"{ms:9.1f} ms {ratio:6.3f}" for ms, ratio in both), flush=True)


def _plain(ranks: Ranks) -> list[dict[str, Any]]:
    return [{name: dataclasses.asdict(timed) for name, timed in rank.items()} for rank in ranks]


def _mebibytes(told: Bytes) -> str:
    return " ".join(f"{value / 2**20:9.2f}" for value in (told.saved, told.peak, told.resident))


def _file(date: str, *, quick: bool) -> Path:
    stamp = date.partition("+")[0].replace(":", "")
    return Path(__file__).parent / "results" / f"{'quick-' if quick else ''}{stamp}.json"
