"""Results as figures and as a table in Markdown: every architecture, every miss with its reason."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["LAYOUTS", "SHARE", "figures", "is_miss", "markdown"]

LAYOUTS = ("pp2", "tp2", "tp2_pp2")
SHARE = 0.9  # of the parameters of matrix products in blocks, divided: where those are of attention, MLPs or experts

Row = Mapping[str, Any]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """`trained`: architectures. `pp2`: of these, proven on it (None: not verified yet). `tp2`, `tp2_pp2`: proven with
    at least `SHARE` divided, of the `*_of` that are verified and made of attention, MLPs or experts. `wrong`: results
    that differ from one device. `misses`: architectures that miss what a layout asks for."""
    trained = [row for row in rows if row["trained"]]
    found: dict[str, Any] = {"trained": len(trained)}
    for layout in LAYOUTS:
        asked = [row for row in trained if _outcome(row, layout) and (layout == "pp2" or _asked(row))]
        found[layout] = sum(not is_miss(row, layout) for row in asked) if asked else None
        found[f"{layout}_of"] = len(asked)
    others = [row for row in trained if _outcome(row, "tp2") and not _asked(row)]
    shares = [share for row in others if (share := _outcome(row, "tp2").get("sharded_share")) is not None]
    found |= {
        "tp2_others": sum(bool(_outcome(row, "tp2")["proven"]) for row in others),
        "tp2_others_of": len(others),
        "tp2_others_median_share": round(statistics.median(shares), 3) if shares else None,
        "wrong": sum(_outcome(row, layout).get("wrong", False) for row in trained for layout in LAYOUTS),
        "misses": [row["architecture"] for row in trained if any(is_miss(row, layout) for layout in LAYOUTS)],
    }
    return found


def is_miss(row: Row, layout: str) -> bool:
    """Whether a layout was verified, and is not proven; or divides too little where `SHARE` is asked for."""
    outcome = _outcome(row, layout)
    return bool(outcome) and (not outcome["proven"] or (layout != "pp2" and _asked(row) and _share(outcome) < SHARE))


def markdown(rows: Sequence[Row], not_run: Sequence[str] = ()) -> str:
    """The page `docs/coverage.md`."""
    trained = [row for row in rows if row["trained"]]
    untrained = [row for row in rows if not row["trained"]]
    asked, others = [row for row in trained if _asked(row)], [row for row in trained if not _asked(row)]
    parts = [_HEAD.format(known=len(rows), trained=len(trained), untrained=len(untrained), share=f"{SHARE:.0%}")]
    parts += [
        _pipeline(trained),
        *(_tensor(layout, asked) for layout in LAYOUTS[1:]),
        _of_others(others),
        _wrong(trained),
    ]
    parts += [
        _keyed(trained),
        _weak(trained),
        _commits(rows),
        "",
        "## Proven, with less divided, or not proven",
        "",
        _MISS_HEAD,
    ]
    parts += [
        f"| {row['architecture']} | {layout} | {_cell(_why(row, layout))} |"
        for row in trained
        for layout in LAYOUTS
        if is_miss(row, layout)
    ]
    parts += ["", "## Convolutional and state-space architectures", "", _OTHERS_HEAD]
    parts += [
        f"| {row['architecture']} | {_kinds(row)} | {_percent(_outcome(row, 'tp2').get('sharded_share'))} | "
        f"{_cell(_outcome(row, 'tp2').get('whole', ''), 200)} |"
        for row in others
        if _outcome(row, "tp2")
    ]
    parts += ["", "## Trained", "", _TABLE_HEAD, *(_row(row) for row in trained)]
    parts += ["", "## Not trained on one device", "", _NOT_HEAD, "", "| architecture | reason |", "|---|---|"]
    parts += [f"| {row['architecture']} | {_cell(row['reason'])} |" for row in untrained]
    if not_run:
        parts += ["", "## Not run yet", "", ", ".join(not_run) + "."]
    return "\n".join(parts) + "\n"


_HEAD = """# Coverage

