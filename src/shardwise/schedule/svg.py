"""Draws timelines as one SVG picture: a row a rank, an axis in real units, several timelines on the same scale.

The picture holds all it needs, and follows the reader's light or dark page. It does not know how a timeline came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Transfer
from shardwise.schedule.svg_style import MEANINGS, NUM_SHADES, style_sheet
from shardwise.schedule.timeline import Span, Timeline

__all__ = ["Panel", "Unit", "to_svg"]

_ROW, _GAP = 22.0, 3.0  # height of a rank, and between two
_BESIDE = 4.0  # height of what runs beside the computing
_LEFT, _RIGHT = 58.0, 14.0  # for names of ranks, and so that the last number of the axis fits
_HEAD, _AXIS, _LEGEND = 26.0, 30.0, 28.0
_DIGIT = 6.6  # width of one
_BORDER = 0.8  # between two actions
_TICKS = 10  # about


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What the axis counts: `scale` of them are a second (or whatever the timeline is in)."""

    name: str
    scale: float = 1.0

    @classmethod
    def of_seconds(cls, longest_s: float) -> Unit:
        """Seconds, milliseconds or microseconds, whichever has readable numbers."""
        if longest_s >= 2:
            return cls(name="s")
        return cls(name="ms", scale=1e3) if longest_s >= 2e-3 else cls(name="µs", scale=1e6)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One timeline of a picture, under a title."""

    title: str
    timeline: Timeline


def to_svg(
    shown: Timeline | Sequence[Panel], *, title: str = "", unit: Unit | None = None, width: float = 960.0
) -> str:
    """The text of an SVG file. Panels stand below each other, their rows on one scale of time.

    An action is a box in the hue of its kind, the shade of its stage among those of its rank, and the number of its
    micro-batch where it fits; a transfer that takes time is a line between two rows. The title of a panel is followed
    by its seconds and bubble. Raises ScheduleError if there is nothing to draw, or `width` leaves no room for it.
    """
    panels = [Panel(title=title, timeline=shown)] if isinstance(shown, Timeline) else list(shown)
    if not panels or width < _LEFT + _RIGHT + 50:
        raise ScheduleError(
            f"a picture shows 1 or more timelines in {_LEFT + _RIGHT + 50:.0f} or more pixels, but got {len(panels)} "
            f"and width={width:g}; give both"
        )
    longest = max(panel.timeline.seconds for panel in panels)
    unit = unit or Unit.of_seconds(longest)
    scale = (width - _LEFT - _RIGHT) / longest if longest else 0.0
    known = {(kind, shade) for panel in panels for kind, shade in _classes(panel.timeline).values()}
    parts, top = [], 4.0
    for panel in panels:
        drawn, top = _panel(panel, top, scale, unit)
        parts += drawn
    parts += _axis(top, scale, longest, unit)
    top += _AXIS
    parts += _legend(known, top)
    height = top + _LEGEND
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img">',
            f"<title>{escape('; '.join(_heading(panel, unit) for panel in panels))}</title>",
            f"<style>{style_sheet(known)}</style>",
            f'<rect class="p" width="{width:g}" height="{height:g}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _classes(timeline: Timeline) -> dict[tuple[str, int], tuple[str, int]]:
    """(kind, stage) -> (kind, shade): a stage's shade is its number among those of its rank."""
    stages: list[set[int]] = [set() for _ in range(timeline.num_ranks)]
    kinds = set()
    for span in timeline.spans:
        if not isinstance(span.action, Transfer) and span.action.kind.value in MEANINGS:
            stages[span.rank].add(span.action.stage)
            kinds.add((span.action.kind.value, span.action.stage))
    shade = {s: chunk % NUM_SHADES for owned in stages for chunk, s in enumerate(sorted(owned))}
    return {(kind, s): (kind, shade[s]) for kind, s in kinds}


def _heading(panel: Panel, unit: Unit) -> str:
    timeline = panel.timeline
    length = f"{_number(timeline.seconds * unit.scale)} {unit.name}".rstrip()
    figures = f"{length}, bubble {100 * timeline.bubble_fraction:.1f} %"
    return f"{panel.title}: {figures}" if panel.title else figures


def _panel(panel: Panel, top: float, scale: float, unit: Unit) -> tuple[list[str], float]:
    """The drawn panel and where it ends."""
    timeline = panel.timeline
    width = timeline.seconds * scale
    parts = [f'<text class="t h" x="8" y="{top + 16:g}">{escape(_heading(panel, unit))}</text>']
    top += _HEAD
    tops = [top + rank * (_ROW + _GAP) for rank in range(timeline.num_ranks)]
    for rank, row in enumerate(tops):
        parts.append(f'<text class="l e" x="{_LEFT - 8:g}" y="{row + 15:g}">rank {rank}</text>')
        parts.append(f'<rect class="i" x="{_LEFT:g}" y="{row:g}" width="{_short(width)}" height="{_ROW:g}"/>')
    parts += _boxes(timeline, tops, scale)
    parts += _lines(timeline, tops, scale)
    return parts, top + timeline.num_ranks * (_ROW + _GAP) + 4.0


