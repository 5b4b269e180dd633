"""Bytes that one rank keeps between forward and backward, its peak, and the time of a step, for every way of keeping less.

Each way runs in a process of its own, so that no allocator remembers another one's peak. Prints a table, writes the
results, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.circumstances import circumstances
from benchmarks.common.memory import forget_peak, peak_bytes, resident_bytes
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.layout import Layout

__all__ = ["main"]

WAYS = (
    "recompute=none",
    "recompute=selective",
    "recompute=full",
    "recompute=96MiB",
    "offload=activations",
    "recompute=selective,offload=activations",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A llama, and its batch."""

    hidden: int
    layers: int
    tokens: int
    samples: int
    steps: int


SHAPES = {
    "full": Shape(hidden=384, layers=6, tokens=256, samples=4, steps=6),
    "quick": Shape(hidden=64, layers=2, tokens=32, samples=2, steps=2),
}


class Alive(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Bytes of what was made inside and is still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._made or self._made[storage._cdata][0].expired():
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(nbytes for storage, nbytes in self._made.values() if not storage.expired())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs, not the figures")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    parser.add_argument("--one", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else "full"
    if options.one is not None:
        print(json.dumps(_measured(SHAPES[name], options.one)))
        return
    record: dict[str, Any] = {**circumstances("benchmarks.recompute"), "shape": dataclasses.asdict(SHAPES[name])}
    record["ways"] = {way: _in_a_process(way, options.quick) for way in WAYS}
    print(_table(record["ways"]))
    file = options.output or Path(__file__).parent / "results" / f"{record['date'][:10]}{'-quick' * options.quick}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({way: found["kept_bytes"] for way, found in record["ways"].items()}))


def _in_a_process(way: str, quick: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.recompute", "--one", way, *(["--quick"] if quick else [])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _measured(shape: Shape, way: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=shape.hidden,
            intermediate_size=shape.hidden * 8 // 3,
            num_hidden_layers=shape.layers,
            num_attention_heads=8,
            use_cache=False,
        )
    )
    ids = torch.randint(0, 512, (shape.samples, shape.tokens))
    batch = {"input_ids": ids, "labels": ids}
    told: list[int] = []
    watched: list[Alive] = []

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        value: torch.Tensor = outputs.loss
        if watched:
            value.register_hook(lambda gradient: told.append(watched[0].nbytes))  # type: ignore[no-untyped-call]
        return value

    parts = split(batch, micro_batches=1, replicas=1, weights=lambda part: 1.0)[0]
    program = assemble(model, parts[0].inputs, layout=Layout.parse(way), rank=0, loss=loss)
    program.step(parts, step=0)
    before = resident_bytes()
    forget_peak()
    wall: list[float] = []
    processor: list[float] = []
    for step in range(1, shape.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        program.step(parts, step=step)
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    peak = peak_bytes() - before
    with Alive() as alive:
        watched.append(alive)
        result = program.step(parts, step=99)
    program.close()
    return {
        "kept_bytes": told[-1],
        "peak_bytes": peak,  # of the process, above what it holds between steps
        "step_s": statistics.median(wall),
        "processor_s": statistics.median(processor),
        "loss": result.loss,
    }


def _table(ways: dict[str, dict[str, Any]]) -> str:
    first = ways[WAYS[0]]
    lines = [f"{'':42} {'kept':>10} {'peak':>10} {'processor':>10} {'of none':>8}"]
    for way, found in ways.items():
        kept, peak = (f"{found[name] / 2**20:.1f} MiB" for name in ("kept_bytes", "peak_bytes"))
        share = found["processor_s"] / first["processor_s"]
        lines.append(f"{way:42} {kept:>10} {peak:>10} {found['processor_s']:>8.3f} s {share:>8.2f}")
    return "\n".join(lines)
