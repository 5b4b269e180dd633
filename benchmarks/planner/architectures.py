"""The architecture of a row: what it states, or what its source's other rows and the parameters in its name imply.

Inferred by rule, never by the name of a row's model but for the parameters in it. Refuses to know layouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Architecture

__all__ = ["architecture_of"]

_VOCAB = 50257


def architecture_of(row: Row, others: Sequence[Row] = ()) -> Architecture | None:
    """What the row states, or what its source's other rows and the parameters in its name imply."""
    if row.layers and row.hidden and row.heads and row.vocab:
        head = row.head_dim or row.hidden // row.heads
        return Architecture(
            layers=row.layers,
            hidden=row.hidden,
            ffn=row.ffn_hidden or 4 * row.hidden,
            mats=row.mlp_mats or 2,
            heads=row.heads,
            kv_heads=row.kv_heads or row.heads,
            head_dim=head,
            vocab=row.vocab,
            tied=bool(row.tied),
        )
    return _inferred(row, others) or _completed(row)


def _completed(row: Row) -> Architecture | None:
    """Of a row that states its layers and their size alone: heads of 128 (or 64), GPT-2's vocabulary."""
    if not row.layers or not row.hidden or row.family != "dense":
        return None
    head = row.head_dim or (row.hidden // row.heads if row.heads else 128 if row.hidden % 128 == 0 else 64)
    heads = row.heads or max(1, row.hidden // head)
    return architecture_of(dataclasses.replace(row, heads=heads, head_dim=head, vocab=row.vocab or _VOCAB))


def _inferred(row: Row, others: Sequence[Row]) -> Architecture | None:
    """Of the nearest size among the source's rows that state theirs, with as many layers as give the parameters; a
    hidden size in the notes goes before it."""
    stated = [other for other in others if other.layers and other.hidden and other.vocab and other.file == row.file]
    if row.billions is None or not stated or row.family != "dense":
        return None
    size = row.billions
    alike = [other for other in stated if row.noted_hidden and other.hidden == row.noted_hidden] or stated
    nearest = min(alike, key=lambda other: abs(math.log((other.billions or size) / size)))
    model = architecture_of(nearest)
    if model is None:
        return None
    table = model.vocab * model.hidden * (1 if model.tied else 2)
    layers = max(row.pp, round((size * 1e9 - table) / model.layer_parameters))
    return dataclasses.replace(model, layers=layers)
