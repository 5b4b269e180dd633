"""Run files whose layout is "auto": read on one device while the best layout is still to be found, or on one that was.

Knows run files; searches nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.layout import Layout
from shardwise.train.run_file import Run, load_run, run_from

__all__ = ["AUTO", "Written", "is_auto", "run_on_one_device", "run_with_layout"]

AUTO = "auto"
Written = Mapping[str, Any] | str | Path
_SAMPLES = 2  # of the micro-batch that is traced


def is_auto(written: Written, overrides: Sequence[str] = ()) -> bool:
    """Whether the layout of a run file, or of a mapping like one, is "auto" after its overrides. Raises ConfigError
    where it cannot be read."""
    told = [text.partition("=")[2].strip().strip("\"'") for text in overrides if _sets_layout(text)]
    if told:
        return told[-1] == AUTO
    if isinstance(written, Mapping):
        return bool(written.get("layout") == AUTO)
    text = read_text(written, what="a run file", repair="correct the path")
    try:
        return tomllib.loads(text).get("layout") == AUTO
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"a run file is TOML, but {written} is not: {error}; correct that place") from error


def run_on_one_device(written: Written, overrides: Sequence[str] = ()) -> Run:
    """The run with a layout of one device, in micro-batches of a few samples, whatever layout it asks for. Raises as
    `load_run` does."""
    others = [text for text in overrides if not _sets_layout(text)]
    training = run_with_layout(written, others, Layout()).training
    if training.accumulate is not None:
        raise ConfigError(
            f"a search chooses micro-batches, but accumulate = {training.accumulate}; drop it, or write a layout"
        )
    return run_with_layout(written, others, Layout(micro_batches=max(1, training.global_batch // _SAMPLES)))


def run_with_layout(written: Written, overrides: Sequence[str], layout: Layout) -> Run:
    """The run on a layout, in place of its own. Raises as `load_run` does."""
    others = [text for text in overrides if not _sets_layout(text)]
    if isinstance(written, Mapping):
        return run_from({**written, "layout": layout}, others)
    return load_run(written, others, layout=layout)


def _sets_layout(text: str) -> bool:
    name = text.partition("=")[0].strip()
    return name == "layout" or name.startswith("layout.")
