"""The table of this benchmark in Markdown: `python -m benchmarks.backends.page results/FILE.json`. Measures nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["table"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an exchange, number of ranks and backend; microseconds by size, and to gloo's in brackets."""
    sizes = sorted({row["bytes"] for row in rows})
    lines = ["| exchange | ranks | by | " + " | ".join(map(_size, sizes)) + " |"]
    lines += ["|---|--:|---|" + "--:|" * len(sizes)]
    kinds: dict[tuple[str, int, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by = " ".join(filter(None, [row["backend"], "" if row["algorithm"] in ("", "auto") else row["algorithm"]]))
        kinds.setdefault((row["what"], row["ranks"], by), {})[row["bytes"]] = row
    order = ["all-reduce", "all-gather", "reduce-scatter", "one way"]
    for (what, ranks, by), found in sorted(kinds.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        cells = [_cell(found.get(size)) for size in sizes]
        lines.append(f"| {what} | {ranks} | {by} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    us = f"{row['us']:,.0f}"
    return us if row["backend"] == "gloo" else f"{us} ({row['to_gloo']:.2f})"


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["rows"]))
