"""The run file of a plan: the one that was planned, with the layout that was chosen and the cluster it was priced for.

All else stands as it was written, comments too: lines of two top-level keys are exchanged. Knows TOML's lines; refuses
to know plans.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.layout import Layout

__all__ = ["planned_text", "write_planned"]

_HEADER = re.compile(r"^\s*\[")


def planned_text(text: str, layout: Layout, cluster: str) -> str:
    """The text of a run file with these two. Raises `ConfigError` where its layout is written over several lines."""
    lines = text.splitlines()
    first = next((index for index, line in enumerate(lines) if _HEADER.match(line)), len(lines))
    top, tables = lines[:first], lines[first:]
    if any(re.match(r"^\s*\[+\s*layout\b", line) for line in tables):
        raise ConfigError(
            'a run file is written with its layout as one line, but this one has a table [layout]; write layout = "…" '
            "above the first table, and plan again"
        )
    for name, value in (("cluster", _place(cluster)), ("layout", str(layout))):
        line = f"{name} = {json.dumps(value, ensure_ascii=False)}"
        at = [index for index, own in enumerate(top) if re.match(rf"^\s*[\"']?{name}[\"']?\s*=", own)]
        if at:
            top[at[0]] = line
        else:
            top.insert(_above(top), line)
    return "\n".join([*top, *tables]) + "\n"


def write_planned(path: Path, *, run: str, layout: Layout, cluster: str) -> None:
    """Writes the file. Raises `ConfigError` where one of the two files cannot be read or written."""
    text = planned_text(read_text(Path(run), what="a run file", repair="correct the path"), layout, cluster)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out names a file that can be written, but {path}: {error.strerror}; name another"
        ) from error


def _place(cluster: str) -> str:
    """A file is found from everywhere."""
    name, at, ranks = cluster.partition(".toml@")
    file = f"{name}.toml" if at else cluster
    return f"{Path(file).resolve()}{f'@{ranks}' if at else ''}" if file.endswith(".toml") else cluster


def _above(top: list[str]) -> int:
    """Below the comments that a file begins with."""
    return next((index for index, line in enumerate(top) if line.strip() and not line.startswith("#")), len(top))
