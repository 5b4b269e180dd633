"""Measured rows: a table in the schema of `measurements.csv` as typed values. Refuses to know what a row means."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from pathlib import Path

__all__ = ["Row", "read_rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration. What a source does not state is None; texts are as written. Seconds of a step, GiB."""

    file: str
    tier: str
    status: str
    model: str
    family: str
    layers: int | None
    hidden: int | None
    ffn_hidden: int | None
    mlp_mats: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocab: int | None
    tied: bool | None
    seq_len: int | None
    global_batch_seqs: int | None
    micro_batch: int | None
    precision: str
    gpu: str
    n_gpus: int | None
    gpus_per_node: int | None
    tp: int
    pp: int
    vpp: int
    dp: int | None
    cp: int
    ep: int
    zero: str
    sp: bool
    recompute: str
    schedule: str
    step_time_s: float | None
    tokens_per_s_per_gpu: float | None
    memory_gib: float | None
    memory_kind: str
    notes: str

    @property
    def zero_stage(self) -> int:
        """The stage of ZeRO that the row names first ("1 (distributed optimizer)", "ZeRO-3", "zero stage 0/1"), not any
        digit ("DeepSpeed 3D"); 3 of FSDP without one, 0 where it names none."""
        found = re.search(r"(?:^\s*|zero[\s-]*|stage[\s-]*)([0-3])(?!\w)", self.zero, re.IGNORECASE)
        if found:
            return int(found.group(1))
        return 3 if "fsdp" in self.zero.lower() else 0

    @property
    def divided_among(self) -> int | None:
        """Replicas among which state is divided, where not all do so ("3 (FSDP group 128)")."""
        found = re.search(r"group (\d+)", self.zero)
        return int(found.group(1)) if found else None

    @property
    def ends_are_layers(self) -> bool:
        """Whether the notes say that embedding and head count as layers where stages are cut."""
        return "embedding" in self.notes

    @property
    def noted_hidden(self) -> int | None:
        """The hidden size that the notes state."""
        return self._noted(r"hidden (\d+)")

    @property
    def compiled(self) -> bool | None:
        """Whether it was compiled, where the notes say so ("compile=1")."""
        return None if "compile=" not in self.notes else self._noted(r"compile=(\d)") == 1

    @property
    def hides_shards(self) -> bool | None:
        """Whether shards' collectives ran beside their products, where the notes say so ("asyncTP=0")."""
        said = self._noted(r"asyncTP=(\d)")
        return None if said is None else said == 1

    @property
    def in_jax(self) -> bool:
        """Whether the notes name JAX."""
        return "JAX" in self.notes

    def _noted(self, pattern: str) -> int | None:
        found = re.search(pattern, self.notes)
        return int(found.group(1)) if found else None

    @property
    def billions(self) -> float | None:
        """Parameters by the model's name ("GPT-18.4B", "Llama 3.1 70b"), in billions."""
        found = re.findall(r"(\d+(?:\.\d+)?)\s*[bB](?![a-zA-Z])", self.model)
        return float(found[-1]) if found else None


_ONE = ("tp", "pp", "vpp", "cp", "ep")


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """Every row of the table, in its order. Columns that the schema does not have are left out."""
    with open(path, newline="") as lines:
        return tuple(_row(fields) for fields in csv.DictReader(lines))


def _row(fields: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for field in dataclasses.fields(Row):
        text = (fields.get(field.name) or "").strip()
        kind = str(field.type)
        if "int" in kind:
            number = _number(text)
            values[field.name] = None if number is None else int(number)
        elif "float" in kind:
            values[field.name] = _number(text)
        elif "bool" in kind:
            values[field.name] = bool(_number(text)) if text or field.name == "sp" else None
        else:
            values[field.name] = text
    for name in _ONE:
        values[name] = values[name] or 1
    return Row(**values)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
