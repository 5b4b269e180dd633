"""Results as figures and as a table in Markdown: every architecture, every miss with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["figures", "markdown"]

Row = Mapping[str, Any]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """`trained`: architectures; of each layout how many are proven (None: not verified yet); `wrong`: results that
    differ from one device; `misses`: architectures that are trained and not proven on some layout."""
    trained = [row for row in rows if row["trained"]]
    counts = {name: _proven(trained, name) for name in ("pp2", "tp2", "tp2_pp2")}
    outcomes = [(row, outcome) for row in trained for outcome in row["layouts"].values() if outcome is not None]
    return {
        "trained": len(trained),
        **counts,
        "wrong": sum(outcome["wrong"] for _, outcome in outcomes),
        "misses": list(dict.fromkeys(row["architecture"] for row, outcome in outcomes if not outcome["proven"])),
    }


def _proven(trained: Sequence[Row], layout: str) -> int | None:
    outcomes = [row["layouts"][layout] for row in trained if row["layouts"].get(layout) is not None]
    return sum(outcome["proven"] for outcome in outcomes) if outcomes else None


def markdown(rows: Sequence[Row], not_run: Sequence[str] = ()) -> str:
    """The page `docs/coverage.md`."""
    trained = [row for row in rows if row["trained"]]
    untrained = [row for row in rows if not row["trained"]]
    parts = [_HEAD.format(known=len(rows), trained=len(trained), untrained=len(untrained))]
    parts += [_share(layout, trained) for layout in ("pp2", "tp2", "tp2_pp2")]
    parts += ["", "## Trained, not proven", "", _MISS_HEAD]
    for row in trained:
        for layout, outcome in row["layouts"].items():
            if outcome is not None and not outcome["proven"]:
                parts.append(f"| {row['architecture']} | {layout} | {_cell(outcome['reason'])} |")
    parts += ["", "## Trained", "", _TABLE_HEAD, *(_row(row) for row in trained)]
    parts += ["", "## Not trained on one device", "", _NOT_HEAD, "", "| architecture | reason |", "|---|---|"]
    parts += [f"| {row['architecture']} | {_cell(row['reason'])} |" for row in untrained]
    if not_run:
        parts += ["", "## Not run yet", "", ", ".join(not_run) + "."]
    return "\n".join(parts) + "\n"


_HEAD = """# Coverage

`python -m benchmarks.coverage` makes a small model of every architecture that `transformers` has a config for, trains
it one step on one device, and then runs the same step on layouts. A layout is *proven* when loss and every gradient
equal those of one device, within 1e-5 in float32. For tp2, 90 % of
the parameters of matrix products in blocks have to be sharded too. This page is what the last run wrote.

Of {known} architectures {trained} train one step here; {untrained} do not, and are listed at the end with the reason.
"""
_MISS_HEAD = "| architecture | layout | reason |\n|---|---|---|"
_NOT_HEAD = (
    "These could not be built small, or no inputs could be made up for them, or they do not train alone (parts that\n"
    "take other parts' outputs, models with discrete outputs). Nothing is claimed of them."
)
_TABLE_HEAD = (
    "*Stages*: unit calls of each; *sharded* the share of block matmul parameters that tp=2 shards (–: not verified\n"
    "yet); *loss* is the model's own or the distance of its outputs from a fixed pattern.\n\n"
    "| architecture | class | parameters | loss | units | stages | pp2 error | tp2 | tp2 × pp2 | sharded | seconds |\n"
    "|---|---|--:|---|--:|---|--:|---|---|--:|--:|"
)


def _share(layout: str, trained: Sequence[Row]) -> str:
    outcomes = [row["layouts"][layout] for row in trained if row["layouts"].get(layout) is not None]
    if not outcomes:
        return f"- {layout}: not verified yet."
    proven = sum(outcome["proven"] for outcome in outcomes)
    wrong = sum(outcome["wrong"] for outcome in outcomes)
    share = f"{100 * proven / len(outcomes):.1f} %"
    return f"- {layout}: proven for {proven} of {len(outcomes)} verified ({share}); different from one device: {wrong}."


def _row(row: Row) -> str:
    stages = row["layouts"].get("pp2") or {}
    tensor = row["layouts"].get("tp2") or {}
    share = tensor.get("sharded_share")
    cells = [
        row["architecture"],
        row["class"],
        f"{row['parameters']:,}",
        "own" if row["own_loss"] else "pattern",
        str(stages.get("units", "–")),
        " + ".join(map(str, stages.get("stages", ()))) or "–",
        _error(stages),
        _error(tensor),
        _error(row["layouts"].get("tp2_pp2") or {}),
        "–" if share is None else f"{100 * share:.0f} %",
        f"{row['seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _error(outcome: Mapping[str, Any]) -> str:
    if not outcome:
        return "–"
    if outcome["gradient_error"] is None:
        return "missed"
    return f"{outcome['gradient_error']:.0e}" if outcome["gradient_error"] else "0"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:400]