def _boxes(timeline: Timeline, tops: Sequence[float], scale: float) -> list[str]:
    classes = _classes(timeline)
    low = _BESIDE if any(not _computes(span) and span.end_s > span.start_s for span in timeline.spans) else 0.0
    boxes, numbers = [], []
    for span in timeline.spans:
        if isinstance(span.action, Transfer):
            continue
        kind, shade = classes.get((span.action.kind.value, span.action.stage), ("", 0))
        x, width = _LEFT + (span.start_s - timeline.start_s) * scale, (span.end_s - span.start_s) * scale
        if not kind or width <= 0:
            continue
        y, height, computes = tops[span.rank], _ROW - low, _computes(span)
        if not computes:
            y, height = y + _ROW - _BESIDE, _BESIDE
        boxes.append(
            f'<rect class="{kind.lower()}{shade}" x="{_short(x)}" y="{y:g}" '
            f'width="{_short(max(width - _BORDER, width / 2))}" height="{height:g}"/>'
        )
        text = str(span.action.micro_batch) if isinstance(span.action, Action) else ""
        if computes and width >= _DIGIT * len(text) + 3:
            numbers.append(
                f'<text class="m n{shade}" x="{_short(x + width / 2)}" y="{y + 15 - low / 2:g}">{text}</text>'
            )
    return boxes + numbers


def _computes(span: Span) -> bool:
    """Whether the rank is busy with it; transfers, which have lines of their own, count as computing here."""
    if isinstance(span.action, Action):
        return span.action.kind.computes
    return isinstance(span.action, Transfer)


def _lines(timeline: Timeline, tops: Sequence[float], scale: float) -> list[str]:
    """Transfers that take time, from the row of the sender to that of the receiver."""
    owner = {span.action.stage: span.rank for span in timeline.spans if not isinstance(span.action, Transfer)}
    lines = []
    for span in timeline.spans:
        if isinstance(span.action, Transfer) and span.end_s > span.start_s and span.action.target in owner:
            there = tops[owner[span.action.target]]
            here = tops[span.rank]
            start, end = ((_LEFT + (s - timeline.start_s) * scale) for s in (span.start_s, span.end_s))
            down = there > here
            lines.append(f"M{_short(start)} {here + _ROW * down:g}L{_short(end)} {there + _ROW * (not down):g}")
    return [f'<path class="v" d="{"".join(lines)}"/>'] if lines else []


def _axis(top: float, scale: float, longest: float, unit: Unit) -> list[str]:
    length = longest * unit.scale
    step = _nice(length / _TICKS) if length else 1.0
    at = [index * step for index in range(math.floor(length / step + 1e-9) + 1)] if length else [0.0]
    places = [_LEFT + value / unit.scale * scale for value in at]
    end = _LEFT + longest * scale
    marks = "".join(f"M{_short(x)} {top:g}v5" for x in places)
    parts = [f'<path class="a" d="M{_LEFT:g} {top:g}H{_short(end)}{marks}"/>']
    parts += [
        f'<text class="l m" x="{_short(x)}" y="{top + 17:g}">{_number(value)}</text>'
        for x, value in zip(places, at, strict=True)
    ]
    return [*parts, f'<text class="l e" x="{_LEFT - 14:g}" y="{top + 17:g}">{escape(unit.name)}</text>']


def _legend(known: set[tuple[str, int]], top: float) -> list[str]:
    parts, x = [], _LEFT
    num_shades = 1 + max((shade for _, shade in known), default=0)
    for kind in [kind for kind in MEANINGS if any(kind == each for each, _ in known)]:
        for shade in sorted(shade for each, shade in known if each == kind):
            parts.append(f'<rect class="{kind.lower()}{shade}" x="{x:g}" y="{top + 2:g}" width="12" height="12"/>')
            x += 14
        parts.append(f'<text class="l" x="{x + 3:g}" y="{top + 12:g}">{MEANINGS[kind]}</text>')
        x += 3 + 5.9 * len(MEANINGS[kind]) + 16
    if num_shades > 1:
        stages = "first, second, third, fourth".split(", ")[:num_shades]
        parts.append(f'<text class="l" x="{x:g}" y="{top + 12:g}">shades: {", ".join(stages)} stage of the rank</text>')
    return parts


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _number(value: float) -> str:
    """Three digits at least, and no more than tell something."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 100 else f"{value:.3g}"


def _short(pixels: float) -> str:
    return f"{pixels:.2f}".rstrip("0").rstrip(".")
