"""Run files whose layout is "auto": read with a layout for one device, while the best one is still to be found.

Knows run files; searches nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.train.run_file import Run, load_run

__all__ = ["AUTO", "is_auto", "run_on_one_device"]

AUTO = "auto"
_SAMPLES = 2  # of the micro-batch that is traced


def is_auto(path: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Whether the layout of a run file, after its overrides, is "auto". Raises ConfigError where it cannot be read."""
    told = [text.partition("=")[2].strip().strip("\"'") for text in overrides if _sets_layout(text)]
    if told:
        return told[-1] == AUTO
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8")).get("layout") == AUTO
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a run file is readable TOML, but {path} is not: {error}; correct it") from error


def run_on_one_device(path: str, overrides: Sequence[str]) -> Run:
    """The run with a layout of one device, in micro-batches of a few samples, whatever layout it asks for. Raises as
    `load_run` does."""
    others = [text for text in overrides if not _sets_layout(text)]
    batch = load_run(path, [*others, "layout=pp=1"]).training.global_batch
    return load_run(path, [*others, f"layout=pp=1,micro_batches={max(1, batch // _SAMPLES)}"])


def _sets_layout(text: str) -> bool:
    name = text.partition("=")[0].strip()
    return name == "layout" or name.startswith("layout.")
