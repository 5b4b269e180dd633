"""Options that several verbs share, and the layout in an option. Knows typer; starts nothing."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Overrides", "RunFile"]

RunFile = Annotated[str, typer.Argument(metavar="RUN.toml", help="The run, as examples/demo.toml is one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the run, as training.steps=50. Repeatable."),
]
