"""A run as somebody asked for it: with its layout, or with `layout = "auto"` and a search to come.

Knows how a run is written; refuses to know how a layout is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from shardwise.layout import Layout
from shardwise.train.auto_layout import is_auto, run_on_one_device, run_with_layout
from shardwise.train.layout_search import Choice
from shardwise.train.run_file import Run, load_run, run_from

__all__ = ["Asked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """`run` is on one device where a search is to come; `again`: also where one was made before."""

    run: Run
    written: Mapping[str, Any] | str | Path = ""
    overrides: tuple[str, ...] = ()
    searches: bool = False
    again: bool = False

    @classmethod
    def of(
        cls, run: Run | Mapping[str, Any] | str | Path, overrides: Sequence[str] = (), *, search: bool = False
    ) -> Self:
        """What a run, a mapping that reads like a run file, or the path of one asks for. Raises as `load_run` does."""
        if isinstance(run, Run):
            return cls(run=run)
        if is_auto(run, overrides):
            alone = run_on_one_device(run, overrides)
            return cls(run=alone, written=run, overrides=tuple(overrides), searches=True, again=search)
        return cls(run=run_from(run, overrides) if isinstance(run, Mapping) else load_run(run, overrides))

    def on(self, choice: Choice | None) -> Run:
        """The run on the layout that was found; on its own where none was asked for."""
        return self.run if choice is None else self.on_layout(choice.layout)

    def on_layout(self, layout: Layout) -> Run:
        """The run on another layout than it has."""
        return run_with_layout(self.written, self.overrides, layout)
