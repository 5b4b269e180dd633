"""Scaling as one SVG picture: samples a second over devices, strong and weak, beside what would be ideal.

Both axes are logarithmic, so that ideal is a straight line. Follows the reader's light or dark page. Knows points only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from shardwise.errors import ConfigError
from shardwise.plan.what_if import Point, Scaling
from shardwise.schedule.svg_style import style_sheet

__all__ = ["scaling_svg"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 96.0, 34.0, 40.0
_FEW = 4  # powers of ten
_SHADES = (("f0", "F", 0), ("w0", "W", 0))


def scaling_svg(scalings: Sequence[Scaling], *, title: str = "", width: float = 720.0, height: float = 380.0) -> str:
    """The text of an SVG file. Raises `ConfigError` where no point has a layout."""
    points = [point for scaling in scalings for point in scaling.points if point.best is not None]
    if not points:
        raise ConfigError("a picture of scaling shows at least one layout, but none was found; use more devices")
    across = _scale([point.devices for point in points], _LEFT, width - _RIGHT)
    up = _scale([point.samples_per_s for point in points], height - _BOTTOM, _TOP)
    parts = [f'<text class="t h" x="8" y="18">{escape(title or "samples a second over devices")}</text>']
    for value in _ticks([point.devices for point in points], base=2):
        x = across(value)
        parts.append(f'<line class="a" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text class="l m" x="{x:.1f}" y="{height - _BOTTOM + 16}">{value:g}</text>')
    for value in _ticks([point.samples_per_s for point in points], base=10):
        y = up(value)
        parts.append(f'<line class="a" x1="{_LEFT}" y1="{y:.1f}" x2="{width - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="l e" x="{_LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>')
    parts.append(f'<text class="l m" x="{(_LEFT + width - _RIGHT) / 2}" y="{height - 8}">devices</text>')
    for (shade, _, _), scaling in zip(_SHADES, scalings, strict=False):
        parts += _line(scaling, shade, across, up)
    sheet = style_sheet([(kind, number) for _, kind, number in _SHADES])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img">',
            f"<title>{escape(title or 'scaling')}</title>",
            f"<style>{sheet}</style>",
            f'<rect class="p" width="{width:g}" height="{height:g}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


class _Axis:
    """A number -> where it stands, logarithmically."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = math.log(low), start
        self.step = (end - start) / (math.log(high) - math.log(low)) if high > low else 0.0

    def __call__(self, value: float) -> float:
        return self.start + (math.log(value) - self.low) * self.step


def _scale(values: Sequence[float], start: float, end: float) -> _Axis:
    return _Axis(min(values), max(values), start, end)


def _ticks(values: Sequence[float], *, base: int) -> list[float]:
    """Powers of the base within the values, of ten twice and five times these where they are few; both ends where there
    are fewer than two."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log(low, base) + 1e-9), math.floor(math.log(high, base) + 1e-9)
    powers = [float(base) ** n for n in range(first, last + 1)]
    between = (1, 2, 5) if base == 10 and len(powers) < _FEW else (1,)
    ticks = [power * times for power in powers for times in between]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    return ticks if len(ticks) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})


def _line(scaling: Scaling, shade: str, across: _Axis, up: _Axis) -> list[str]:
    """The points of one kind, joined; what is ideal from the first of them, dashed."""
    points = [point for point in scaling.points if point.best is not None]
    if not points:
        return []
    first, last = points[0], points[-1]
    ideal = first.samples_per_s * last.devices / first.devices
    drawn = [
        f'<line class="v" stroke-dasharray="4 4" x1="{across(first.devices):.1f}" y1="{up(first.samples_per_s):.1f}" '
        f'x2="{across(last.devices):.1f}" y2="{max(_TOP, up(ideal)):.1f}"/>'
    ]
    where = [(across(point.devices), up(point.samples_per_s)) for point in points]
    for (x1, y1), (x2, y2) in itertools.pairwise(where):
        drawn.append(f'<line class="v" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for (x, y), point in zip(where, points, strict=True):
        drawn.append(f'<circle class="{shade}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_told(point)}</title></circle>')
    x, y = where[-1]
    drawn.append(f'<text class="t" x="{x + 8:.1f}" y="{y + 4:.1f}">{escape(scaling.kind)}</text>')
    return drawn


def _told(point: Point) -> str:
    assert point.best is not None
    return escape(f"{point.devices} devices: {point.samples_per_s:.4g} samples/s, {point.best.layout}")
