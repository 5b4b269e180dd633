"""Frames of pixels with a line of words above them, as an animated GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError

__all__ = ["Frame", "check_film", "write_film"]

Frame = tuple[NDArray[np.uint8], str]  # pixels (height, width, 3), and the words above them

_CAPTION = 14  # pixels
_FRAME_MS = 350


def check_film(path: Path) -> None:
    """Raises ConfigError where a film could not be written, which is else known when all is done."""
    _pillow()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"a film is written to {path}, but {error}; name another file as task.film") from error


def write_film(path: Path, frames: Sequence[Frame]) -> None:
    """Raises ConfigError where Pillow is missing."""
    library, draw = _pillow()
    images = []
    for pixels, words in frames:
        height, width, _ = pixels.shape
        image = library.new("RGB", (width, height + _CAPTION), "white")
        image.paste(library.fromarray(pixels), (0, _CAPTION))
        draw.Draw(image).text((2, 1), words, fill="black")
        images.append(image.quantize(64))
    images[0].save(path, save_all=True, append_images=images[1:], duration=_FRAME_MS, loop=0, optimize=True)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ConfigError(
            "films are written by Pillow, which is not installed; run: pip install 'shardwise[vla]'"
        ) from error
    return Image, ImageDraw
