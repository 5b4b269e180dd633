"""Quantities are read from what people write and printed as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise import quantities as q
from shardwise.errors import ConfigError


@pytest.mark.parametrize(
    "text, num_bytes",
    [("0", 0), ("4096", 4096), (4096, 4096), ("1.5 GiB", 3 * 2**29), ("80GB", 80 * 10**9), ("64 kB", 64000)]
    + [("64 KB", 64000), ("1_000 B", 1000), ("2e3B", 2000), (".5 MiB", 2**19)],
)
def test_bytes_are_read_in_powers_of_1024_and_of_1000(text: str | int, num_bytes: int) -> None:
    assert q.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4 gib", "4 GiB 2 MiB", "four", "1.2.3 B", "-1 MiB", "1e999 B", "4 Gb"])
def test_what_is_not_a_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        q.parse_bytes(text)


def test_the_refusal_lists_the_units() -> None:
    with pytest.raises(ConfigError, match=r"'4 gigs' is not a number of bytes; .*GiB.*GB"):
        q.parse_bytes("4 gigs")


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("30", 30),
        (0.5, 0.5),
        ("250 ms", 0.25),
        ("2 h 5 min", 7500),
        ("1h30m", 5400),
        ("3 µs", 3e-6),
        ("1 d", 86400),
    ],
)
def test_durations_are_read_in_one_unit_or_several(text: str | float, seconds: float) -> None:
    assert q.parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5 weeks", "1 h 30", "h", "1 h, 2 min", "- 3 s"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        q.parse_seconds(text)


def test_flops_and_counts_are_read() -> None:
    assert q.parse_flops("312 Tflops") == q.parse_flops("312 TFLOPs/s") == q.parse_flops(312e12) == 312e12
    assert q.parse_count("1.3 B") == q.parse_count("1300M") == 1_300_000_000


@pytest.mark.parametrize(
    "num_bytes, text",
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (123456, "121 KiB"), (80e9, "74.5 GiB")]
    + [(2**20 - 1, "1 MiB")],
)
def test_bytes_are_printed_with_three_digits(num_bytes: float, text: str) -> None:
    assert q.format_bytes(num_bytes) == text


def test_flops_rates_and_counts_are_printed() -> None:
    assert q.format_flops(3.12e14) == "312 Tflops"
    assert q.format_rate(2.5e10) == "25 GB/s"
    assert q.format_count(1.3e9, "parameters") == "1.3 B parameters"
    assert q.format_count(999_999) == "1 M"
    assert q.format_count(12) == "12"


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (3e-8, "30 ns"), (0.00123, "1.23 ms"), (0.9999, "1 s"), (95, "95 s"), (7500, "2 h 05 min")],
)
def test_measured_seconds_are_printed_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert q.format_seconds(seconds) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(12.4, "12 s"), (95, "1 min 35 s"), (59.7, "1 min 00 s"), (7500, "2 h 05 min"), (1e5, "1 d 03 h")],
)
def test_waiting_times_are_printed_for_people(seconds: float, text: str) -> None:
    assert q.format_duration(seconds) == text


@given(st.integers(min_value=0, max_value=2**59))
def test_printed_bytes_are_read_back_within_half_a_percent(num_bytes: int) -> None:
    assert q.parse_bytes(q.format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=5.1e-3)


@given(st.floats(min_value=1e-9, max_value=99))
def test_printed_seconds_are_read_back_within_half_a_percent(seconds: float) -> None:
    assert q.parse_seconds(q.format_seconds(seconds)) == pytest.approx(seconds, rel=5.1e-3)


def test_rates_are_read_with_what_they_count() -> None:
    assert q.parse_rate("3.35 TB/s") == 3.35e12
    assert q.parse_rate("989 Tflops/s", "flops") == 989e12
    assert q.parse_rate("12") == q.parse_rate(12) == 12.0


@pytest.mark.parametrize("text, unit", [("31 GB", "B"), ("31 Gflops/s", "B"), ("31 GB/s", "flops"), ("/s", "B")])
def test_what_is_no_rate_is_refused(text: str, unit: str) -> None:
    with pytest.raises(ConfigError, match="rate"):
        q.parse_rate(text, unit)


@pytest.mark.parametrize(
    "written, text",
    [
        (q.exact_bytes(80_000_000_000), "80 GB"),
        (q.exact_bytes(2**34), "16 GiB"),
        (q.exact_bytes(0), "0 B"),
        (q.exact_seconds(5e-6), "5 us"),
        (q.exact_seconds(1.5), "1.5 s"),
        (q.exact_seconds(1e-12), "0.001 ns"),
        (q.exact_rate(3.35e12), "3.35 TB/s"),
        (q.exact_rate(9.89e14, "flops"), "989 Tflops/s"),
        (q.exact_flops(2.5e9), "2.5 Gflops"),
    ],
)
def test_exact_text_is_short_where_it_can_be(written: str, text: str) -> None:
    assert written == text


@given(st.floats(0, 1e20))
def test_exact_text_is_read_as_the_same_number(value: float) -> None:
    assert q.parse_seconds(q.exact_seconds(value)) == value
    assert q.parse_flops(q.exact_flops(value)) == value
    assert q.parse_rate(q.exact_rate(value)) == value
    assert q.parse_bytes(q.exact_bytes(round(value))) == round(value)
