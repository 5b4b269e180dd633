"""Bytes, flops, seconds and counts: read from text, print for people.

Values inside shardwise are plain numbers in base units (bytes, flops, seconds); this file knows how they look
at the edge, in run files and reports. It knows nothing of what is measured.

    512 MiB = 512 · 2**20 bytes      512 MB = 512 · 10**6 bytes      2 h 05 min = 7500 s

`format_…` rounds for reading; `exact_…` writes what is read back as the same number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType

from shardwise.errors import ConfigError

__all__ = [
    "exact_bytes",
    "exact_flops",
    "exact_rate",
    "exact_seconds",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_flops",
    "format_rate",
    "format_seconds",
    "parse_bytes",
    "parse_count",
    "parse_flops",
    "parse_rate",
    "parse_seconds",
]

_NUMBER = r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"\s*({_NUMBER})\s*([A-Za-zµ]*)\s*")

_BINARY = MappingProxyType({"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50})
_DECIMAL = MappingProxyType({"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18})
_COUNTS = MappingProxyType({"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12})
_SECONDS = MappingProxyType(
    {"": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60, "m": 60, "h": 3600, "d": 86400}
)
_BYTE_UNITS: Mapping[str, float] = MappingProxyType(
    {
        "": 1,
        **{f"{prefix}B": factor for prefix, factor in _BINARY.items()},
        **{f"{prefix}B": factor for prefix, factor in _DECIMAL.items()},
        "KB": 1e3,
    }
)
_FLOP_UNITS: Mapping[str, float] = MappingProxyType(
    {
        f"{prefix}{unit}": factor
        for prefix, factor in _DECIMAL.items()
        for unit in ("", "flop", "flops", "FLOP", "FLOPs")
    }
)


def _parse(text: str | float, units: Mapping[str, float], what: str) -> float:
    """One number with one unit; a bare number is in base units."""
    if isinstance(text, int | float):
        return _checked(float(text), text, what)
    match = _TERM.fullmatch(text)
    if match is None or match[2] not in units:
        raise ConfigError(_unreadable(text, units, what))
    try:  # in decimals: 5 us is the float 5e-6, as 5 * 1e-6 is not
        value = float(Decimal(match[1].replace("_", "")) * Decimal(str(units[match[2]])))
    except ArithmeticError:
        value = math.inf
    return _checked(value, text, what)


def _checked(value: float, text: str | float, what: str) -> float:
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{what} must be finite and not negative, not {text!r}; write a number ≥ 0")
    return value


def _unreadable(text: str, units: Mapping[str, float], what: str) -> str:
    known = ", ".join(unit for unit in units if unit)
    return f"{text!r} is not a {what}; write a number and one of the units {known}"


def parse_bytes(text: str | float) -> int:
    """`"1.5 GiB"`, `"80 GB"`, `4096` -> bytes. KiB, MiB … are powers of 1024; kB, MB … powers of 1000."""
    return round(_parse(text, _BYTE_UNITS, "number of bytes"))


def parse_flops(text: str | float) -> float:
    """`"312 Tflops"`, `"6.7e9"` -> flops (or flops per second; the caller knows which)."""
    value = text.removesuffix("/s") if isinstance(text, str) else text
    return _parse(value, _FLOP_UNITS, "number of flops")


def parse_rate(text: str | float, unit: str = "B") -> float:
    """`"3.35 TB/s"` or, with `unit="flops"`, `"989 Tflops/s"` -> so many a second; a bare number is in base units."""
    if isinstance(text, str) and not text.rstrip().endswith("/s"):
        if not re.fullmatch(rf"\s*{_NUMBER}\s*", text):
            raise ConfigError(f'{text!r} is not a rate; write one such as "3.2 G{unit}/s"')
        text = float(text)
    amount = text.rstrip().removesuffix("/s") if isinstance(text, str) else text
    return _parse(amount, _FLOP_UNITS if unit == "flops" else _BYTE_UNITS, f"rate of {unit} a second")


def parse_count(text: str | float) -> int:
    """`"1.3 B"`, `"125M"`, `1000` -> a count. B is 10**9, as in the names of models."""
    return round(_parse(text, _COUNTS, "count"))


def parse_seconds(text: str | float) -> float:
    """`"30"`, `"250 ms"`, `"2 h 5 min"`, `"1h30m"` -> seconds."""
    if isinstance(text, int | float):
        return _checked(float(text), text, "duration")
    terms = _TERM.findall(text)
    whole = "".join(number + unit for number, unit in terms) == re.sub(r"\s+", "", text)
    if not terms or not whole or (len(terms) > 1 and any(unit == "" for _, unit in terms)):
        raise ConfigError(_unreadable(text, _SECONDS, "duration"))
    return sum(_parse(number + unit, _SECONDS, "duration") for number, unit in terms)


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """Three significant digits and the largest prefix that keeps the number at least 1: 1 k, 23.4 M, 999."""
    magnitude = abs(value)
    chosen, factor = "", 1.0
    for prefix, candidate in units.items():
        # a number that would round up to the next prefix is already printed with it: 999 999 is 1 M
        if magnitude >= candidate * (1 - 5e-4 if candidate > 1 else 1):
            chosen, factor = prefix, float(candidate)
    scaled = value / factor
    if factor == 1.0 and float(scaled).is_integer():
        return f"{int(scaled)} "
    digits = max(0, 2 - math.floor(math.log10(abs(scaled)))) if scaled else 0
    number = f"{scaled:.{min(digits, 2)}f}"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {chosen}"


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `"1.5 KiB"`: powers of 1024, as memory is sold."""
    return f"{_scaled(num_bytes, _BINARY)}B"


