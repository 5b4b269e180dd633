"""A cached folder is whole or absent, whoever makes it and whoever is killed while making it."""

import threading
from pathlib import Path

import pytest

from shardwise.tasks.cache import content_key, filled_folder


def test_keys_tell_where_one_part_ends() -> None:
    assert content_key(["ab", "c"]) != content_key(["a", "bc"])
    assert content_key(["a"]) != content_key(["a", ""])
    assert content_key(["é"]) == content_key(["é".encode()])


def test_a_folder_is_filled_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("content")

    for _ in range(2):
        assert filled_folder(tmp_path / "cache" / "key", fill) == tmp_path / "cache" / "key"
    assert (tmp_path / "cache" / "key" / "file").read_text() == "content"
    assert len(calls) == 1


def test_the_folder_is_not_there_while_it_is_filled_and_nothing_stays_after_a_failure(tmp_path: Path) -> None:
    final = tmp_path / "key"

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        assert not final.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled_folder(final, fill)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_folder_the_first_wins_and_both_get_it(tmp_path: Path) -> None:
    both_are_filling = threading.Barrier(2, timeout=10)
    found: list[str] = []

    def fill(folder: Path) -> None:
        (folder / "first").write_text("1")
        both_are_filling.wait()
        (folder / "second").write_text("2")

    def make() -> None:
        folder = filled_folder(tmp_path / "key", fill)
        found.append("".join(sorted(file.name for file in folder.iterdir())))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert found == ["firstsecond", "firstsecond"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_folder_that_cannot_be_placed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a file is in the way")
    with pytest.raises(OSError, match="key"):
        filled_folder(tmp_path / "key", lambda folder: None)
