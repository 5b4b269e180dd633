"""Curves as SVG: loss over steps of several contenders, with a legend. Knows numbers; refuses to know their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

__all__ = ["Points", "curves_svg"]

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 16, 44
_COLOURS = ("#24292f", "#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a")
_STYLE = (
    "text{font:12px ui-sans-serif,system-ui,sans-serif;fill:#57606a}"
    "line{stroke:#d0d7de}polyline{fill:none;stroke-width:1.6}rect.page{fill:#fff}"
)


def curves_svg(curves: Mapping[str, Points], *, x: str, y: str, title: str) -> str:
    """One line a name, in the order given; `x` and `y` say what the axes are, `title` what a reader is told."""
    points = [point for each in curves.values() for point in each]
    low, high = min(value for _, value in points), max(value for _, value in points)
    last = max(place for place, _ in points)

    def at(place: float, value: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * place / last
        down = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low or 1.0)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}"/>',
    ]
    for value in _ticks(low, high, 6):
        _, down = at(0, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down + 4}" text-anchor="end">{value:g}</text>')
    for place in _ticks(0, last, 8):
        across, _ = at(place, low)
        parts.append(f'<text x="{across}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{place:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP + 2}" dx="6">{escape(y)}</text>')
    for number, (name, of_name) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{across},{down}" for across, down in (at(*point) for point in of_name))
        parts.append(f'<polyline points="{line}" stroke="{colour}"/>')
        down = _TOP + 18 * (number + 1)
        parts.append(f'<line x1="{_WIDTH - 250}" x2="{_WIDTH - 226}" y1="{down}" y2="{down}" style="stroke:{colour}"/>')
        parts.append(f'<text x="{_WIDTH - 218}" y="{down + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most so many."""
    size = 10.0**-6
    while True:
        for factor in (1, 2, 5):
            step = size * factor
            first = -(-low // step)
            if high // step - first < most:
                return [round((first + i) * step, 6) for i in range(int(high // step - first) + 1)]
        size *= 10
