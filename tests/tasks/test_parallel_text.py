"""Files of two languages: which are read, which way round, and what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.errors import ConfigError
from shardwise.tasks.pairs import Pair
from shardwise.tasks.parallel_text import read_pairs
from tasks.test_catalogues import HEADER, MESSAGES, PAIRS, PO, compiled

OPEN = Pair(source="open", target="öffnen")


def test_folders_files_and_globs_are_read_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "git.mo").write_bytes(compiled(MESSAGES))
    (tmp_path / "more.po").write_text(PO, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a catalogue")
    read = read_pairs([f"{tmp_path}/de/*.mo", str(tmp_path)], source="en", target="de")
    assert read.pairs[:4] == tuple(PAIRS)
    assert len(read.pairs) == 4 + 5
    assert (read.num_files, read.held_out) == (2, ())


def test_catalogues_of_other_languages_are_passed_over_and_those_of_the_source_read_backwards(tmp_path: Path) -> None:
    for language in ("de", "de_AT", "fr", ""):
        header = HEADER.replace("Language: de", f"Language: {language}")
        (tmp_path / f"{language or 'none'}.mo").write_bytes(compiled({"": header, "open": f"in {language}"}))
    there = read_pairs(str(tmp_path), source="en", target="de")
    assert [pair.target for pair in there.pairs] == ["in de", "in de_AT", "in "]
    back = read_pairs(str(tmp_path), source="fr", target="en")
    assert Pair(source="in fr", target="open") in back.pairs
    with pytest.raises(ConfigError, match="has catalogues of fr; correct task.data or task.target"):
        read_pairs(str(tmp_path / "fr.mo"), source="en", target="it")


def test_lines_side_by_side_are_pairs_and_names_say_what_is_held_out(tmp_path: Path) -> None:
    for name, count in (("news", 3), ("newstest2014", 2), ("latest", 1), ("dev", 1)):
        (tmp_path / f"{name}.en").write_text("".join(f"{name} {n}\n" for n in range(count)))
        (tmp_path / f"{name}.de").write_text("".join(f"{name} zu {n}\n" for n in range(count)))
    read = read_pairs(str(tmp_path), source="en", target="de")
    assert [pair.source for pair in read.pairs] == ["latest 0", "news 0", "news 1", "news 2"]
    assert [pair.target for pair in read.held_out] == ["dev zu 0", "newstest2014 zu 0", "newstest2014 zu 1"]


def test_what_is_wrong_is_told_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "news.en").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="there is no news.de; add it"):
        read_pairs(str(tmp_path), source="en", target="de")
    (tmp_path / "news.de").write_text("eins\n")
    with pytest.raises(ConfigError, match=r"news.en has 2 lines and news.de 1; align them"):
        read_pairs(str(tmp_path), source="en", target="de")
    with pytest.raises(ConfigError, match=r"has files .de, .en; correct task.data"):
        read_pairs(str(tmp_path), source="it", target="fr")
    with pytest.raises(ConfigError, match='source="en" and target="en"; name two'):
        read_pairs(str(tmp_path), source="en", target="en")
    with pytest.raises(ConfigError, match="names at least one file; .*; correct task.data"):
        read_pairs(str(tmp_path / "nowhere"), source="en", target="de")
