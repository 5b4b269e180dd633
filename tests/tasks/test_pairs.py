"""Pairs of texts: cleaned, each source once, and no source of one split in the other."""

from __future__ import annotations

import pytest

from shardwise.errors import ConfigError
from shardwise.tasks.pairs import Pair, clean_pair, fault_of, split_pairs, words_of


def pair(source: str, target: str) -> Pair:
    return Pair(source=source, target=target)


@pytest.mark.parametrize(
    "source, target, wanted",
    [
        ("_File", "Date_i", ("File", "Datei")),
        ("Ex~port...", "E~xportieren…", ("Export...", "Exportieren…")),
        ("&Open\n", " Öffnen\t&jetzt ", ("Open", "Öffnen jetzt")),
        ("a %s\n  b", "ein %s\n b", ("a %s b", "ein %s b")),
        ("no _Bool here", "kein _Bool hier", ("no _Bool here", "kein _Bool hier")),  # a word of both
        ("save_temps or no_temps", "x_y oder y_z", ("save_temps or no_temps", "x_y oder y_z")),  # several: no key
        ("salt & pepper", "Salz & Pfeffer", ("salt & pepper", "Salz & Pfeffer")),
        ("Cafe\u0301", "Café", ("Café", "Café")),
    ],
)
def test_a_pair_is_one_line_without_marks_of_keys(source: str, target: str, wanted: tuple[str, str]) -> None:
    assert clean_pair(pair(source, target)) == pair(*wanted)


@pytest.mark.parametrize(
    "source, target, fault",
    [
        ("open", "öffnen", ""),
        ("GIF", "gif", "equal"),
        ("...", "…", "empty"),
        ("open", "", "empty"),
        ("on", "eingeschaltet", ""),  # short ones differ much
        ("on", "Dieser Satz ist viel zu lang", "unequal lengths"),
    ],
)
def test_pairs_that_teach_nothing_have_a_reason(source: str, target: str, fault: str) -> None:
    assert fault_of(pair(source, target)) == fault


def test_sources_are_alike_where_a_reader_sees_the_same_words() -> None:
    assert words_of("Row 12: _Öffnen!") == words_of("row 3 öffnen") == "row 0 öffnen"
    assert words_of("%s is gone") != words_of("is gone")


def test_no_source_of_a_split_is_in_the_other() -> None:
    texts = [pair(f"{kind} of number {n % 60} {'x' * (n % 5)}", f"{kind} Nummer {n}") for n in range(400)
             for kind in ("Row", "row", "Column:")]  # fmt: skip
    split = split_pairs(texts, held_out_fraction=0.3)
    train, held_out = ({words_of(p.source) for p in part} for part in (split.train, split.held_out))
    assert train
    assert held_out
    assert not train & held_out
    sources = [p.source for p in (*split.train, *split.held_out)]
    assert len(set(sources)) == len(sources)
    assert split.left_out["known source"] == len(texts) - len(sources)


def test_more_pairs_move_no_other_and_the_first_held_out_ones_are_a_sample() -> None:
    texts = [pair(f"text {'abcdefghij'[n % 10]} {'klmnopqrst'[n // 10]}", "Wort") for n in range(100)]
    few, all_of_them = (split_pairs(part, held_out_fraction=0.5) for part in (texts[:60], texts))
    assert {p.source for p in few.held_out} <= {p.source for p in all_of_them.held_out}
    assert {p.source for p in few.train} <= {p.source for p in all_of_them.train}
    order = [texts.index(p) for p in all_of_them.held_out]
    assert order != sorted(order)
    assert all_of_them.held_out == split_pairs(texts[::-1], held_out_fraction=0.5).held_out


def test_what_a_file_holds_out_is_taken_from_the_others() -> None:
    split = split_pairs(
        [pair("Open it", "Öffne es"), pair("Close it", "Schließe es")],
        held_out=[pair("open it!", "öffne es!")],
        held_out_fraction=0.5,
    )
    assert [p.source for p in split.train] == ["Close it"]
    assert [p.source for p in split.held_out] == ["open it!"]
    assert split.left_out == {"held out elsewhere": 1}


def test_a_fraction_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"held_out_fraction lies in \[0, 0.5\]; got 0.7"):
        split_pairs([], held_out_fraction=0.7)
