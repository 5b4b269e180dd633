"""Catalogues of GNU gettext: the messages of a program and their translations, by people.

    .mo   magic │ version │ messages │ table of sources │ table of translations │ …    compiled, of either byte order
    .po   msgctxt "…"  msgid "…"  msgid_plural "…"  msgstr[0] "…"  msgstr[1] "…"       text

Format: https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html and PO-Files.html. It knows files; it
refuses to know which messages are worth learning.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.tasks.pairs import Pair

__all__ = ["SUFFIXES", "Catalogue", "Message", "read_catalogue"]

SUFFIXES = (".mo", ".gmo", ".po")

_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}  # 0x950412de, and the byte order of all numbers
_HEADER_BYTES = 28
_CONTEXT_END = "\x04"  # before the source proper in a .mo
_FORM_END = "\x00"  # between singular and plural
_FIELD = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr(?:\[(\d+)\])?)\s*"(.*)"')
_ESCAPED = re.compile(r"\\([0-7]{1,3}|x[0-9a-fA-F]{2}|.)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A text of a program, its plural if it has one, and its translations: one, or a form for each kind of number."""

    source: str
    plural: str = ""
    forms: tuple[str, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The text with its first form, its plural with the last one."""
        if not self.forms:
            return ()
        single = Pair(source=self.source, target=self.forms[0])
        if not self.plural:
            return (single,)
        several = Pair(source=self.plural, target=self.forms[-1])
        return (single, several) if len(self.forms) > 1 else (several,)  # one form for all numbers


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The translated messages of a file; `language` as its header says it, such as de or pt_BR, else empty."""

    language: str
    messages: tuple[Message, ...] = field(repr=False)


def read_catalogue(file: Path) -> Catalogue:
    """The catalogue in a .mo or .po file; messages without translation, fuzzy and obsolete ones are left out.

    Raises ConfigError for a file that is damaged or none of these.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"a catalogue is a file that can be read, but {file}: {error.strerror}") from error
    try:
        read = _of_po(data) if file.suffix == ".po" else _of_mo(data)
        header = next((message.forms[0] for message in read if not message.source and message.forms), "")
    except _DamagedError as error:
        kind = "a .po file is the text of a catalogue" if file.suffix == ".po" else "a .mo file is a catalogue"
        raise ConfigError(f"{kind} of gettext, but {file} is none: {error}; leave it out, or make it again") from error
    language = re.search(r"^Language:[ \t]*(\w*)", header, re.MULTILINE)
    named = tuple(message for message in read if message.source and any(message.forms))
    return Catalogue(language=language[1] if language else "", messages=named)


class _DamagedError(ValueError):
    """What is wrong with a file, in words."""


def _charset(data: bytes) -> str:
    found = re.search(rb"Content-Type:[^\\\n]*charset=([\w.:-]+)", data)
    name = found[1].decode() if found else "utf-8"
    return "utf-8" if name == "CHARSET" else name  # what templates have there


def _decoded(data: bytes, charset: str) -> str:
    try:
        return data.decode(charset)
    except (UnicodeError, LookupError) as error:
        raise _DamagedError(str(error)) from error


def _of_mo(data: bytes) -> list[Message]:
    order = _MAGIC.get(data[:4])
    if order is None or len(data) < _HEADER_BYTES:
        raise _DamagedError(f"its first bytes are {data[:4]!r}")
    version, count, sources_at, targets_at = struct.unpack_from(f"{order}4I", data, 4)
    if version >> 16 > 1:
        raise _DamagedError(f"it is of version {version >> 16}")
    sources, targets = (list(_strings(data, order, start, count)) for start in (sources_at, targets_at))
    header = next((target for source, target in zip(sources, targets, strict=True) if not source), b"")
    charset = _charset(header)
    messages = []
    for source, target in zip(sources, targets, strict=True):
        single, _, plural = _decoded(source, charset).rpartition(_CONTEXT_END)[2].partition(_FORM_END)
        messages.append(Message(source=single, plural=plural, forms=tuple(_decoded(target, charset).split(_FORM_END))))
    return messages


def _strings(data: bytes, order: str, start: int, count: int) -> Iterator[bytes]:
    """The strings of a table of (length, place)."""
    if start + 8 * count > len(data):
        raise _DamagedError(f"a table of {count} strings ends behind its {len(data)} bytes")
    for length, place in struct.iter_unpack(f"{order}2I", data[start : start + 8 * count]):
        if place + length > len(data):
            raise _DamagedError(f"a string ends at byte {place + length} of {len(data)}")
        yield data[place : place + length]


def _of_po(data: bytes) -> list[Message]:
    text = _decoded(data, _charset(data)).removeprefix("\ufeff")
    return list(_entries(text.splitlines()))


def _entries(lines: Sequence[str]) -> Iterator[Message]:
    """An entry ends where the next one's first field begins."""
    parts: dict[str, list[str]] = {}
    fuzzy, last = False, ""
    for number, line in enumerate([*map(str.strip, lines), 'msgid ""'], start=1):
        found = _FIELD.fullmatch(line)
        if found is None and line.startswith('"') and line.endswith('"') and len(line) > 1 and last:
            parts[last].append(line[1:-1])
        elif found is not None:
            last = found[1]
            if last in parts or (last == "msgctxt" and parts):
                yield from _message(parts, fuzzy)
                parts, fuzzy = {}, False
            parts[last] = [found[3]]
        elif line and not line.startswith("#"):
            raise _DamagedError(f"line {number} is {line[:60]!r}")
        elif parts and "msgid" in parts and any(name.startswith("msgstr") for name in parts):
            yield from _message(parts, fuzzy)  # a comment or an empty line ends it, and what follows is of the next
            parts, fuzzy, last = {}, False, ""
        if line.startswith("#,") and "fuzzy" in line:
            fuzzy = True


def _message(parts: dict[str, list[str]], fuzzy: bool) -> Iterator[Message]:
    if fuzzy and any(parts.get("msgid", ())):
        return  # a guess; the header may be marked so in templates
    text = {name: _unescaped("".join(pieces)) for name, pieces in parts.items()}
    forms = sorted((int(name[7:-1]), form) for name, form in text.items() if name.startswith("msgstr["))
    yield Message(
        source=text.get("msgid", ""),
        plural=text.get("msgid_plural", ""),
        forms=tuple(form for _, form in forms) or (text.get("msgstr", ""),),
    )


def _unescaped(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        code = match[1]
        if code[0] in "01234567":
            return chr(int(code, 8) & 0xFF)
        return chr(int(code[1:], 16)) if len(code) == 3 else _ESCAPES.get(code, code)

    return _ESCAPED.sub(plain, text)