`python -m benchmarks.coverage` makes a small model of every architecture that `transformers` has a config for, trains
it one step on one device, and then runs the same step on layouts. A layout is *proven* when loss and every gradient
equal those of one device, within 1e-5 in float32. A tensor-parallel one that ends above, by 0.1 at most, is run again
in float64: it has to be within 1e-9 there, and in float32 at most four times as far from that as one device (marked *),
or as one device whose weights differ in their last bit, the farthest of four (marked **: a ReLU that flips, say).
For tp2, {share} of the parameters of matrix products in blocks have to be divided too, where most of these are of
attention, MLPs or experts; of convolutional and state-space architectures the share that is reached is told. This page
is what the last run wrote.

Of {known} architectures {trained} train one step here; {untrained} do not, and are listed at the end with the reason.
"""
_MISS_HEAD = "| architecture | layout | reason |\n|---|---|---|"
_OTHERS_HEAD = (
    "*Made of*: weights of matrix products in blocks, by what their layers are. *Divided*: the share of them.\n\n"
    "| architecture | made of | divided | why the rest is whole |\n|---|---|--:|---|"
)
_NOT_HEAD = (
    "These could not be built small, or no inputs could be made up for them, or they do not train alone (parts that\n"
    "take other parts' outputs, models with discrete outputs). Nothing is claimed of them."
)
_TABLE_HEAD = (
    "*Stages*: unit calls of each; *divided*: the share of block matmul parameters that tp=2 divides (–: not verified\n"
    "yet); *loss* is the model's own or the distance of its outputs from a fixed pattern; *plan*: seconds to find and\n"
    "prove how units are divided.\n\n"
    "| architecture | class | parameters | loss | units | stages | pp2 error | tp2 error | tp2 × pp2 error | divided "
    "| plan | seconds |\n"
    "|---|---|--:|---|--:|---|--:|--:|--:|--:|--:|--:|"
)


# -- rows ----------------------------------------------------------------------------------------------


def _outcome(row: Row, layout: str) -> Mapping[str, Any]:
    """What came of a layout; empty where it is not verified yet."""
    return row["layouts"].get(layout) or {}


def _asked(row: Row) -> bool:
    """Whether `SHARE` is asked: more than half of the weights are of attention, MLPs or experts."""
    weights = row.get("weights")
    return weights is None or 2 * weights["matmul"] > sum(weights.values())


def _share(outcome: Mapping[str, Any]) -> float:
    return float(outcome.get("sharded_share") or 0.0)


def _why(row: Row, layout: str) -> str:
    outcome = _outcome(row, layout)
    if outcome["reason"] or layout == "pp2":
        return str(outcome["reason"])
    return f"{_percent(outcome.get('sharded_share'))} divided: {outcome.get('whole', '')}"


def _kinds(row: Row) -> str:
    total = sum(row["weights"].values()) or 1
    return ", ".join(f"{_percent(count / total)} {kind}" for kind, count in row["weights"].items() if count)


# -- sentences -----------------------------------------------------------------------------------------


def _pipeline(trained: Sequence[Row]) -> str:
    rows = [row for row in trained if _outcome(row, "pp2")]
    return f"- pp2: proven for {_of(sum(not is_miss(row, 'pp2') for row in rows), len(rows))}."


def _tensor(layout: str, asked: Sequence[Row]) -> str:
    rows = [row for row in asked if _outcome(row, layout)]
    if not rows:
        return f"- {layout}: not verified yet."
    reached = _of(sum(not is_miss(row, layout) for row in rows), len(rows))
    equal = _of(sum(bool(_outcome(row, layout)["proven"]) for row in rows), len(rows))
    return f"- {layout}, attention, MLPs or experts: proven with {SHARE:.0%} divided for {reached}; equal for {equal}."


def _of_others(others: Sequence[Row]) -> str:
    outcomes = [_outcome(row, "tp2") for row in others if _outcome(row, "tp2")]
    if not outcomes:
        return "- tp2, convolutional or state-space: not verified yet."
    equal = _of(sum(bool(outcome["proven"]) for outcome in outcomes), len(outcomes))
    shares = sorted(_share(outcome) for outcome in outcomes)
    reached = sum(share >= SHARE for share in shares)
    return (
        f"- tp2, convolutional or state-space: equal for {equal}; {_percent(statistics.median(shares))} divided in the "
        f"median, {SHARE:.0%} and more in {reached}."
    )


def _wrong(trained: Sequence[Row]) -> str:
    wrong = [
        f"{row['architecture']} {layout}" for row in trained for layout in LAYOUTS if _outcome(row, layout).get("wrong")
    ]
    return f"- Layouts that ran and differ from one device: {', '.join(wrong) or 'none'}."


def _keyed(trained: Sequence[Row]) -> str:
    names = [
        row["architecture"]
        for row in trained
        if any("keyed draws" in _outcome(row, layout).get("reference", "") for layout in LAYOUTS)
    ]
    return (
        f"- Random numbers in the forward, so held against one stage that draws the same: {', '.join(names) or 'none'}."
    )


def _weak(trained: Sequence[Row]) -> str:
    """Where `followed_share` is small."""
    shares = {
        row["architecture"]: min(followed)
        for row in trained
        if (followed := [f for layout in LAYOUTS if (f := _outcome(row, layout).get("followed")) is not None])
    }
    told = [f"{name} ({_percent(share)})" for name, share in sorted(shares.items()) if share < 0.5]
    return (
        "- Proofs that say little, since fewer than half of the parameters have a gradient of which a hundredth would "
        f"show beside the rest: {', '.join(told) or 'none'}."
    )


def _commits(rows: Sequence[Row]) -> str:
    commits = _by_count(
        commit or ""
        for row in rows
        for commit in (
            [_outcome(row, layout).get("commit") for layout in LAYOUTS] if row["trained"] else [row.get("commit")]
        )
    )
    told = ", ".join(f"{commit} ({count})" for commit, count in commits if commit)
    return f"- Commits, with the number of results (+: with changes): {told or 'not known'}."


def _by_count(values: Iterable[str]) -> list[tuple[str, int]]:
    listed = list(values)
    return sorted(((value, listed.count(value)) for value in set(listed)), key=lambda pair: (-pair[1], pair[0]))


def _of(count: int, total: int) -> str:
    return f"{count} of {total} ({100 * count / total:.1f} %)" if total else "none yet"


# -- cells ---------------------------------------------------------------------------------------------


def _row(row: Row) -> str:
    stages, tensor = _outcome(row, "pp2"), _outcome(row, "tp2")
    cells = [
        row["architecture"],
        row["class"],
        f"{row['parameters']:,}",
        "own" if row["own_loss"] else "pattern",
        str(stages.get("units", "–")),
        " + ".join(map(str, stages.get("stages", ()))) or "–",
        *(_error(_outcome(row, layout)) for layout in LAYOUTS),
        _percent(tensor.get("sharded_share")),
        f"{tensor['plan_seconds']:.1f}" if "plan_seconds" in tensor else "–",
        f"{sum(_outcome(row, layout).get('seconds', 0.0) for layout in LAYOUTS):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _error(outcome: Mapping[str, Any]) -> str:
    if not outcome:
        return "–"
    if outcome["gradient_error"] is None:
        return "missed"
    mark = "" if outcome.get("float64_error") is None else "**" if outcome.get("shaken") else "*"
    return f"{outcome['gradient_error']:.0e}{mark}" if outcome["gradient_error"] else "0"


def _cell(text: str, length: int = 400) -> str:
    return text[:length].replace("|", "\\|").replace("<", "&lt;")
