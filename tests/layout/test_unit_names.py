"""Short names stand for units, calls and ranges of them, or the error says what they could mean."""

from __future__ import annotations

import pytest

from shardwise.errors import LayoutError
from shardwise.layout import compress, expand

LLAMA = ("model.embed#0", *(f"model.layers.{i}#0" for i in range(12)), "model.norm#0", "head#0")
BART = ("shared#0", *(f"{side}.layers.{i}#0" for side in ("encoder", "decoder") for i in range(3)))
ALBERT = ("embed#0", *(f"group.layer#{i}" for i in range(4)), "head#0")


def test_neighbours_with_consecutive_numbers_are_written_as_a_range() -> None:
    units = [call.rpartition("#")[0] for call in LLAMA]
    assert compress(units) == ("model.embed", "model.layers.0-11", "model.norm", "head")
    assert compress(["l.0", "l.2", "l.3", "m.4"]) == ("l.0", "l.2-3", "m.4")
    assert compress(ALBERT[1:3]) == ("group.layer#0-1",)


@pytest.mark.parametrize(
    "text, calls, chosen",
    [
        ("head", LLAMA, ("head#0",)),
        ("model.layers.1", LLAMA, ("model.layers.1#0",)),  # not layers 10 and 11
        ("model.layers.9-11", LLAMA, LLAMA[10:13]),
        ("layers.0-1", LLAMA, LLAMA[1:3]),
        ("layers", LLAMA, LLAMA[1:13]),
        ("encoder", BART, BART[1:4]),
        ("group.layer", ALBERT, ALBERT[1:5]),
        ("group.layer#3", ALBERT, ALBERT[4:5]),
        ("layer#1-2", ALBERT, ALBERT[2:4]),
    ],
)
def test_a_name_stands_for(text, calls, chosen) -> None:
    assert expand(text, calls) == chosen


def test_what_compress_writes_expand_reads() -> None:
    for calls in (LLAMA, BART, ALBERT):
        assert [call for text in compress(calls) for call in expand(text, calls)] == list(calls)


@pytest.mark.parametrize(
    "text, calls, message",
    [
        ("layers.0", BART, "may be encoder.layers.0 or decoder.layers.0"),
        ("model.layer.3", LLAMA, "did you mean model.layers.3"),
        ("layers.11-12", LLAMA, "there is no 'layers.12'"),
        ("layers.3-1", LLAMA, "from low to high"),
        ("zzz", LLAMA, "there are model.embed, model.layers.0-11"),
    ],
)
def test_a_name_that_stands_for_nothing_or_two_things_is_refused(text, calls, message) -> None:
    with pytest.raises(LayoutError, match=message):
        expand(text, calls)
