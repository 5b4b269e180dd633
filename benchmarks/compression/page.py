"""docs/compression.md and its plots, from the results alone. Knows files and words; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.curves import curves_svg

__all__ = ["PAGE", "PLOTS", "page", "plots", "write"]

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "compression.md"
PLOTS = DOCS / "compression"

_HEAD = """\
# Compressed communication

```toml
[communication]
gradients   = "powersgd:4"    # "none", "bf16", "fp16", "int8", "powersgd:R", "topk:F"
activations = "int8"          # "none", "bf16", "fp16", "int8"
```

`gradients` is how replicas sum their gradients (`dp`, and `fsdp`, whose parts are of such sums), `activations` how
values and their gradients cross between the stages of a pipeline. Each is a wrapper around what moves the bytes
(`comm/compress/`, one file each), so all of them work through shared memory, gloo, NCCL, rings, trees and two levels.
What is summed over shards (`tp`), contexts (`cp`), experts (`ep`) or weights that stages share travels as it is.

| `gradients`  | what travels                                                            | what is left out           |
|--------------|-------------------------------------------------------------------------|----------------------------|
| `bf16`       | 16 bits: float32's range, 8 bits of precision                           | is lost                    |
| `fp16`       | 16 bits: 11 bits of precision, largest number 65504                     | is lost                    |
| `int8`       | 8 bits and a scale for every 256 numbers; twice: parts, then their sums | is added to the next step  |
| `powersgd:R` | two matrices of rank R for each that gets smaller so, the rest whole    | is added to the next step  |
| `topk:F`     | the fraction F that is largest, with its places                         | is added to the next step  |

What is promised: every rank ends a sum with the same bits, so weights of replicas stay equal. With error feedback what
a run has applied and what is left on its ranks is, to rounding, what there was: a test adds both up. A sum that is not
finite is finite on no rank, and what was not finite is not left for the next step. Not promised is the curve of an
uncompressed run; the table shows how near one comes. What is left is no part of a checkpoint: a run that resumes starts
with nothing left. It takes as much memory as the gradients (in float32, on every rank, also under `fsdp`), and does not
go together with a dynamic loss scale, which changes between two steps. Gathers of parameters (`fsdp`) are never
compressed.

Papers: PowerSGD, Vogels et al. 2019 (arXiv:1905.13727); the largest numbers, Lin et al. 2018 (arXiv:1712.01887, without
its corrections of momentum) and Stich et al. 2018 (arXiv:1809.07599); both directions of int8, Tang et al. 2019
(arXiv:1905.05957), its blocks, Dettmers et al. 2022 (arXiv:2110.02861).

## Bytes and losses
"""


def page(record: Mapping[str, Any]) -> str:
    """The text of the page."""
    rows = record["rows"]
    parts = [
        _HEAD,
        f"{record['task']}; the same seed, weights and batches each time. Bytes are those that leave a rank in a step; "
        "the loss is the mean of the last ten steps, and, evaluated, that on texts that were not trained on.",
        "",
        *_section([row for row in rows if row["layout"].startswith("dp")], "gradients", "two replicas"),
        *_section([row for row in rows if row["layout"].startswith("pp")], "activations", "two stages"),
        *_noise(rows),
        f"`{record['command'].partition(' --only')[0]}` on {record['machine']}, torch {record['versions']['torch']}; "
        "which command, commit and date each row is of stands in `benchmarks/compression/results/demo.json`.",
        "",
    ]
    return "\n".join(parts)


def plots(record: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    found = {}
    for name, axis in (("gradients", "dp"), ("activations", "pp")):
        rows = [row for row in record["rows"] if row["layout"].startswith(axis)]
        if rows:
            found[f"{name}.svg"] = curves_svg(
                {row[name]: [(10 * i + 5, value) for i, value in enumerate(row["curve"])] for row in rows},
                x="step",
                y="loss (mean of ten steps)",
                title=f"Loss of the demo task by how its {name} travel",
            )
    return found


def write(record: Mapping[str, Any]) -> None:
    """Page and plots."""
    PAGE.write_text(page(record))
    PLOTS.mkdir(exist_ok=True)
    for name, svg in plots(record).items():
        (PLOTS / name).write_text(svg)


def _noise(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What two runs differ in that compress nothing: one training, summed in another order."""
    plain = [row["loss"] for row in rows if row["gradients"] == row["activations"] == "none"]
    if len(plain) < 2:
        return []
    apart = max(plain) / min(plain) - 1
    return [
        f"The runs that compress nothing are one training, summed in another order; behind 200 steps they are "
        f"{100 * apart:.1f} % apart. That much is rounding, which grows along a curve: differences below it say "
        "nothing.",
        "",
    ]


def _section(rows: Sequence[Mapping[str, Any]], what: str, layout: str) -> list[str]:
    """A table and a plot; nothing where nothing was measured."""
    if not rows:
        return []
    lines = [
        f"| {layout}: `{what}` | bytes a step | of all | loss | of that without | evaluated |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    whole = next((row for row in rows if row[what] == "none"), None)
    for row in rows:
        share = "" if whole is None else f"{row['bytes'] / whole['bytes']:.3f}"
        loss = "" if whole is None else f"{row['loss'] / whole['loss']:.3f}"
        lines.append(
            f"| `{row[what]}` | {row['bytes']:,} | {share} | {row['loss']:.3f} | {loss} | {row['evaluated']:.3f} |"
        )
    return [*lines, "", f"![Loss over steps, {layout}](compression/{what}.svg)", ""]
