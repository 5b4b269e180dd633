"""Catalogues of gettext: compiled ones of both byte orders, and texts."""

from __future__ import annotations

import gettext
import random
import struct
from pathlib import Path

import pytest

from shardwise.errors import ConfigError
from shardwise.tasks.catalogues import read_catalogue
from shardwise.tasks.pairs import Pair

HEADER = (
    "Project-Id-Version: x\nLanguage: de\nContent-Type: text/plain; charset=UTF-8\n"
    "Plural-Forms: nplurals=2; plural=(n != 1);\n"
)
MESSAGES = {
    "": HEADER,
    "open": "öffnen",
    "menu\x04File": "Datei",
    "%d file\x00%d files": "%d Datei\x00%d Dateien",
    "untranslated": "",
}
PO = r"""
# a translator's word
msgid ""
msgstr ""
"Language: de\n"
"Content-Type: text/plain; charset=UTF-8\n"

#: a.c:1
msgid "open"
msgstr "öffnen"

msgctxt "menu"
msgid "File"
msgstr "Datei"
#, c-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d "
"Dateien"

#, fuzzy, c-format
#| msgid "guess"
msgid "guessed"
msgstr "geraten"

msgid "untranslated"
msgstr ""

msgid "a \"quoted\"\ttab\n"
"and \101\x42 end"
msgstr "ein „Zitat“"

#~ msgid "obsolete"
#~ msgstr "veraltet"
"""
PAIRS = [
    Pair(source="open", target="öffnen"),
    Pair(source="File", target="Datei"),
    Pair(source="%d file", target="%d Datei"),
    Pair(source="%d files", target="%d Dateien"),
]


def compiled(messages: dict[str, str], *, order: str = "<", charset: str = "utf-8") -> bytes:
    """What msgfmt would write of them."""
    sources, targets = ([text.encode(charset) for text in side] for side in (messages, messages.values()))
    count, tables, strings = len(messages), b"", b""
    place = 28 + 16 * count
    for text in (*sources, *targets):
        tables += struct.pack(f"{order}2I", len(text), place + len(strings))
        strings += text + b"\x00"
    return struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, place) + tables + strings


def pairs_of(file: Path) -> list[Pair]:
    return [pair for message in read_catalogue(file).messages for pair in message.pairs]


@pytest.mark.parametrize("order", "<>")
def test_a_compiled_catalogue_has_its_pairs_in_order(tmp_path: Path, order: str) -> None:
    file = tmp_path / "git.mo"
    file.write_bytes(compiled(MESSAGES, order=order))
    assert read_catalogue(file).language == "de"
    assert pairs_of(file) == PAIRS
    with file.open("rb") as opened:  # the standard library reads the same
        assert gettext.GNUTranslations(opened).ngettext("%d file", "%d files", 5) == "%d Dateien"


def test_a_text_catalogue_has_the_same_and_neither_fuzzy_nor_obsolete_messages(tmp_path: Path) -> None:
    file = tmp_path / "git.po"
    file.write_text(PO, encoding="utf-8")
    assert read_catalogue(file).language == "de"
    assert pairs_of(file) == [*PAIRS, Pair(source='a "quoted"\ttab\nand AB end', target="ein „Zitat“")]


def test_the_header_says_the_charset(tmp_path: Path) -> None:
    header = HEADER.replace("UTF-8", "ISO-8859-1")
    file = tmp_path / "old.mo"
    file.write_bytes(compiled({"": header, "open": "öffnen"}, charset="latin-1"))
    assert pairs_of(file) == [Pair(source="open", target="öffnen")]
    text = tmp_path / "old.po"
    text.write_bytes(PO.replace("UTF-8", "ISO-8859-15").encode("cp1252", errors="replace"))
    assert Pair(source="open", target="öffnen") in pairs_of(text)


def test_one_form_for_all_numbers_translates_the_plural(tmp_path: Path) -> None:
    file = tmp_path / "ja.mo"
    file.write_bytes(compiled({"%d file\x00%d files": "%d ファイル"}))
    assert pairs_of(file) == [Pair(source="%d files", target="%d ファイル")]


@pytest.mark.parametrize(
    "name, data, told",
    [
        ("a.mo", b"GIF89a", r"a .mo file is a catalogue of gettext, but .*a.mo is none: its first bytes are b'GIF8'"),
        ("a.mo", compiled(MESSAGES)[:60], "a string ends at byte|a table of 5 strings ends behind"),
        ("a.mo", struct.pack("<7I", 0x950412DE, 0, 2**31, 28, 28, 0, 28), "a table of 2147483648 strings ends behind"),
        ("a.mo", struct.pack("<7I", 0x950412DE, 9 << 16, 0, 28, 28, 0, 28), "it is of version 9"),
        (
            "a.po",
            b'msgid "a"\nmsgstr "b"\nnonsense',
            r"the text of a catalogue of gettext, but .* line 3 is 'nonsense'",
        ),
        ("a.po", b"\xff\xfe\x00", "codec can't decode"),
        ("a.po", b'msgid ""\nmsgstr "Content-Type: text/plain; charset=nonsense\\n"', "unknown encoding: nonsense"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=told):
        read_catalogue(file)


@pytest.mark.parametrize("name", ["a.mo", "a.po"])
def test_any_damage_is_an_error_of_ours_or_read(tmp_path: Path, name: str) -> None:
    whole = compiled(MESSAGES) if name == "a.mo" else PO.encode()
    drawn = random.Random(1)
    file = tmp_path / name
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(drawn.randrange(1, 6)):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        file.write_bytes(bytes(data[: drawn.randrange(len(data)) if drawn.random() < 0.3 else None]))
        try:
            read_catalogue(file)
        except ConfigError:
            continue
