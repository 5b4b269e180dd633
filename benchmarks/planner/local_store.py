"""What was measured of every layout, in one file that is written as it goes: a run that was stopped is gone on with.

Knows measurements, where and when they are from; refuses to know predictions.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Hashable
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Store"]


@dataclasses.dataclass(kw_only=True)
class Entry:
    """One layout of a model. peak_bytes, before_bytes: by rank, the last measured. runs: every visit, the median
    step of the slowest rank, half of the middle half of its steps, its parts, and the turn that it belongs to: those of
    layouts that were visited one behind the other."""

    model: str
    ranks: int
    layout: str
    peak_bytes: list[int] = dataclasses.field(default_factory=list)
    before_bytes: list[int] = dataclasses.field(default_factory=list)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    loss: float = 0.0
    failed: str = ""

    @property
    def spread(self) -> float:
        return statistics.median([float(run["spread"]) for run in self.runs]) if self.runs else 0.0


class Store:
    """The entries of a file, by model, ranks and layout; `about` says machine, commit and date."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = -1
        self.about: dict[str, str] = {}
        self._entries: dict[tuple[str, int, str], Entry] = {}
        if path.is_file():
            told = json.loads(path.read_text(encoding="utf-8"))
            self.about = told["about"]
            for values in told["layouts"]:
                entry = Entry(**values)
                self._entries[entry.model, entry.ranks, entry.layout] = entry

    def of(self, model: str, ranks: int, layout: str) -> Entry:
        """That of a layout; new where there is none."""
        return self._entries.setdefault((model, ranks, layout), Entry(model=model, ranks=ranks, layout=layout))

    def next_turn(self) -> int:
        """A number that no turn has yet."""
        turns = [int(run["turn"]) for entry in self._entries.values() for run in entry.runs if "turn" in run]
        self._turn = max((self._turn, *turns)) + 1
        return self._turn

    def timed(self, ranks: int) -> dict[Hashable, list[tuple[int, float]]]:
        """(model, layout) -> turn and seconds of every visit."""
        return {
            (entry.model, entry.layout): timed
            for entry in self._entries.values()
            if entry.ranks == ranks
            and (timed := [(int(run["turn"]), float(run["step_s"])) for run in entry.runs if "turn" in run])
        }

    def keep(self, about: dict[str, str]) -> None:
        """All entries that something was measured of; `about` the last of it."""
        self.about = about
        entries = [dataclasses.asdict(e) for e in self._entries.values() if e.peak_bytes or e.failed]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        text = f'{{"about": {json.dumps(self.about)}, "layouts": [\n{lines}\n]}}\n'
        fresh = self._path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self._path)
