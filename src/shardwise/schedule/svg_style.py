"""Colours and sizes of drawn timelines: a hue for what is computed, a shade for which stage of a rank, light and dark.

The hues are those of Okabe and Ito (2008), which people with any colour vision tell apart. Knows no timeline.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

__all__ = ["MEANINGS", "NUM_SHADES", "style_sheet"]

NUM_SHADES = 4  # of the first stages of a rank; further ones begin anew

# kinds in the order of the legend
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "F": "forward",
        "C": "forward again",
        "B": "backward",
        "I": "input gradient",
        "W": "weight gradient",
        "G": "sum of gradients",
        "U": "gathering of parameters",
        "H": "release of parameters",
        "O": "offload",
        "L": "load",
    }
)
_HUES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "F": (0, 102, 170),
        "C": (70, 70, 200),
        "B": (0, 138, 100),
        "I": (190, 95, 0),
        "W": (160, 70, 130),
        "G": (90, 90, 90),
        "U": (90, 140, 0),
        "H": (140, 170, 90),
        "O": (200, 40, 60),
        "L": (210, 100, 130),
    }
)
_WHITENED = (0.0, 0.58, 0.3, 0.75)  # of each shade: how far towards white
_DARK_TEXT_ABOVE = 0.5  # a shade that is whiter than this is written on in black

_LIGHT = {"text": "#1b1f24", "faint": "#59636e", "idle": "#f0f2f4", "line": "#c9d0d8", "page": "#ffffff"}
_DARK = {"text": "#e6edf3", "faint": "#9aa4af", "idle": "#1c2128", "line": "#3d444d", "page": "#0d1117"}


def style_sheet(shown: Collection[tuple[str, int]]) -> str:
    """CSS for actions of class "f0" (kind F, shade 0) and their numbers "n0", for a light and for a dark page."""
    fills = [f".{kind.lower()}{shade}{{fill:{_mixed(_HUES[kind], _WHITENED[shade])}}}" for kind, shade in sorted(shown)]
    numbers = [
        f".n{shade}{{fill:{'#10151b' if _WHITENED[shade] > _DARK_TEXT_ABOVE else '#ffffff'}}}"
        for shade in sorted({shade for _, shade in shown})
    ]
    return "".join(
        [
            "text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:11px}",
            ".h{font-size:13px;font-weight:600}.m{text-anchor:middle;font-variant-numeric:tabular-nums}",
            ".e{text-anchor:end}",
            _page(_LIGHT),
            *fills,
            *numbers,
            f"@media(prefers-color-scheme:dark){{{_page(_DARK)}}}",
        ]
    )


def _page(colours: Mapping[str, str]) -> str:
    return (
        f".t{{fill:{colours['text']}}}.l{{fill:{colours['faint']}}}.i{{fill:{colours['idle']}}}"
        f".a{{stroke:{colours['line']};fill:none}}.v{{stroke:{colours['faint']};fill:none;opacity:.55}}"
        f".p{{fill:{colours['page']}}}"
    )


def _mixed(colour: tuple[int, int, int], white: float) -> str:
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in colour)
