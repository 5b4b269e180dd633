"""`python -m benchmarks.matrix.page`: writes docs/matrix.md from the text beside this file and the results of the
matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.matrix.table import page

__all__ = ["PAGE", "rendered"]

_HERE = Path(__file__).parent
PAGE = _HERE.parents[1] / "docs" / "matrix.md"


def rendered() -> str:
    """The page as the results have it."""
    text = (_HERE / "page.md").read_text(encoding="utf-8")
    cases, pairs = _read(_HERE / "results" / "matrix.json"), _read(_HERE / "results" / "resume.json")
    return page(text, cases, pairs, _read(_HERE.parent / "schedules" / "results" / "matrix.json"))


def _read(file: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
