"""One suite in several processes: each takes the next module that none of them has taken.

    process 1   test_a │ test_c         │ test_d │ test_f
    process 2   test_b       │ test_e                      `--claims=FOLDER`: a file for each module that is taken

A module stays whole, and so do its fixtures; what is kept for a session, warm ranks among it, each process has of its
own. Tests on ranks leave a core idle now and then, and others none: two processes use two cores better than one does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

__all__ = ["claimed", "pytest_addoption", "pytest_runtestloop", "with_next"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--claims",
        metavar="FOLDER",
        type=Path,
        help="run modules that no other process has taken that was given the same folder, empty at first",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    folder: Path | None = session.config.getoption("--claims")
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop, which also says what could not be collected
    for item, following in with_next(claimed(session.items, folder)):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
    return True


def claimed(items: Iterable[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """Those of modules that nobody else has taken, in order; a module is taken when its first one is asked for."""
    for module, own in itertools.groupby(items, key=lambda item: item.nodeid.partition("::")[0]):
        try:
            (folder / module.replace("/", "-")).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from own


def with_next(items: Iterator[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Each with the one behind it, by which pytest knows what to tear down."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following