def format_flops(flops: float) -> str:
    """`3.12e14` -> `"312 Tflops"`."""
    return f"{_scaled(flops, _DECIMAL)}flops"


def format_rate(amount_per_second: float, unit: str = "B") -> str:
    """`2.5e10` -> `"25 GB/s"`: powers of 1000, as links are sold."""
    return f"{_scaled(amount_per_second, _DECIMAL)}{unit}/s"


def format_count(count: float, noun: str = "") -> str:
    """`1_300_000_000, "parameters"` -> `"1.3 B parameters"`."""
    scales = {prefix: factor for prefix, factor in _COUNTS.items() if prefix != "K"}
    return f"{_scaled(count, scales).strip()} {noun}".rstrip()


def format_seconds(seconds: float) -> str:
    """A measured time in the unit that reads best: `0.00123` -> `"1.23 ms"`; 100 s and more as a duration."""
    if abs(seconds) >= 100:
        return format_duration(seconds)
    if seconds == 0:
        return "0 s"
    scales = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
    scale, unit = next((pair for pair in scales if abs(seconds) >= pair[0] * 0.9995), scales[-1])
    return f"{float(f'{seconds / scale:.3g}'):g} {unit}"


def format_duration(seconds: float) -> str:
    """How long a person waits: `7500` -> `"2 h 05 min"`, `95` -> `"1 min 35 s"`, `12.4` -> `"12 s"`."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"


def _exact(value: float, units: Mapping[str, float]) -> str:
    """The shortest of the texts that are exactly `value`, in one of `units`; of two as short, in the larger one."""
    number = Decimal(str(value))
    found = []
    for unit, factor in units.items():
        scaled = number / Decimal(str(factor))
        if scaled * Decimal(str(factor)) == number and (abs(scaled) >= 1 or factor == min(units.values())):
            found.append((len(text := f"{scaled.normalize():f}"), -factor, f"{text} {unit}"))
    return min(found)[2] if number else f"0 {next(unit for unit, factor in units.items() if factor == 1)}"


def exact_bytes(num_bytes: float) -> str:
    """`80_000_000_000` -> `"80 GB"`, `2**34` -> `"16 GiB"`: `parse_bytes` gives the same number."""
    return _exact(num_bytes, {f"{prefix}B": factor for prefix, factor in {**_DECIMAL, **_BINARY}.items()})


def exact_seconds(seconds: float) -> str:
    """`5e-6` -> `"5 us"`: `parse_seconds` gives the same number."""
    return _exact(seconds, {unit: _SECONDS[unit] for unit in ("s", "ms", "us", "ns")})


def exact_flops(flops: float) -> str:
    """`2e9` -> `"2 Gflops"`: `parse_flops` gives the same number."""
    return _exact(flops, {f"{prefix}flops": factor for prefix, factor in _DECIMAL.items()})


def exact_rate(amount_per_second: float, unit: str = "B") -> str:
    """`3.35e12` -> `"3.35 TB/s"`: `parse_rate` gives the same number."""
    return f"{_exact(amount_per_second, {f'{prefix}{unit}': factor for prefix, factor in _DECIMAL.items()})}/s"
