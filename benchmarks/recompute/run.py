"""Bytes that a rank keeps between forward and backward, and the time of a step, by how it keeps less.

All ways run one after another in this process. Prints a table, writes the results, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.circumstances import circumstances
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.layout import Layout

__all__ = ["main"]

WAYS = (
    "recompute=none",
    "recompute=selective",
    "recompute=full",
    "recompute=24MiB",
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
    "full": Shape(hidden=256, layers=4, tokens=256, samples=2, steps=3),
    "quick": Shape(hidden=64, layers=2, tokens=32, samples=2, steps=2),
}


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of what was made inside and is still there."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = [each for p in model.parameters() for each in (p, p.grad) if each is not None]
        self._before = {each.untyped_storage()._cdata for each in held}  # views of them are made inside
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, list | tuple) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                known = self._made.get(storage._cdata)
                if known is None or known[0].expired():  # type: ignore[no-untyped-call]
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._made[storage._cdata] = weak, storage.nbytes()
        return out

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        made = [pair for key, pair in self._made.items() if key not in self._before]
        return sum(n for storage, n in made if not storage.expired())  # type: ignore[misc, no-untyped-call]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model: shows that it runs, not the figures")
    parser.add_argument("--output", type=Path, help="a file for the results, instead of one in results/")
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else "full"
    record: dict[str, Any] = {**circumstances("benchmarks.recompute"), "shape": dataclasses.asdict(SHAPES[name])}
    record["ways"] = {way: _measured(SHAPES[name], way) for way in WAYS}
    print(_table(record["ways"]))
    file = options.output or Path(__file__).parent / "results" / f"{record['date'][:10]}{'-quick' * options.quick}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({way: found["kept_bytes"] for way, found in record["ways"].items()}))


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
    wall: list[float] = []
    processor: list[float] = []
    for step in range(1, shape.steps + 1):
        start, used = time.perf_counter(), time.process_time()
        program.step(parts, step=step)
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    with Alive(model) as alive:
        watched.append(alive)
        result = program.step(parts, step=99)
    program.close()
    return {
        "kept_bytes": told[-1],
        "step_s": statistics.median(wall),
        "processor_s": statistics.median(processor),
        "loss": result.loss,
    }


def _table(ways: dict[str, dict[str, Any]]) -> str:
    first = ways[WAYS[0]]
    lines = [f"{'':42} {'kept':>10} {'processor':>10} {'of none':>8}"]
    for way, found in ways.items():
        kept = f"{found['kept_bytes'] / 2**20:.1f} MiB"
        share = found["processor_s"] / first["processor_s"]
        lines.append(f"{way:42} {kept:>10} {found['processor_s']:>8.3f} s {share:>8.2f}")
    return "\n".join(lines)
