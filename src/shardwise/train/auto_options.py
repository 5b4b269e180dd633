"""The table [auto] of a run file: what `layout = "auto"` measures before it stays with a layout."""

from __future__ import annotations

from pydantic import Field

from shardwise.train.run_tables import Table

__all__ = ["AutoOptions"]


class AutoOptions(Table):
    """[auto]: how `layout = "auto"` is decided. Measured steps are steps of the training like all others.

    measure   layouts that the run measures on its way, the best by prediction first; 0 or 1: it trusts the prediction
    steps     of each that are measured, behind two that warm up
    within    share by which a layout may be predicted behind the best one and still be measured: the error that
              predictions have on this machine
    """

    measure: int = Field(default=0, ge=0)
    steps: int = Field(default=4, ge=1)
    within: float = Field(default=0.25, ge=0, allow_inf_nan=False)
