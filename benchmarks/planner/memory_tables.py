"""The same functions against other published tables of memory, nothing fitted: layers of Galvatron's profiles, figure 1
of Korthikanti et al. (arXiv:2205.05198), table 1 of the ZeRO paper (arXiv:1910.02054), Zero Bubble's peaks
(arXiv:2401.10241).

    python -m benchmarks.planner.memory_tables FOLDER

FOLDER holds galvatron_memory_profiles.csv, korthikanti_2022_memory_fig1.csv, zero_paper_table1.csv and a table in the
schema of measurements.csv. Prints a line a quantity: how many, median and worst error.
"""

from __future__ import annotations

import csv
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.planner.activations import Keeps, block_bytes
from benchmarks.planner.memory_cases import held_of
from benchmarks.planner.memory_fit import MemoryFit, measured_place
from benchmarks.planner.rows import read_rows
from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import Stack
from shardwise.layout import Layout
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.memory import memory_lines
from shardwise.plan.stage_work import StageWork

__all__ = ["Compared", "galvatron", "korthikanti", "zero_bubble", "zero_table"]

MIB = float(2**20)
_OTHER_LAYER = 0.05
_FFN = {4096: 11008, 5120: 13824}  # of LLaMA, by hidden size (Touvron et al. 2023)
Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """Predicted over measured, less 1, of one quantity of one table."""

    quantity: str
    errors: tuple[float, ...]

    def __str__(self) -> str:
        sizes = np.abs(self.errors)
        return f"{self.quantity:64s} {len(sizes):4d} rows, median {np.median(sizes):6.1%}, worst {np.max(sizes):6.1%}"


def galvatron(rows: Sequence[Row]) -> list[Compared]:
    """What a layer adds to states and to activations: the difference of profiles that differ in one layer. Those whose
    states show that their layer is another (half of one, a wider one) are left out."""
    states: list[float] = []
    kept: dict[str, list[float]] = {}
    for few, many in _one_layer_apart(rows):
        shard = _galvatron_shard(few)
        if shard is None:
            continue
        held = float(many["model_states_MiB_after_backward"]) - float(few["model_states_MiB_after_backward"])
        apart = _layer_states(shard, int(few["dp"])) / MIB / held - 1
        if abs(apart) > _OTHER_LAYER:
            continue
        states.append(apart)
        recompute = "full" if few["recompute_full"] == "1" else "none"
        stack = Stack(name="Galvatron", dropout=shard.arch.mats == 2)
        predicted = block_bytes(shard, stack, recompute=recompute, keeps=Keeps(gate=8)) / MIB
        measured = float(many["activation_MiB_after_forward"]) - float(few["activation_MiB_after_forward"])
        kind = f"recompute {recompute}, {'tokens divided' if shard.sp else 'tokens whole'}"
        kept.setdefault(kind, []).append(predicted / measured - 1)
    found = [Compared(quantity="Galvatron: states a layer (ZeRO-3)", errors=tuple(states))]
    named = sorted(kept.items())
    return found + [Compared(quantity=f"Galvatron: activations a layer, {k}", errors=tuple(v)) for k, v in named]


def korthikanti(rows: Sequence[Row]) -> list[Compared]:
    """Activations of the first stage: layers of a stage times micro-batches in flight, without parallel tokens and
    recomputation, and with tokens divided and attention computed again."""
    kept: dict[str, list[float]] = {}
    stack = Stack(name="Megatron-LM", fused_attention=False, dropout=True)
    for row in rows:
        layers, pp, chunks = int(row["layers"]), int(row["pp"]), int(row["vpp"])
        hidden, heads = int(row["hidden"]), int(row["heads"])
        arch = Architecture(
            layers=layers,
            hidden=hidden,
            ffn=4 * hidden,
            mats=2,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            vocab=int(row["vocab"]),
            tied=True,
        )
        shard = Shard(
            arch=arch,
            samples=int(row["micro_batch"]),
            sequence=int(row["seq_len"]),
            whole=int(row["seq_len"]),
            tp=int(row["tp"]),
            cp=1,
            ep=1,
            sp=row["sp"] == "1",
        )
        recompute = row["recompute"]
        in_flight = layers * (1 + (pp - 1) / (pp * chunks) if chunks > 1 else 1)
        predicted = in_flight * block_bytes(shard, stack, recompute=recompute, keeps=Keeps()) / 2**30
        kept.setdefault(recompute, []).append(predicted / float(row["activations_gib"]) - 1)
    return [Compared(quantity=f"Korthikanti figure 1: activations, {k}", errors=tuple(v)) for k, v in kept.items()]


