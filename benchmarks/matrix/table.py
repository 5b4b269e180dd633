"""Figures of the matrices as text: a table of each use, one of pairs; and the page of the documentation for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.matrix.cases import BESIDE, DATA, USES, Case

__all__ = ["page", "table"]

_OF_USES = {
    "plain": "one micro-batch (four with a pipeline), AdamW",
    "recompute": "activations of every unit computed again in the backward, AdamW",
    "accumulation": "three micro-batches (five with a pipeline) of unequal sizes, AdamW",
    "clipping": "the norm of all gradients brought down to 0.25, SGD",
}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The worst error of every case, by data and what is beside, one table a use."""
    lines: list[str] = []
    for use in USES:
        lines += ["", f"{use:14s}" + "".join(f"{name:>12s}" for name in BESIDE)]
        lines += [
            f"{data:14s}" + "".join(f"{_cell(found, data, beside, use):>12s}" for beside in BESIDE) for data in DATA
        ]
    return "\n".join(lines)


def page(text: str, cases: Mapping[str, Any], pairs: Mapping[str, Any], schedules: Mapping[str, Any]) -> str:
    """The page: `text` with the figures of three files in place of `{names}`."""
    return text.format(
        num_cases=len(cases["cases"]),
        worst=_worst(each["worst"] for each in cases["cases"].values()),
        tables=_tables(cases["cases"]),
        of_cases=_circumstances(cases),
        num_pairs=len(pairs["pairs"]),
        pairs=_pairs(pairs["pairs"]),
        worst_pair=_worst(each["error"] for each in pairs["pairs"].values()),
        of_pairs=_circumstances(pairs),
        num_schedules=len(schedules["cases"]),
        worst_schedule=f"{schedules['worst']:.1e}",
        of_schedules=_circumstances(schedules),
    )


def _cell(found: Mapping[str, Mapping[str, Any]], data: str, beside: str, use: str) -> str:
    each = found.get(str(Case(data=data, beside=beside, use=use)))
    if each is None:
        return ""
    return "FAILED" if each["why"] else f"{each['worst']:.0e}"


def _tables(found: Mapping[str, Mapping[str, Any]]) -> str:
    parts: list[str] = []
    for use in USES:
        lines = [f"**{use}**: {_OF_USES[use]}", "", f"| | {' | '.join(BESIDE)} |", f"|---|{'---|' * len(BESIDE)}"]
        lines += [f"| {data} | {' | '.join(_cell(found, data, each, use) for each in BESIDE)} |" for data in DATA]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _pairs(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Who saved in rows, who resumed in columns."""
    firsts = list(dict.fromkeys(pair.split(" -> ")[0] for pair in found))
    seconds = list(dict.fromkeys(pair.split(" -> ")[1] for pair in found))
    lines = [f"| saved \\ resumed | {' | '.join(seconds)} |", f"|---|{'---|' * len(seconds)}"]
    for first in firsts:
        cells = [found.get(f"{first} -> {second}") for second in seconds]
        shown = ["" if each is None else "FAILED" if each["why"] else f"{each['error']:.0e}" for each in cells]
        lines.append(f"| {first} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _worst(errors: Any) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if known else "none"


def _circumstances(figures: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    return (
        f"`{figures['command']}` · {figures['machine']} · {versions} · commit {figures['commit']} · "
        f"{figures['date'][:10]}"
    )
