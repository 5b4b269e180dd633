"""The page about schedules is what the code renders today, and what it says of the searched schedule holds."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from shardwise.schedule import GENERATORS, Schedule, check, simulate
from shardwise.schedule.memory import peak_bytes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    name = "docs_render_schedules"
    spec = importlib.util.spec_from_file_location(name, DOCS / "render_schedules.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def test_page_and_pictures_are_what_the_code_renders(script: ModuleType) -> None:
    rendered = script.render()
    differing = [name for name, text in rendered.items() if (DOCS / name).read_text(encoding="utf-8") != text]
    assert not differing, "run `python docs/render_schedules.py`"
    committed = {f"schedules/{path.name}" for path in (DOCS / "schedules").glob("*.svg")}
    assert committed == rendered.keys() - {"schedules.md"}


def test_every_schedule_has_its_section_and_every_link_a_file() -> None:
    page = (DOCS / "schedules.md").read_text(encoding="utf-8")
    for name in GENERATORS:
        assert f'`schedule = "{name}"`' in page
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if not (DOCS / link).exists()] == []
    assert "{{" not in page


def test_the_searched_schedule_runs_fits_and_beats_the_textbook(script: ModuleType) -> None:
    found = Schedule.from_json((DOCS / "schedules" / "searched.json").read_text(encoding="utf-8"))
    check(found)
    assert max(peak_bytes(found, script.LIMIT)) <= script.ROOM
    assert simulate(found, costs=script.UNEVEN).seconds < script.best_textbook()[1].seconds