def zero_table(rows: Sequence[Row]) -> list[Compared]:
    """Bytes of states by `plan.memory`."""
    errors: list[float] = []
    job = Job(global_batch=1, per_parameter=PerParameter(parameter=2, gradient=2, master=4, optimizer=8))
    for row in rows:
        text = row["model_params"]
        parameters = round(float(text[:-1]) * {"B": 1e9, "T": 1e12}[text[-1]])
        found = re.search(r"ZeRO-(\d)", row["stage"])
        if not found or row["optimizer_k"] != "12":
            continue
        stage = StageWork(stage=0, parameters=parameters, trained=parameters, kernels=(), saved_bytes=0)
        layout = Layout(fsdp=int(row["dp"]), zero=int(found.group(1)))
        lines = memory_lines([stage], layout, job, num_micro_batches=1, in_flight=[1])
        errors.append(lines.total / 1e9 / float(row["model_state_gb_per_device"]) - 1)
    return [Compared(quantity="ZeRO table 1: states (2 to 4 printed digits)", errors=tuple(errors))]


def zero_bubble(path: Path) -> list[Compared]:
    """Peaks of the fullest rank by schedule, with the formulas as they stand."""
    fit = MemoryFit(values={"framework": 0.0, "activations": 1.0, **dict.fromkeys(_GATHERED, 0.0)})
    kept: dict[str, list[float]] = {}
    for row in read_rows(path):
        if row.file != "zero_bubble_pp.csv" or not row.memory_gib or (held := held_of(row)) is None:
            continue
        schedule = row.schedule.partition(" ")[0]
        kept.setdefault(schedule, []).append(measured_place(held, fit) / 2**30 / row.memory_gib - 1)
    return [Compared(quantity=f"Zero Bubble: peak of {k}", errors=tuple(v)) for k, v in sorted(kept.items())]


_GATHERED = ("gathered", "gathered_staged")
_SAME = ("family", "profile", "tp", "dp", "recompute_full", "vocab_tp", "sp", "global_batch_seqs", "seq_len")


def _one_layer_apart(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Profiles without a pipeline of one layer and of two, all else equal, on the first rank that has both."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["pp"] == "1" and row["layers_profiled"] in ("1", "2"):
            found.setdefault(tuple(row[name] for name in _SAME), {}).setdefault(row["layers_profiled"], row)
    for pair in found.values():
        if len(pair) == 2:
            yield pair["1"], pair["2"]


def _galvatron_shard(row: Row) -> Shard | None:
    """Decoders whose numbers are in the profile's name; None for the others."""
    gated = "llama" in row["family"] + row["profile"]
    if not (gated or row["family"].startswith("gpt")):
        return None
    text = re.search(r"hidden(\d+)_head(\d+)", row["profile"])
    hidden, heads = (int(text.group(1)), int(text.group(2))) if text else (4096, 32)
    named = re.search(r"seqlen(\d+)", row["profile"])
    sequence = int(row["seq_len"] or (named.group(1) if named else 2048))
    arch = Architecture(
        layers=1,
        hidden=hidden,
        ffn=_FFN.get(hidden, 4 * hidden) if gated else 4 * hidden,
        mats=3 if gated else 2,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=1,
        tied=True,
    )
    samples = int(row["global_batch_seqs"]) // int(row["dp"])
    tp = int(row["tp"])
    return Shard(
        arch=arch, samples=samples, sequence=sequence, whole=sequence, tp=tp, cp=1, ep=1, sp=row["sp"] == "1" and tp > 1
    )


def _layer_states(shard: Shard, replicas: int) -> float:
    """Float32 parameters, gradients and AdamW's moments, all divided."""
    parameters = shard.arch.layer_parameters // shard.tp
    stage = StageWork(stage=0, parameters=parameters, trained=parameters, kernels=(), saved_bytes=0)
    layout = Layout(fsdp=replicas, zero=3)
    return memory_lines([stage], layout, Job(global_batch=replicas), num_micro_batches=1, in_flight=[1]).total


def _read(path: Path) -> list[Row]:
    with open(path, newline="") as lines:
        return list(csv.DictReader(lines))


def main() -> None:
    """Prints every comparison."""
    folder = Path(sys.argv[1])
    compared = [
        *galvatron(_read(folder / "galvatron_memory_profiles.csv")),
        *korthikanti(_read(folder / "korthikanti_2022_memory_fig1.csv")),
        *zero_table(_read(folder / "zero_paper_table1.csv")),
        *zero_bubble(folder / "measurements.csv"),
    ]
    for each in compared:
        print(each)


if __name__ == "__main__":
    main()
